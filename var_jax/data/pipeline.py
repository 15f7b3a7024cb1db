"""Batches of images or tokens: the data clock.

A sample index is a position in one seeded, infinite, epoch-wise permuted
stream. Step k with global batch B takes the positions kB .. kB+B-1, so batches
straddle epochs, and augmentation is drawn from (seed, position). Nothing
depends on the number of processes or threads: step k is a function of
(seed, k), and the state of the data in a checkpoint is one integer.

A batch has b rows, those of the global batch that this process makes:

  image       uint8 [b, H, W, 3], or tokens uint16 [b, L] of a token source
  label       int32 [b]
  position    int64 [b]
  index       int64 [b]      in the source, of the sample that was used
  skipped     int32 [b]      broken ones that were passed over before it
  raw_digest  uint32 [b, 2]  of the sample as the source gave it
  digest      uint32 [b, 2]  of what the model gets
"""

import dataclasses
import functools
import os
import sys
from collections.abc import Iterator, Sequence

import numpy as np

from var_jax.data import processes
from var_jax.data.broken import Tolerant
from var_jax.data.digests import sample_digest
from var_jax.data.sources import Source
from var_jax.data.transforms import Transform

Batch = dict[str, np.ndarray]

THREADS = min(16, os.cpu_count() or 1)


def training_batches(
  source: Source,
  transform: Transform,
  *,
  batch_size: int,
  seed: int,
  start_step: int = 0,
  rows: Sequence[int] | None = None,
  on_broken: str = "fail",
  workers: int = 0,
  threads: int | None = None,
  prefetch: int | None = None,
) -> Iterator[Batch]:
  """Return the batches of steps start_step, start_step + 1, ... without end.

  Nothing before `start_step` is read. The iterator's close() drops what is
  queued and ends the worker processes. With workers, a script must start
  under `if __name__ == "__main__":`.

  Args:
    batch_size: of the global batch.
    rows: of each global batch, those that this process makes, in order; None
      makes them all.
    on_broken: "fail" or "skip", as in `broken.Tolerant`.
    workers: processes that make the batches, whole ones in turn; 0 makes them
      in threads of this process.
    threads: in each process, each makes a whole batch at a time; 0 works in
      the caller or worker. THREADS unless there are workers, else 0.
    prefetch: batches made ahead and held in memory; at least `threads`. THREADS
      unless there are workers, else two a worker.
  """
  import grain

  span = _rows(rows, batch_size)
  _check(seed >= 0, f"seed {seed} is negative; use 0 or more.")
  _check(start_step >= 0, f"step {start_step} is negative; use 0 or more.")
  _check(workers >= 0, f"{workers} workers are below 0; use 0 or more.")
  if threads is None:
    threads = 0 if workers else THREADS
  if prefetch is None:
    prefetch = 2 * workers or max(threads, THREADS)

  # Grain derives the seeds of shuffle and random_map from their depth below
  # seed(): a node added between them changes the stream of every run.
  samples = (
    grain.MapDataset.source(_tolerant(source, transform, on_broken))
    .seed(seed)
    .shuffle()
    .repeat()
    .map_with_index(_stamp)
    .random_map(functools.partial(_apply, transform))
  )
  steps = grain.MapDataset.range(start_step, sys.maxsize // batch_size)
  batches = steps.map(_MakeBatch(samples, batch_size, span))
  if workers:
    return processes.iterate(batches, workers, threads, prefetch)
  return iter(batches.to_iter_dataset(grain.ReadOptions(threads, prefetch)))


def evaluation_batches(
  source: Source,
  transform: Transform,
  *,
  batch_size: int,
  rows: Sequence[int] | None = None,
  limit: int | None = None,
  on_broken: str = "fail",
) -> Iterator[Batch]:
  """Return every sample once, in order, in batches of one size.

  A batch also has `real`, bool [b]: False on the rows that fill up the last
  batch with its last sample, and on those that stand in for a broken one.

  Args:
    batch_size: of the global batch.
    rows: of each global batch, those that this process makes, in order; None
      makes them all.
    limit: how many samples, the first ones; None takes them all.
    on_broken: "fail" or "skip", as in `broken.Tolerant`.
  """
  import grain

  span = _rows(rows, batch_size)
  size = len(source)
  if limit is not None:
    _check(limit >= 1, f"limit {limit} is below 1; use 1 or more.")
    size = min(size, limit)
  samples = (
    grain.MapDataset.source(_tolerant(source, transform, on_broken))
    .map_with_index(_stamp)
    .map(functools.partial(_apply, transform, rng=None))
  )
  steps = grain.MapDataset.range(-(-size // batch_size))
  batches = steps.map(_MakeBatch(samples, batch_size, span, size))
  return iter(batches.to_iter_dataset(grain.ReadOptions(THREADS, THREADS)))


def check_first(
  source: Source, transform: Transform, on_broken: str = "fail"
) -> None:
  """Read and transform the first sample, so that a run fails at its start.

  Raises:
    ValueError: it cannot be used, or with "skip" no sample that follows.
  """
  sample = _tolerant(source, transform, on_broken)[0]
  _apply(transform, _stamp(0, sample), np.random.default_rng(0))


@dataclasses.dataclass(frozen=True)
class _MakeBatch:
  """Makes this process's rows of the global batch of a step.

  Args:
    samples: by position.
    size: after which positions repeat the last sample; None is endless.
  """

  samples: Sequence[dict]
  batch_size: int
  rows: np.ndarray
  size: int | None = None

  def __call__(self, step: int) -> Batch:
    position_B = step * self.batch_size + self.rows
    used = position_B.tolist()
    if self.size is not None:
      used = [min(position, self.size - 1) for position in used]
    made = {position: self.samples[position] for position in set(used)}
    samples = [made[position] for position in used]
    batch = {
      key: np.stack([sample[key] for sample in samples]) for key in samples[0]
    }
    if self.size is not None:
      batch["real"] = (position_B < self.size) & (batch["skipped"] == 0)
    return batch


def _tolerant(source: Source, transform: Transform, on_broken: str) -> Tolerant:
  return Tolerant(source, on_broken, getattr(transform, "refusal", None))


def _stamp(position: int, sample: dict) -> dict:
  key = _content(sample)
  return {
    key: sample[key],
    "label": np.int32(sample["label"]),
    "position": np.int64(position),
    "index": np.int64(sample["index"]),
    "skipped": np.int32(sample["skipped"]),
    "raw_digest": sample_digest(sample[key], sample["label"]),
  }


def _apply(
  transform: Transform, sample: dict, rng: np.random.Generator | None
) -> dict:
  key = _content(sample)
  array = transform(sample[key], rng)
  return sample | {key: array, "digest": sample_digest(array, sample["label"])}


def _content(sample: dict) -> str:
  return "tokens" if "tokens" in sample else "image"


def _rows(rows: Sequence[int] | None, batch_size: int) -> np.ndarray:
  """Return the rows of a global batch that `rows` means."""
  _check(batch_size >= 1, f"batch size {batch_size} is below 1; use 1 or more.")
  if rows is None:
    return np.arange(batch_size)
  rows = np.asarray(rows)
  _check(
    rows.size > 0
    and rows[0] >= 0
    and rows[-1] < batch_size
    and bool(np.all(np.diff(rows) > 0)),
    f"rows {rows.tolist()} are no part of a batch of {batch_size}; give some "
    "of its rows, in order.",
  )
  return rows


def _check(holds: bool, message: str):
  if not holds:
    raise ValueError(message)
