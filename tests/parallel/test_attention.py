"""Every attention is the plain one, in values and gradients."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from var_jax.models import layers
from var_jax.models.scales import SCALES, ScaleSchedule
from var_jax.parallel import attention, mesh

SMALL = ScaleSchedule((1, 2, 3, 5, 12))  # 183 tokens: two blocks, padded


def inputs(l, heads=2, K=64, seed=0):
  keys = jax.random.split(jax.random.key(seed), 4)
  q, k, v, weights = (jax.random.normal(key, (2, l, heads, K)) for key in keys)
  return layers.l2_normalize(q) * 4.0, layers.l2_normalize(k), v, weights


def one_device():
  return mesh.make_mesh(devices=jax.devices()[:1])


def mask_of(scales, l):
  level_l = scales.level_ids()[:l]
  return jnp.asarray(level_l[:, None] >= level_l)


def with_gradients(attend, q, k, v, weights, mask_ll):
  def loss(q, k, v):
    out = attend(q, k, v, mask_ll)
    return jnp.sum(out * weights), out

  grads, out = jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))(q, k, v)
  return out, *grads


@pytest.mark.parametrize(
  "name, scales, l",
  [
    ("splash", SMALL, 183),
    ("splash", SMALL, 39),
    ("splash", SMALL, 14),
    ("splash", ScaleSchedule(SCALES[256]), 680),
    ("cpu", SMALL, 183),
    ("cpu", ScaleSchedule(SCALES[256]), 680),
  ],
)
def test_attention_is_plain_attention(name, scales, l):
  attend = attention.choose(name, one_device(), scales, "float32")
  assert attention.name_of(attend) == name
  q, k, v, weights = inputs(l, heads=1 if l == 680 else 2)
  mask_ll = mask_of(scales, l)
  found = with_gradients(attend, q, k, v, weights, mask_ll)
  expected = with_gradients(layers.attend, q, k, v, weights, mask_ll)
  for name, here, there in zip("oqkv", found, expected, strict=True):
    scale = np.abs(there).max()
    # Sums over blocks and over rows: float32 in another order.
    np.testing.assert_allclose(here, there, atol=1e-5 * scale, err_msg=name)


@pytest.mark.parametrize("name", ["splash", "cpu"])
def test_no_gradient_of_a_token_reaches_finer_scales(name):
  attend = attention.choose(name, one_device(), SMALL, "float32")
  q, k, v, _ = inputs(183)

  def of_scale_two(v):
    return jnp.sum(attend(q, k, v, mask_of(SMALL, 183))[:, 5:14])

  reached = np.abs(jax.grad(of_scale_two)(v)).sum((0, 2, 3)) > 0
  assert reached.tolist() == [True] * 14 + [False] * 169


def test_without_a_mask_splash_attention_sees_everything():
  splash = attention.choose("splash", mesh.make_mesh(), SMALL, "float32")
  q, k, v, _ = inputs(14)
  np.testing.assert_array_equal(
    splash(q[:, 5:], k, v, None), layers.attend(q[:, 5:], k, v, None)
  )


def test_the_platform_chooses():
  here = one_device()
  auto = attention.choose("auto", here, SMALL, "float32")
  assert auto == attention.choose("cpu", here, SMALL, "float32")
  half = attention.choose("auto", here, SMALL, "bfloat16")
  eight = types.SimpleNamespace(size=8, devices=np.repeat(here.devices, 8))
  several = attention.choose("auto", eight, SMALL, "float32")
  assert half is several is layers.attend
  one, other = (
    attention.choose("splash", mesh.make_mesh(), SMALL, "float32")
    for _ in range(2)
  )
  assert one == other and hash(one) == hash(other)  # or jit traces again
  with pytest.raises(ValueError, match="'flash' is not known; use one of auto"):
    attention.choose("flash", here, SMALL, "float32")
  message = "'cpu' is for one CPU in float32, not for {} x cpu in {}; use auto"
  with pytest.raises(ValueError, match=message.format(8, "float32")):
    attention.choose("cpu", eight, SMALL, "float32")
  with pytest.raises(ValueError, match=message.format(1, "bfloat16")):
    attention.choose("cpu", here, SMALL, "bfloat16")
  with pytest.raises(ValueError, match="'cudnn' does not run on cpu in fl"):
    attention.choose("cudnn", here, SMALL, "float32")
