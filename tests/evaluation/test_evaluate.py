"""`var-jax evaluate`: receipts, what is refused, what goes on after a kill."""

import argparse
import json
import os
import pathlib
import shutil
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest
import tiny_models
from PIL import Image

import var_jax
from var_jax import cli, images, loading
from var_jax.checkpoints import network_weights, store
from var_jax.commands import measuring
from var_jax.evaluation import (
  classifier,
  inception,
  measure,
  statistics,
  sweep,
)
from var_jax.evaluation import run as evaluation_run
from var_jax.evaluation.partial import Partial

ROOT = pathlib.Path(__file__).parents[2]
SIDE, CLASSES = 16, 10


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """A classifier of noise in ten colours, and the noise: "train" and "val"."""
  folder = tmp_path_factory.mktemp("evaluate")
  for name, count in (("train", 300), ("val", 120)):
    pixels, labels = coloured(len(name), count)
    np.savez(folder / f"{name}.npz", images=pixels, labels=labels)
  source = f"npz:{folder / 'train.npz'}"
  assert run("--fit-classifier", source, "--output", folder / "classifier") == 0
  return folder


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
  folder = tmp_path_factory.mktemp("model")
  tiny_models.write_var(folder, (1, 4, 8))
  return folder


def coloured(seed, count):
  """Return noise whose mean is its class's, in shuffled order, and labels."""
  rng = np.random.default_rng(seed)
  labels = rng.permutation(np.arange(count) % CLASSES)
  means = np.random.default_rng(0).uniform(60, 190, (CLASSES, 1, 1, 3))
  noise = rng.normal(0, 20, (count, SIDE, SIDE, 3))
  return np.uint8((means[labels] + noise).clip(0, 255)), labels


def run(*flags):
  return cli.main(["evaluate", *map(str, flags)])


def by_classifier(folder, *flags, reference="train.npz", output):
  return run(
    *("--classifier", folder / "classifier"),
    *("--reference", folder / reference),
    *("--output", output),
    *flags,
  )


def receipt_of(path):
  return json.loads(path.read_text())


def line(capsys):
  (line,) = capsys.readouterr().err.splitlines()
  return line


def test_a_receipt_has_the_numbers_and_what_they_depend_on(folder, tmp_path):
  output = tmp_path / "a.json"
  flags = ["--samples", folder / "val.npz", "--reference-split", "train"]
  assert by_classifier(folder, *flags, output=output) == 0
  found = receipt_of(output)
  about, weights = classifier.read(folder / "classifier")
  looks = {}
  for name in ("train", "val"):
    pixels = np.load(folder / f"{name}.npz")["images"]
    looks[name] = classifier.features(CLASSES, weights, pixels)
  real, drawn = (
    np.asarray(looks[name].pooled_BD, np.float64) for name in ("train", "val")
  )
  a, b = (statistics.Moments.of(x).gaussian() for x in (real, drawn))
  numbers = found["numbers"]
  assert list(numbers) == [
    "classifier_distance",
    "classifier_score",
    "classifier_kernel_distance",
    "classifier_precision",
    "classifier_recall",
  ]
  distance = statistics.frechet_distance(a, b)
  assert numbers["classifier_distance"] == pytest.approx(distance, rel=1e-3)
  score = statistics.inception_score(np.asarray(looks["val"].probs_BC))
  assert numbers["classifier_score"] == pytest.approx(score, rel=1e-4)
  precision, recall = statistics.precision_recall(real, drawn)
  assert numbers["classifier_precision"] == pytest.approx(precision, abs=0.01)
  assert numbers["classifier_recall"] == pytest.approx(recall, abs=0.01)
  weights_file = folder / "classifier" / "classifier.safetensors"
  from var_jax import files

  assert found["features"]["sha256"] == files.sha256(weights_file)
  assert found["reference"]["sha256"] == files.sha256(folder / "train.npz")
  assert found["reference"]["split"] == "train"
  assert found["images"]["count"] == 120 and found["images"]["kind"] == "npz"
  assert about["held_out_accuracy"] > 0.9 and found["packages"]["jax"]
  assert not (tmp_path / "a.json.partial").exists()


def test_a_classifier_is_fitted_to_the_size_of_a_model(folder, tmp_path):
  source = ["--fit-classifier", f"npz:{folder / 'train.npz'}"]
  size = ["--image-size", 8]
  assert run(*source, *size, "--output", tmp_path / "small") == 0
  about, _ = classifier.read(tmp_path / "small")
  assert about["shape"] == [8, 8, 3] and about["held_out_accuracy"] > 0.8

  real, output = f"npz:{folder / 'val.npz'}", tmp_path / "real.json"
  flags = ["--classifier", tmp_path / "small", "--transform", "resize"]
  flags += ["--reference", f"npz:{folder / 'train.npz'}", "--output", output]
  assert run("--samples", real, *flags) == 0
  images = receipt_of(output)["images"]
  assert images["shape"] == [8, 8, 3] and images["transform"] == "resize"


