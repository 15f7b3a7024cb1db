"""Attention head by head is attention, with and without a mask."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from var_jax.models import cpu, cpu_attention, layers
from var_jax.models.scales import SCALES, ScaleSchedule
from var_jax.models.transformer import VAR, VARConfig

SCALES_183 = ScaleSchedule((1, 2, 3, 5, 12))


def queries(l, T, dtype=jnp.float32):
  """Return q, k and v of two rows with three heads; logits spread over 60."""
  q, k, v = jax.random.split(jax.random.key(1), 3)
  return (
    jax.random.normal(q, (2, l, 3, 8), dtype) * 5,
    jax.random.normal(k, (2, T, 3, 8), dtype),
    jax.random.normal(v, (2, T, 3, 8), dtype),
  )


@pytest.mark.parametrize("l, T", [(64, 64), (81, 140)])
def test_attention_by_heads_is_attention(l, T):
  qkv = queries(l, T)
  # No program of it holds the weights of all heads.
  text = jax.jit(cpu_attention.attend).lower(*qkv, None).as_text()
  assert f"tensor<{l}x{T}xf32>" in text and f"x{l}x{T}xf32>" not in text
  ours, theirs = cpu_attention.attend(*qkv, None), layers.attend(*qkv, None)
  np.testing.assert_allclose(ours, theirs, atol=5e-6)


@pytest.mark.parametrize(
  "args",
  [
    (*queries(63, 80), None),
    (*queries(64, 64, jnp.bfloat16), None),
    (*queries(64, 64), jnp.tri(64, dtype=bool)),
  ],
  ids=["few", "bfloat16", "masked"],
)
def test_other_attention_is_plain(args):
  np.testing.assert_array_equal(
    cpu_attention.attend(*args), layers.attend(*args)
  )


def levels(*sides):
  return tuple(ScaleSchedule(sides).level_ids().tolist())


@pytest.mark.parametrize(
  "sides, length, expected",
  [
    ((1, 2, 3, 5, 12), 183, [(0, 39, True), (39, 183, False)]),
    ((1, 2, 3, 5, 12), 100, [(0, 100, True)]),
    ((1, 2, 3, 5, 12), 39, [(0, 39, True)]),
    ((12, 12), 288, [(0, 144, False), (144, 288, False)]),
    ((12, 13), 244, [(0, 144, False), (144, 244, True)]),
    ((8, 12, 14), 308, [(0, 64, True), (64, 208, False), (208, 308, True)]),
    (SCALES[256], 474, [(0, 255, True), (255, 424, False), (424, 474, True)]),
  ],
)
def test_large_scales_are_parts_of_their_own(sides, length, expected):
  attend = cpu_attention.Attend(levels(*sides))
  parts = attend._parts(length)
  found = [(part.start, part.end, bool(part.level_ids)) for part in parts]
  assert found == expected
  for part in parts:
    if part.level_ids:
      assert part.level_ids == attend.level_ids[: part.end]


@pytest.mark.parametrize(
  "sides, length",
  [((1, 2, 3, 5, 12), 183), ((12, 13), 244), ((8, 12, 14), 308)],
)
def test_parts_and_their_gradients_are_plain_attention(sides, length):
  keys = jax.random.split(jax.random.key(0), 4)
  q, k, v, weights = (
    jax.random.normal(key, (2, length, 2, 16)) for key in keys
  )
  level_l = jnp.asarray(levels(*sides)[:length])
  mask_ll = level_l[:, None] >= level_l

  def of(attend):
    def loss(q, k, v):
      out = attend(q, k, v, mask_ll)
      return jnp.sum(out * weights), out

    grads, out = jax.grad(loss, argnums=(0, 1, 2), has_aux=True)(q, k, v)
    return out, *grads

  ours = of(cpu_attention.Attend(levels(*sides)))
  for here, there in zip(ours, of(layers.attend), strict=True):
    scale = np.abs(there).max()
    np.testing.assert_allclose(here, there, atol=1e-5 * scale)


def test_without_a_mask_it_goes_by_heads_too(monkeypatch):
  qkv, seen = queries(64, 80), []
  monkeypatch.setattr(cpu_attention, "attend", lambda *args: seen.append(args))
  cpu_attention.Attend(levels(8, 12))(*qkv, None)
  assert len(seen) == 1


def test_a_transformer_trains_alike_with_what_suits_a_cpu():
  cfg = VARConfig(
    depth=2,
    width=32,
    heads=2,
    num_classes=3,
    vocab_size=24,
    latent_channels=4,
    scales=SCALES_183.sizes,
    init_adaln_gamma=1.0,  # else a layer is hardly felt
  )
  keys = jax.random.split(jax.random.key(0), 3)
  inputs_BlZ = jax.random.normal(keys[0], (2, SCALES_183.num_tokens - 1, 4))
  labels_B = jnp.array([0, 2])
  params = VAR(cfg).init(keys[1], labels_B, inputs_BlZ)
  weights = jax.random.normal(keys[2], (2, SCALES_183.num_tokens, 24))

  def of(var):
    def loss(params):
      return jnp.sum(var.apply(params, labels_B, inputs_BlZ) * weights)

    return jax.jit(jax.value_and_grad(loss))(params)

  attend = cpu_attention.Attend(levels(*SCALES_183.sizes))
  plain, grads = of(VAR(cfg))
  value, found = of(VAR(cfg, attend, cpu.dot_general))
  np.testing.assert_allclose(value, plain, rtol=1e-4)
  largest = max(np.abs(g).max() for g in jax.tree.leaves(grads))
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5 * largest),
    found, grads,
  )  # fmt: skip
