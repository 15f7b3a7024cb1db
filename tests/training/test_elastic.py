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

ROOT = pathlib.Path(__file__).parents[2]
CONFIG = """
import json, pathlib, ml_collections

def get_config():
  text = pathlib.Path(__file__).with_suffix(".json").read_text()
  return ml_collections.ConfigDict(json.loads(text))
"""


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
  path = folder / "config.py"
  path.write_text(CONFIG)
  path.with_suffix(".json").write_text(config.to_json())
  return path


def train(config, workdir, devices, processes=1, steps=40):
  """Train in new processes; raise if one fails."""
  environment = os.environ | {
    "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
    "JAX_PLATFORMS": "cpu",
  }
  several = [{}]
  if processes > 1:
    # Programs of several processes are not looked for among kept ones.
    environment.pop("JAX_COMPILATION_CACHE_DIR", None)
    with socket.socket() as free:
      free.bind(("127.0.0.1", 0))
      port = free.getsockname()[1]
    several = [
      {
        "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
        "JAX_NUM_PROCESSES": str(processes),
        "JAX_PROCESS_ID": str(i),
        "JAX_CPU_COLLECTIVES_IMPLEMENTATION": "gloo",
      }
      for i in range(processes)
    ]
  command = [sys.executable, "-m", "var_jax.cli", "train"]
  command += ["--config", str(config), "--workdir", str(workdir)]
  command += [f"--config.steps={steps}"]
  started = [
    subprocess.Popen(
      command,
      cwd=ROOT,
      env=environment | place,
      stdout=subprocess.PIPE,
      stderr=subprocess.STDOUT,
      text=True,
    )
    for place in several
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


def test_a_run_begins_on_two_processes_as_on_one_device(config, tmp_path):
  train(config, tmp_path / "two", devices=1, processes=2, steps=3)
  train(config, tmp_path / "one", devices=1, steps=3)
  told, expected = (
    history.History.read(tmp_path / name / "ledger.jsonl")
    for name in ("two", "one")
  )
  assert list(told.steps) == [1, 2, 3]
  for step, record in told.steps.items():
    there = expected.steps[step]
    assert record["batch_digest"] == there["batch_digest"], step
    assert record["loss"] == pytest.approx(there["loss"], rel=1e-4), step
  assert (tmp_path / "two" / "tokenizer" / "config.json").exists()


def test_a_process_that_knows_no_number_is_told(config, tmp_path):
  environment = os.environ | {"JAX_COORDINATOR_ADDRESS": "127.0.0.1:1"}
  done = subprocess.run(
    [sys.executable, "-m", "var_jax.cli", "train", "--config", str(config)]
    + ["--workdir", str(tmp_path / "run")],
    cwd=ROOT,
    env=environment,
    capture_output=True,
    text=True,
  )
  assert done.returncode == 1
  assert done.stderr.startswith("var-jax: JAX_NUM_PROCESSES is '' and")
