"""A ledger's history: which records count after kills and rollbacks."""

import numpy as np
import pytest

from var_jax.ledger import records
from var_jax.ledger.history import History
from var_jax.ledger.records import Recorder


class Run:
  """A run of a single sample a step, killed and resumed at will."""

  def __init__(self, path):
    self.path, self.recorder = path, None

  def start(self, step, code="abc"):
    if self.recorder:
      self.recorder.close()
    self.recorder = Recorder(self.path, step, {"code": code}, position=step)

  def step(self, step, loss=1.0, raw=(5, 5), label=0, **values):
    one = {"index": 0, "position": step, "label": label}
    batch = {name: np.asarray([value]) for name, value in one.items()}
    for name in ("raw_digest", "digest"):
      batch[name] = np.asarray([raw], np.uint32)
    values = {"loss": loss, "grad_norm": 0.5, "skipped": False, **values}
    self.recorder.step(step, batch, values)

  def history(self):
    self.recorder.close()
    return History.read(self.path)


@pytest.fixture
def run(tmp_path):
  run = Run(tmp_path / "ledger.jsonl")
  run.start(0)
  return run


def test_the_last_record_of_a_step_counts(run):
  for step in (1, 2, 3, 4):
    run.step(step, loss=step)
  run.start(2)
  run.step(3, loss=30)
  history = run.history()
  losses = {step: r["loss"] for step, r in history.steps.items()}
  assert losses == {1: 1, 2: 2, 3: 30}  # step 4 led nowhere
  assert [start["step"] for start in history.starts] == [0, 2]


def test_a_record_knows_the_start_it_came_after(run):
  run.step(1)
  run.step(2)
  run.start(1, code="def")
  run.step(2)
  history = run.history()
  assert history.start_of(history.steps[1])["provenance"] == {"code": "abc"}
  assert history.start_of(history.steps[2])["provenance"] == {"code": "def"}


def test_a_rollback_that_a_resume_went_back_behind_does_not_count(run):
  for step in (1, 2, 3):
    run.step(step)
  run.recorder.rollback(2, 1)
  run.recorder.rollback(3, 1)
  run.start(2)
  run.step(3)
  history = run.history()
  pairs = [(r["step"], r["to_step"]) for r in history.rollbacks]
  assert pairs == [(2, 1)]
  assert list(history.steps) == [1, 2, 3]


@pytest.mark.parametrize(
  "name, first, second",
  [
    ("loss", {"loss": 1.0}, {"loss": 1.5}),
    ("loss", {"loss": 1.0}, {"loss": float("nan")}),
    ("grad_norm", {"grad_norm": 0.5}, {"grad_norm": 0.25}),
    ("skipped", {"skipped": False}, {"skipped": True}),
    ("checksum", {"checksum": "00"}, {"checksum": "01"}),
    ("batch_digest", {"label": 0}, {"label": 1}),
  ],
)
def test_a_step_that_differs_after_a_resume_is_a_contradiction(
  run, name, first, second
):
  run.step(1)
  run.step(2, **first)
  run.start(1)
  run.step(2, **second)
  (found,) = run.history().contradictions
  assert (found.step, found.name) == (2, name)
  # start, samples, step 1, step 2, start, step 2
  assert (found.first_number, found.second_number) == (4, 6)
  assert str(found).startswith(
    "step 2 was taken twice by the same code, config and devices, but "
    f"{name} was {found.first} (record 4), then {found.second} (record 6)"
  )


def test_a_step_that_is_the_same_after_a_resume_is_none(run):
  for values in ({}, {"checksum": "00"}, {"loss": float("nan")}):
    run.step(1, **values)
    run.step(2)
    run.start(0, code=str(values))
  assert run.history().contradictions == []
  run.start(0)
  run.step(1, loss=float("nan"))
  run.start(0)
  run.step(1, loss=float("nan"), checksum="00")
  assert run.history().contradictions == []


def test_a_step_that_two_kills_went_back_behind_is_still_compared(run):
  for step in (1, 2, 3):
    run.step(step)
  run.start(1)
  run.step(2)
  run.start(1)
  run.step(2)
  run.step(3, loss=7.0)
  assert [c.step for c in run.history().contradictions] == [3]


def test_other_code_may_give_other_numbers(run):
  run.step(1)
  run.start(0, code="def")
  run.step(1, loss=2.0)
  assert run.history().contradictions == []


def test_steps_after_other_rollbacks_are_not_compared(run):
  run.step(1)
  run.step(2)
  run.recorder.rollback(2, 1)
  run.step(3)
  run.step(4)
  run.start(0)
  run.step(1, loss=7.0)  # comes before it
  run.step(2)
  run.step(3, loss=7.0)  # this time nothing led back
  history = run.history()
  assert [c.step for c in history.contradictions] == [1]
  for loss in (1.0, 7.0):
    run.start(1)
    run.step(2)
    run.recorder.rollback(2, 1)
    run.step(3, loss=loss)
  assert [c.step for c in run.history().contradictions] == [1, 3]


def as_raw(pair):
  return "".join(f"{number:08x}" for number in pair)


def test_a_sample_is_known_as_it_was_at_each_step(run):
  raws = [(5, 5), (5, 5), (6, 5), (6, 5), (7, 5)]
  for step, raw in enumerate(raws, 1):
    run.step(step, raw=raw)
  history = run.history()
  for step, raw in enumerate(raws, 1):
    number = history.steps[step]["number"]
    assert history.raw_digest(0, number) == as_raw(raw)
  assert history.raw_digest(0) == as_raw((7, 5))
  assert history.raw_digest(1) is None
  assert [c["step"] for c in history.changed_samples] == [3, 5]


def test_a_batch_is_compared_with_the_samples_of_its_step(run):
  run.step(1, raw=(5, 5))
  run.step(2, raw=(6, 5))
  history = run.history()
  batch = {
    "index": np.asarray([0, 9]),  # 9 was never drawn
    "raw_digest": np.asarray([(6, 5), (1, 1)], np.uint32),
  }
  first, second = (history.steps[step]["number"] for step in (1, 2))
  assert history.changed(batch, first) == [(0, as_raw((5, 5)), as_raw((6, 5)))]
  assert history.changed(batch, second) == []


def test_a_history_of_records_is_that_of_their_file(run):
  run.step(1)
  history = run.history()
  assert History(records.read(run.path)).steps == history.steps
