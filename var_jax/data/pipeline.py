"""Batches of images: the data clock.

A sample index is a position in one seeded, infinite, epoch-wise permuted
stream. Step k with global batch B takes the positions kB .. kB+B-1, so batches
straddle epochs, and augmentation is drawn from (seed, position). Nothing
depends on the number of processes or threads: step k is a function of
(seed, k), and the state of the data in a checkpoint is one integer.

A batch is {"image": uint8 [B, H, W, 3], "label": int32 [B],
"position": int64 [B]}.
"""

import os
from collections.abc import Iterator

import numpy as np

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
  threads: int = THREADS,
  prefetch: int = THREADS,
) -> Iterator[Batch]:
  """Return the batches of steps start_step, start_step + 1, ... without end.

  Nothing before `start_step` is read. The iterator's close() drops what is
  queued; without it the interpreter finishes the queue before it exits.

  Args:
    threads: each makes a whole batch at a time; 0 works in the caller.
    prefetch: batches made ahead and held in memory; at least `threads`.
  """
  import grain

  _check(batch_size >= 1, f"batch size {batch_size} is below 1; use 1 or more.")
  _check(seed >= 0, f"seed {seed} is negative; use 0 or more.")
  _check(start_step >= 0, f"step {start_step} is negative; use 0 or more.")

  def augment(sample, rng):
    return sample | {"image": transform(sample["image"], rng)}

  # Grain derives the seeds of shuffle and random_map from their depth below
  # seed(): a node added between them changes the stream of every run.
  batches = (
    grain.MapDataset.source(source)
    .seed(seed)
    .shuffle()
    .repeat()
    .map_with_index(_stamp)
    .random_map(augment)
    .batch(batch_size)
  )
  options = grain.ReadOptions(threads, prefetch)
  return iter(batches[start_step:].to_iter_dataset(options))


def evaluation_batches(
  source: Source, transform: Transform, *, batch_size: int
) -> Iterator[Batch]:
  """Return every sample once, in order; the last batch may be smaller."""
  import grain

  _check(batch_size >= 1, f"batch size {batch_size} is below 1; use 1 or more.")

  def place(position, sample):
    image = transform(sample["image"], None)
    return _stamp(position, sample | {"image": image})

  batches = grain.MapDataset.source(source).map_with_index(place)
  options = grain.ReadOptions(THREADS, THREADS)
  return iter(batches.batch(batch_size).to_iter_dataset(options))


def _stamp(position: int, sample: dict) -> dict:
  return {
    "image": sample["image"],
    "label": np.int32(sample["label"]),
    "position": np.int64(position),
  }


def _check(holds: bool, message: str):
  if not holds:
    raise ValueError(message)
