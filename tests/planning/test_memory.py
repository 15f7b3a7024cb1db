"""State and batch against real arrays, peaks against the compiler's."""

import json
import pathlib

import jax
import numpy as np
import pytest

from configs import tokenizer as tokenizer_presets
from configs import var as var_presets
from var_jax.models.tokenizer import TokenizerConfig
from var_jax.parallel import mesh as mesh_lib
from var_jax.planning import compiling, memory, topology
from var_jax.planning.asked import Asked
from var_jax.training import loop, setup
from var_jax.training.var_training import VARTraining

TINY = {**tokenizer_presets.get_config("tiny").model, "dtype": "float32"}


def training(batch=16, **model):
  config = var_presets.get_config("tiny")
  config.data.batch_size = batch
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


def test_a_state_is_its_arrays():
  planned = training(depth=3)
  state = planned.placed(planned.fresh)
  arrays = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
  assert memory.state_bytes(planned, planned.mesh) == arrays


def test_the_estimate_follows_what_is_asked():
  planned = training(batch=4096, depth=12, remat="full")
  mesh = planned.mesh
  full = memory.estimate(planned, mesh)
  dots = memory.estimate(planned, mesh, remat="dots")
  everything = memory.estimate(planned, mesh, remat="none")
  assert full.peak < dots.peak < everything.peak
  assert full.state == dots.state and full.batch == dots.batch
  parts = memory.estimate(planned, mesh, accumulate=4)
  fewer = memory.estimate(planned, mesh, batch=1024)
  assert parts.activations < full.activations
  assert fewer.batch == full.batch / 4 < parts.batch
  with pytest.raises(ValueError, match="batch 4096 in 3 parts"):
    memory.estimate(planned, mesh, accumulate=3)


def test_parameters_have_their_names():
  shapes = memory.parameter_shapes(training(depth=3))
  assert shapes["blocks/ffn/fc1/kernel"] == (3, 256, 1024)
  assert shapes["head/bias"] == (32,)
  assert np.prod(shapes["class_emb"]) == 11 * 256


def peaks():
  path = pathlib.Path(__file__).with_name("peaks.json")
  for row in json.loads(path.read_text()):
    name = f"{row['preset']} {row['slices']}x{row['topology']} {row['mesh']}"
    yield pytest.param(row, id=f"{name} {row['changes'] or ''}")


@pytest.mark.parametrize("row", list(peaks()))
def test_an_estimate_is_within_a_tenth_of_the_compiler_s_peak(row, monkeypatch):
  """The compiler's words are kept; compiling again takes minutes each.

  What is below a hundredth of the smallest chip's memory does not count.
  """
  pytest.importorskip("libtpu")
  for name in topology.ALONE:
    monkeypatch.setenv(name, "")
  topology.use_no_tpu()
  config = var_presets.get_config(row["preset"])
  config.update_from_flattened_dict(row["changes"])
  slices = topology.Topology(row["topology"], row["slices"])
  asked = Asked(config, slices)
  mesh = asked.mesh(mesh_lib.parse(row["mesh"]))
  found = memory.estimate(asked.training(mesh), mesh)
  assert found.peak == pytest.approx(row["peak"], rel=0.1, abs=0.15 * 2**30)
  given = found.state + found.frozen + found.batch
  assert given == pytest.approx(row["arguments"], rel=0.05)
