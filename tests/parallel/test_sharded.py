"""What is split over a mesh is what one device computes.

The programs of real runs, on 8 fake devices in a process of its own.
"""

import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from configs import tokenizer as tokenizer_presets
from configs import var as var_presets
from var_jax.training import loop

ROOT = pathlib.Path(__file__).parents[2]
MESHES = (
  "data=8",
  "fsdp=8",
  "model=4",
  "data=2,fsdp=2,model=2",
  "slices=2,data=2,fsdp=2",
)


def run_on(folder, devices, *meshes):
  environment = os.environ | {
    # Most of the time is compiling: no faster program is worth it here.
    "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices} "
    "--xla_backend_optimization_level=0",
    "JAX_PLATFORMS": "cpu",
    "PYTHONPATH": str(ROOT),
  }
  script = pathlib.Path(__file__).with_name("run_on_meshes.py")
  subprocess.run(
    [sys.executable, script, folder, *meshes], check=True, env=environment
  )


@pytest.fixture(scope="module")
def transformer(tmp_path_factory):
  """Results of a transformer's run, by mesh."""
  folder = tmp_path_factory.mktemp("transformer")
  tokenizer = tokenizer_presets.get_config("tiny")
  tokenizer.steps, tokenizer.data.batch_size = 1, 4
  loop.train(tokenizer, folder / "tokenizer")
  config = var_presets.get_config("tiny")
  config.tokenizer_path = str(folder / "tokenizer")
  config.model.update(depth=2, width=64, heads=4, dropout=0.1, drop_path=0.2)
  config.ema_decay = 0.9
  config.accumulate = 2
  config.data.batch_size = 16
  config.eval_every, config.eval_samples = 1, 20
  config.steps = 1
  config.pictures = 0
  loop.train(config, folder / "trained")
  return results(folder, config)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
  """Results of a tokenizer's run, by mesh."""
  folder = tmp_path_factory.mktemp("tokenizer")
  config = tokenizer_presets.get_config("tiny")
  config.data.batch_size = 16
  config.eval_every, config.eval_samples = 1, 20
  return results(folder, config, MESHES[-2:])


def results(folder, config, meshes=MESHES):
  (folder / "config.json").write_text(config.to_json())
  run_on(folder, 1, "data=1")
  run_on(folder, 8, *meshes)
  return {
    mesh: dict(np.load(folder / f"{mesh}.npz")) for mesh in ("data=1", *meshes)
  }


def check(found, expected, grads_within):
  """Assert that results are alike.

  Args:
    grads_within: of what the gradients' tolerance is 1e-5: "leaf" or "all".
  """
  assert found.keys() == expected.keys()
  for name, here in expected.items():
    there = found[name]
    kind = name.partition("/")[0]
    if kind in ("params", "record", "tokens", "edited"):
      np.testing.assert_array_equal(there, here, name)
    elif kind == "grads":
      scale = (
        np.abs(here).max() if grads_within == "leaf" else largest(expected)
      )
      assert np.abs(there - here).max() <= 1e-5 * scale, name
    elif "loss" in name:
      np.testing.assert_allclose(there, here, rtol=1e-6, err_msg=name)
    else:
      scale = np.abs(here).max()
      np.testing.assert_allclose(there, here, atol=2e-5 * scale, err_msg=name)


def largest(found):
  return max(np.abs(v).max() for k, v in found.items() if k.startswith("grads"))


@pytest.mark.parametrize("mesh", MESHES)
def test_a_transformer_trains_evaluates_and_draws_alike(transformer, mesh):
  check(transformer[mesh], transformer["data=1"], "leaf")


@pytest.mark.parametrize("mesh", MESHES[-2:])
def test_a_tokenizer_trains_and_evaluates_alike(tokenizer, mesh):
  # Of a bias before a norm the gradient is what cancellation leaves.
  check(tokenizer[mesh], tokenizer["data=1"], "all")
