"""The data clock: step k is a function of (seed, k) and of nothing else."""

import contextlib
import hashlib
import itertools
import struct
import subprocess
import sys
import threading

import numpy as np
import pytest

from var_jax.data.broken import broken_names
from var_jax.data.pipeline import (
  check_first,
  evaluation_batches,
  training_batches,
)
from var_jax.data.sources import ArraySource
from var_jax.data.transforms import make_transform, pick_crop


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
  with contextlib.closing(iterator):
    return list(itertools.islice(iterator, count))


def _assert_equal(left, right):
  assert len(left) == len(right)
  for a, b in zip(left, right, strict=True):
    assert a.keys() == b.keys()
    for key in a:
      assert a[key].dtype == b[key].dtype
      np.testing.assert_array_equal(a[key], b[key])


def _join(batches, key):
  return np.concatenate([batch[key] for batch in batches])


def test_a_batch_is_stacked_arrays():
  (batch,) = _batches(1)
  assert {key: (a.dtype.name, a.shape) for key, a in batch.items()} == {
    "image": ("uint8", (4, 2, 2, 3)),
    "label": ("int32", (4,)),
    "position": ("int64", (4,)),
    "index": ("int64", (4,)),
    "skipped": ("int32", (4,)),
    "raw_digest": ("uint32", (4, 2)),
    "digest": ("uint32", (4, 2)),
  }
  np.testing.assert_array_equal(batch["image"][:, 0, 0, 0], batch["label"])
  np.testing.assert_array_equal(batch["index"], batch["label"])
  assert not batch["skipped"].any()


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


def _counting(size):
  """Return a source that counts its reads."""

  class Counting(ArraySource):
    reads = 0

    def __getitem__(self, i):
      Counting.reads += 1
      return super().__getitem__(i)

  return Counting(**vars(_source(size)))


def test_resuming_reads_nothing_before_its_step():
  source = _counting(10)
  iterator = training_batches(
    source, _keep, batch_size=4, seed=0, start_step=10**12, threads=0
  )
  assert next(iterator)["position"][0] == 4 * 10**12
  assert source.reads == 4


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


@pytest.mark.parametrize("mine", [[0], [0, 1, 2], [0, 1, 4, 5], [5]])
def test_rows_of_processes_are_the_parts_of_a_batch(mine):
  options = {"transform": _draw, "batch_size": 6, "start_step": 2}
  others = [row for row in range(6) if row not in mine]
  whole = _batches(5, **options)
  here, there = (_batches(5, rows=rows, **options) for rows in (mine, others))
  for batch, *parts in zip(whole, here, there, strict=True):
    assert batch.keys() == parts[0].keys() == parts[1].keys()
    for key in batch:
      for rows, part in zip((mine, others), parts, strict=True):
        np.testing.assert_array_equal(batch[key][rows], part[key])


def test_only_the_rows_asked_for_are_read():
  source = _counting(10)
  iterator = training_batches(
    source, _keep, batch_size=8, seed=0, rows=range(2, 5), threads=0
  )
  assert next(iterator)["position"].tolist() == [2, 3, 4]
  assert source.reads == 3


@pytest.mark.parametrize(
  "rows", [[], range(3, 5), range(-1, 3), [3, 1], [1, 1]]
)
def test_rows_outside_of_the_batch_are_refused(rows):
  with pytest.raises(ValueError, match="are no part of a batch of 4; give"):
    _batches(1, rows=rows)


def test_digests_are_of_shape_label_and_content():
  (batch,) = _batches(1, transform=_draw)
  for b in range(4):
    raw = np.full((2, 2, 3), batch["index"][b], np.uint8)
    for key, array in (("raw_digest", raw), ("digest", batch["image"][b])):
      told = struct.pack("<4q", batch["label"][b], *array.shape)
      oracle = hashlib.blake2b(told + array.tobytes(), digest_size=8).digest()
      assert batch[key][b].tobytes() == oracle


def _tokens(crops):
  """Return a source of 5 samples whose tokens tell the sample and the crop."""
  i, c = np.ogrid[:5, :crops]
  tokens = np.stack([i + 0 * c, c + 0 * i], axis=-1).astype(np.uint16)
  return TokenSource(tokens)


class TokenSource:
  class_names = tuple("abcde")

  def __init__(self, tokens):
    self.tokens = tokens

  def __len__(self):
    return len(self.tokens)

  def __getitem__(self, i):
    return {"tokens": self.tokens[i], "label": i}

  def name_of(self, i):
    return f"tokens {i}"


def test_one_of_the_crops_of_cached_tokens_is_drawn():
  source = _tokens(crops=3)
  iterator = training_batches(source, pick_crop, batch_size=200, seed=0)
  batch = next(iterator)
  iterator.close()
  assert "image" not in batch
  assert batch["tokens"].dtype == np.uint16 and batch["tokens"].shape == (
    200,
    2,
  )
  np.testing.assert_array_equal(batch["tokens"][:, 0], batch["index"])
  # 40 draws a sample: each is missed with probability 3 e^-16.
  drawn = set(map(tuple, batch["tokens"].tolist()))
  assert drawn == {(i, c) for i in range(5) for c in range(3)}
  # The raw digest is of all crops, so a sample has one; the other is of each.
  assert len(np.unique(batch["raw_digest"], axis=0)) == 5
  assert len(np.unique(batch["digest"], axis=0)) == 15


