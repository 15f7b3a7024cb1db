"""Worker processes that make batches, and what keeps them out of the way.

A worker is a fresh interpreter. It never opens an accelerator, leaves signals
to the main process, and ends when that does, however it does. (When that is by
SIGKILL, a batch that is moving into shared memory at that moment stays there.)
"""

import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from typing import Any

# Smaller arrays travel through the pipe, not through shared memory.
MIN_SHARED_BYTES = 1 << 16


def iterate(
  batches, workers: int, threads: int, prefetch: int
) -> Iterator[Any]:
  """Return an iterator over a MapDataset whose elements workers make in turn.

  Its order is that of the dataset. Errors of a worker are raised here; its
  close() ends the workers.

  Args:
    threads: of each worker.
    prefetch: elements made ahead by all workers together.
  """
  import grain
  from absl import flags

  if not flags.FLAGS.is_parsed():
    flags.FLAGS.mark_as_parsed()  # Grain has some of its own.
  options = grain.MultiprocessingOptions(workers, max(1, prefetch // workers))
  dataset = grain.experimental.WithOptionsIterDataset(
    batches.to_iter_dataset(grain.ReadOptions(threads, threads)),
    grain.experimental.DatasetOptions(min_shm_size=MIN_SHARED_BYTES),
  )
  return _Iterator(iter(dataset.mp_prefetch(options, start)))


class _Iterator:
  """An iterator that says in one line that a worker is gone."""

  def __init__(self, iterator):
    self._iterator = iterator

  def __iter__(self):
    return self

  def __next__(self):
    try:
      return next(self._iterator)
    except RuntimeError as error:
      raise OSError(
        f"a data worker failed ({error}); it may lack memory or room in "
        "/dev/shm: use fewer workers, or 0."
      ) from error

  def close(self) -> None:
    self._iterator.close()


def start(index: int, count: int) -> None:
  """Prepare a worker process; Grain calls it before anything is read."""
  import jax

  jax.config.update("jax_platforms", "cpu")
  # A signal to the whole group, as from a terminal or a scheduler, is for the
  # main process to answer: it still wants batches for the step it saves.
  signal.signal(signal.SIGINT, signal.SIG_IGN)
  signal.signal(signal.SIGTERM, signal.SIG_IGN)
  threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
  multiprocessing.parent_process().join()
  os._exit(1)
