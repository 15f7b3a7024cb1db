"""Digests of samples and batches: what the ledger knows of the data.

A digest is uint32 [2]; of a sample there are two, made where it is read: of
what the source holds (raw), and of what the model gets.
"""

import hashlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

# Of a batch: what says which samples a step took, and what it saw of them.
_BATCH = (("position", "<i8"), ("index", "<i8"), ("label", "<i4"),
          ("digest", "<u4"))  # fmt: skip


class Change(NamedTuple):
  """A source sample that is not what it was."""

  index: int
  old: str  # raw digests, hexadecimal
  new: str

  def __str__(self) -> str:
    return (
      f"sample {self.index} of the source is not what it was: its digest was "
      f"{self.old}, now it is {self.new}"
    )


class RawDigests:
  """The digest of each source sample by its index, in nine bytes a sample."""

  def __init__(self):
    self._known_n = np.zeros(0, bool)
    self._raw_n2 = np.zeros((0, 2), np.uint32)

  def __getitem__(self, index: int) -> str | None:
    known = index < len(self._known_n) and self._known_n[index]
    return as_hex(self._raw_n2[index]) if known else None

  def add(self, index_B: np.ndarray, raw_B2: np.ndarray) -> np.ndarray:
    """Take up samples not seen before; return the rows where they are."""
    self._grow(int(index_B.max()) + 1)
    unique_n, row_n = np.unique(index_B, return_index=True)
    row_n = np.sort(row_n[~self._known_n[unique_n]])
    self._known_n[index_B[row_n]] = True
    self._raw_n2[index_B[row_n]] = raw_B2[row_n]
    return row_n

  def update(self, index_B: np.ndarray, raw_B2: np.ndarray) -> list[Change]:
    """Take up and return what differs of samples that were seen before."""
    changes = []
    for row in np.flatnonzero((self._raw_n2[index_B] != raw_B2).any(1)):
      index, new = int(index_B[row]), as_hex(raw_B2[row])
      old = self[index]
      if old != new:  # a sample may stand twice in a batch
        self._raw_n2[index] = raw_B2[row]
        changes.append(Change(index, old, new))
    return changes

  def read(self, record: Mapping[str, Any]) -> None:
    """Take up a record of what `add` or `update` returned."""
    if record["kind"] == "samples":
      index_n = np.asarray(record["index"], np.int64)
      self.add(index_n, _from_hex(record["raw_digest"]))
    elif record["kind"] == "changed_sample":
      self._raw_n2[record["index"]] = _from_hex(record["new"])[0]

  def _grow(self, size: int) -> None:
    if size > len(self._known_n):
      more = max(size, 2 * len(self._known_n)) - len(self._known_n)
      self._known_n = np.pad(self._known_n, (0, more))
      self._raw_n2 = np.pad(self._raw_n2, ((0, more), (0, 0)))


def batch_digest(batch: Mapping[str, np.ndarray]) -> str:
  """Return the SHA-256 of what a step took, in hexadecimal.

  Args:
    batch: position, index and label [B], digest uint32 [B, 2].
  """
  sha256 = hashlib.sha256()
  for name, dtype in _BATCH:
    sha256.update(np.ascontiguousarray(batch[name], dtype).tobytes())
  return sha256.hexdigest()


def as_hex(digest: np.ndarray) -> str:
  """Return uint32 [.., 2] as 16 hexadecimal digits a pair."""
  return np.ascontiguousarray(digest, ">u4").tobytes().hex()


def _from_hex(text: str) -> np.ndarray:
  raw = np.frombuffer(bytes.fromhex(text), ">u4").reshape(-1, 2)
  return raw.astype(np.uint32)
