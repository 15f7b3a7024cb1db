"""Runs whose workdir is in a bucket, beside the same runs on a disk."""

import json

import jax
import numpy as np
import pytest
from etils import epath

import var_jax
from configs import tokenizer as tokenizer_presets
from configs import var as var_presets
from var_jax.checkpoints import weights
from var_jax.ledger.history import History
from var_jax.training import loop, report


def tokenizer_config(steps=2):
  config = tokenizer_presets.get_config("tiny")
  config.steps = steps
  config.data.batch_size = 8
  config.log_every = 1
  return config


def var_config(tokenizer_path, steps=4):
  config = var_presets.get_config("tiny")
  config.steps = steps
  config.tokenizer_path = str(tokenizer_path)
  config.data.batch_size = 8
  config.ema_decay = 0.9
  config.log_every, config.checkpoint_every = 1, 2
  return config


def train_both(root):
  loop.train(tokenizer_config(), f"{root}/tokenizer")
  loop.train(var_config(f"{root}/tokenizer"), f"{root}/var")


@pytest.fixture(scope="module")
def trained(bucket, tmp_path_factory):
  """Return (a folder, one in the bucket), with a tokenizer and a transformer."""
  disk, there = tmp_path_factory.mktemp("trained"), epath.Path(bucket) / "runs"
  train_both(disk)
  train_both(there)
  return epath.Path(disk), there


def metrics(workdir):
  lines = (workdir / "metrics.jsonl").read_text().splitlines()
  records = [json.loads(line) for line in lines]
  for record in records:
    for name in report.TIMING_KEYS:
      record.pop(name, None)
  return records


def names(folder, prefix=""):
  found = set()
  for path in folder.iterdir():
    if path.is_dir():
      found |= names(path, f"{prefix}{path.name}/")
    else:
      found.add(prefix + path.name)
  return found


def test_a_bucket_holds_what_a_disk_holds(trained):
  disk, there = trained
  def kept(workdir):
    return {n for n in names(workdir) if "ocdbt" not in n and "/d/" not in n and "tfevents" not in n}
  print(sorted(names(there / "var")))
  assert kept(there / "var") == kept(disk / "var")
