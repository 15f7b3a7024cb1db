"""Filters and draws against recorded masks and a sort."""

import golden_files
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from var_jax.generation import logits as logits_lib

CASES = golden_files.table("topk_topp_cases.json")["cases"]


def filtered(logits_BlV, k, p):
  return logits_lib.keep_top_p(logits_lib.keep_top_k(logits_BlV, k), p)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["key"])
def test_kept_tokens_equal_the_recorded_ones(case):
  recorded = golden_files.arrays("topk_topp.npz")
  logits_BlV = recorded[case["logits"]]
  ours = np.isfinite(filtered(logits_BlV, case["top_k"], case["top_p"]))
  expected = recorded[case["key"]].astype(bool)
  # Among equal logits at the cut any choice of the right size is right.
  np.testing.assert_array_equal(ours.sum(-1), expected.sum(-1))
  rows = ~np.array(case["tie_ambiguous_per_row"]).reshape(ours.shape[:-1])
  np.testing.assert_array_equal(ours[rows], expected[rows])


def sorted_filter(row_V, k, p):
  """Return the count of kept tokens and the smallest kept logit, by sorting."""
  row_V = row_V.astype(np.float64)
  if 0 < k <= len(row_V):
    row_V = np.where(row_V >= np.sort(row_V)[-k], row_V, -np.inf)
  ascending = np.sort(row_V)
  probs = np.exp(ascending - ascending[-1])
  mass = np.cumsum(probs / probs.sum())
  keep = mass > 1.0 - p if p else np.isfinite(ascending)
  keep[-1] = True
  return keep.sum(), ascending[keep].min()


@pytest.fixture(params=["_by_bits", "_by_digits"])
def search(request, monkeypatch):
  """Search as on CPU, and as on accelerators."""
  find = getattr(logits_lib, request.param)

  def largest_bound(holds, batch_shape, bits=32):
    return find(holds, bits, jnp.zeros((*batch_shape, 1), jnp.uint32))

  monkeypatch.setattr(logits_lib, "_largest_bound", largest_bound)


@pytest.mark.parametrize("k, p", [(0, 0.9), (20, 0.0), (20, 0.7), (3, 0.96)])
def test_filters_equal_a_sort_on_ten_thousand_rows_with_ties(k, p, search):
  rng = np.random.default_rng(0)
  rows = np.concatenate(
    [
      rng.normal(size=(1250, 50)) * 3,
      rng.integers(-3, 3, size=(1250, 50)) + rng.normal(size=(1250, 1)),
    ]
  ).astype(np.float32)
  ours = np.asarray(filtered(rows[:, None], k, p))[:, 0]
  for row, kept in zip(rows, ours, strict=True):
    count, smallest = sorted_filter(row, k, p)
    assert np.isfinite(kept).sum() == count
    assert kept[np.isfinite(kept)].min() == np.float32(smallest)


@pytest.mark.parametrize("find", [logits_lib._by_bits, logits_lib._by_digits])
@pytest.mark.parametrize("bits", [1, 4, 13, 31, 32])
def test_a_bound_is_found_wherever_it_lies(find, bits):
  rng = np.random.default_rng(bits)
  bounds = [0, 2**bits - 1, *rng.integers(2**bits, size=200)]
  bounds_B1 = jnp.array(bounds, jnp.uint32)[:, None]
  zero = jnp.zeros_like(bounds_B1)
  found = find(lambda bound: bound <= bounds_B1, bits, zero)
  np.testing.assert_array_equal(found, bounds_B1)


def test_zero_and_a_k_of_the_vocabulary_or_more_are_off():
  logits_BlV = jax.random.normal(jax.random.key(0), (2, 3, 16))
  for k in (0, 16, 900):
    np.testing.assert_array_equal(filtered(logits_BlV, k, 0.0), logits_BlV)


def test_top_k_of_one_equals_greedy_whatever_the_noise():
  logits_BlV = jax.random.normal(jax.random.key(0), (2, 30, 64))
  gumbel_BlV = jax.random.gumbel(jax.random.key(1), logits_BlV.shape)
  drawn = logits_lib.draw(logits_lib.keep_top_k(logits_BlV, 1), gumbel_BlV)
  np.testing.assert_array_equal(drawn, logits_BlV.argmax(-1))


def test_top_p_always_leaves_the_most_likely_token():
  logits_BlV = jnp.array([[[0.0, 3.0, 1.0], [2.0, 2.0, -5.0]]])
  # 1 - p is 1 in float32: every token fits into what may be dropped.
  kept = np.isfinite(logits_lib.keep_top_p(logits_BlV, 1e-9))
  np.testing.assert_array_equal(kept[0, 0], [False, True, False])
  assert kept[0, 1].sum() == 1 and not kept[0, 1, 2]


def test_negative_zero_and_zero_are_one_value():
  kept = logits_lib.keep_top_k(jnp.array([[[0.0, -0.0, -1.0]]]), 1)
  np.testing.assert_array_equal(np.isfinite(kept), [[[True, True, False]]])


def test_draws_follow_the_softmax():
  logits_V = jnp.array([2.0, 1.0, 0.0, -jnp.inf])
  n = 40_000
  gumbel = jax.random.gumbel(jax.random.key(0), (n, 1, 4))
  drawn = logits_lib.draw(jnp.tile(logits_V, (n, 1, 1)), gumbel)
  frequency = np.bincount(np.asarray(drawn).ravel(), minlength=4) / n
  probs = np.asarray(jax.nn.softmax(logits_V))
  # Five standard deviations of a frequency.
  assert np.all(np.abs(frequency - probs) <= 5 * np.sqrt(probs / n))


@pytest.mark.parametrize("strength", [0.0, 1.5])
def test_guidance_moves_away_from_the_unconditional(strength):
  conditional, unconditional = jnp.array([1.0, 0.0]), jnp.array([0.0, 1.0])
  np.testing.assert_allclose(
    logits_lib.guide(conditional, unconditional, strength),
    [1.0 + strength, -strength],
  )


def test_smooth_weights_never_touch_a_filtered_token():
  logits_BlV = jnp.array([[[1.0, -jnp.inf, 0.5]]])
  gumbel_BlV = jnp.array([[[0.0, 50.0, 0.0]]])
  for ratio in (0.0, 0.5, 1.0):
    weights = logits_lib.smooth_weights(logits_BlV, gumbel_BlV, ratio)
    assert weights[0, 0, 1] == 0.0
    np.testing.assert_allclose(weights.sum(), 1.0, rtol=1e-6)
