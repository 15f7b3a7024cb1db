"""A run goes on with other numbers of devices and processes.

Begun by `launch/local.sh` on 2 processes of 4 devices, the state split over
both, and killed. A copy is resumed on 1 process of 8 devices; another on 4 of
2, and once more on a single device. Trained from cached tokens: where an
encoder runs on other shapes a token at a tie could differ.
"""

import contextlib
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from configs import tokenizer as tokenizer_presets
from configs import var as var_presets
from var_jax.checkpoints import store
from var_jax.ledger import history
from var_jax.training import caching, loop

ROOT = pathlib.Path(__file__).parents[2]
STEPS, EVERY = 24, 8
CONFIG = """
import json, pathlib, ml_collections

def get_config():
  text = pathlib.Path(__file__).with_suffix(".json").read_text()
  return ml_collections.ConfigDict(json.loads(text))
"""
# Notes its id, which is that of its process group too.
PROGRAM = f"""#!/usr/bin/env bash
echo $$ >"$IDS/$JAX_PROCESS_ID"
exec {sys.executable} -m var_jax.cli "$@"
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
  config.steps = STEPS
  config.checkpoint_every, config.keep_checkpoints = EVERY, STEPS
  config.log_every = 1
  caching.build(config, folder / "cache")
  path = folder / "config.py"
  path.write_text(CONFIG)
  path.with_suffix(".json").write_text(config.to_json())
  return path


@pytest.fixture
def begin(config, tmp_path):
  """A function that starts local.sh on a run; what is left dies at the end."""
  program = tmp_path / "program"
  program.write_text(PROGRAM)
  program.chmod(0o755)
  started = []

  def start(workdir, processes, devices, mesh=()):
    ids_of(workdir).mkdir()
    environment = os.environ | {
      "VAR_JAX": str(program),
      "DEVICES": str(devices),
      "IDS": str(ids_of(workdir)),
      "JAX_PLATFORMS": "cpu",
      # Most of the time is compiling.
      "XLA_FLAGS": "--xla_backend_optimization_level=0",
    }
    if processes > 1:
      # Programs of several processes are not looked for among kept ones.
      environment.pop("JAX_COMPILATION_CACHE_DIR", None)
    command = ["train", "--config", config, "--workdir", workdir]
    command += [f"--config.mesh.{axis}" for axis in mesh]
    with (tmp_path / "log").open("a") as log:
      process = subprocess.Popen(
        [ROOT / "launch" / "local.sh", str(processes), *command],
        cwd=ROOT,
        env=environment,
        stdout=log,
        stderr=log,
        start_new_session=True,
      )
    started.append((process, workdir))
    return process

  yield start
  for process, workdir in started:
    if process.poll() is None:
      kill(process, workdir)


def ids_of(workdir):
  """Return the folder of the ids of a run's processes."""
  return workdir.with_name(f"{workdir.name}.ids")


def kill(launcher, workdir):
  """Kill the launcher, then its processes; return when none is left."""
  os.killpg(launcher.pid, signal.SIGKILL)
  launcher.wait()
  groups = [int(path.read_text()) for path in ids_of(workdir).iterdir()]
  for group in groups:
    with contextlib.suppress(ProcessLookupError):
      os.killpg(group, signal.SIGKILL)
  wanted = ",".join(map(str, groups))
  for _ in range(1000):
    states = subprocess.run(
      ["ps", "-o", "stat=", "-p", wanted], capture_output=True, text=True
    ).stdout.split()
    if all(state.startswith("Z") for state in states):
      return
    time.sleep(0.01)
  raise AssertionError(f"processes of {wanted} are still there: {states}")


@pytest.fixture
def train(begin, tmp_path):
  """A function that trains to the end."""

  def to_the_end(*run, **how):
    process = begin(*run, **how)
    code = process.wait(600)
    assert code == 0, (tmp_path / "log").read_text()[-4000:]

  return to_the_end


def test_a_killed_run_goes_on_with_other_devices_and_processes(
  begin, train, tmp_path
):
  killed, log = tmp_path / "on2x4", tmp_path / "log"
  launcher = begin(killed, 2, 4, mesh=("fsdp=4", "model=2"))
  deadline = time.monotonic() + 600
  while store.latest_step(killed) is None:
    trains = launcher.poll() is None and time.monotonic() < deadline
    assert trains, log.read_text()[-4000:]
    time.sleep(0.01)
  kill(launcher, killed)
  saved = store.latest_step(killed)
  assert saved <= max(told(killed).steps) < STEPS

  on8 = shutil.copytree(killed, tmp_path / "on1x8")
  train(on8, 1, 8)
  on4x2 = shutil.copytree(killed, tmp_path / "on4x2")
  train(on4x2, 4, 2, mesh=("data=2", "fsdp=2", "model=2"))
  on1 = cut_back(on4x2, tmp_path / "on1", 2 * EVERY)
  train(on1, 1, 1)
  whole = tmp_path / "whole"
  train(whole, 1, 8)

  compare(on8, whole, {0: (2, 8), saved: (1, 8)})
  compare(on4x2, whole, {0: (2, 8), saved: (4, 8)})
  compare(on1, whole, {0: (2, 8), saved: (4, 8), 2 * EVERY: (1, 1)})
  losses = [record["loss"] for record in told(whole).steps.values()]
  assert np.mean(losses[-5:]) < losses[0]
  config_json = json.loads((on8 / "config.json").read_text())
  assert config_json["class_names"] == [str(i) for i in range(10)]


def told(workdir):
  return history.History.read(workdir / "ledger.jsonl")


def cut_back(workdir, copy, step):
  """Return `copy`: the workdir as a kill right after a save left it."""
  shutil.copytree(workdir, copy)
  for folder in (copy / "checkpoints").iterdir():
    if int(folder.name) > step:
      shutil.rmtree(folder)
  return copy


def compare(workdir, whole, shapes):
  """Assert that two runs took the same steps.

  Args:
    shapes: (processes, devices) of each start, by its step.
  """
  found, expected = told(workdir), told(whole)
  devices = [start["provenance"]["devices"] for start in found.starts]
  assert [start["step"] for start in found.starts] == list(shapes)
  assert [(d["processes"], d["count"]) for d in devices] == [*shapes.values()]
  steps = list(range(1, STEPS + 1))
  assert list(found.steps) == steps
  with (workdir / "metrics.jsonl").open() as lines:  # one process wrote
    assert [json.loads(line)["step"] for line in lines] == steps
  for step, record in found.steps.items():
    there = expected.steps[step]
    # Positions, indices, labels and the tokens themselves.
    assert record["batch_digest"] == there["batch_digest"], step
    assert record["loss"] == pytest.approx(there["loss"], rel=1e-4), step


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
