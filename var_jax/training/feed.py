"""Batches on their way to the devices: one ahead of the step that runs."""

import collections
import time
from collections.abc import Iterator, Mapping

import jax
import numpy as np

from var_jax.parallel import mesh as mesh_lib

DeviceBatch = Mapping[str, jax.Array]


class Feed:
  """Hands out batches that are already on the devices.

  Args:
    batches: of NumPy arrays, as `data.pipeline.training_batches` gives them.
  """

  def __init__(self, mesh, batches: Iterator[Mapping[str, np.ndarray]]):
    self._mesh, self._batches = mesh, batches
    self._ahead = collections.deque()

  def take(self) -> DeviceBatch:
    if not self._ahead:
      self.fetch()
    return self._ahead.popleft()

  def give_back(self, batch: DeviceBatch) -> None:
    """Make `batch` the next one again."""
    self._ahead.appendleft(batch)

  def fetch(self) -> float:
    """Bring one more batch to the devices; return the seconds of waiting."""
    start = time.monotonic()
    batch = next(self._batches)
    seconds = time.monotonic() - start
    # Indices and positions are below 2^32, which JAX without x64 can hold.
    narrow = {
      name: array.astype(np.uint32) if array.dtype == np.int64 else array
      for name, array in batch.items()
    }
    self._ahead.append(mesh_lib.to_devices(self._mesh, narrow))
    return seconds

  def close(self) -> None:
    self._batches.close()