def test_few_images_are_warned_of_with_what_it_costs(folder, tmp_path, capsys):
  output = tmp_path / "a.json"
  flags = ["--samples", folder / "val.npz"]
  assert by_classifier(folder, *flags, output=output) == 0
  (warning,) = receipt_of(output)["warnings"]
  assert "120 images are fewer than the 128 dimensions" in warning
  assert f"warning: {warning}" in capsys.readouterr().out


def test_images_sorted_by_class_are_refused_or_renamed(
  folder, tmp_path, capsys
):
  pixels, labels = coloured(3, 120)
  np.savez(tmp_path / "s.npz", arr_0=pixels[np.argsort(labels)])
  output = tmp_path / "a.json"
  flags = ["--samples", tmp_path / "s.npz"]
  assert by_classifier(folder, *flags, output=output) == 1
  message = line(capsys)
  assert "s.npz is sorted by class" in message and "--shuffle" in message
  assert not output.exists()
  assert by_classifier(folder, *flags, "--force", output=output) == 0
  forced = receipt_of(output)
  assert "classifier_score_class_sorted" in forced["numbers"]
  assert "classifier_distance" in forced["numbers"]
  assert "is sorted by class" in forced["forced"][0]
  output = tmp_path / "b.json"
  assert by_classifier(folder, *flags, "--shuffle", output=output) == 0
  shuffled = receipt_of(output)
  assert "classifier_score" in shuffled["numbers"] and not shuffled["forced"]
  # The whole is one part, which has no order.
  assert shuffled["numbers"]["classifier_score"] == pytest.approx(
    forced["numbers"]["classifier_score_class_sorted"]
  )


def test_labels_tell_that_images_are_sorted(folder, tmp_path, capsys):
  """Of images in which no class is to be seen."""
  rng = np.random.default_rng(0)
  pixels = rng.integers(0, 256, (120, SIDE, SIDE, 3), np.uint8)
  labels = np.arange(120) // 12
  for i, image in enumerate(pixels):
    place = tmp_path / "s" / f"class{labels[i]}"
    place.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(place / f"{i:03d}.png")
  np.savez(tmp_path / "s.npz", arr_0=pixels, arr_1=labels)
  output = tmp_path / "a.json"
  for name in ("s", "s.npz"):
    flags = ["--samples", tmp_path / name]
    assert by_classifier(folder, *flags, output=output) == 1
    assert f"{name} is sorted by class" in line(capsys)
    assert not (tmp_path / "a.json.partial").exists()  # before one looks
    shuffled = tmp_path / f"{name}.json"
    assert by_classifier(folder, *flags, "--shuffle", output=shuffled) == 0
  # Nothing else is known of these.
  np.savez(tmp_path / "s.npz", arr_0=pixels)
  assert by_classifier(folder, *flags, output=tmp_path / "b.json") == 0


def test_fewer_images_than_stated_are_refused_or_renamed(
  folder, tmp_path, capsys
):
  output = tmp_path / "a.json"
  flags = ["--samples", folder / "val.npz", "--count", 121]
  assert by_classifier(folder, *flags, output=output) == 1
  assert "has 120 images and 121 are stated" in line(capsys)
  assert not list(tmp_path.iterdir())  # it is known before one looks
  assert by_classifier(folder, *flags, "--force", output=output) == 0
  names = receipt_of(output)["numbers"]
  assert all(name.endswith("_few_images") for name in names)


def test_a_model_draws_balanced_classes_for_its_receipt(
  folder, workdir, tmp_path, capsys
):
  output, archive = tmp_path / "a.json", tmp_path / "drawn.npz"
  flags = ["--checkpoint", workdir, "--count", 20, "--batch-size", 8]
  flags += ["--guidance", 2, "--save-npz", archive]
  assert by_classifier(folder, *flags, output=output) == 0
  found = receipt_of(output)
  assert found["sampler"]["guidance"] == 2.0 and found["sampler"]["seed"] == 0
  assert found["checkpoint"]["step"] == 0
  assert found["checkpoint"]["weights"] == "raw"
  assert "has no averaged weights; its own are" in capsys.readouterr().out
  with np.load(archive) as arrays:
    pixels, labels = arrays["arr_0"], arrays["arr_1"]
  assert pixels.shape == (20, SIDE, SIDE, 3) and pixels.dtype == np.uint8
  np.testing.assert_array_equal(np.bincount(labels), np.full(CLASSES, 2))
  assert (np.diff(labels) < 0).any()  # in no order
  model = var_jax.load(workdir)
  again = model.sample(labels, jax.random.key(0), guidance=2.0)
  difference = images.to_uint8(again.images_BHW3) - pixels.astype(int)
  assert np.abs(difference).max() <= 1
  # The archive measures as the draw did.
  other = tmp_path / "b.json"
  assert by_classifier(folder, "--samples", archive, output=other) == 0
  assert receipt_of(other)["numbers"] == pytest.approx(found["numbers"])