def test_evaluation_takes_the_first_crop():
  (batch,) = evaluation_batches(_tokens(crops=3), pick_crop, batch_size=5)
  assert batch["tokens"].tolist() == [[i, 0] for i in range(5)]


def test_evaluation_is_one_ordered_pass_that_is_filled_up():
  batches = list(evaluation_batches(_source(10), _keep, batch_size=4))
  for key in ("label", "position", "index"):
    assert _join(batches, key).tolist() == [*range(10), 9, 9]
  assert _join(batches, "real").tolist() == [True] * 10 + [False] * 2
  assert {key: (a.dtype.name, len(a)) for key, a in batches[2].items()} == {
    "image": ("uint8", 4),
    "label": ("int32", 4),
    "position": ("int64", 4),
    "index": ("int64", 4),
    "skipped": ("int32", 4),
    "raw_digest": ("uint32", 4),
    "digest": ("uint32", 4),
    "real": ("bool", 4),
  }


@pytest.mark.parametrize("limit, taken", [(1, 1), (4, 4), (7, 7), (99, 10)])
def test_evaluation_takes_as_many_as_it_is_told(limit, taken):
  batches = evaluation_batches(_source(10), _keep, batch_size=4, limit=limit)
  joined = list(batches)
  assert len(joined) == -(-taken // 4)
  real = _join(joined, "real")
  np.testing.assert_array_equal(_join(joined, "index")[real], range(taken))
  with pytest.raises(ValueError, match="limit 0 is below 1; use 1 or more"):
    evaluation_batches(_source(10), _keep, batch_size=4, limit=0)


def test_processes_evaluate_each_sample_once():
  parts = [
    list(evaluation_batches(_source(10), _keep, batch_size=4, rows=rows))
    for rows in ([0, 2], [1, 3])
  ]
  # As many steps in each, or they would wait for each other for ever.
  assert [len(part) for part in parts] == [3, 3]
  seen = [batch["index"][batch["real"]] for part in parts for batch in part]
  assert sorted(np.concatenate(seen).tolist()) == list(range(10))


def test_evaluation_does_not_count_what_stands_in_for_a_broken_sample():
  source = broken_source(10, {3, 4, 9})
  with pytest.raises(ValueError, match=r"x\[3\] is damaged"):
    list(evaluation_batches(source, _keep, batch_size=5))
  batches = list(
    evaluation_batches(source, _keep, batch_size=6, on_broken="skip")
  )
  real = _join(batches, "real")
  assert _join(batches, "index")[real].tolist() == [0, 1, 2, 5, 6, 7, 8]


def broken_source(size, broken):
  """Return a source of which the samples in `broken` are."""

  class Broken(ArraySource):
    def __getitem__(self, i):
      if i in broken:
        raise ValueError(f"{self.name_of(i)} is damaged")
      return super().__getitem__(i)

  return Broken(**vars(_source(size)) | {"name": "x"})


def test_a_broken_sample_changes_its_own_rows_only():
  source = broken_source(10, {3, 4})
  options = {"batch_size": 10, "seed": 0}
  iterator = training_batches(source, _draw, on_broken="skip", **options)
  batches = list(itertools.islice(iterator, 4))
  iterator.close()
  for batch, whole in zip(
    batches, _batches(4, 10, _draw, **options), strict=True
  ):
    wanted = whole["index"]
    used = np.where((wanted == 3) | (wanted == 4), 5, wanted)
    np.testing.assert_array_equal(batch["index"], used)
    np.testing.assert_array_equal(batch["label"], used)
    np.testing.assert_array_equal(batch["skipped"], used - wanted)
    # What is drawn for a position is drawn for it whichever sample it gets.
    np.testing.assert_array_equal(batch["image"], whole["image"])
    assert broken_names(source, batch) in (
      ("x[3]", "x[4]"),
      ("x[4]", "x[3]"),
    )


def test_a_run_fails_at_its_start_when_the_first_image_cannot_be_used():
  crop = make_transform("crop", (8, 8), train=True, flip=False)
  message = (
    r"sample\[\d\]: the image of 2x2 pixels is smaller than the crop of 8x8"
  )
  with pytest.raises(ValueError, match=message):
    check_first(_source(3), crop)
  with pytest.raises(ValueError, match="3 samples in a row are broken, from"):
    check_first(_source(3), crop, on_broken="skip")
  check_first(broken_source(3, {0}), _draw, on_broken="skip")
  with pytest.raises(ValueError, match=message):
    _batches(1, transform=crop)


def test_evaluation_passes_no_generator():
  def only_without(image, rng):
    assert rng is None
    return image

  assert len(list(evaluation_batches(_source(3), only_without, batch_size=3)))


def test_a_closed_iterator_stops_its_threads():
  before = set(threading.enumerate())
  iterator = training_batches(_source(10), _draw, batch_size=2, seed=0)
  next(iterator)
  started = set(threading.enumerate()) - before
  assert started
  iterator.close()
  for thread in started:
    thread.join(timeout=10)
    assert not thread.is_alive()


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
    ({"workers": -1}, "-1 workers are below 0; use 0 or more"),
    ({"on_broken": "stop"}, "policy 'stop' for broken images is unknown; use"),
  ],
)
def test_bad_numbers_are_refused_before_anything_is_read(options, message):
  with pytest.raises(ValueError, match=message):
    training_batches(None, _keep, **({"batch_size": 1, "seed": 0} | options))


def test_evaluation_refuses_an_empty_batch():
  with pytest.raises(ValueError, match="batch size 0 is below 1"):
    evaluation_batches(_source(3), _keep, batch_size=0)
