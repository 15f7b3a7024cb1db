"""What the records of a ledger amount to after kills, resumes and rollbacks."""

import bisect
import os
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np

from var_jax.ledger import digests, records

# Of a step: what the same code, config, data and machine do not change.
_REPRODUCED = ("batch_digest", "loss", "grad_norm", "skipped", "checksum")


_Rollback = tuple[int, int]  # step, to_step


class Contradiction(NamedTuple):
  """A step that was taken twice, and not in the same way."""

  step: int
  name: str  # of the value that differs
  first: Any
  second: Any
  first_number: int  # of the record
  second_number: int

  def __str__(self) -> str:
    return (
      f"step {self.step} was taken twice by the same code, config and devices, "
      f"but {self.name} was {self.first} (record {self.first_number}), then "
      f"{self.second} (record {self.second_number})"
    )


class History:
  """A run as its ledger tells it.

  Attributes:
    steps: the record that counts of each step, in order; steps that a resume
      went back behind, and that were not taken again, are absent.
    rollbacks: the records that count, likewise.
    starts, changed_samples: all records of the kind.
    contradictions: of steps that were taken before a kill and after the resume
      by the same code, config and devices, after the same rollbacks.
  """

  def __init__(self, records: Iterable[Mapping[str, Any]]):
    self.steps: dict[int, Mapping[str, Any]] = {}
    self.starts: list[Mapping[str, Any]] = []
    self.rollbacks: list[Mapping[str, Any]] = []
    self.changed_samples: list[Mapping[str, Any]] = []
    self.contradictions: list[Contradiction] = []
    self._raw = digests.RawDigests()
    # Of each step, as it was taken last: the record and the rollbacks before.
    self._taken: dict[int, tuple[Mapping[str, Any], list[_Rollback]]] = {}
    for record in records:
      self._add(record)

  @classmethod
  def read(cls, path: os.PathLike | str) -> "History":
    """Return the history of a ledger file; raise as `records.records` does."""
    return cls(records.records(path))

  def start_of(self, record: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the start that `record` came after: its provenance."""
    numbers = [start["number"] for start in self.starts]
    return self.starts[bisect.bisect(numbers, record["number"]) - 1]

  def raw_digest(self, index: int, number: int | None = None) -> str | None:
    """Return the raw digest of a source sample, None if it was never seen.

    Args:
      number: of a record; as the sample was then, else as it was last.
    """
    digest = self._raw[index]
    for change in reversed(self.changed_samples):
      if number is None or change["number"] < number:
        break
      digest = change["old"] if change["index"] == index else digest
    return digest

  def changed(
    self, batch: Mapping[str, np.ndarray], number: int
  ) -> list[digests.Change]:
    """Return the samples of a batch that are not what they were at a record.

    Args:
      batch: index [B] and raw_digest uint32 [B, 2].
      number: of the step's record.
    """
    changes = []
    for index, raw_2 in zip(batch["index"], batch["raw_digest"], strict=True):
      old, new = self.raw_digest(int(index), number), digests.as_hex(raw_2)
      if old not in (None, new):
        changes.append(digests.Change(int(index), old, new))
    return changes

  def _add(self, record: Mapping[str, Any]) -> None:
    kind = record["kind"]
    kept = {k: v for k, v in record.items() if k not in ("previous", "digest")}
    if kind == "step":
      self._take(kept)
    elif kind == "start":
      self.starts.append(kept)
      self._go_back(record["step"])
    elif kind == "rollback":
      self.rollbacks.append(kept)
    else:
      self._raw.read(record)
      if kind == "changed_sample":
        self.changed_samples.append(kept)

  def _take(self, record: Mapping[str, Any]) -> None:
    step = record["step"]
    self.steps[step] = record
    rollbacks = [(r["step"], r["to_step"]) for r in self.rollbacks]
    earlier, before = self._taken.get(step, (None, None))
    self._taken[step] = record, rollbacks
    if before == rollbacks and self._same_provenance(earlier, record):
      for name in _REPRODUCED:
        pair = [r.get(name) for r in (earlier, record)]
        if None not in pair and pair[0] != pair[1]:
          numbers = earlier["number"], record["number"]
          self.contradictions.append(Contradiction(step, name, *pair, *numbers))

  def _same_provenance(self, *records: Mapping[str, Any]) -> bool:
    first, second = (self.start_of(r)["provenance"] for r in records)
    return first == second

  def _go_back(self, step: int) -> None:
    while self.steps and next(reversed(self.steps)) > step:
      self.steps.popitem()
    self.rollbacks = [r for r in self.rollbacks if r["step"] <= step]
