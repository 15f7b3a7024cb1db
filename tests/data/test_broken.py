"""Broken samples are refused by name, or passed over and counted."""

import numpy as np
import pytest

from var_jax.data.broken import MAX_SKIPPED, Tolerant, broken_names


class Source:
  """Labels are indices; the samples in `broken` raise `error`."""

  class_names = ("a", "b")

  def __init__(self, size, broken=(), error=ValueError):
    self.size, self.broken, self.error = size, set(broken), error

  def __len__(self):
    return self.size

  def name_of(self, i):
    return f"file {i}"

  def __getitem__(self, i):
    if i in self.broken:
      raise self.error(f"file {i} is damaged")
    return {"image": np.full((2, 3, 3), i, np.uint8), "label": i}


def _batch(samples):
  return {
    key: np.array([sample[key] for sample in samples])
    for key in ("index", "skipped")
  }


@pytest.mark.parametrize("policy", ["fail", "skip"])
def test_a_whole_sample_says_where_it_is_from(policy):
  source = Tolerant(Source(4), policy)
  assert len(source) == 4 and source.class_names == ("a", "b")
  assert source.name_of(2) == "file 2"
  for i in range(4):
    sample = source[i]
    assert (sample["label"], sample["index"], sample["skipped"]) == (i, i, 0)


def test_fail_raises_what_the_source_does():
  with pytest.raises(ValueError, match="^file 2 is damaged$"):
    Tolerant(Source(4, {2}), "fail")[2]


@pytest.mark.parametrize(
  "broken, i, index, skipped",
  [
    ({2}, 2, 3, 1),
    ({2, 3, 4}, 2, 5, 3),
    ({2, 3, 4}, 3, 5, 2),
    ({5, 0, 1}, 5, 2, 3),  # round the end
    ({0, 1, 2, 3, 4}, 0, 5, 5),
    ({0, 1, 2, 3, 4}, 5, 5, 0),
  ],
)
def test_skip_takes_the_next_whole_sample(broken, i, index, skipped):
  source = Source(6, broken)
  sample = Tolerant(source, "skip")[i]
  assert sample["label"] == sample["index"] == index
  assert sample["skipped"] == skipped
  names = broken_names(source, _batch([sample]))
  assert names == tuple(f"file {(i + k) % 6}" for k in range(skipped))


def test_each_broken_sample_of_a_batch_is_named_once():
  source = Source(6, {2, 3})
  tolerant = Tolerant(source, "skip")
  batch = _batch([tolerant[i] for i in (3, 0, 2, 3, 5)])
  assert broken_names(source, batch) == ("file 3", "file 2")
  assert broken_names(source, _batch([tolerant[i] for i in (0, 4)])) == ()


def test_too_many_in_a_row_are_an_error():
  size = 3 * MAX_SKIPPED
  most = Tolerant(Source(size, range(5, 5 + MAX_SKIPPED)), "skip")
  assert most[5]["skipped"] == MAX_SKIPPED
  more = Tolerant(Source(size, range(5, 6 + MAX_SKIPPED)), "skip")
  message = (
    f"^{MAX_SKIPPED + 1} samples in a row are broken, from file 5 on; the "
    "first: file 5 is damaged$"
  )
  with pytest.raises(ValueError, match=message):
    more[5]
  assert more[6]["skipped"] == MAX_SKIPPED


def test_a_source_that_is_all_broken_is_an_error():
  with pytest.raises(ValueError, match="^3 samples in a row are broken, from"):
    Tolerant(Source(3, range(3)), "skip")[1]


@pytest.mark.parametrize("policy", ["fail", "skip"])
def test_failing_storage_is_no_broken_sample(policy):
  with pytest.raises(OSError, match="file 1 is damaged"):
    Tolerant(Source(3, {1}, OSError), policy)[1]


def test_what_the_transform_refuses_is_broken():
  def refusal(image):
    return "too dark." if image[0, 0, 0] < 2 else None

  with pytest.raises(ValueError, match="^file 1: too dark.$"):
    Tolerant(Source(4), "fail", refusal)[1]
  sample = Tolerant(Source(4), "skip", refusal)[0]
  assert (sample["index"], sample["skipped"]) == (2, 2)


def test_an_unknown_policy_is_refused():
  with pytest.raises(
    ValueError, match="'stop' for broken images is unknown; u"
  ):
    Tolerant(Source(3), "stop")
