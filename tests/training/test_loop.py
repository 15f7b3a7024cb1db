"""The loop: resuming, the data clock, and workdirs that are not ours."""

import json
import shutil

import jax
import ml_collections
import numpy as np
import pytest
from etils import epath

from configs import tokenizer as tokenizer_presets
from configs import var as var_presets
from var_jax.checkpoints import store, weights
from var_jax.training import checks, loop, programs, report, setup


def tokenizer_config(steps=6):
  config = tokenizer_presets.get_config("tiny")
  config.steps = steps
  config.data.batch_size = 8
  config.data.transform = "jitter"
  config.loss.update(revive_every=2, kmeans_rounds=2, scale_dropout=0.3)
  config.collapse.update(policy="revive", every=2, min_perplexity=4.0)
  config.adversary.update(
    weight=0.1, start=2, lecam=0.1, channels=8, layers=2, norm_groups=4
  )
  config.log_every, config.checkpoint_every = 1, 2
  config.keep_checkpoints = 10
  return config


def var_config(tokenizer_path, steps=6):
  config = var_presets.get_config("tiny")
  config.steps = steps
  config.tokenizer_path = str(tokenizer_path)
  config.data.batch_size = 8
  config.ema_decay = 0.9
  config.model.dropout = 0.1
  config.log_every, config.checkpoint_every = 1, 2
  config.keep_checkpoints = 10
  return config


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
  """Return (tokenizer workdir, transformer workdir), each of six steps."""
  root = tmp_path_factory.mktemp("trained")
  loop.train(tokenizer_config(), root / "tokenizer")
  loop.train(var_config(root / "tokenizer"), root / "var")
  return root / "tokenizer", root / "var"


def newest(workdir, which="raw"):
  _, tokenizer, transformer = weights.read_models(workdir, weights=which)
  return transformer or tokenizer


def metrics(workdir):
  lines = (workdir / "metrics.jsonl").read_text().splitlines()
  records = [json.loads(line) for line in lines]
  for record in records:
    for name in report.TIMING_KEYS:
      record.pop(name, None)
  return records


def cut_back(workdir, copy, step):
  """Return `copy`: the workdir as a kill after the save of `step` left it."""
  shutil.copytree(workdir, copy)
  for folder in (copy / "checkpoints").iterdir():
    if int(folder.name) > step:
      shutil.rmtree(folder)
  with (copy / "metrics.jsonl").open("a") as file:
    file.write('{"step": 6, "los')
  return copy


def test_before_its_start_a_discriminator_does_nothing(trained):
  workdir = epath.Path(trained[0])
  run = setup.open_run(tokenizer_config(), workdir)
  checkpoints = store.Store(workdir, keep=1, read_only=True)
  fresh = run.program.init().adversary
  second, fourth = (run.restore(checkpoints, k).adversary for k in (2, 4))
  checkpoints.close()
  jax.tree.map(np.testing.assert_array_equal, second, fresh)
  assert fourth.real != 0.0
  moved = jax.tree.map(lambda a, b: bool((a != b).any()), fourth, fresh)
  assert all(jax.tree.leaves(moved.params))
  told = ["adversary_loss" in record for record in metrics(workdir)]
  assert told == [False] * 2 + [True] * 4


def test_resumed_tokenizer_equals_the_uninterrupted_one(trained, tmp_path):
  resumed = cut_back(trained[0], tmp_path / "again", step=2)
  loop.train(tokenizer_config(), resumed)
  jax.tree.map(
    np.testing.assert_array_equal, newest(resumed), newest(trained[0])
  )
  assert metrics(resumed) == metrics(trained[0])


def test_resumed_transformer_equals_the_uninterrupted_one(
  trained, tmp_path, capsys
):
  """It needs nothing outside its workdir: the tokenizer is in it."""
  resumed = cut_back(trained[1], tmp_path / "again", step=4)
  loop.train(var_config(tokenizer_path=""), resumed)
  assert f"{resumed} goes on from step 4 of 6\n" in capsys.readouterr().out
  for which in ("raw", "ema"):
    jax.tree.map(
      np.testing.assert_array_equal,
      newest(resumed, which),
      newest(trained[1], which),
    )
  assert metrics(resumed) == metrics(trained[1])
  assert [record["step"] for record in metrics(resumed)] == [1, 2, 3, 4, 5, 6]


def test_a_finished_run_does_nothing_more(trained):
  before = (trained[1] / "metrics.jsonl").read_bytes()
  loop.train(var_config(trained[0]), trained[1])
  assert (trained[1] / "metrics.jsonl").read_bytes() == before


def test_ema_and_raw_weights_differ(trained):
  differences = jax.tree.map(
    lambda a, b: np.abs(a - b).max(),
    newest(trained[1], "ema"),
    newest(trained[1], "raw"),
  )
  assert max(jax.tree.leaves(differences)) > 0


def test_the_tokenizer_in_a_transformer_workdir_is_the_averaged_one(trained):
  _, tokenizer, _ = weights.read_models(trained[1])
  jax.tree.map(
    np.testing.assert_array_equal, tokenizer, newest(trained[0], "ema")
  )