def test_tokens_are_decoded_and_held_out_images_reconstructed(
  folder, workdir, tmp_path, capsys
):
  model = var_jax.load(workdir)
  pixels = np.load(folder / "val.npz")["images"]
  tokens_NL = np.asarray(model.encode(images.to_float(pixels)))
  np.savez(tmp_path / "tokens.npz", tokens=tokens_NL)
  flags = ["--checkpoint", workdir, "--batch-size", 50]
  flags += ["--transform", "resize"]
  tokens = ["--tokens", tmp_path / "tokens.npz", "--shuffle"]
  assert by_classifier(folder, *flags, *tokens, output=tmp_path / "t.json") == 0
  source = f"npz:{folder / 'val.npz'}"
  again = ["--classifier", folder / "classifier", "--reconstruct", source]
  assert run(*flags, *again, "--output", tmp_path / "r.json") == 0
  decoded, rebuilt = (receipt_of(tmp_path / f"{x}.json") for x in "tr")
  assert rebuilt["reference"]["split"] == "val"
  back = images.to_uint8(model.decode(tokens_NL)).astype(np.float64)
  error_N = np.square(back - pixels).mean(axis=(1, 2, 3))
  psnr = np.mean(10 * np.log10(255**2 / error_N))
  assert rebuilt["numbers"]["PSNR"] == pytest.approx(psnr, rel=1e-4)
  assert 0 < rebuilt["numbers"]["SSIM"] < 1
  # The same images, in another order, against another reference.
  assert decoded["numbers"]["classifier_score"] == pytest.approx(
    rebuilt["numbers"]["classifier_score"], rel=1e-4
  )
  # Statistics of training images are none for reconstructions.
  code = by_classifier(
    folder, *flags, "--reconstruct", source, output=tmp_path / "x.json"
  )
  assert code == 1
  assert "compared with images of an unnamed split" in line(capsys)


def interrupted(monkeypatch, after, how):
  """Let the look at images end once `after` batches were added."""
  add, seen = Partial.add, []

  def add_and_fall(self, part):
    if len(seen) == after:
      raise how
    seen.append(len(part["pooled_BD"]))
    add(self, part)

  monkeypatch.setattr(Partial, "add", add_and_fall)
  return seen


def test_an_interrupted_measurement_goes_on(folder, tmp_path, monkeypatch):
  pixels, _ = coloured(5, 60)
  (tmp_path / "images").mkdir()
  for i, image in enumerate(pixels):
    Image.fromarray(image).save(tmp_path / "images" / f"{i:03d}.png")
  np.savez(tmp_path / "images.npz", arr_0=pixels)
  for name in ("images", "images.npz"):
    flags = ["--samples", tmp_path / name, "--batch-size", 20]
    whole, gone_on = (tmp_path / f"{name}.{x}.json" for x in "ab")
    assert by_classifier(folder, *flags, output=whole) == 0
    with monkeypatch.context() as patched:
      interrupted(patched, 2, KeyboardInterrupt)
      assert by_classifier(folder, *flags, output=gone_on) == 1
    assert not gone_on.exists()
    with monkeypatch.context() as patched:
      seen = interrupted(patched, 9, KeyboardInterrupt)
      assert by_classifier(folder, *flags, output=gone_on) == 0
    assert seen == [20]
    a, b = (receipt_of(x)["numbers"] for x in (whole, gone_on))
    # Of fewer images than dimensions the root is of rounding, in part.
    assert b == pytest.approx(a, rel=1e-4)
    assert not pathlib.Path(f"{gone_on}.partial").exists()


def test_features_are_saved_now_and_then(folder, tmp_path, monkeypatch):
  monkeypatch.setattr(evaluation_run, "_SAVE_EVERY", 0.0)
  interrupted(monkeypatch, 2, RuntimeError)
  flags = ["--samples", folder / "val.npz", "--batch-size", 20]
  with pytest.raises(RuntimeError):
    by_classifier(folder, *flags, output=tmp_path / "a.json")
  parts = sorted(path.name for path in (tmp_path / "a.json.partial").iterdir())
  assert parts == ["00000000.npz", "00000020.npz", "settings.json"]


