"""The tokenizer's recipe through `loop.train`: parts, guards, what is said."""

import json
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from etils import epath

import var_jax
from configs import tokenizer as presets
from var_jax import images
from var_jax.checkpoints import network_weights, store, weights
from var_jax.evaluation import inception
from var_jax.evaluation.statistics import Moments, frechet_distance
from var_jax.models.scales import ScaleSchedule
from var_jax.training import loop, observer, setup, tokenizer_step


def config_of(steps=2, **settings):
  config = presets.get_config("tiny")
  config.steps = steps
  config.data.batch_size = 4
  config.log_every = 1
  config.checkpoint_every = steps
  config.loss.revive_every = 0
  config.update_from_flattened_dict(settings)
  return config


def flat(variables):
  leaves = jax.tree_util.tree_leaves_with_path(variables["params"])
  return {
    "/".join(key.key for key in path): np.asarray(leaf) for path, leaf in leaves
  }


@pytest.fixture(scope="module")
def first(tmp_path_factory):
  workdir = tmp_path_factory.mktemp("recipe") / "first"
  loop.train(config_of(), workdir)
  return workdir


@pytest.mark.parametrize(
  "part, moved",
  [
    ("decoder", ("decoder/", "post_quant_conv/")),
    ("quantizer", ("codebook", "phi_")),
  ],
)
def test_a_part_of_a_trained_tokenizer_is_trained_alone(
  part, moved, first, tmp_path
):
  settings = {"init_from": str(first), "train_only": part, "ema_decay": 0.5}
  settings["optimizer.learning_rate"] = 0.1
  loop.train(config_of(**settings), tmp_path / "tuned")
  before = flat(weights.read_tokenizer(first)[1])
  after = flat(weights.read_tokenizer(tmp_path / "tuned")[1])
  for path, leaf in before.items():
    if not path.startswith(moved):
      # Of the average, which has its own rounding.
      np.testing.assert_allclose(after[path], leaf, atol=1e-7, err_msg=path)
  changed = {path for path in before if np.any(after[path] != before[path])}
  kernels = {
    path
    for path in before
    if path.startswith(moved) and path.endswith(("kernel", "codebook"))
  }
  assert kernels <= changed


def test_a_tokenizer_that_a_run_starts_from_keeps_its_codes(first, tmp_path):
  """Though codes are looked after, and before the first step."""
  settings = {
    "init_from": str(first),
    "loss.revive_every": 1,
    "loss.kmeans_rounds": 2,
    "optimizer.learning_rate": 1e-12,
  }
  loop.train(config_of(steps=1, **settings), tmp_path / "tuned")
  before, after = (
    flat(weights.read_tokenizer(folder)[1])["codebook"]
    for folder in (first, tmp_path / "tuned")
  )
  np.testing.assert_allclose(after, before, atol=1e-6)


def test_a_run_with_other_players_cannot_be_resumed(tmp_path):
  loop.train(config_of(steps=1), tmp_path)
  more = {
    "adversary.weight": 0.1,
    "adversary.channels": 8,
    "adversary.layers": 2,
    "adversary.norm_groups": 4,
  }
  message = "1 has no adversary: it is of an earlier version, or of a run with"
  with pytest.raises(ValueError, match=message):
    loop.train(config_of(steps=2, **more), tmp_path, allow_config_change=True)


def test_a_collapse_stops_the_run_with_the_name_of_the_scale(tmp_path):
  config = config_of(
    steps=6,
    **{
      "collapse.policy": "stop",
      "collapse.every": 3,
      "collapse.min_perplexity": 1.0,
      "collapse.min_explained": 0.999,
    },
  )
  message = r"step 4: the codes collapse at scale 0 \(1x1, .+%.+scale 2"
  with pytest.raises(ValueError, match=message):
    loop.train(config, tmp_path)


@pytest.mark.parametrize(
  "policy, skipped, said",
  [
    ("report", 0.0, "nothing is done about it"),
    ("revive", 0.0, "the least used codes are moved to what it wants"),
    ("lower", 0.0, "the learning rate is now 0.5 of its schedule"),
    ("lower", 1.0, "its update was refused, and nothing is done"),
  ],
)
def test_a_collapse_is_said_and_what_is_done(policy, skipped, said):
  said_so_far, schedule = [], ScaleSchedule((1, 2))
  run = SimpleNamespace(
    program=SimpleNamespace(
      description=SimpleNamespace(tokenizer=SimpleNamespace(schedule=schedule))
    ),
    config=SimpleNamespace(collapse=SimpleNamespace(policy=policy)),
  )
  told = SimpleNamespace(
    _run=run, report=SimpleNamespace(message=said_so_far.append)
  )
  values = {
    "collapsed": {"0": 0.0, "1": 1.0},
    "explained": {"0": 0.5, "1": 0.004},
    "perplexity": {"0": 9.0, "1": 1.25},
    "rate": 0.5,
    "skipped": skipped,
  }
  observer.Observer._collapsed(told, 4, values)
  assert said_so_far == [
    "step 4: the codes collapse at scale 1 (2x2, explains 0.40% of the energy "
    f"that reaches it, perplexity 1.2); {said}"
  ]
  values["collapsed"]["1"] = 0.0
  observer.Observer._collapsed(told, 5, values)
  assert len(said_so_far) == 1


