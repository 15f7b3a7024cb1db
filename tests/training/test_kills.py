"""SIGKILL at three moments, one inside a save; SIGTERM from outside."""

import random
import signal
import time

from benchmarks import kills
from var_jax.checkpoints import store
from var_jax.ledger.history import History

STEPS = 200  # more than it takes before the signal


def test_killed_runs_end_as_an_undisturbed_one_would(tmp_path):
  kills.compare(tmp_path, kills=3, rng=random.Random(0))


def test_sigterm_is_answered_with_a_save_and_143(tmp_path):
  workdir = tmp_path / "run"
  process = kills.start(workdir, tmp_path, STEPS)
  log = workdir / "metrics.jsonl"
  while not (log.exists() and log.read_text()):
    assert process.poll() is None, (tmp_path / "run.log").read_text()
    time.sleep(0.01)
  process.send_signal(signal.SIGTERM)
  assert process.wait() == 143
  told = History.read(workdir / "ledger.jsonl")
  assert store.latest_step(workdir) == max(told.steps) < STEPS
  lines = (tmp_path / "run.log").read_text().splitlines()
  assert lines[-1].startswith("var-jax: stopped by SIGTERM; step ")
