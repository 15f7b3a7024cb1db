"""Augmented crops of chosen samples, made ahead of who encodes them.

Crop c of sample i is drawn from (seed, i, c) and from nothing else.
"""

import dataclasses
from collections.abc import Iterator

import numpy as np

from var_jax.data import processes
from var_jax.data.broken import Tolerant
from var_jax.data.pipeline import THREADS, Batch
from var_jax.data.transforms import Transform


@dataclasses.dataclass(frozen=True)
class CropSource:
  """The samples at `places` of a source, each in C crops.

  An element is {"image": uint8 [C, H, W, 3], "label", "index"}, where the
  index is that of the sample which was really used.
  """

  source: Tolerant
  transform: Transform
  places: np.ndarray
  seed: int
  crops: int

  def __len__(self) -> int:
    return len(self.places)

  def __getitem__(self, k: int) -> dict:
    place = int(self.places[k])
    sample = self.source[place]
    crops = [
      self.transform(
        sample["image"], np.random.default_rng((self.seed, place, c))
      )
      for c in range(self.crops)
    ]
    return {
      "image": np.stack(crops),
      "label": np.int32(sample["label"]),
      "index": np.int64(sample["index"]),
    }


def crop_batches(
  source: CropSource, *, batch_size: int, workers: int = 0
) -> Iterator[Batch]:
  """Return the elements of `source` in order, `batch_size` at a time.

  The iterator's close() drops what is queued and ends the workers.

  Args:
    workers: processes that make whole batches; 0 makes them in threads.
  """
  import grain

  batches = grain.MapDataset.source(source).batch(batch_size)
  if workers:
    return processes.iterate(batches, workers, threads=0, prefetch=2 * workers)
  return iter(batches.to_iter_dataset(grain.ReadOptions(THREADS, THREADS)))
