"""A run goes on with other numbers of devices and processes.

Forty steps on 8 devices; resumed at 10 on 4, at 20 on 2 processes of 2 each,
at 30 on 1. Trained from cached tokens: where an encoder runs on other shapes a
token at a tie could differ.
"""

import json
import os
import pathlib
import shutil
import socket
import subprocess
import sys

import numpy as np
import pytest

from configs import tokenizer as tokenizer_presets
from configs import var as var_presets
from var_jax.ledger import history
from var_jax.training import caching, loop

SCRIPT = pathlib.Path(__file__).parents[1] / "elastic_run.py"
ROOT = SCRIPT.parents[1]


@pytest.fixture(scope="module")
def config(tmp_path_factory):
  """The config of a run on cached tokens, as a file."""
  folder = tmp_path_factory.mktemp("elastic")
  tokenizer = tokenizer_presets.get_config("tiny")
  tokenizer.steps, tokenizer.data.batch_size = 1, 4
  loop.train(tokenizer, folder / "tokenizer")
  config = var_presets.get_config("tiny,cached")
  config.tokenizer_path = str(folder / "tokenizer")
  config.data.token_cache = str(folder / "cache")
  config.data.cache_crops = 2
  config.data.batch_size = 16
  config.model.update(depth=2, width=32, heads=2, dropout=0.1)
  config.ema_decay = 0.9
  config.steps, config.checkpoint_every, config.keep_checkpoints = 40, 10, 10
  config.log_every = 1
  caching.build(config, folder / "cache")
  path = folder / "config.json"
  path.write_text(config.to_json())
  return path


def train(config, workdir, devices, processes=1):
  """Train in new processes; raise if one fails."""
  environment = os.environ | {
    "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
    "JAX_PLATFORMS": "cpu",
    "PYTHONPATH": str(ROOT),
  }
  # Programs of several processes are not looked for among kept ones.
  several = [[]]
  if processes > 1:
    del environment["JAX_COMPILATION_CACHE_DIR"]
    with socket.socket() as free:
      free.bind(("127.0.0.1", 0))
      port = free.getsockname()[1]
    several = [[str(i), str(processes), str(port)] for i in range(processes)]
  started = [
    subprocess.Popen(
      [sys.executable, str(SCRIPT), str(config), str(workdir), *arguments],
      env=environment,
      stdout=subprocess.PIPE,
      stderr=subprocess.STDOUT,
      text=True,
    )
    for arguments in several
  ]
  for process in started:
    output, _ = process.communicate(timeout=600)
    assert process.returncode == 0, output[-4000:]


def cut_back(workdir, copy, step):
  """Return `copy`: the workdir as a kill right after a save left it."""
  shutil.copytree(workdir, copy)
  for folder in (copy / "checkpoints").iterdir():
    if int(folder.name) > step:
      shutil.rmtree(folder)
  return copy


def test_a_run_goes_on_with_other_devices_and_processes(config, tmp_path):
  whole = tmp_path / "on8"
  train(config, whole, devices=8)
  at10 = cut_back(whole, tmp_path / "on4", 10)
  train(config, at10, devices=4)
  at20 = cut_back(at10, tmp_path / "on2x2", 20)
  train(config, at20, devices=2, processes=2)
  at30 = cut_back(at20, tmp_path / "on1", 30)
  train(config, at30, devices=1)

  expected, told = (
    history.History.read(folder / "ledger.jsonl") for folder in (whole, at30)
  )
  assert [start["step"] for start in told.starts] == [0, 10, 20, 30]
  shapes = [
    (
      s["provenance"]["devices"]["count"],
      s["provenance"]["devices"]["processes"],
    )
    for s in told.starts
  ]
  assert shapes == [(8, 1), (4, 1), (4, 2), (1, 1)]
  assert list(told.steps) == list(range(1, 41))
  for step, record in told.steps.items():
    there = expected.steps[step]
    # Positions, indices, labels and the tokens themselves.
    assert record["batch_digest"] == there["batch_digest"], step
    assert record["loss"] == pytest.approx(there["loss"], rel=1e-4), step
  losses = [record["loss"] for record in told.steps.values()]
  assert np.mean(losses[-5:]) < losses[0]
  config_json = json.loads((at30 / "config.json").read_text())
  assert config_json["class_names"] == [str(i) for i in range(10)]
