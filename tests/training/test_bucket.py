"""A run whose workdir is in a bucket, beside the same run on a disk.

The bucket is `bucket_server.py`: no real one was ever reached.
"""

import json
import os
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from etils import epath

from configs import tokenizer as tokenizer_presets
from configs import var as var_presets
from var_jax import api, cli, files, images
from var_jax.checkpoints import store, weights
from var_jax.ledger.history import History
from var_jax.training import loop, report
from var_jax.training.tensorboard import EventFile

VAR_STEPS = 6


def tokenizer_config():
  config = tokenizer_presets.get_config("tiny")
  config.steps = 2
  config.data.batch_size = 8
  config.ema_decay = 0.0  # half the objects
  return config


VAR_SETTINGS = dict(
  steps=VAR_STEPS, ema_decay=0.0, log_every=1, checkpoint_every=2
)


def var_config(tokenizer_path):
  config = var_presets.get_config("tiny")
  config.update(VAR_SETTINGS)
  config.data.batch_size = 8
  config.tokenizer_path = str(tokenizer_path)
  return config


def train_until_killed(workdir, tokenizer_path, log):
  """Kill a run of `var_config` when its step 2 is kept: most likely in a save."""
  settings = {
    **VAR_SETTINGS,
    "data.batch_size": 8,
    "tokenizer_path": tokenizer_path,
  }
  flags = [f"--config.{name}={value}" for name, value in settings.items()]
  command = ["train", "--config", "configs/var.py:tiny", "--workdir", workdir]
  with open(log, "w") as output:
    run = subprocess.Popen(
      [sys.executable, "-m", "var_jax.cli", *map(str, command), *flags],
      stdout=output,
      stderr=output,
    )
  while not store.all_steps(workdir):
    assert run.poll() is None, log.read_text()
    time.sleep(0.05)
  run.kill()
  assert run.wait() == -signal.SIGKILL


@pytest.fixture(scope="module")
def trained(bucket, tmp_path_factory):
  """Return (a folder, one in the bucket), each with a tokenizer and a VAR.

  The run in the bucket was killed once.
  """
  disk = epath.Path(tmp_path_factory.mktemp("trained"))
  there = files.absolute(f"{bucket}/runs")
  for root in (disk, there):
    loop.train(tokenizer_config(), root / "tokenizer")
    if root is there:
      log = tmp_path_factory.mktemp("killed") / "log"
      train_until_killed(root / "var", root / "tokenizer", log)
    loop.train(var_config(root / "tokenizer"), root / "var")
  return disk, there


def content(folder, prefix=""):
  """Return the names of all files, those of arrays and events left out."""
  found = set()
  for path in folder.iterdir():
    name = prefix + path.name
    if not path.is_dir():
      found.add(name)
    elif path.name not in ("d", "ocdbt.process_0", "tensorboard"):
      found |= content(path, f"{name}/")
  return found


def metrics(workdir):
  lines = (workdir / "metrics.jsonl").read_text().splitlines()
  records = [json.loads(line) for line in lines]
  for record in records:
    for name in report.TIMING_KEYS:
      record.pop(name, None)
  return records


def steps(workdir):
  """Return what the ledger says of each step, but for its place in it."""
  history = History.read(workdir / "ledger.jsonl")
  assert not history.contradictions
  return [{**record, "number": None} for record in history.steps.values()]


def test_a_bucket_holds_what_a_disk_holds(trained):
  disk, there = trained
  for name in ("tokenizer", "var"):
    assert content(there / name) == content(disk / name)
    checkpoints = f"{name}/checkpoints"
    assert content(there / checkpoints) == content(disk / checkpoints)


def test_a_killed_run_in_a_bucket_ends_as_one_on_a_disk(trained):
  disk, there = trained
  assert metrics(there / "var") == metrics(disk / "var")
  assert steps(there / "var") == steps(disk / "var")
  assert len(steps(there / "var")) == VAR_STEPS
  starts = History.read(there / "var" / "ledger.jsonl").starts
  assert [start["step"] for start in starts][0] == 0
  assert starts[1]["step"] in (2, 4)
  jax.tree.map(
    np.testing.assert_array_equal,
    *(weights.read_models(root / "var")[1:] for root in trained),
  )
