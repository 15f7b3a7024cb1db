"""Scale lists, token ranges, masks."""

import numpy as np
import pytest

from var_jax.models.scales import SCALES, ScaleSchedule


def test_published_lists_have_the_published_lengths():
  lengths = {
    pixels: ScaleSchedule(sizes).num_tokens for pixels, sizes in SCALES.items()
  }
  assert lengths == {256: 680, 512: 2240, 1024: 9451}


def test_token_ranges_tile_the_sequence():
  scales = ScaleSchedule((1, 2, (2, 3), (4, 6)))
  assert scales.shapes == ((1, 1), (2, 2), (2, 3), (4, 6))
  assert [scales.start(s) for s in range(4)] == [0, 1, 5, 11]
  assert [scales.end(s) for s in range(4)] == [1, 5, 11, 35]
  assert scales.grid == (4, 6)
  counts = np.bincount(scales.level_ids())
  np.testing.assert_array_equal(counts, [1, 4, 6, 24])


def test_mask_equals_a_loop_over_tokens():
  scales = ScaleSchedule((1, 2, 3))
  mask = scales.block_causal_mask()
  level = [0] + [1] * 4 + [2] * 9
  for query in range(14):
    for key in range(14):
      assert mask[query, key] == (level[key] <= level[query])


def test_equal_lists_compare_equal_however_they_are_written():
  assert ScaleSchedule((1, (2, 2))) == ScaleSchedule([1, np.int64(2)])


def test_a_single_scale_has_ratio_zero():
  assert ScaleSchedule((4,)).ratio(0) == 0.0


@pytest.mark.parametrize(
  "sizes, message",
  [
    ((), "is empty"),
    ((1, 3, 2), "decreases from"),
    ((1, (2, 4), (3, 3)), "decreases from"),
    ((0, 1), "below 1"),
  ],
)
def test_impossible_lists_are_errors(sizes, message):
  with pytest.raises(ValueError, match=message):
    ScaleSchedule(sizes)


def test_tokens_that_end_inside_a_scale_are_an_error():
  scales = ScaleSchedule((1, 2, 3))
  assert [scales.covered(n) for n in (1, 5, 14)] == [1, 2, 3]
  with pytest.raises(ValueError, match=r"6 tokens end inside .*\[1, 5, 14\]"):
    scales.covered(6)
