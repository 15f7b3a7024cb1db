"""State and batch to the byte; the rest is held by docs/pods.md's table."""

import jax
import numpy as np
import pytest

from configs import tokenizer as tokenizer_presets
from configs import var as var_presets
from var_jax.models.tokenizer import TokenizerConfig
from var_jax.parallel import mesh as mesh_lib
from var_jax.planning import compiling, memory
from var_jax.training import loop, setup
from var_jax.training.var_training import VARTraining

TINY = {**tokenizer_presets.get_config("tiny").model, "dtype": "float32"}


def training(**model):
  config = var_presets.get_config("tiny")
  config.model.update(width=256, heads=4, **model)
  mesh = mesh_lib.make_mesh(devices=jax.devices()[:1])
  return VARTraining.of(config, mesh, TokenizerConfig(**TINY), 10)


def test_a_batch_is_taken_for_what_the_devices_are_fed(tmp_path):
  tokenizer = tokenizer_presets.get_config("tiny")
  tokenizer.steps, tokenizer.data.batch_size = 1, 4
  loop.train(tokenizer, tmp_path / "tokenizer")
  config = var_presets.get_config("tiny")
  config.tokenizer_path = str(tmp_path / "tokenizer")
  run = setup.open_run(config, tmp_path / "run")
  feed = run.feed(0)
  batch = feed.take()
  feed.close()
  planned = VARTraining.of(config, run.mesh, TokenizerConfig(**TINY), 10)
  like = compiling.batch_like(planned)
  assert like.keys() == batch.keys()
  for name, array in batch.items():
    told = like[name]
    assert (told.shape, told.sharding) == (array.shape, array.sharding), name
    assert told.dtype == array.dtype, name


def test_a_state_takes_its_arrays_in_tiles():
  planned = training(depth=3)
  whole = memory.state_bytes(planned, planned.mesh)
  arrays = sum(4 * leaf.size for leaf in jax.tree.leaves(planned.like))
  assert arrays <= whole < 1.2 * arrays


def test_the_estimate_follows_what_is_asked():
  planned = training(depth=12, remat="full")
  mesh = planned.mesh
  full = memory.estimate(planned, mesh)
  dots = memory.estimate(planned, mesh, remat="dots")
  everything = memory.estimate(planned, mesh, remat="none")
  assert full.peak < dots.peak < everything.peak
  assert full.state == dots.state and full.batch == dots.batch
  # 21 tokens of 16 rows, 12 layers, the stream in float32.
  assert full.saved == 12 * 21 * 16 * 4 * 256
  parts = memory.estimate(planned, mesh, accumulate=4)
  assert parts.saved == full.saved / 4
  with pytest.raises(ValueError, match="batch 16 in 3 parts"):
    memory.estimate(planned, mesh, accumulate=3)


def test_parameters_have_their_names():
  shapes = memory.parameter_shapes(training(depth=3))
  assert shapes["blocks/ffn/fc1/kernel"] == (3, 256, 1024)
  assert shapes["head/bias"] == (32,)
  assert np.prod(shapes["class_emb"]) == 11 * 256
