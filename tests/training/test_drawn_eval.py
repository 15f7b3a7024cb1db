"""What evaluations say of drawn images equals what is measured afterwards."""

import json

import jax
import numpy as np
import pytest
import tiny_models
from PIL import Image

import var_jax
from configs import var as var_presets
from var_jax.evaluation import classifier, made_sets, measure, networks
from var_jax.parallel import mesh as mesh_lib
from var_jax.training import loop

COUNT, HELD_OUT = 20, 50


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  folder = tmp_path_factory.mktemp("drawn")
  tiny_models.write_var(folder / "tokenizer", (1, 4, 8))
  real = made_sets.OfDataset("digits", "train", (16, 16), "resize")
  classifier.write(folder / "classifier", *real.labelled(), "digits")
  return folder


def config_of(folder, **settings):
  config = var_presets.get_config("tiny")
  config.steps, config.data.batch_size = 2, 8
  config.tokenizer_path = str(folder / "tokenizer")
  config.eval_every, config.eval_samples, config.pictures = 1, HELD_OUT, 0
  config.draws.count = COUNT
  config.draws.network = str(folder / "classifier")
  config.update_from_flattened_dict(settings)
  return config


def parts(network, batches):
  mesh = mesh_lib.make_mesh(devices=jax.devices()[:1])
  found = networks.extract(network, batches, 25, mesh)
  return [features.present() for _, features in found]


def test_evaluations_measure_what_is_drawn(folder, tmp_path):
  loop.train(config_of(folder, **{"draws.guidance": 2.0}), tmp_path / "run")
  lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
  records = [r for r in map(json.loads, lines) if "eval/loss_mean" in r]
  assert [r["step"] for r in records] == [1, 2]
  network = networks.open_classifier(folder / "classifier")
  from var_jax.data import sources, transforms

  source = sources.open_source("digits", "val")
  small = transforms.make_transform("resize", (16, 16), train=False, flip=False)
  real = np.stack([small(source[i]["image"], None) for i in range(HELD_OUT)])
  there = parts(network, [real[:25], real[25:]])
  reference = measure.as_reference(there, HELD_OUT)
  how = dict(guidance=2.0, top_k=900, top_p=0.96)
  model = var_jax.load(tmp_path / "run")
  drawn = made_sets.Drawn(model, COUNT, 0, **how)
  looks = measure.gather(parts(network, drawn.batches(20)))
  numbers = measure.compare(looks, reference, network.names)
  for name in ("classifier_distance", "classifier_score"):
    found = records[-1][f"eval/{name}_{COUNT}"]
    assert found == pytest.approx(numbers[name], rel=2e-3)
  first, second = (r[f"eval/classifier_distance_{COUNT}"] for r in records)
  assert first != second


def test_numbers_of_other_weights_have_another_name(
  folder, tmp_path, monkeypatch
):
  opened = networks.open_either(folder / "classifier")
  other = opened._replace(official=False)
  monkeypatch.setattr(networks, "open_either", lambda _: other)
  loop.train(config_of(folder, steps=1), tmp_path / "run")
  told = (tmp_path / "run" / "metrics.jsonl").read_text()
  assert f'"eval/classifier_distance_other_weights_{COUNT}"' in told
  assert f'"eval/classifier_distance_{COUNT}"' not in told


def test_broken_held_out_images_are_left_out(folder, tmp_path):
  """The last batch of eight has one image, which is broken."""
  pictures = tmp_path / "pictures"
  rng = np.random.default_rng(0)
  for i in range(9):
    image = Image.fromarray(rng.integers(0, 256, (16, 16, 3), np.uint8))
    for split in ("train", "val"):
      place = pictures / split / str(i % 2)
      place.mkdir(parents=True, exist_ok=True)
      image.save(place / f"{i}.png")
  source = f"folder:{pictures}"
  settings = {"data.source": source, "data.on_broken": "skip", "steps": 1}
  settings |= {"eval_samples": 0, "draws.count": 4}
  (pictures / "val" / "1" / "7.png").write_bytes(b"no picture")
  loop.train(config_of(folder, **settings), tmp_path / "run")
  told = (tmp_path / "run" / "metrics.jsonl").read_text()
  assert "eval/classifier_distance_4" in told


@pytest.mark.parametrize(
  "settings, message",
  [
    ({"draws.count": 1}, "config.draws: count 1 is no number of images"),
    (
      {"draws.network": ""},
      "config.draws: count 20 needs a network that looks",
    ),
    (
      {"draws.network": "/no"},
      "/no has neither classifier.safetensors nor inception.safetensors; give",
    ),
    ({"draws.guidance": float("nan")}, "guidance nan is no number"),
    ({"draws.count": 21}, "config.draws: 21 images are no equal number"),
    ({"draws.top_p": 7.0}, "config.draws: top_p 7.0 is not in"),
    (
      {"draws.network": "{}/wide"},
      "config.draws: the classifier .* is of 18x18 pixels and the model of",
    ),
    ({"eval_samples": 1}, "held-out images, and one has no spread"),
    ({"eval_every": 0}, "draws.count 20 is for evaluations"),
  ],
)
def test_what_makes_no_sense_is_said_before_anything_is_written(
  settings, message, folder, tmp_path
):
  wide = np.random.default_rng(0).integers(0, 256, (150, 18, 18, 3), np.uint8)
  if not (folder / "wide").exists():
    classifier.write(folder / "wide", wide, np.arange(150) % 10, "noise")
  if "draws.network" in settings:
    network = settings["draws.network"].format(folder)
    settings = {**settings, "draws.network": network}
  with pytest.raises(ValueError, match=message):
    loop.train(config_of(folder, **settings), tmp_path / "run")
  assert not (tmp_path / "run").exists()
