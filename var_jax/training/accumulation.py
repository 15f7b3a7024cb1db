"""A batch in parts, one after another: the memory of one, the mean of all."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


def mean_over_parts(
  fn: Callable[[dict[str, jax.Array], jax.Array], Any],
  batch: dict[str, jax.Array],
  parts: int,
):
  """Return the mean of fn(part, number) over the parts of a batch.

  They are taken one after another, so that the memory is that of one. Part a
  holds the rows a, a + parts, ..: a batch that lies on several devices need
  not move.

  Raises:
    ValueError: the batch does not divide.
  """
  if parts == 1:
    return fn(batch, jnp.int32(0))
  B = len(next(iter(batch.values())))
  if B % parts:
    raise ValueError(
      f"batch {B} is not divisible by accumulate {parts}; use a divisor."
    )
  split = jax.tree.map(
    lambda x: x.reshape(B // parts, parts, *x.shape[1:]).swapaxes(0, 1), batch
  )
  numbered = (split, jnp.arange(parts))

  def add(total, part):
    return jax.tree.map(jnp.add, total, fn(*part)), None

  one = jax.eval_shape(fn, *jax.tree.map(lambda x: x[0], numbered))
  zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), one)
  total, _ = jax.lax.scan(add, zeros, numbered)
  return jax.tree.map(lambda x: x / parts, total)
