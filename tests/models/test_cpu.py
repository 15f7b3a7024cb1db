"""What is faster on CPUs is the plain operation, and stays there."""

import functools
import os
import pathlib
import subprocess
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from var_jax.models import cpu, layers, vae
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
  assert np.abs(at_once - oracle).max() < error / 4 * np.abs(oracle).max()


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
  x_BTZ = jax.random.uniform(jax.random.key(1), (2, 65536, 8))
  oracle = np.float64(x_BTZ).sum(1)
  np.testing.assert_allclose(
    jax.jit(cpu.sum_positions)(x_BTZ), oracle, rtol=3e-5
  )
  grads = jax.grad(lambda x: cpu.sum_positions(x)[0, 3] * 2.0)(x_BTZ)
  assert np.all(grads[0, :, 3] == 2.0) and float(grads.sum()) == 2.0 * 65536


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


def test_a_tokenizer_of_the_released_size_does_the_same_with_plain_operations(
  monkeypatch,
):
  """Random weights and noise. Largest difference of pixels seen: 2.5e-5."""
  tokenizer = Tokenizer(TokenizerConfig())
  image_BHW3 = jax.random.uniform(jax.random.key(4), (1, 256, 256, 3)) * 2 - 1
  params = jax.jit(tokenizer.init)(jax.random.key(5), image_BHW3)

  def tokens_and_image(jit):
    encode, decode = (
      jit(functools.partial(tokenizer.apply, method=method))
      for method in ("encode", "decode")
    )
    tokens_BL = encode(params, image_BHW3)
    return tokens_BL, decode(params, tokens_BL)

  tokens_BL, ours = tokens_and_image(cpu.Jit)
  monkeypatch.setattr(cpu, "_on_cpu", lambda fast, plain: plain)
  plain_BL, theirs = tokens_and_image(jax.jit)
  np.testing.assert_array_equal(tokens_BL, plain_BL)
  assert 0 < np.abs(ours - theirs).max() < 1e-4


def test_a_program_with_options_is_part_of_others_all_the_same():
  double = cpu.Jit(lambda x: 2.0 * x, "cpu")
  one = jnp.ones(())
  assert cpu.compiler_options("cpu")
  for found in (
    double(one),
    jax.grad(double)(one),
    jax.jit(double)(one),
    jax.jit(lambda: double(one))(),
    jax.vmap(double)(jnp.ones((1,)))[0],
    double.lower(one).compile()(one),
    double.lower(one, platform="tpu").compile()(one),  # no options at all
  ):
    assert found == 2.0


def test_whole_programs_have_the_kernels_that_suit_them():
  matrix = jnp.ones((200, 200))
  texts = [
    jit(lambda x: x @ x).lower(matrix).compile().as_text()
    for jit in (jax.jit, lambda f: cpu.Jit(f, "cpu"))
  ]
  assert ["ynn_fusion" in text for text in texts] == [True, False]


def test_eight_devices_convolve_as_one_does():
  code = """
import jax, numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from test_cpu import SAME, convolve, operands
x_BhwZ, kernel_ijZF = operands(batch=8)
mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
split = jax.device_put(x_BhwZ, NamedSharding(mesh, PartitionSpec("data")))
program = jax.jit(lambda x, k: convolve(x, k, (1, 1), SAME))
out_BhwF = program(split, kernel_ijZF)
assert not out_BhwF.sharding.is_fully_replicated
np.testing.assert_allclose(
  out_BhwF, program(x_BhwZ, kernel_ijZF), atol=1e-5 * abs(out_BhwF).max())
"""
  flags = "--xla_force_host_platform_device_count=8"
  environment = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
  subprocess.run(
    [sys.executable, "-c", code],
    check=True,
    env=environment,
    cwd=pathlib.Path(__file__).parent,
  )


_LAST = (((2,), (0,)), ((), ()))


def projected(dot_general, shape=(16, 24), dtype="float32"):
  """Return (value and gradients of a projection, its arguments)."""
  keys = jax.random.split(jax.random.key(0), 3)
  x_BlD, kernel, weights = (
    jax.random.normal(key, size, dtype)
    for key, size in zip(
      keys, [(3, 5, 16), shape, (3, 5, *shape[1:])], strict=True
    )
  )

  def loss(x_BlD, kernel):
    precision = layers.matmul_precision(dtype)
    out = dot_general(x_BlD, kernel, _LAST, precision=precision)
    return jnp.sum((out * weights).astype(jnp.float32))

  return jax.jit(jax.value_and_grad(loss, argnums=(0, 1))), (x_BlD, kernel)


@pytest.mark.parametrize("shape", [(16, 24), (16, 3, 8)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_projection_of_rows_is_one_of_all_dimensions(shape, dtype):
  ours, args = projected(cpu.dot_general, shape, dtype)
  plain_one, _ = projected(jax.lax.dot_general, shape, dtype)
  tolerance = 1e-5 if dtype == "float32" else 2e-2
  found, expected = (jax.tree.leaves(f(*args)) for f in (ours, plain_one))
  for here, there in zip(found, expected, strict=True):
    assert here.dtype == there.dtype
    here, there = np.float32(here), np.float32(there)
    np.testing.assert_allclose(here, there, atol=tolerance * abs(there).max())
  # What it is for: the gradient of the kernel sums over one dimension.
  sums = [
    text.count("contracting_dims = [0, 1] x [0, 1]")
    for text in (f.lower(*args).as_text() for f in (ours, plain_one))
  ]
  assert sums == [0, 1]


def test_other_products_are_refused():
  with pytest.raises(ValueError, match="not of a projection of 3 dimensions"):
    cpu.dot_general(
      jnp.ones((2, 3, 4)), jnp.ones((3, 4)), (((1,), (0,)), ((), ()))
    )