@pytest.mark.parametrize("after", [1, 2])
@pytest.mark.parametrize("what", ["drawn", "tokens", "reconstructed"])
def test_what_a_model_makes_goes_on(
  what, after, folder, workdir, tmp_path, monkeypatch
):
  """From within, or when all is seen and the comparison was interrupted."""
  rng = np.random.default_rng(0)
  L = var_jax.load(workdir).config.tokenizer.schedule.num_tokens
  np.savez(tmp_path / "tokens.npz", tokens=rng.integers(0, 16, (16, L)))
  pixels, labels = coloured(6, 16)
  np.savez(tmp_path / "few.npz", images=pixels, labels=labels)
  flags = {
    "drawn": ["--count", 20],
    "tokens": ["--tokens", tmp_path / "tokens.npz", "--shuffle"],
    "reconstructed": [
      *("--reconstruct", f"npz:{tmp_path}/few.npz", "--transform", "resize"),
      *("--reference-split", "val"),
    ],
  }[what]
  flags += ["--checkpoint", workdir, "--batch-size", 10]
  assert by_classifier(folder, *flags, output=tmp_path / "a.json") == 0
  with monkeypatch.context() as patched:
    if after == 1:
      interrupted(patched, 1, KeyboardInterrupt)
    else:
      patched.setattr(measure, "gather", interrupting)
    code = by_classifier(folder, *flags, output=tmp_path / "b.json")
  assert code == 1 and (tmp_path / "b.json.partial").exists()
  assert by_classifier(folder, *flags, output=tmp_path / "b.json") == 0
  a, b = (receipt_of(tmp_path / f"{x}.json")["numbers"] for x in "ab")
  assert b == pytest.approx(a, rel=1e-3)


def interrupting(parts):
  raise KeyboardInterrupt


@pytest.mark.parametrize(
  "name, message",
  [
    ("hello", "has hello, not ours; remove it"),
    ("00000000.npz", "has no settings.json; remove it"),
    ("", "is a file; remove it"),
  ],
)
def test_what_is_no_measurement_is_neither_taken_nor_removed(
  name, message, folder, tmp_path, capsys
):
  partial = tmp_path / "a.json.partial"
  if name:
    partial.mkdir()
  (partial / name).write_bytes(b"mine")
  flags = ["--samples", folder / "val.npz"]
  assert by_classifier(folder, *flags, output=tmp_path / "a.json") == 1
  assert message in line(capsys)
  assert (partial / name).read_bytes() == b"mine"


@pytest.mark.parametrize("content", [b"", b"PK no zip", b"text", "npy", "text"])
def test_damaged_tokens_are_one_line(
  content, folder, workdir, tmp_path, capsys
):
  path = tmp_path / "tokens.npz"
  if isinstance(content, bytes):
    path.write_bytes(content)
  elif content == "npy":
    np.save(tmp_path / "tokens.npy", np.zeros(3))
    (tmp_path / "tokens.npy").rename(path)
  else:
    np.savez(path, tokens=np.array(["a", "b"]))
  flags = ["--checkpoint", workdir, "--tokens", path]
  assert by_classifier(folder, *flags, output=tmp_path / "a.json") == 1
  message = line(capsys)
  assert f"{path}: tokens cannot be read" in message
  assert "give an .npz with `tokens`" in message


def test_what_was_left_by_other_settings_is_not_taken(folder, tmp_path, capsys):
  pixels, labels = coloured(3, 120)
  np.savez(tmp_path / "s.npz", arr_0=pixels[np.argsort(labels)])
  output = tmp_path / "a.json"
  assert by_classifier(folder, "--samples", tmp_path / "s.npz", output=output)
  capsys.readouterr()
  other = ["--samples", folder / "train.npz"]
  assert by_classifier(folder, *other, output=output) == 1
  assert "with other settings left; remove it" in line(capsys)


@pytest.mark.parametrize("content", [b"", b"PK no zip", None])
def test_a_damaged_part_is_named(content, tmp_path):
  (tmp_path / "settings.json").write_text("{}")
  part = tmp_path / "00000000.npz"
  if content is None:
    np.savez(part, other=np.zeros(3))
  else:
    part.write_bytes(content)
  with pytest.raises(ValueError, match="cannot be read .* begin anew"):
    Partial(tmp_path, {})


def test_a_sweep_goes_into_a_folder_of_its_own(tmp_path):
  (tmp_path / "sweep.json").write_text("{}")
  sweep.check_folder(tmp_path)
  sweep.check_folder(tmp_path / "new")
  (tmp_path / "config.json").write_text("{}")
  with pytest.raises(ValueError, match="has config.json, which is no sweep's"):
    sweep.check_folder(tmp_path)
  with pytest.raises(ValueError, match="is a file; name a folder"):
    sweep.check_folder(tmp_path / "config.json")
  with pytest.raises(ValueError, match="is no folder; make it first"):
    sweep.check_folder(tmp_path / "none" / "new")
  # What a write that was killed leaves is a sweep's.
  (tmp_path / "cut").mkdir()
  (tmp_path / "cut" / ".sweep.json.partial").write_text("{")
  sweep.check_folder(tmp_path / "cut")


