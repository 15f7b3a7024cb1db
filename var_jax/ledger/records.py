"""ledger.jsonl: what a run did, in records that vouch for each other.

A record is one line of JSON. Its `number` counts from 1, `previous` is the
SHA-256 of the line before it, and `digest`, the last field, that of the line
itself without the field. So a record that was edited, removed or moved is
named. It is no signature: records that are cut off at the end, or a last one
whose digest was computed anew, leave no trace here.

    start           step, position, provenance: steps above `step` come next
    samples         step, index [n], raw_digest: all n in one, seen first here
    changed_sample  step, index, old, new: the source is not what it was
    step            step, batch_digest, loss, grad_norm, ..
    rollback        step, to_step: `step` led back to the weights of `to_step`
    end             step

This module reads and appends; `history.py` makes sense of what was read.
"""

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np
from etils import epath

from var_jax import appended
from var_jax.ledger import digests

_NO_RECORD = "0" * 64  # the `previous` of the first record
_SEAL = len(',"digest":""}') + 64


class Ledger:
  """A ledger file that is open for appending, verified up to its end.

  What a kill left behind the last newline is no record and is cut off.

  Args:
    visit: gets each record that is already there.

  Raises:
    ValueError: a record is not what was written, or another process appends to
      it.
  """

  def __init__(
    self,
    path: os.PathLike | str,
    visit: Callable[[Mapping[str, Any]], None] = lambda record: None,
  ):
    self._file = appended.open_file(path, locked=True)
    try:
      self._number, self._previous, size = 0, _NO_RECORD, 0
      for record, line in _verified(self._file.lines(), os.fspath(path)):
        visit(record)
        self._number, self._previous = record["number"], _sha256(line)
        size += len(line) + 1
      self._file.truncate(size)
    except BaseException:
      self._file.drop()
      raise

  def append(self, kind: str, **fields: Any) -> None:
    """Append a record; NumPy values become JSON's, see `plain`."""
    head = {"kind": kind, "number": self._number + 1}
    head["previous"] = self._previous
    assert not fields.keys() & {*head, "digest"}, fields.keys()
    text = json.dumps(
      {**head, **plain(fields)}, separators=(",", ":"), allow_nan=False
    )
    line = _sealed(text.encode())
    self._file.write(line + b"\n")
    self._number, self._previous = head["number"], _sha256(line)

  def flush(self) -> None:
    """Wait until all records are on the disk, or in the bucket."""
    self._file.flush()

  def close(self) -> None:
    self._file.close()


class Recorder:
  """Keeps the ledger of a run; of several processes the first has it.

  Args:
    start_step: the step that the run goes on from, 0 for a new one.
    provenance: as `provenance.describe` returns it.
    position: the next sample's.

  Raises:
    ValueError: as of Ledger.
  """

  def __init__(
    self,
    path: os.PathLike | str,
    start_step: int,
    provenance: Mapping[str, Any],
    position: int,
  ):
    self._raw = digests.RawDigests()
    self._ledger = Ledger(path, visit=self._raw.read)
    self._ledger.append(
      "start", step=start_step, position=position, provenance=provenance
    )
    self.flush()  # in a bucket, so that another run finds it

  def step(
    self,
    step: int,
    batch: Mapping[str, np.ndarray],
    values: Mapping[str, Any],
  ) -> list[digests.Change]:
    """Record a step; return the samples that are not what they once were.

    Args:
      batch: the whole global batch: raw_digest uint32 [B, 2], and what
        `digests.batch_digest` takes.
      values: loss, grad_norm, skipped and, now and then, checksum.
    """
    index_B, raw_B2 = batch["index"], batch["raw_digest"]
    row_n = self._raw.add(index_B, raw_B2)
    if row_n.size:
      self._ledger.append(
        "samples",
        step=step,
        index=index_B[row_n],
        raw_digest=digests.as_hex(raw_B2[row_n]),
      )
    changes = self._raw.update(index_B, raw_B2)
    for change in changes:
      self._ledger.append("changed_sample", step=step, **change._asdict())
    digest = digests.batch_digest(batch)
    self._ledger.append("step", step=step, batch_digest=digest, **values)
    return changes

  def rollback(self, step: int, to_step: int) -> None:
    """Record that after `step` the weights are those of `to_step` again."""
    self._ledger.append("rollback", step=step, to_step=to_step)

  def end(self, step: int) -> None:
    """Record that the run ended here by itself."""
    self._ledger.append("end", step=step)

  def flush(self) -> None:
    """Wait until all records are kept; before a checkpoint is."""
    self._ledger.flush()

  def close(self) -> None:
    self._ledger.close()


def records(path: os.PathLike | str) -> Iterator[dict[str, Any]]:
  """Yield the records of a ledger, each verified.

  Raises:
    ValueError: there is none, or a record is not what was written.
  """
  try:
    with epath.Path(path).open("rb") as file:
      for record, _ in _verified(file, os.fspath(path)):
        yield record
  except FileNotFoundError:
    raise ValueError(
      f"{os.fspath(path)} does not exist; check the workdir."
    ) from None


def read(path: os.PathLike | str) -> list[dict[str, Any]]:
  """Return the records of a ledger; raise as `records` does."""
  return list(records(path))


def plain(value: Any) -> Any:
  """Return `value` in types of JSON, numbers that are not finite as text.

  A float32 becomes the float of the same value, so it comes back bit by bit.
  """
  if isinstance(value, Mapping):
    return {str(name): plain(item) for name, item in value.items()}
  if isinstance(value, np.ndarray) and value.dtype.kind in "iu":
    return value.tolist()
  if isinstance(value, (list, tuple)) or np.ndim(value):
    return [plain(item) for item in value]
  if hasattr(value, "item"):  # a scalar of NumPy or JAX
    value = value.item()
  if isinstance(value, float) and not math.isfinite(value):
    return str(value)
  return value


def _sha256(data: bytes) -> str:
  return hashlib.sha256(data).hexdigest()


def _sealed(body: bytes) -> bytes:
  """Return an object's JSON with its digest as one more field."""
  return b'%s,"digest":"%s"}' % (body[:-1], _sha256(body).encode())


def _verified(
  lines: Iterable[bytes], path: str
) -> Iterator[tuple[dict[str, Any], bytes]]:
  """Yield (record, its line without the newline)."""
  number, before, previous = 1, "the beginning", _NO_RECORD
  for line in lines:
    if not line.endswith(b"\n"):
      return  # a kill cut it short
    line = line[:-1]
    try:
      record = json.loads(line)
      name = _name(record, number)
    except (ValueError, AttributeError):
      _refuse(path, f"record {number}, after {before}, is not a JSON object")
    if _sealed(line[:-_SEAL] + b"}") != line:
      _refuse(path, f"{name} was edited: its digest is that of other content")
    if record.get("number") != number:
      _refuse(
        path,
        f"record {number} is missing or out of place: after {before} comes "
        f"{_name(record, record.get('number'))}",
      )
    if record.get("previous") != previous:
      _refuse(path, f"{before} was rewritten: {name} followed something else")
    yield record, line
    number, before, previous = number + 1, name, _sha256(line)


def _name(record: Mapping[str, Any], number: int) -> str:
  return f"record {number} ({record.get('kind')}, step {record.get('step')})"


def _refuse(path: str, fault: str):
  raise ValueError(
    f"{path}: {fault}; restore the file from a copy, or move it away to go on "
    "without proof of what was."
  )
