"""What is split over a mesh is what one device computes.

The programs of real runs, on 8 fake devices in a process of its own, and on 4
of two processes.
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
  "data=2,fsdp=2,model=2",
  "slices=2,data=2,fsdp=2",
)
DRAWN = ("tokens", "edited", "tokens_streamed", "tokens_again")
# Of two processes with two devices each: rows and parameters are split over
# processes, heads within one.
SEVERAL = "fsdp=2,model=2"
IN_EACH = tuple(f"{SEVERAL}@{process}" for process in range(2))


def run_on(folder, devices, *meshes, processes=1):
  environment = os.environ | {
    # Most of the time is compiling: no faster program is worth it here.
    "XLA_FLAGS": "--xla_backend_optimization_level=0",
    "DEVICES": str(devices),
    "VAR_JAX": sys.executable,
    "JAX_PLATFORMS": "cpu",
    "PYTHONPATH": str(ROOT),
  }
  if processes > 1:
    # Programs of several processes are not looked for among kept ones.
    environment.pop("JAX_COMPILATION_CACHE_DIR", None)
  script = pathlib.Path(__file__).with_name("run_on_meshes.py")
  launcher = [ROOT / "launch" / "local.sh", str(processes)]
  subprocess.run(
    [*launcher, script, folder, *meshes], check=True, env=environment
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
  loop.train(config, folder / "trained")
  return results(folder, config)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
  """Results of a tokenizer's run, by mesh."""
  folder = tmp_path_factory.mktemp("tokenizer")
  config = tokenizer_presets.get_config("tiny")
  config.data.batch_size = 16
  config.eval_every, config.eval_samples = 1, 20
  config.loss.update(kmeans_rounds=2, scale_dropout=0.3)
  config.adversary.update(
    weight=0.1, lecam=0.1, channels=8, layers=2, norm_groups=4
  )
  return results(folder, config, MESHES[-2:])


def results(folder, config, meshes=MESHES):
  (folder / "config.json").write_text(config.to_json())
  run_on(folder, 1, "data=1")
  run_on(folder, 8, *meshes)
  run_on(folder, 2, SEVERAL, processes=2)
  names = ("data=1", *meshes, *IN_EACH)
  return {name: dict(np.load(folder / f"{name}.npz")) for name in names}


def check(found, expected, grads_within):
  """Assert that results are alike.

  Args:
    grads_within: of what the gradients' tolerance is 1e-5: "leaf" or "all".
  """
  undrawn = expected.keys() - found.keys()
  assert all(name.startswith("pictures/") for name in undrawn), undrawn
  for name, there in found.items():
    here = expected[name]
    kind = name.partition("/")[0]
    if kind in ("params", "record") or kind in DRAWN:
      np.testing.assert_array_equal(there, here, name)
    elif kind == "pictures":
      # Of 255 levels; what is near the middle of two may be rounded to either.
      assert there.shape == here.shape and there.dtype == np.uint8
      np.testing.assert_allclose(there, here, rtol=0, atol=1, err_msg=name)
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


@pytest.mark.parametrize("mesh", MESHES + IN_EACH)
def test_a_transformer_trains_evaluates_and_draws_alike(transformer, mesh):
  check(transformer[mesh], transformer["data=1"], "leaf")


@pytest.mark.parametrize("mesh", MESHES[-2:] + IN_EACH)
def test_a_tokenizer_trains_and_evaluates_alike(tokenizer, mesh):
  # Of a bias before a norm the gradient is what cancellation leaves.
  check(tokenizer[mesh], tokenizer["data=1"], "all")
