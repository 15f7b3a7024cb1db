"""A batch in parts: the mean is that of the whole."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from var_jax.training.accumulation import mean_over_parts


@pytest.mark.parametrize("parts", [1, 2, 3, 6])
def test_the_mean_over_parts_is_that_of_the_batch(parts):
  batch = {"x": jnp.arange(12.0).reshape(6, 2), "weight": jnp.arange(6) % 4}

  def fn(part, number):
    return {
      "mean": jnp.mean(part["x"] * part["weight"][:, None]),
      "rows": jnp.mean(part["x"], axis=0),
    }

  whole = fn(batch, 0)
  mean = jax.jit(lambda batch: mean_over_parts(fn, batch, parts))(batch)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), mean, whole
  )


def test_parts_take_turns_with_the_rows_and_are_numbered():
  batch = {"x": jnp.arange(6.0)}

  def fn(part, number):
    return jnp.zeros(3).at[number].set(jnp.sum(part["x"]))

  sums_3 = 3 * mean_over_parts(fn, batch, 3)
  np.testing.assert_allclose(sums_3, [0 + 3, 1 + 4, 2 + 5], rtol=1e-6)


def test_a_batch_that_does_not_divide_is_refused():
  message = "batch 6 is not divisible by accumulate 4; use a divisor"
  with pytest.raises(ValueError, match=message):
    mean_over_parts(lambda part, number: part, {"x": jnp.ones(6)}, 4)