def test_receipts_say_whether_they_may_be_compared(folder, tmp_path, capsys):
  a, b, c = (tmp_path / f"{x}.json" for x in "abc")
  samples = ["--samples", folder / "val.npz"]
  assert by_classifier(folder, *samples, output=a) == 0
  assert by_classifier(folder, *samples, "--shuffle", output=b) == 0
  flags = [*samples, "--count", 121, "--force"]
  assert by_classifier(folder, *flags, reference="val.npz", output=c) == 0
  capsys.readouterr()
  assert run("--compare", a, b) == 0
  assert capsys.readouterr().out == "they may be compared\n"
  other = receipt_of(a)
  for transform, code in ((None, 0), ("crop", 0), ("resize", 1)):
    for path, known in ((a, "crop"), (b, transform)):
      other["images"]["transform"] = known
      path.write_text(json.dumps(other))
    assert run("--compare", a, b) == code
  assert "another crop: images.transform is" in capsys.readouterr().out
  assert run("--compare", a, c) == 1
  lines = capsys.readouterr().out.splitlines()
  assert lines[0].startswith("another reference: reference.sha256 is")
  assert "the second was forced" in lines[1]
  assert lines[2].startswith("no measure in common")
  for content in ("{}", '{"format_version": 1}', "[]"):
    (tmp_path / "no.json").write_text(content)
    assert run("--compare", a, tmp_path / "no.json") == 1
    assert "no.json is no receipt of format 1" in line(capsys)
  assert run("--compare", a, tmp_path) == 1
  assert "is a folder; name a receipt in it" in line(capsys)


def test_a_sweep_writes_a_receipt_each_and_the_best(
  folder, workdir, tmp_path, capsys
):
  pytest.importorskip("matplotlib")
  flags = ["--checkpoint", workdir, "--count", 20, "--guidance", "1,1.5"]
  flags += ["--top-k", "0,10"]
  assert by_classifier(folder, *flags, output=tmp_path / "sweep") == 0
  found = receipt_of(tmp_path / "sweep" / "sweep.json")
  assert len(found["points"]) == 4
  point = found["points"]["guidance=1.5,top_k=10,top_p=0.96"]
  one = receipt_of(tmp_path / "sweep" / "guidance=1.5,top_k=10,top_p=0.96.json")
  assert one["sampler"]["top_k"] == 10
  assert point == [
    one["numbers"][name] for name in ("classifier_distance", "classifier_score")
  ]
  # Called again it reads what is there, unless something else is asked.
  assert by_classifier(folder, *flags, output=tmp_path / "sweep") == 0
  for other in (["--count", 30], ["--seed", 1], ["--weights", "raw"]):
    changed = [*flags, *other]
    code = by_classifier(folder, *changed, output=tmp_path / "sweep")
    assert code == (0 if other[0] == "--weights" else 1)
  code = by_classifier(
    folder, *flags, reference="val.npz", output=tmp_path / "sweep"
  )
  assert code == 1
  assert "is of another reference; name a new folder" in capsys.readouterr().err
  for name in found["best"]:
    x, y = found["points"][name]
    others = [p for n, p in found["points"].items() if n != name]
    assert not any(a <= x and b >= y and (a, b) != (x, y) for a, b in others)
  picture = Image.open(tmp_path / "sweep" / "sweep.png")
  assert np.ptp(np.asarray(picture)) > 0


def test_a_forced_sweep_has_the_names_of_its_receipts(tmp_path):
  pytest.importorskip("matplotlib")
  numbers = {"FID_other_weights": 3.0, "IS_other_weights": 200.0}
  receipts = {
    "guidance=1,top_k=0": {"numbers": numbers},
    "guidance=2,top_k=0": {"numbers": {name: 5.0 for name in numbers}},
  }
  sweep.write(tmp_path, receipts, "FID", "IS")
  found = receipt_of(tmp_path / "sweep.json")
  assert found["measures"] == ["FID_other_weights", "IS_other_weights"]
  assert found["points"]["guidance=1,top_k=0"] == [3.0, 200.0]


def test_all_that_is_measured_is_of_one_step(
  folder, workdir, tmp_path, monkeypatch
):
  """A run that goes on has a newer one when the model is there."""
  load, copy = var_jax.load, tmp_path / "run"
  shutil.copytree(workdir, copy)

  def load_and_train(path, **how):
    model = load(path, **how)
    steps = copy / "checkpoints"
    shutil.copytree(steps / "0", steps / "7")
    return model

  monkeypatch.setattr(loading, "load", load_and_train)
  flags = ["--checkpoint", copy, "--count", 20]
  assert by_classifier(folder, *flags, output=tmp_path / "a.json") == 0
  assert receipt_of(tmp_path / "a.json")["checkpoint"]["step"] == 0
  assert store.latest_step(copy) == 7


@pytest.mark.parametrize(
  "trained, expected", [(None, "crop"), ("crop", "crop"), ("jitter", "resize")]
)
def test_sources_are_brought_to_size_as_in_training(
  trained, expected, workdir, tmp_path
):
  shutil.copytree(workdir, tmp_path / "run")
  path = tmp_path / "run" / "config.json"
  description = json.loads(path.read_text())
  description["config"] = {"data": {"transform": trained}} if trained else {}
  path.write_text(json.dumps(description))
  how = argparse.Namespace(transform=None, checkpoint=str(tmp_path / "run"))
  assert measuring._transform(how) == expected