def test_the_checkpoint_knows_the_next_sample_position(trained):
  path = trained[1] / "checkpoints" / "4" / "data" / "metadata"
  assert json.loads(path.read_text()) == {"position": 4 * 8}


@pytest.mark.parametrize(
  "change, message",
  [
    (("model.depth", 3), "model.depth is 2 there and 3 here"),
    (("seed", 1), "seed is 0 there and 1 here"),
    (("data.batch_size", 4), "data.batch_size is 8 there and 4 here"),
  ],
)
def test_a_workdir_of_another_config_is_an_error(trained, change, message):
  config = var_config(trained[0])
  config.update_from_flattened_dict({change[0]: change[1]})
  before = sorted(trained[1].rglob("*"))
  with pytest.raises(ValueError, match=message):
    loop.train(config, trained[1])
  assert sorted(trained[1].rglob("*")) == before


def test_how_often_to_log_may_change(trained):
  config = var_config(trained[0])
  config.log_every = 3
  loop.train(config, trained[1])


@pytest.mark.parametrize(
  "key, value, message",
  [
    ("kind", "gan", "kind 'gan' is not known"),
    ("steps", 0, "steps 0 is below 1"),
    ("ema_decay", 1.0, "ema_decay 1.0 is not in"),
    ("data.batch_size", 0, "data.batch_size 0 is below 1"),
    ("seed", -1, "seed -1 is not in 0"),
    ("optimizer.clip_norm", -1.0, "clip_norm -1.0 is negative"),
    ("optimizer.warmup_fraction", 1.0, "warmup_fraction 1.0 is not in"),
    ("model.drop_path", 1.0, "drop_path 1.0 is not in"),
    ("loss.label_dropout", 1.5, "label_dropout 1.5 is not in"),
    ("tokenizer_path", "", "tokenizer_path is empty"),
    ("tokenizer_path", "/nothing/here", "does not exist"),
    ("data.source", "digitz", "digitz"),
    ("data.transform", "blur", "blur"),
    ("optimizer.schedule", "zigzag", "zigzag"),
    ("model.heads", 3, "width 128 is not divisible by 3 heads"),
    ("model.heads", 0, "heads 0 is below 1"),
    ("model.dtype", "float8", "dtype 'float8' is not known"),
  ],
)
def test_a_config_that_makes_no_sense_leaves_nothing(
  trained, tmp_path, key, value, message
):
  config = var_config(trained[0])
  config.update_from_flattened_dict({key: value})
  with pytest.raises(ValueError, match=message):
    loop.train(config, tmp_path / "new")
  assert not (tmp_path / "new").exists()


def test_a_config_without_a_key_is_an_error(trained, tmp_path):
  config = var_config(trained[0])
  with config.unlocked():
    del config.kind
  with pytest.raises(ValueError, match="the config has no kind"):
    loop.train(config, tmp_path / "new")


def test_a_copy_that_an_interrupted_start_left_is_replaced(trained, tmp_path):
  """Without config.json nothing says what a tokenizer/ in the workdir is."""
  shutil.copytree(trained[1] / "tokenizer", tmp_path / "tokenizer")
  stale = tmp_path / "tokenizer" / "config.json"
  stale.write_text("{}")
  config = var_config(trained[0], steps=1)
  loop.train(config, tmp_path)
  jax.tree.map(
    np.testing.assert_array_equal,
    weights.read_models(tmp_path)[1],
    newest(trained[0], "ema"),
  )


def test_an_unknown_field_is_named(trained, tmp_path):
  config = var_config(trained[0])
  with config.unlocked():
    config.model.depht = 3
  with pytest.raises(ValueError, match="depht"):
    loop.train(config, tmp_path / "new")


def test_every_preset_builds_its_dataclasses():
  from var_jax.models.tokenizer import TokenizerConfig
  from var_jax.models.transformer import VARConfig

  for name in tokenizer_presets.PRESETS:
    config = tokenizer_presets.get_config(name)
    TokenizerConfig(**config.model)
    assert isinstance(config, ml_collections.ConfigDict)
    checks.check_config(config)
  for name in var_presets.PRESETS:
    config = var_presets.get_config(name)
    cfg = VARConfig(**config.model)
    small = name in ("fashion32", "emoji64")
    assert cfg.width == (32 if small else 64) * cfg.depth
    programs.optimizer(config)
    checks.check_config(config)


def test_published_recipes_are_the_published_numbers():
  d16, d30 = (var_presets.get_config(name) for name in ("d16", "d30"))
  assert d16.steps == 200 * 1669
  assert round(d16.optimizer.warmup_fraction * d16.steps) == 4 * 1669
  assert d30.data.batch_size == 1024
  assert d30.optimizer.weight_decay_end == 0.08
  assert d30.model.drop_path == 0.125


def test_a_cut_line_of_the_log_is_dropped(tmp_path):
  path = tmp_path / "metrics.jsonl"
  path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"st')
  assert report._lines_up_to(path, 2) == ['{"step": 1}\n', '{"step": 2}\n']
