"""Traces begin and end with whole steps."""

import gzip
import json

import jax
import jax.numpy as jnp
import pytest

from configs import tokenizer as presets
from var_jax import cli
from var_jax.ledger.history import History
from var_jax.training import loop
from var_jax.training.profiling import Profiler


@pytest.fixture
def calls(monkeypatch):
  """What the profiler of JAX was told, in order."""
  told = []
  monkeypatch.setattr(
    jax.profiler, "start_trace", lambda folder: told.append("start")
  )
  monkeypatch.setattr(jax.profiler, "stop_trace", lambda: told.append("stop"))
  return told


def take(profiler, steps, calls):
  for step in steps:
    with profiler.step(step, ()):
      calls.append(step)
  profiler.close()


@pytest.mark.parametrize(
  "steps, of_run, expected",
  [
    ((2, 3), range(1, 6), [1, "start", 2, 3, "stop", 4, 5]),
    ((1, 1), range(1, 3), ["start", 1, "stop", 2]),
    ((4, 9), range(3, 6), [3, "start", 4, 5, "stop"]),
    ((2, 6), range(5, 8), ["start", 5, 6, "stop", 7]),
    ((2, 3), range(7, 9), [7, 8]),
    (None, range(0, 3), [0, 1, 2]),
  ],
)
def test_the_steps_that_were_asked_for_are_traced(
  tmp_path, calls, steps, of_run, expected
):
  take(Profiler(tmp_path, steps), of_run, calls)
  assert calls == expected


def test_other_processes_trace_nothing(tmp_path, calls, monkeypatch):
  monkeypatch.setattr(jax, "process_index", lambda: 1)
  take(Profiler(tmp_path, (1, 2)), range(1, 4), calls)
  assert calls == [1, 2, 3]


def test_a_trace_has_the_steps_by_number(tmp_path):
  profiler = Profiler(tmp_path / "profile", (2, 3))
  state = jnp.ones(4)
  for step in range(1, 5):
    with profiler.step(step, state):
      state = jnp.sin(state)
  profiler.close()
  (path,) = tmp_path.rglob("*.trace.json.gz")
  events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
  steps = [e["args"] for e in events if e.get("name") == "train"]
  assert sorted(int(args["step_num"]) for args in steps) == [2, 3]
  assert list(tmp_path.rglob("*.xplane.pb"))


def test_a_run_traces_the_steps_that_are_asked_for(tmp_path):
  config = presets.get_config("tiny")
  config.steps, config.data.batch_size = 3, 4
  loop.train(config, tmp_path / "run", profile=(2, 2))
  assert list((tmp_path / "run" / "profile").rglob("*.xplane.pb"))
  told = History.read(tmp_path / "run" / "ledger.jsonl")
  assert list(told.steps) == [1, 2, 3]


def test_a_range_of_steps_that_makes_no_sense_is_a_usage_error(capsys):
  for wrong in ("5", "0:3", "7:5", "a:b"):
    command = ["train", "--config", "x", "--workdir", "y", "--profile", wrong]
    assert cli.main(command) == 2
    assert f"'{wrong}' is not FROM:TO" in capsys.readouterr().err