def of_inception(monkeypatch, folder):
  """Replace the network by mean colours, whose own tests are elsewhere."""

  def features(weights, pixels_BHW3):
    colour_B3 = pixels_BHW3.mean(axis=(1, 2))
    probs_B3 = jax.nn.softmax(colour_B3 - 128.0)
    return inception.Features(weights["gain"] * colour_B3, colour_B3, probs_B3)

  monkeypatch.setattr(inception, "features", features)
  monkeypatch.setattr(inception, "shapes", lambda: {"gain": (3,)})
  for name in ("POOLED", "SPATIAL"):
    monkeypatch.setattr(inception, name, 3)
  gain = {"gain": np.float32([1.0, 1.0, 1.0])}
  for name, digest in (("official", "6726825dff"), ("other", "00")):
    about = {"from": {"file.pth": digest}}
    network_weights.write(folder / name, "inception", gain, about)


def by_inception(folder, *flags, weights="official"):
  return run("--inception", folder / weights, *flags)


def test_statistics_of_adm_are_a_reference(
  folder, tmp_path, monkeypatch, capsys
):
  of_inception(monkeypatch, tmp_path)
  real = np.load(folder / "train.npz")["images"]
  colours_N3 = real.mean(axis=(1, 2))
  statistic = dict(
    mu=colours_N3.mean(axis=0), sigma=np.cov(colours_N3, rowvar=False)
  )
  spatial = {f"{name}_s": value for name, value in statistic.items()}
  np.savez(tmp_path / "ref.npz", arr_0=real[:100], **statistic, **spatial)
  flags = ["--samples", folder / "val.npz", "--count", 120]
  flags += ["--reference", tmp_path / "ref.npz"]
  output = tmp_path / "a.json"
  assert by_inception(tmp_path, *flags, "--output", output) == 0
  numbers = receipt_of(output)["numbers"]
  val = np.load(folder / "val.npz")["images"].mean(axis=(1, 2))
  a, b = (
    statistics.Gaussian(x.mean(axis=0), np.cov(x, rowvar=False))
    for x in (colours_N3, val)
  )
  fid = statistics.frechet_distance(a, b)
  for name in ("FID", "sFID"):
    assert numbers[name] == pytest.approx(fid, rel=1e-3)
  assert {"IS", "KID", "precision", "recall"} <= numbers.keys()
  assert receipt_of(output)["reference"]["kind"] == "statistics"
  # Also where the shell has left the tilde.
  monkeypatch.setenv("HOME", str(tmp_path))
  home = [*flags[:-1], "~/ref.npz", "--output", tmp_path / "home.json"]
  assert by_inception(tmp_path, *home) == 0
  assert receipt_of(tmp_path / "home.json")["numbers"]["FID"] == numbers["FID"]
  other = by_inception(
    tmp_path, *flags, "--output", tmp_path / "b.json", weights="other"
  )
  assert other == 1
  assert "are not those of published numbers" in line(capsys)
  np.savez(tmp_path / "ref.npz", mu=statistic["mu"])
  assert by_inception(tmp_path, *flags, "--output", tmp_path / "c.json") == 1
  assert "ref.npz has arrays mu and no sigma" in line(capsys)
  for sigma in (-statistic["sigma"], np.triu(np.ones((3, 3)))):
    np.savez(tmp_path / "ref.npz", mu=statistic["mu"], sigma=sigma)
    assert by_inception(tmp_path, *flags, "--output", tmp_path / "c.json") == 1
    assert "sigma is no covariance" in line(capsys)
  statistic["mu"] = np.zeros(5)
  np.savez(tmp_path / "ref.npz", **statistic)
  assert by_inception(tmp_path, *flags, "--output", tmp_path / "d.json") == 1
  assert "mu has shape (5,), not finite numbers of shape (3,)" in line(capsys)


def test_fewer_than_fifty_thousand_are_no_fid_unless_stated(
  folder, tmp_path, monkeypatch, capsys
):
  of_inception(monkeypatch, tmp_path)
  flags = ["--samples", folder / "val.npz", "--output", tmp_path / "a.json"]
  flags += ["--reference", folder / "train.npz"]
  assert by_inception(tmp_path, *flags) == 1
  assert "has 120 images and 50000 are stated" in line(capsys)


def test_classes_that_do_not_divide_fifty_thousand_are_drawn(
  folder, workdir, tmp_path, monkeypatch
):
  of_inception(monkeypatch, tmp_path)
  monkeypatch.setattr(measuring, "_STATED", 47)  # classes: 10
  flags = ["--checkpoint", workdir, "--output", tmp_path / "a.json"]
  flags += ["--reference", folder / "train.npz"]
  assert by_inception(tmp_path, *flags) == 0
  assert receipt_of(tmp_path / "a.json")["images"]["count"] == 40
  assert "FID" in receipt_of(tmp_path / "a.json")["numbers"]


