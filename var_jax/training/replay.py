"""Take a run's steps again and compare them, bit for bit, with its ledger.

A ledger says what a run did. This shows that it did: from the nearest kept
checkpoint the same code on the same data has to give the same batches, losses,
gradient norms and parameters. What differs is named, the cause where one is
known: code, config, data (and which sample) or environment.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import ml_collections
import numpy as np
from etils import epath

from var_jax.checkpoints import store
from var_jax.checkpoints.description import Description
from var_jax.ledger import checksum, digests, provenance
from var_jax.ledger.history import History
from var_jax.training import checks, setup


@dataclasses.dataclass(frozen=True)
class Verdict:
  """Of one step."""

  step: int
  differs: tuple[str, ...]  # a line each; empty: equal, bit for bit
  number: int  # of the ledger's record


class Replay:
  """A part of a run, ready to be taken again. Writes nothing.

  Args:
    first, last: steps, both taken.

  Raises:
    ValueError: the ledger is not what was written, has no such steps, or
      there is nothing to start from.
  """

  def __init__(self, workdir: epath.PathLike, first: int, last: int):
    self.workdir = checks.folder(workdir)
    there = Description.read(self.workdir)
    self.history = History.read(self.workdir / "ledger.jsonl")
    self._check_steps(first, last)
    self.first, self.last = first, last
    start = self.history.start_of(self.history.steps[first])
    self.recorded = start["provenance"]
    config = checks.completed(self.recorded["config"])
    checks.check_config(config)  # may be of an earlier version
    # Nothing is evaluated, so what evaluations need may be elsewhere.
    config.eval_every, config.inception_path = 0, ""
    if "draws" in config:
      config.draws.count = 0
    self.run = setup.open_run(_tuples(config), self.workdir)
    self.causes = _causes(self, there)

  def verdicts(self) -> Iterator[Verdict]:
    """Yield a verdict a step, from `first` to `last`."""
    run, history = self.run, self.history
    start, state = self._state_before(self.first)
    feed = run.feed(start)
    kept = {}  # states that a rollback goes back to, on the host
    rollbacks = {r["step"]: r["to_step"] for r in history.rollbacks}
    try:
      for step in range(start + 1, self.last + 1):
        if step - 1 in rollbacks.values():
          kept[step - 1] = jax.device_get(state)
        state, metrics = run.take(state, feed.take(), step)
        bits = checksum.param_checksum(state.params)
        if step >= self.first:
          yield self._verdict(step, jax.device_get(metrics), bits)
        if step in rollbacks:
          state = self._rolled_back(kept, rollbacks[step], step)
    finally:
      feed.close()

  def _check_steps(self, first: int, last: int) -> None:
    steps = self.history.steps
    if not 1 <= first <= last:
      raise ValueError(
        f"steps {first}..{last} are no range; count from 1, --from first."
      )
    missing = [s for s in range(first, last + 1) if s not in steps]
    if missing:
      raise ValueError(
        f"the ledger of {self.workdir} has no step {missing[0]}, its last is "
        f"{max(steps, default=0)}; ask for steps that were taken."
      )

  def _state_before(self, first: int):
    """Return the nearest kept step before `first`, and its state."""
    steps = [s for s in store.all_steps(self.workdir) if s < first]
    if not steps:
      return 0, self.run.fresh()
    checkpoints = store.Store(self.workdir, keep=1, read_only=True)
    try:
      return max(steps), self.run.restore(checkpoints, max(steps))
    finally:
      checkpoints.close()

  def _rolled_back(self, kept: dict, to: int, step: int):
    if to not in kept:
      raise ValueError(
        f"step {step} went back to step {to}, which comes before the first "
        f"checkpoint that is kept; replay from {step + 1} on, or up to {step}."
      )
    return self.run.at_step(jax.device_put(kept[to], self.run.replicated), step)

  def _verdict(self, step: int, metrics, bits) -> Verdict:
    """Compare a step with the record that counts."""
    record = self.history.steps[step]
    batch = metrics["record"]
    differs = []
    if digests.batch_digest(batch) != record["batch_digest"]:
      differs.append(self._batch_difference(batch, record))
    here = {name: float(metrics[name]) for name in ("loss", "grad_norm")}
    here["skipped"] = metrics["skipped"]
    if "checksum" in record:
      here["checksum"] = checksum.as_hex(jax.device_get(bits))
    for name, value in here.items():
      if not _same(record[name], value):
        differs.append(f"{name} {record[name]} in the ledger, {value} here")
    return Verdict(step, tuple(differs), record["number"])

  def _batch_difference(self, batch, record) -> str:
    changed = self.history.changed(batch, record["number"])
    if not changed:
      return (
        "the batch: the samples are the same, what the model was shown of "
        "them is not (order, augmentation or labels)"
      )
    names = [
      f"{change.index} ({self.run.source.name_of(change.index)})"
      for change in changed
    ]
    return f"data: sample {', '.join(names)} is not what it was"


def _causes(replay: Replay, there: Description) -> list[str]:
  """Return what is known to differ before a step is taken, a line each."""
  here = provenance.describe(replay.recorded["config"], replay.run.mesh)
  causes = provenance.differences(replay.recorded, here)
  newest = replay.history.starts[-1]["provenance"]["config"]
  for change in checks.config_changes(newest, there.config):
    causes.append(f"config: {change} (ledger, then config.json)")
  for start in replay.history.starts:
    if replay.first <= start["step"] < replay.last:
      causes += [
        f"{change} in the run itself, from step {start['step'] + 1} on"
        for change in provenance.differences(
          replay.recorded, start["provenance"]
        )
      ]
  return causes + [str(twice) for twice in replay.history.contradictions]


def _same(recorded: Any, here: Any) -> bool:
  if isinstance(here, str):
    return recorded == here
  # JSON has no NaN: the ledger holds it as a string.
  return np.array_equal(float(recorded), float(here), equal_nan=True)


def _tuples(config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
  """Turn the lists that JSON made of tuples back, in place."""
  for name, value in config.items():
    if isinstance(value, ml_collections.ConfigDict):
      _tuples(value)
    elif isinstance(value, list):
      config[name] = tuple(value)
  return config
