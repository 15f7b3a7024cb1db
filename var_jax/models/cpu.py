"""Operations that XLA compiles badly for CPUs, and a better way there.

Convolutions and sums are the plain operations on other platforms, and wherever
a derivative is taken. `dot_general` is for programs that run on one CPU only.
`Jit` makes whole programs with the kernels that suit them on CPUs, training
included.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

# F(4x4, 3x3) of "Fast Algorithms for Convolutional Neural Networks"
# (1509.09308, 4.3): 4x4 outputs of 6x6 inputs, 36 products in place of 144. It
# rounds more: up to 1.5e-5 of the largest value, in place of 8e-7.
_INPUT = np.array(
  [
    [4, 0, -5, 0, 1, 0],
    [0, -4, -4, 1, 1, 0],
    [0, 4, -4, -1, 1, 0],
    [0, -2, -1, 2, 1, 0],
    [0, 2, -1, -2, 1, 0],
    [0, 4, 0, -5, 0, 1],
  ]
)
_KERNEL = np.array(
  [
    [1 / 4, 0, 0],
    [-1 / 6, -1 / 6, -1 / 6],
    [-1 / 6, 1 / 6, -1 / 6],
    [1 / 24, 1 / 12, 1 / 6],
    [1 / 24, -1 / 12, 1 / 6],
    [0, 0, 1],
  ]
)
_OUTPUT = np.array(
  [
    [1, 1, 1, 1, 1, 0],
    [0, 1, -1, 2, -2, 0],
    [0, 1, 1, 4, 4, 0],
    [0, 1, -1, 8, -8, 1],
  ]
)
_TILE = 4  # pixels of a side
_TILES = 512  # at once, about: what one image's take stays near the cores
_YNN_FUSIONS = "xla_cpu_experimental_ynn_fusion_type"
_MIN_SIDE, _MIN_CHANNELS = 64, 128  # below, the plain convolution is faster


def compiler_options(platform: str) -> dict[str, Any] | None:
  """Return what jax.jit takes for a program that decodes, encodes or trains.

  On CPUs it turns XLA's YNN kernels off, which jaxlib 0.10 to 0.12 know. Those
  are slower than Eigen's for convolutions and training; for drawing they are
  not, and stay on.
  """
  return {_YNN_FUSIONS: ""} if platform == "cpu" else None


class Jit:
  """`jax.jit` with `compiler_options`; within another program, without.

  Args:
    platform: by default the default backend's, when it is first called.
    options: of jax.jit.
  """

  def __init__(
    self, function: Callable, platform: str | None = None, **options
  ):
    self._plain = jax.jit(function, **options)
    self._jit = functools.partial(jax.jit, function, **options)
    self._platform = platform

  def __call__(self, *args):
    if compiler_options(self._platform or jax.default_backend()) is None:
      return self._plain(*args)
    # What is traced here, or differentiated, is part of another program, and
    # JAX takes options for whole ones only.
    values = (jax.lax.full((), 0), *jax.tree.leaves(args))
    nested = any(isinstance(x, jax.core.Tracer) for x in values)
    return (self._plain if nested else self._whole)(*args)

  def eval_shape(self, *args):
    """Return the shapes of the results."""
    return self._plain.eval_shape(*args)

  def lower(self, *args, platform: str | None = None) -> jax.stages.Lowered:
    """Return the whole program, of another platform if it is said."""
    if platform is None:
      return self._whole.lower(*args)
    return self._jit(compiler_options=compiler_options(platform)).lower(*args)

  @functools.cached_property
  def _whole(self):
    platform = self._platform or jax.default_backend()
    return self._jit(compiler_options=compiler_options(platform))


def convolve(
  x_BhwZ: jax.Array,
  kernel_ijZF: jax.Array,
  window_strides: Sequence[int],
  padding: Sequence[tuple[int, int]],
  **how,
) -> jax.Array:
  """Return lax.conv_general_dilated of the same arguments."""

  def plain(x_BhwZ, kernel_ijZF):
    return jax.lax.conv_general_dilated(
      x_BhwZ, kernel_ijZF, window_strides, padding, **how
    )

  dilations = (how.get("lhs_dilation"), how.get("rhs_dilation"))
  if (
    kernel_ijZF.shape[:2] != (3, 3)
    or tuple(window_strides) != (1, 1)
    or [tuple(pad) for pad in padding] != [(1, 1), (1, 1)]
    or any(d != 1 for dilation in dilations for d in dilation or ())
    or how.get("batch_group_count", 1) != 1
    or x_BhwZ.dtype != jnp.float32
    or min(x_BhwZ.shape[1:3]) < _MIN_SIDE
    or any(side % _TILE for side in x_BhwZ.shape[1:3])
    or min(kernel_ijZF.shape[2:]) < _MIN_CHANNELS
  ):
    return plain(x_BhwZ, kernel_ijZF)
  return _on_cpu(_winograd, plain)(x_BhwZ, kernel_ijZF)


def sum_positions(x_BTZ: jax.Array) -> jax.Array:
  """Return the sum over T, [B, Z]; of 65,536 it is off by up to 3e-5."""

  def product(x_BTZ):
    ones_T = jnp.ones(x_BTZ.shape[1], x_BTZ.dtype)
    return _product("t,btz->bz", ones_T, x_BTZ)

  return _on_cpu(product, lambda x_BTZ: jnp.sum(x_BTZ, axis=1))(x_BTZ)


def dot_general(
  x: jax.Array, kernel: jax.Array, dimension_numbers, *args, **how
) -> jax.Array:
  """Return lax.dot_general of the same arguments, of x by its last dimension.

  All other dimensions of x are made one. Else XLA's gradient of the kernel sums
  over several, for which CPUs copy both factors.
  """
  (contracted, of_kernel), batch = dimension_numbers
  if tuple(contracted) != (x.ndim - 1,) or any(batch):
    raise ValueError(
      f"dimension_numbers {dimension_numbers} are not of a projection of "
      f"{x.ndim} dimensions; use lax.dot_general."
    )
  out_nE = jax.lax.dot_general(
    x.reshape(-1, x.shape[-1]),
    kernel,
    (((1,), of_kernel), batch),
    *args,
    **how,
  )
  return out_nE.reshape(*x.shape[:-1], *out_nE.shape[1:])


def _on_cpu(fast, plain):
  """Return a function that is `fast` on CPUs and else, and to AD, `plain`."""

  @jax.custom_jvp
  def function(*args):
    return jax.lax.platform_dependent(*args, cpu=fast, default=plain)

  @function.defjvp
  def derivative(primals, tangents):
    return jax.jvp(plain, primals, tangents)

  return function


def _winograd(x_BhwZ: jax.Array, kernel_ijZF: jax.Array) -> jax.Array:
  """Return the 3x3 convolution of stride 1, padded by 1, in float32."""
  B, h, w, Z = x_BhwZ.shape
  F = kernel_ijZF.shape[-1]
  down, across = h // _TILE, w // _TILE
  rows = max(
    r
    for r in range(1, down + 1)
    if not down % r and (r == 1 or B * r * across <= _TILES)
  )  # of tiles, at once
  high, wide = _TILE * rows, _TILE * across
  kernel_EZF = _transform(_KERNEL, kernel_ijZF).reshape(-1, Z, F)
  # A window reaches one pixel past its tile. The slices below take four past a
  # strip, so that all have one length: hence three on the far side.
  x_BhwZ = jnp.pad(x_BhwZ, ((0, 0), (1, 3), (1, 3), (0, 0)))
  places = [(i, j) for i in range(6) for j in range(6)]

  def strip(index):
    x_BrwZ = jax.lax.dynamic_slice_in_dim(
      x_BhwZ, index * high, high + _TILE, axis=1
    )
    windows = [
      x_BrwZ[:, i : i + high : _TILE, j : j + wide : _TILE] for i, j in places
    ]
    # E: the 36 values of a window; n: all tiles of the strip.
    window_EnZ = _transform(_INPUT, jnp.stack(windows)).reshape(36, -1, Z)
    product_EnF = _product("enz,ezf->enf", window_EnZ, kernel_EZF)
    out_E = _transform(_OUTPUT, product_EnF)
    out_ijBrtF = out_E.reshape(_TILE, _TILE, B, rows, across, F)
    return out_ijBrtF.transpose(2, 3, 0, 4, 1, 5).reshape(B, high, w, F)

  strips_SBhwF = jax.lax.map(strip, jnp.arange(down // rows))
  return strips_SBhwF.swapaxes(0, 1).reshape(B, h, w, F)


def _transform(matrix: np.ndarray, x: jax.Array) -> jax.Array:
  """Apply a matrix to both sides of squares, which lead and may be flat."""
  both = jnp.asarray(np.kron(matrix, matrix), jnp.float32)
  return _product("de,en->dn", both, x.reshape(both.shape[1], -1))


_product = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)
