"""Resampling between scales as constant matrices: out = R x C^T.

PyTorch's `interpolate` is the reference (modes area, bicubic and bilinear,
align_corners=False, no antialiasing). `jax.image.resize` is another function:
its cubic kernel has a=-0.5 and renormalises at the border.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

HIGHEST = jax.lax.Precision.HIGHEST


@functools.cache
def area_matrix(n_out: int, n_in: int) -> np.ndarray:
  """Return float64 [n_out, n_in] that averages the cells an output covers.

  Output i is the mean of inputs floor(i n_in/n_out) .. ceil((i+1) n_in/n_out),
  so neighbours overlap where n_out does not divide n_in.
  """
  matrix = np.zeros((n_out, n_in))
  for i in range(n_out):
    first = i * n_in // n_out
    last = -(-(i + 1) * n_in // n_out)
    matrix[i, first:last] = 1.0 / (last - first)
  return matrix


@functools.cache
def bicubic_matrix(n_out: int, n_in: int) -> np.ndarray:
  """Return float64 [n_out, n_in] of Keys' cubic kernel with a=-0.75.

  Taps beyond the border are read from the border pixel.
  """
  return _kernel_matrix(n_out, n_in, _cubic, taps=(-1, 0, 1, 2))


@functools.cache
def bilinear_matrix(n_out: int, n_in: int) -> np.ndarray:
  """Return float64 [n_out, n_in] of the triangle kernel, border repeated."""
  return _kernel_matrix(n_out, n_in, lambda d: 1.0 - d, taps=(0, 1))


def resample(
  x_BhwZ: jax.Array, rows_ih: np.ndarray, columns_jw: np.ndarray
) -> jax.Array:
  """Apply one matrix to the rows and one to the columns: [B, i, j, Z]."""
  # HIGHEST: a float32 einsum on TPU runs in bfloat16 passes otherwise.
  rows_ih = jnp.asarray(rows_ih, x_BhwZ.dtype)
  columns_jw = jnp.asarray(columns_jw, x_BhwZ.dtype)
  x_BiwZ = jnp.einsum("ih,bhwz->biwz", rows_ih, x_BhwZ, precision=HIGHEST)
  return jnp.einsum("jw,biwz->bijz", columns_jw, x_BiwZ, precision=HIGHEST)


def area(x_BhwZ: jax.Array, shape: tuple[int, int]) -> jax.Array:
  """Average a map down to `shape`: [B, *shape, Z]."""
  return _to_shape(x_BhwZ, shape, area_matrix)


def bicubic(x_BijZ: jax.Array, shape: tuple[int, int]) -> jax.Array:
  """Enlarge a map to `shape`: [B, *shape, Z]."""
  return _to_shape(x_BijZ, shape, bicubic_matrix)


def _to_shape(x_BhwZ, shape, matrix):
  _, h, w, _ = x_BhwZ.shape
  if (h, w) == tuple(shape):
    return x_BhwZ
  return resample(x_BhwZ, matrix(shape[0], h), matrix(shape[1], w))


def _kernel_matrix(n_out, n_in, kernel, taps):
  matrix = np.zeros((n_out, n_in))
  for i in range(n_out):
    center = (i + 0.5) * n_in / n_out - 0.5
    if taps == (0, 1):  # PyTorch clamps the centre for linear modes only.
      center = max(center, 0.0)
    floor = int(np.floor(center))
    for tap in taps:
      source = min(max(floor + tap, 0), n_in - 1)
      matrix[i, source] += kernel(abs(center - (floor + tap)))
  return matrix


def _cubic(d: float, a: float = -0.75) -> float:
  if d <= 1.0:
    return ((a + 2.0) * d - (a + 3.0)) * d * d + 1.0
  return (((d - 5.0) * d + 8.0) * d - 4.0) * a