def test_a_run_that_is_stopped_goes_on_with_all_that_it_carries(tmp_path):
  """Discriminator, running means and rate are those of one long run."""
  settings = {
    "collapse.policy": "lower",
    "collapse.every": 2,
    "collapse.min_explained": 0.999,
    "adversary.weight": 0.1,
    "adversary.lecam": 0.1,
    "adversary.channels": 8,
    "adversary.layers": 2,
    "adversary.norm_groups": 4,
    "loss.scale_dropout": 0.5,
  }
  whole = config_of(steps=4, **settings)
  whole.checkpoint_every = 2
  whole.keep_checkpoints = 3
  loop.train(whole, tmp_path / "whole")
  other = epath.Path(tmp_path / "other")
  loop.train(whole, other)
  (other / "checkpoints" / "4").rmtree()
  loop.train(whole, other)
  found = []
  for workdir in (tmp_path / "whole", other):
    checkpoints = store.Store(workdir, keep=1, read_only=True)
    run = setup.open_run(whole, epath.Path(workdir))
    found.append(run.restore(checkpoints, 4))
    checkpoints.close()
  assert found[0].rate < 1.0 and found[0].adversary.real != 0.0
  jax.tree.map(np.testing.assert_array_equal, *found)


def test_an_evaluation_writes_the_health_of_scales_and_a_page(tmp_path):
  config = config_of(steps=2, eval_every=2, eval_samples=6, pictures=2)
  loop.train(config, tmp_path)
  lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
  last = json.loads(lines[-1])
  for name in ("psnr", "ssim", "code_share"):
    assert np.isfinite(last[f"eval/{name}"])
  for name in ("codes_used", "perplexity", "explained", "commitment"):
    for s in range(3):
      assert np.isfinite(last[f"eval/{name}/{s}"])
  page = (tmp_path / "report.html").read_text()
  assert page.count("<svg") == 10 and page.count("<img") == 1


def test_an_evaluation_has_rfid_where_there_is_a_network(
  tmp_path, monkeypatch, capsys
):
  """A stand-in whose features are mean colours; Inception has its own tests."""

  def features(weights, pixels_BHW3):
    colour_B3 = weights["gain"] * pixels_BHW3.mean(axis=(1, 2))
    return inception.Features(colour_B3, None, None)

  monkeypatch.setattr(inception, "features", features)
  monkeypatch.setattr(inception, "shapes", lambda: {"gain": (3,)})
  gain = {"gain": np.float32([1.0, 2.0, 3.0])}
  network_weights.write(tmp_path / "network", "inception", gain, {})
  # The second batch is half filled up.
  config = config_of(
    eval_every=2, eval_samples=6, inception_path=str(tmp_path / "network")
  )
  loop.train(config, tmp_path / "run")
  assert "rFID of 6 images, fewer than the 2048" in capsys.readouterr().out
  lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
  run = setup.open_run(config, tmp_path / "run")
  held_out = [run.held_out[i]["image"] for i in range(6)]
  pixels_BHW3 = np.stack([run.plain(image, None) for image in held_out])
  model = var_jax.load(tmp_path / "run")
  again_BHW3 = model.decode(model.encode(images.to_float(pixels_BHW3)))
  real, again = (
    Moments.of(features(gain, np.float32(x)).pooled_BD).gaussian()
    for x in (pixels_BHW3, images.to_uint8(again_BHW3))
  )
  expected = frechet_distance(real, again)
  assert json.loads(lines[-1])["eval/rfid"] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(
  "settings, message",
  [
    ({"train_only": "half"}, "train_only 'half' is not known"),
    ({"train_only": "decoder"}, "'decoder' needs a trained tokenizer to start"),
    (
      {"train_only": "decoder", "init_from": "/a", "loss.revive_every": 5},
      "train_only 'decoder' keeps the codes",
    ),
    (
      {"lpips_path": "/a", "model.scales": (1, 2)},
      "images of 8 pixels are",
    ),
    (
      {"adversary_optimizer.learning_rate": -1.0},
      "config.adversary_optimizer: learning_rate -1.0 is not",
    ),
    (
      {"adversary.weight": float("nan")},
      r"config.adversary: weight nan is not in \[0, inf\)",
    ),
    ({"inception_path": "/a"}, "inception_path is for the rFID of evaluations"),
    (
      {"inception_path": "/nowhere", "eval_every": 1},
      "/nowhere has no inception.safetensors",
    ),
    ({"loss.lpips_weight": 1.0}, "needs weights; convert the public files"),
    (
      {"loss.lpips_weight": 1.0, "lpips_path": "/nowhere"},
      "/nowhere has no lpips.safetensors",
    ),
    (
      {"adversary.weight": 1.0, "adversary.layers": 5},
      "adversary.layers 5 halve images of 16 pixels",
    ),
    (
      {"collapse.policy": "pray"},
      "config.collapse: policy 'pray' is not known",
    ),
    ({"loss.scale_dropout": 1.5}, "scale_dropout 1.5 is above 1"),
    ({"loss.l1_weight": -1.0}, r"l1_weight -1.0 is not in \[0, inf\)"),
    ({"loss.l1_weight": float("inf")}, "l1_weight inf is not in"),
    ({"loss.revive_below": 5.0}, "revive_below 5.0 is above 1; it is a share"),
  ],
)
def test_what_makes_no_sense_is_said_before_anything_is_written(
  settings, message, tmp_path
):
  with pytest.raises(ValueError, match=message):
    loop.train(config_of(**settings), tmp_path / "run")
  assert not (tmp_path / "run").exists()


