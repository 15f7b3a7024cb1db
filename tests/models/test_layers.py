"""Gradients of attention scores, which have a rule of their own."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from var_jax.models import layers


def plain_scores(q_BlNK, k_BTNK):
  return jnp.einsum(
    "blnk,btnk->bnlt",
    q_BlNK,
    k_BTNK,
    precision=layers.matmul_precision(q_BlNK.dtype),
    preferred_element_type=jnp.float32,
  )


def gradients(scores, dtype):
  rng = np.random.default_rng(0)
  q_BlNK = jnp.asarray(rng.normal(size=(2, 3, 4, 8)), dtype)
  k_BTNK = jnp.asarray(rng.normal(size=(2, 5, 4, 8)), dtype)
  weights_BNlT = jnp.asarray(rng.normal(size=(2, 4, 3, 5)))

  def loss(q_BlNK, k_BTNK):
    return jnp.sum(jnp.tanh(scores(q_BlNK, k_BTNK)) * weights_BNlT)

  return jax.grad(loss, argnums=(0, 1))(q_BlNK, k_BTNK)


# bfloat16 has 8 bits; the rule rounds the gradient of the scores to them.
@pytest.mark.parametrize(
  ("dtype", "within"), [("float32", 1e-6), ("bfloat16", 2e-2)]
)
def test_scores_have_the_gradient_of_a_plain_product(dtype, within):
  found = gradients(layers._scores, dtype)
  expected = gradients(plain_scores, dtype)
  for there, here in zip(found, expected, strict=True):
    assert there.dtype == here.dtype == dtype
    here = np.asarray(here, np.float32)
    difference = np.abs(np.asarray(there, np.float32) - here).max()
    assert difference <= within * np.abs(here).max()