def test_small_references_are_warned_of_or_refused(folder, tmp_path, capsys):
  pixels, _ = coloured(8, 20)
  np.savez(tmp_path / "few.npz", arr_0=pixels)
  np.savez(tmp_path / "three.npz", arr_0=pixels[:3])
  flags = ["--samples", folder / "train.npz", "--classifier"]
  flags += [folder / "classifier", "--output", tmp_path / "a.json"]
  assert run(*flags, "--reference", tmp_path / "three.npz") == 1
  assert "three.npz has 3 images, and measures need 4" in line(capsys)
  assert run(*flags, "--reference", tmp_path / "few.npz") == 0
  (warning,) = receipt_of(tmp_path / "a.json")["warnings"]
  assert "the reference's 20 images are fewer than the 128 dimensions" in (
    warning
  )


@pytest.mark.parametrize(
  "flags, code, message",
  [
    (["--guidance", "nan"], 1, "guidance"),
    (["--top-k", "-1"], 1, "top_k -1"),
    (["--count", "21"], 1, "21 images are no equal number of each of 10"),
    (["--guidance", "1,2"], 2, "a sweep's is a folder"),
    (["--top-p", "2"], 1, "top_p 2.0 is not in [0, 1]"),
    (["--guided-scales", "2:1"], 1, "guided_scales"),
    (["--samples", "x"], 2, "--checkpoint does not go with --samples"),
    (["--fit-classifier", "digits"], 2, "does not go with --fit-classifier"),
    (["--guidance", "a"], 2, "'a' is no number"),
    (["--guidance", "1,2,1.0"], 2, "'1,2,1.0' has a number twice"),
  ],
)
def test_bad_draws_are_one_line_and_leave_nothing(
  flags, code, message, folder, workdir, tmp_path, capsys
):
  output = tmp_path / "a.json"
  flags = ["--checkpoint", workdir, "--count", 20, *flags]
  assert by_classifier(folder, *flags, output=output) == code
  assert message in line(capsys)
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("classes, part", [(1000, 300), (2, 4000)])
def test_sorted_classes_are_told_from_shuffled_ones(classes, part):
  rng = np.random.default_rng(0)
  labels = np.sort(np.arange(10_000) % classes)
  # A network that is right on six of ten.
  wrong = rng.random(10_000) > 0.6
  judged = np.where(wrong, rng.integers(0, classes, 10_000), labels)
  if classes == 2:
    judged = labels
  assert measure.sortedness(judged) > 3
  for seed in range(20):
    shuffled = np.random.default_rng(seed).permutation(judged)
    assert measure.sortedness(shuffled) < 1.5
    assert measure.sortedness(shuffled[:part]) < 3


def in_processes(command, processes, devices):
  """Return the lines that each process says on stdout."""
  environment = dict(
    os.environ,
    JAX_PLATFORMS="cpu",
    XLA_FLAGS=f"--xla_force_host_platform_device_count={devices}",
    PYTHONPATH=str(ROOT),
  )
  numbered = [{}]
  if processes > 1:
    with socket.socket() as free:
      free.bind(("localhost", 0))
      port = free.getsockname()[1]
    environment["JAX_COORDINATOR_ADDRESS"] = f"localhost:{port}"
    environment["JAX_NUM_PROCESSES"] = str(processes)
    numbered = [{"JAX_PROCESS_ID": str(i)} for i in range(processes)]
  running = [
    subprocess.Popen(
      [sys.executable, *map(str, command)],
      env={**environment, **number},
      stdout=subprocess.PIPE,
      text=True,
    )
    for number in numbered
  ]
  said = [
    [
      line
      for line in process.communicate(timeout=300)[0].splitlines()
      if not line.startswith("[Gloo]")
    ]
    for process in running
  ]
  assert [process.returncode for process in running] == [0] * processes
  return said


def seen(folder, name, *, processes, devices):
  """Return what each process of look.py has found."""
  command = [ROOT / "tests/evaluation/look.py", folder, name]
  in_processes(command, processes, devices)
  places = [f"@{i}" for i in range(processes)] if processes > 1 else [""]
  return [np.load(folder / f"{name}{place}.npz") for place in places]


def test_two_processes_write_the_receipt_of_one(folder, workdir, tmp_path):
  command = ["-m", "var_jax.cli", "evaluate", "--classifier"]
  command += [folder / "classifier", "--reference", folder / "train.npz"]
  command += ["--checkpoint", workdir, "--count", 20, "--batch-size", 8]
  command += ["--guidance", "1,2", "--output"]
  for name, processes in (("one", 1), ("two", 2)):
    said = in_processes([*command, tmp_path / name], processes, 2)
    assert "wrote 2 receipts and sweep.png" in said[0][-1]
    assert not any(said[1:])
  names = {path.name for path in (tmp_path / "one").iterdir()}
  assert names == {path.name for path in (tmp_path / "two").iterdir()}
  assert len(names) == 4
  for guidance in (1, 2):
    name = f"guidance={guidance},top_k=900,top_p=0.96.json"
    one, two = (receipt_of(tmp_path / x / name) for x in ("one", "two"))
    assert two["images"] == one["images"]
    assert two["numbers"] == pytest.approx(one["numbers"], rel=1e-3)
  # Both go on with what is there.
  said = in_processes([*command, tmp_path / "two"], 2, 2)
  assert not any("comparing" in line for line in said[0])


