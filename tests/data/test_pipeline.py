"""The data clock: step k is a function of (seed, k) and of nothing else."""

import itertools
import subprocess
import sys
import threading

import numpy as np
import pytest

from var_jax.data.pipeline import evaluation_batches, training_batches
from var_jax.data.sources import ArraySource


def _source(size):
  """Return a source whose images and labels are their own index."""
  index = np.arange(size)
  images = np.broadcast_to(index[:, None, None], (size, 2, 2)).astype(np.uint8)
  return ArraySource(images, index, tuple(map(str, index)))


def _keep(image, rng):
  return image


def _draw(image, rng):
  return rng.integers(0, 256, (8, 8, 3), np.uint8)


def _batches(count, size=10, transform=_keep, **options):
  options = {"batch_size": 4, "seed": 0} | options
  iterator = training_batches(_source(size), transform, **options)
  batches = list(itertools.islice(iterator, count))
  iterator.close()
  return batches


def _assert_equal(left, right):
  assert len(left) == len(right)
  for a, b in zip(left, right, strict=True):
    assert a.keys() == b.keys()
    for key in a:
      assert a[key].dtype == b[key].dtype
      np.testing.assert_array_equal(a[key], b[key])


def _join(batches, key):
  return np.concatenate([batch[key] for batch in batches])


def test_a_batch_is_three_stacked_arrays():
  (batch,) = _batches(1)
  assert {key: (a.dtype.name, a.shape) for key, a in batch.items()} == {
    "image": ("uint8", (4, 2, 2, 3)),
    "label": ("int32", (4,)),
    "position": ("int64", (4,)),
  }
  np.testing.assert_array_equal(batch["image"][:, 0, 0, 0], batch["label"])


def test_positions_count_on_without_end():
  position = _join(_batches(8, start_step=3), "position")
  np.testing.assert_array_equal(position, np.arange(12, 44))


@pytest.mark.parametrize("size", [1, 2, 10, 13])
def test_each_epoch_is_a_permutation_though_batches_straddle_epochs(size):
  stream = _join(_batches(size, size, batch_size=4), "label")
  epochs = stream.reshape(4, size)
  for epoch in epochs:
    np.testing.assert_array_equal(np.sort(epoch), np.arange(size))


def test_each_epoch_and_each_seed_has_its_own_order():
  orders = [
    tuple(order)
    for seed in range(3)
    for order in _join(_batches(20, seed=seed), "label").reshape(8, 10)
  ]
  assert len(set(orders)) == 24


def test_a_batch_may_exceed_the_source():
  (batch,) = _batches(1, size=3, batch_size=7)
  np.testing.assert_array_equal(np.sort(batch["label"][:3]), np.arange(3))
  np.testing.assert_array_equal(np.sort(batch["label"][3:6]), np.arange(3))
  assert len(batch["label"]) == 7


def test_the_stream_does_not_depend_on_the_batch_size():
  small = _batches(20, transform=_draw, batch_size=3)
  large = _batches(4, transform=_draw, batch_size=15)
  for key in small[0]:
    np.testing.assert_array_equal(_join(small, key), _join(large, key))


@pytest.mark.parametrize("step", [1, 2, 5, 9])
def test_resumed_equals_uninterrupted(step):
  whole = _batches(12, transform=_draw)
  resumed = _batches(12 - step, transform=_draw, start_step=step)
  _assert_equal(resumed, whole[step:])


def test_resuming_reads_nothing_before_its_step():
  class Counting(ArraySource):
    reads = 0

    def __getitem__(self, i):
      Counting.reads += 1
      return super().__getitem__(i)

  source = Counting(**vars(_source(10)))
  iterator = training_batches(
    source, _keep, batch_size=4, seed=0, start_step=10**12, threads=0
  )
  assert next(iterator)["position"][0] == 4 * 10**12
  assert Counting.reads == 4


@pytest.mark.parametrize("threads, prefetch", [(0, 0), (1, 3), (8, 16)])
def test_threads_change_nothing(threads, prefetch):
  _assert_equal(
    _batches(12, transform=_draw, threads=threads, prefetch=prefetch),
    _batches(12, transform=_draw),
  )


def test_augmentation_differs_by_position_and_seed():
  images = [
    image.tobytes()
    for seed in (0, 1)
    for image in _join(_batches(10, transform=_draw, seed=seed), "image")
  ]
  # 40 positions are four epochs: no sample looks the same twice.
  assert len(set(images)) == 80


def test_the_stream_of_seed_zero_is_the_one_that_checkpoints_mean():
  # A checkpoint holds the next position alone. If this fails, a run that is
  # resumed sees other images than it would have, so say it in the changelog.
  batch = _batches(1, batch_size=12, transform=_draw)[0]
  assert batch["label"].tolist() == [1, 2, 4, 5, 9, 7, 8, 6, 0, 3, 9, 6]
  assert batch["image"][:5, 0, 0, 0].tolist() == [170, 37, 93, 81, 43]


def test_evaluation_is_one_ordered_pass_that_drops_nothing():
  batches = list(evaluation_batches(_source(10), _keep, batch_size=4))
  assert [len(batch["label"]) for batch in batches] == [4, 4, 2]
  for key in ("label", "position"):
    np.testing.assert_array_equal(_join(batches, key), np.arange(10))
  assert {key: a.dtype.name for key, a in batches[0].items()} == {
    "image": "uint8",
    "label": "int32",
    "position": "int64",
  }


def test_evaluation_passes_no_generator():
  def only_without(image, rng):
    assert rng is None
    return image

  assert len(list(evaluation_batches(_source(3), only_without, batch_size=3)))


def test_a_closed_iterator_stops_its_threads():
  before = threading.active_count()
  iterator = training_batches(_source(10), _draw, batch_size=2, seed=0)
  next(iterator)
  iterator.close()
  for thread in threading.enumerate():
    if thread.name.startswith("grain-prefetch"):
      thread.join(timeout=10)
  assert threading.active_count() <= before


def test_an_abandoned_iterator_does_not_hang_the_process():
  code = """
import numpy as np
from var_jax.data.pipeline import training_batches
from var_jax.data.sources import ArraySource

source = ArraySource(np.zeros((9, 2, 2), np.uint8), np.arange(9), ("a",) * 9)
iterator = training_batches(
  source, lambda image, rng: image, batch_size=2, seed=0, threads=4, prefetch=4
)
next(iterator)
"""
  subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_an_error_in_a_thread_reaches_the_caller():
  def fail(image, rng):
    raise ValueError("x.png cannot be decoded")

  with pytest.raises(ValueError, match="x.png cannot be decoded"):
    _batches(1, transform=fail)


@pytest.mark.parametrize(
  "options, message",
  [
    ({"batch_size": 0}, "batch size 0 is below 1; use 1 or more"),
    ({"seed": -1}, "seed -1 is negative; use 0 or more"),
    ({"start_step": -1}, "step -1 is negative; use 0 or more"),
  ],
)
def test_bad_numbers_are_refused_before_anything_is_read(options, message):
  with pytest.raises(ValueError, match=message):
    training_batches(None, _keep, **({"batch_size": 1, "seed": 0} | options))


def test_evaluation_refuses_an_empty_batch():
  with pytest.raises(ValueError, match="batch size 0 is below 1"):
    evaluation_batches(_source(3), _keep, batch_size=0)