def test_scale_dropout_keeps_from_one_to_all_scales():
  part = {"position": np.arange(4000, dtype=np.uint32)}
  kept = np.asarray(tokenizer_step._kept_scales(part, 0.4, 5, 0))
  found = np.bincount(kept, minlength=6) / 4000
  np.testing.assert_allclose(found, [0, 0.1, 0.1, 0.1, 0.1, 0.6], atol=0.025)
  again = tokenizer_step._kept_scales(part, 0.4, 5, 0)
  np.testing.assert_array_equal(kept, again)
  assert tokenizer_step._kept_scales(part, 0.0, 5, 0) is None


def test_grey_images_and_a_codebook_too_large_are_remarked_on(tmp_path, capsys):
  images = np.random.default_rng(0).integers(0, 256, (8, 16, 16), np.uint8)
  labels = np.arange(8) % 2
  np.savez(tmp_path / "grey.npz", images=images, labels=labels)
  source = {"data.source": f"npz:{tmp_path / 'grey.npz'}"}
  loop.train(config_of(steps=1, **source), tmp_path / "run")
  grey, codes = capsys.readouterr().out.splitlines()
  assert grey.startswith("the images are grey; each is given three equal")
  # 8 images of 1 + 4 + 16 tokens.
  assert codes.startswith(
    "warning: 8 images have 168 tokens, 5.2 for each of 32"
  )
  assert codes.endswith("use a vocab_size of 16 or less")
  colour = np.repeat(images[..., None], 3, axis=3)
  many = np.tile(colour, (4, 1, 1, 1))
  np.savez(tmp_path / "rgb.npz", images=many, labels=np.arange(32) % 2)
  source = {"data.source": f"npz:{tmp_path / 'rgb.npz'}"}
  loop.train(config_of(steps=1, **source), tmp_path / "other")
  assert not capsys.readouterr().out


@pytest.mark.parametrize("preset", presets.PRESETS)
def test_presets_make_sense(preset):
  """All but the paths: what a run would refuse is refused here."""
  from var_jax.parallel import mesh as mesh_lib
  from var_jax.training.tokenizer_training import TokenizerTraining

  config = presets.get_config(preset)
  training = TokenizerTraining.of(config, mesh_lib.make_mesh())
  assert config.loss.revive_every and training.like.explained_S.shape


def test_a_plan_has_the_discriminator_and_the_weights_of_lpips():
  """Lowered only: the compiler takes minutes for VGG16."""
  from var_jax.models import perceptual
  from var_jax.parallel import mesh as mesh_lib
  from var_jax.planning import compiling, memory
  from var_jax.training.tokenizer_training import TokenizerTraining

  mesh, found = mesh_lib.make_mesh(), {}
  more = {
    "adversary.weight": 0.1,
    "adversary.start": 2,
    "adversary.channels": 8,
    "adversary.layers": 2,
    "adversary.norm_groups": 4,
    "loss.lpips_weight": 1.0,
    "lpips_path": "/nowhere",
  }
  for name, settings in (("plain", {}), ("all", more)):
    training = TokenizerTraining.of(config_of(steps=4, **settings), mesh)
    lowered = compiling.train_step(training)
    _, metrics = lowered.out_info
    # Of the last step, where the discriminator plays.
    assert ("adversary_loss" in metrics) == bool(settings)
    (state, frozen, _), _ = lowered.args_info
    sizes = [np.prod(x.shape) for x in jax.tree.leaves(frozen)]
    found[name] = memory.state_bytes(training, mesh), sum(sizes)
    assert len(jax.tree.leaves(state)) == len(jax.tree.leaves(training.like))
  vgg = sum(np.prod(shape) for shape in perceptual.shapes().values())
  assert (found["plain"][1], found["all"][1]) == (0, vgg)
  assert found["all"][0] > found["plain"][0]