def test_devices_and_processes_see_what_one_does(folder):
  """Their moments are those of one pass over the features that they saw."""
  pixels = np.load(folder / "val.npz")["images"]
  np.savez(folder / "images.npz", images=pixels)
  weights = classifier.read(folder / "classifier")[1]
  whole_ND = classifier.features(CLASSES, weights, pixels).pooled_BD
  layouts = {"one": (1, 1), "eight": (1, 8), "two": (2, 2)}
  for name, (processes, devices) in layouts.items():
    for found in seen(folder, name, processes=processes, devices=devices):
      assert found["devices"] == processes * devices
      features_ND = found["features_ND"]
      np.testing.assert_allclose(features_ND, whole_ND, atol=1e-4)
      once = statistics.Moments.of(features_ND)
      np.testing.assert_allclose(found["mean_D"], once.mean_D, rtol=1e-10)
      scale = np.abs(once.scatter_DD).max()
      np.testing.assert_allclose(
        found["scatter_DD"], once.scatter_DD, atol=1e-10 * scale
      )


@pytest.mark.parametrize(
  "flags, code, message",
  [
    (["--samples", "{}/val.npz"], 2, "give --inception DIR, for FID, or"),
    (["--classifier", "{}/classifier"], 2, "--checkpoint or --samples, one"),
    (
      ["--classifier", "{}/classifier", "--samples", "{}/val.npz"],
      2,
      "--reference is missing",
    ),
    (
      ["--inception", "{}", "--samples", "a", "--reference", "b"],
      1,
      "has no inception.safetensors; give a folder that `var-jax convert",
    ),
    (
      ["--classifier", "{}", "--samples", "a", "--reference", "b"],
      1,
      "has no classifier.safetensors; give a folder that `var-jax evaluate",
    ),
    (
      [
        *("--classifier", "{}/classifier", "--samples", "{}/small.npz"),
        *("--reference", "{}/val.npz"),
      ],
      1,
      "small.npz has images of 8x8x3, and the classifier is of 16x16x3",
    ),
    (
      [
        *("--classifier", "{}/classifier", "--samples", "{}/float.npz"),
        *("--reference", "{}/val.npz"),
      ],
      1,
      "float.npz: arr_0 is float64 (4, 8, 8, 3); give uint8",
    ),
    (
      [
        *("--classifier", "{}/classifier", "--samples", "{}/val.npz"),
        *("--reference", "{}/none.npz"),
      ],
      1,
      "none.npz does not exist; give a folder or an .npz",
    ),
    (
      ["--classifier", "{}/classifier", "--tokens", "a", "--samples", "b"],
      2,
      "--tokens does not go with --samples",
    ),
    (
      ["--classifier", "{}/classifier", "--tokens", "a"],
      2,
      "--tokens needs --checkpoint",
    ),
    (
      [
        *("--classifier", "{}/classifier", "--samples", "{}/val.npz"),
        *("--reference", "{}/val.npz", "--count", "100"),
      ],
      1,
      "has 120 images, more than the 100 that are stated",
    ),
    (
      [
        *("--classifier", "{}/classifier", "--samples", "{}/three.npz"),
        *("--reference", "{}/val.npz"),
      ],
      1,
      "three.npz has 3 images, and measures need 4",
    ),
    (
      [
        *("--classifier", "{}/classifier", "--samples", "{}/val.npz"),
        *("--reference", "{}/val.npz", "--guidance", "2"),
      ],
      2,
      "--guidance does not go with --samples",
    ),
    (["--compare", "{}/none.json", "{}/none.json"], 1, "none.json"),
    (["--compare", "a", "b", "--seed", "3"], 2, "--seed does not go with"),
  ],
)
def test_bad_commands_are_one_line_and_write_nothing(
  flags, code, message, folder, tmp_path, capsys
):
  small = np.zeros((4, 8, 8, 3))
  np.savez(folder / "float.npz", arr_0=small)
  np.savez(folder / "small.npz", arr_0=small.astype(np.uint8))
  three = np.zeros((3, SIDE, SIDE, 3), np.uint8)
  np.savez(folder / "three.npz", arr_0=three)
  flags = [str(flag).format(folder) for flag in flags]
  if flags[0] != "--compare":
    flags += ["--output", str(tmp_path / "out.json")]
  assert run(*flags) == code
  assert message in line(capsys)
  assert not list(tmp_path.iterdir())
