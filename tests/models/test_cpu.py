"""What is faster on CPUs is the plain operation, and stays there."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from var_jax.models import cpu, vae
from var_jax.models.tokenizer import Tokenizer, TokenizerConfig

SAME = ((1, 1), (1, 1))
DIMENSIONS = ("NHWC", "HWIO", "NHWC")
convolve = functools.partial(cpu.convolve, dimension_numbers=DIMENSIONS)
plain = functools.partial(
  jax.lax.conv_general_dilated, dimension_numbers=DIMENSIONS
)


def operands(h=64, w=64, channels=128, features=128, batch=1, side=3):
  x, kernel = jax.random.split(jax.random.key(0))
  return (
    jax.random.normal(x, (batch, h, w, channels)),
    jax.random.normal(kernel, (side, side, channels, features)),
  )


def lowered(function, *args, platform="cpu") -> str:
  return (
    jax.jit(function)
    .trace(*args)
    .lower(lowering_platforms=(platform,))
    .as_text()
  )


def convolutions(function, *args, platform="cpu") -> tuple[bool, bool]:
  """Return whether a program convolves, and whether it multiplies matrices."""
  traced = jax.jit(function).trace(*args)
  text = traced.lower(lowering_platforms=(platform,)).as_text()
  return "stablehlo.convolution" in text, "stablehlo.dot_general" in text


def by_nine_products(x_BhwZ, kernel_ijZF):
  """Return the convolution in float64."""
  h, w = x_BhwZ.shape[1:3]
  x_BhwZ = np.pad(np.float64(x_BhwZ), ((0, 0), (1, 1), (1, 1), (0, 0)))
  return sum(
    x_BhwZ[:, i : i + h, j : j + w] @ np.float64(kernel_ijZF[i, j])
    for i in range(3)
    for j in range(3)
  )


@pytest.mark.parametrize(
  "shape",
  [
    dict(),
    dict(h=68, w=76, features=160),  # 17 by 19 tiles
    dict(h=64, w=128, channels=160, batch=3),  # more than fit at once
  ],
  ids=str,
)
def test_large_convolutions_are_those_in_float64(shape):
  x_BhwZ, kernel_ijZF = operands(**shape)
  same = functools.partial(convolve, window_strides=(1, 1), padding=SAME)
  assert convolutions(same, x_BhwZ, kernel_ijZF) == (False, True)
  ours = jax.jit(same)(x_BhwZ, kernel_ijZF)
  oracle = by_nine_products(x_BhwZ, kernel_ijZF)
  error = np.abs(ours - oracle).max() / np.abs(oracle).max()
  assert error < 2e-5
  # What the route costs: a plain convolution is some ten times nearer.
  at_once = plain(x_BhwZ, kernel_ijZF, (1, 1), SAME)
  assert np.abs(at_once - oracle).max() < error * np.abs(oracle).max()


@pytest.mark.parametrize(
  "shape, how",
  [
    (dict(h=32), {}),
    (dict(w=66), {}),
    (dict(channels=64), {}),
    (dict(features=3), {}),
    (dict(side=1), dict(padding=((0, 0), (0, 0)))),
    ({}, dict(window_strides=(2, 2))),
    ({}, dict(padding=((0, 1), (0, 1)))),
    ({}, dict(rhs_dilation=(2, 2))),
  ],
  ids=str,
)
def test_other_convolutions_are_plain(shape, how):
  arguments = dict(window_strides=(1, 1), padding=SAME) | how
  args = operands(**shape)
  ours = functools.partial(convolve, **arguments)
  assert convolutions(ours, *args) == (True, False)
  np.testing.assert_array_equal(ours(*args), plain(*args, **arguments))


def test_half_precision_is_plain():
  args = [x.astype(jnp.bfloat16) for x in operands()]
  same = functools.partial(convolve, window_strides=(1, 1), padding=SAME)
  assert convolutions(same, *args) == (True, False)


@pytest.mark.parametrize("platform", ["tpu", "cuda"])
def test_accelerators_convolve_and_sum_plainly(platform):
  same = functools.partial(convolve, window_strides=(1, 1), padding=SAME)
  assert convolutions(same, *operands(), platform=platform) == (True, False)
  (x_BhwZ, _) = operands()
  found = convolutions(
    cpu.sum_positions, x_BhwZ.reshape(1, -1, 128), platform=platform
  )
  assert found == (False, False)
  assert cpu.compiler_options(platform) is None


def test_what_is_differentiated_is_plain():
  args = operands()
  same = dict(window_strides=(1, 1), padding=SAME)

  def loss(function, *args):
    return jnp.sum(jnp.sin(function(*args, **same)))

  ours = jax.grad(functools.partial(loss, convolve), (0, 1))
  theirs = jax.grad(functools.partial(loss, plain), (0, 1))
  assert convolutions(ours, *args) == (True, False)
  for one, other in zip(ours(*args), theirs(*args), strict=True):
    np.testing.assert_array_equal(one, other)


def test_sums_over_positions_are_sums():
  x_BTZ = jax.random.normal(jax.random.key(1), (3, 500, 40))
  oracle = np.float64(x_BTZ).sum(1)
  np.testing.assert_allclose(
    jax.jit(cpu.sum_positions)(x_BTZ), oracle, rtol=1e-4, atol=1e-4
  )
  grads = jax.grad(lambda x: cpu.sum_positions(x)[0, 3] * 2.0)(x_BTZ)
  assert np.all(grads[0, :, 3] == 2.0) and float(grads.sum()) == 1000.0


@pytest.mark.parametrize("shift", [0.0, 100.0])
def test_group_norm_is_that_of_flax(shift):
  x_BhwZ = jax.random.normal(jax.random.key(2), (2, 9, 7, 24)) + shift
  key = jax.random.key(3)
  variables = {
    "params": {
      "scale": jax.random.normal(key, (24,)),
      "bias": jnp.arange(24.0),
    }
  }
  theirs = nn.GroupNorm(8, epsilon=1e-6, use_fast_variance=False)
  ours = vae.GroupNorm(8)
  like = jax.eval_shape(ours.init, key, x_BhwZ)
  assert like == jax.eval_shape(theirs.init, key, x_BhwZ)

  def loss(norm, variables, x_BhwZ):
    return jnp.sum(jnp.cos(norm.apply(variables, x_BhwZ)))

  for function in (
    lambda norm: norm.apply(variables, x_BhwZ),
    lambda norm: jax.grad(loss, 2)(norm, variables, x_BhwZ),
  ):
    np.testing.assert_allclose(
      function(ours), function(theirs), rtol=1e-4, atol=2e-5 * (1 + shift)
    )


def test_the_released_tokenizer_draws_the_same_with_plain_operations(
  monkeypatch,
):
  """Largest difference seen: 2.4e-5 of pixels in [-1, 1]; no token differs."""
  tokenizer = Tokenizer(TokenizerConfig())
  image_BHW3 = jax.random.uniform(jax.random.key(4), (1, 256, 256, 3)) * 2 - 1
  params = jax.jit(tokenizer.init)(jax.random.key(5), image_BHW3)

  def tokens_and_image():
    tokens_BL = cpu.jit(
      lambda p, x: tokenizer.apply(p, x, method="encode"), ()
    )(params, image_BHW3)
    decode = cpu.jit(lambda p, x: tokenizer.apply(p, x, method="decode"), ())
    return tokens_BL, decode(params, tokens_BL)

  tokens_BL, ours = tokens_and_image()
  monkeypatch.setattr(cpu, "_MIN_SIDE", 10**6)
  plain_BL, theirs = tokens_and_image()
  np.testing.assert_array_equal(tokens_BL, plain_BL)
  difference = np.abs(ours - theirs).max()
  assert 0 < difference < 1e-4
