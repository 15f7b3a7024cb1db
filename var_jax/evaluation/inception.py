"""The Inception network of 2015 whose features FID is defined by.

The graph that published evaluators share (1512.00567, with factorised 7x7
convolutions): uint8 images are brought to 299 x 299 by TensorFlow's first
bilinear rule, inside, and go in as (x - 128) / 128. Another network, another
resampling or another range gives another number.

The weights are public and not part of this project: `var-jax convert
--inception` makes a folder of them. Batch normalisation is folded into a scale
and a shift of channels.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from var_jax.models.layers import HIGHEST

SIDE = 299
POOLED, CLASSES = 2048, 1008
SPATIAL_CHANNELS = 7  # of mixed_6, what sFID is taken of
SPATIAL = 17 * 17 * SPATIAL_CHANNELS

Weights = Mapping[str, jax.Array]
# Takes (name, x, features, kernel, stride, padded?) and convolves.
Convolve = Callable[..., jax.Array]


class Features(NamedTuple):
  """Of a batch of images, float32."""

  pooled_BD: jax.Array  # pool_3
  spatial_BE: jax.Array | None  # of mixed_6, 17 x 17 x 7 in one dimension
  probs_BC: jax.Array

  def present(self) -> dict[str, jax.Array]:
    """Return those that there are, by name."""
    return {k: v for k, v in self._asdict().items() if v is not None}


def features(weights: Weights, pixels_BHW3: jax.Array) -> Features:
  """Return what the network sees in uint8 images of any size.

  Args:
    weights: as `shapes` has them.
  """

  def convolve(name, x, features, kernel, stride, padded):
    del features
    x = jax.lax.conv_general_dilated(
      x,
      weights[f"{name}/kernel"],
      (stride, stride),
      _padding(kernel, padded),
      dimension_numbers=("NHWC", "HWIO", "NHWC"),
      precision=HIGHEST,
    )
    return nn.relu(x * weights[f"{name}/scale"] + weights[f"{name}/shift"])

  x = resize(pixels_BHW3.astype(jnp.float32), SIDE)
  pooled_BD, spatial_BijE = _network(convolve, (x - 128.0) / 128.0)
  # IS leaves the bias of the logits out.
  logits_BC = jnp.matmul(pooled_BD, weights["logits/kernel"], precision=HIGHEST)
  spatial_BijE = spatial_BijE[..., :SPATIAL_CHANNELS]
  return Features(
    pooled_BD,
    spatial_BijE.reshape(len(spatial_BijE), -1),
    jax.nn.softmax(logits_BC),
  )


def shapes() -> dict[str, tuple[int, ...]]:
  """Return the shapes of all weights, by name."""
  found = {}

  def convolve(name, x, features, kernel, stride, padded):
    found[f"{name}/kernel"] = (*kernel, x.shape[-1], features)
    found[f"{name}/scale"] = found[f"{name}/shift"] = (features,)
    return jax.lax.conv_general_dilated(
      x,
      jnp.zeros(found[f"{name}/kernel"]),
      (stride, stride),
      _padding(kernel, padded),
      dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )

  jax.eval_shape(lambda x: _network(convolve, x), jnp.zeros((1, SIDE, SIDE, 3)))
  return found | {"logits/kernel": (POOLED, CLASSES)}


def resize(x_BHWZ: jax.Array, side: int) -> jax.Array:
  """Return images of side x side by the rule of TensorFlow 1.

  Bilinear without antialiasing: output pixel i is at i (length / side), not at
  the middle of pixels.
  """
  for axis in (2, 1):
    length = x_BHWZ.shape[axis]
    # float32, as there: it decides which side of a pixel a place is on.
    place = np.arange(side, dtype=np.float32) * np.float32(length / side)
    below = np.floor(place).astype(np.int32)
    above = np.minimum(below + 1, length - 1)
    weight = (place - below).reshape([-1 if i == axis else 1 for i in range(4)])
    low, high = (jnp.take(x_BHWZ, at, axis=axis) for at in (below, above))
    x_BHWZ = low + (high - low) * weight
  return x_BHWZ


def _padding(kernel: tuple[int, int], padded: bool) -> list[tuple[int, int]]:
  return [((k - 1) // 2,) * 2 if padded else (0, 0) for k in kernel]


def _network(convolve: Convolve, x: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Return pool_3 [B, D] and the first branch of mixed_6 [B, 17, 17, E].

  Names are those of the common PyTorch port.
  """

  def conv(name, x, features, kernel=1, stride=1, padded=True):
    if isinstance(kernel, int):
      kernel = (kernel, kernel)
    return convolve(name, x, features, kernel, stride, padded)

  def chain(prefix, x, *layers):
    for name, *how in layers:
      x = conv(f"{prefix}.{name}", x, *how)
    return x

  x = conv("Conv2d_1a_3x3", x, 32, 3, 2, False)
  x = conv("Conv2d_2a_3x3", x, 32, 3, 1, False)
  x = conv("Conv2d_2b_3x3", x, 64, 3)
  x = _shrink(x)
  x = conv("Conv2d_3b_1x1", x, 80)
  x = conv("Conv2d_4a_3x3", x, 192, 3, 1, False)
  x = _shrink(x)
  for name, pooled in (("5b", 32), ("5c", 64), ("5d", 64)):
    x = _fine(chain, f"Mixed_{name}", x, pooled)
  x = jnp.concatenate(
    [
      chain("Mixed_6a", x, ("branch3x3", 384, 3, 2, False)),
      chain(
        "Mixed_6a",
        x,
        ("branch3x3dbl_1", 64),
        ("branch3x3dbl_2", 96, 3),
        ("branch3x3dbl_3", 96, 3, 2, False),
      ),
      _shrink(x),
    ],
    axis=-1,
  )
  spatial = None
  for name, width in (("6b", 128), ("6c", 160), ("6d", 160), ("6e", 192)):
    x = _middle(chain, f"Mixed_{name}", x, width)
    if name == "6d":  # mixed_6 of the graph, which counts from mixed_0
      spatial = x[..., :192]
  x = jnp.concatenate(
    [
      chain(
        "Mixed_7a", x, ("branch3x3_1", 192), ("branch3x3_2", 320, 3, 2, False)
      ),
      chain(
        "Mixed_7a",
        x,
        ("branch7x7x3_1", 192),
        ("branch7x7x3_2", 192, (1, 7)),
        ("branch7x7x3_3", 192, (7, 1)),
        ("branch7x7x3_4", 192, 3, 2, False),
      ),
      _shrink(x),
    ],
    axis=-1,
  )
  x = _coarse(chain, "Mixed_7b", x, _average)
  # The graph takes the maximum here, and nowhere else in such a place.
  x = _coarse(
    chain,
    "Mixed_7c",
    x,
    lambda x: nn.max_pool(x, (3, 3), padding=((1, 1), (1, 1))),
  )
  return x.mean(axis=(1, 2)), spatial


def _fine(chain, name: str, x, pooled: int) -> jax.Array:
  """Return a block at 35 x 35."""
  return jnp.concatenate(
    [
      chain(name, x, ("branch1x1", 64)),
      chain(name, x, ("branch5x5_1", 48), ("branch5x5_2", 64, 5)),
      chain(
        name,
        x,
        ("branch3x3dbl_1", 64),
        ("branch3x3dbl_2", 96, 3),
        ("branch3x3dbl_3", 96, 3),
      ),
      chain(name, _average(x), ("branch_pool", pooled)),
    ],
    axis=-1,
  )


def _middle(chain, name: str, x, width: int) -> jax.Array:
  """Return a block at 17 x 17."""
  return jnp.concatenate(
    [
      chain(name, x, ("branch1x1", 192)),
      chain(
        name,
        x,
        ("branch7x7_1", width),
        ("branch7x7_2", width, (1, 7)),
        ("branch7x7_3", 192, (7, 1)),
      ),
      chain(
        name,
        x,
        ("branch7x7dbl_1", width),
        ("branch7x7dbl_2", width, (7, 1)),
        ("branch7x7dbl_3", width, (1, 7)),
        ("branch7x7dbl_4", width, (7, 1)),
        ("branch7x7dbl_5", 192, (1, 7)),
      ),
      chain(name, _average(x), ("branch_pool", 192)),
    ],
    axis=-1,
  )


def _coarse(chain, name: str, x, pool: Callable) -> jax.Array:
  """Return a block at 8 x 8."""
  three = chain(name, x, ("branch3x3_1", 384))
  double = chain(name, x, ("branch3x3dbl_1", 448), ("branch3x3dbl_2", 384, 3))
  return jnp.concatenate(
    [
      chain(name, x, ("branch1x1", 320)),
      chain(name, three, ("branch3x3_2a", 384, (1, 3))),
      chain(name, three, ("branch3x3_2b", 384, (3, 1))),
      chain(name, double, ("branch3x3dbl_3a", 384, (1, 3))),
      chain(name, double, ("branch3x3dbl_3b", 384, (3, 1))),
      chain(name, pool(x), ("branch_pool", 192)),
    ],
    axis=-1,
  )


def _average(x: jax.Array) -> jax.Array:
  """Return 3x3 averages of what is inside the image."""
  return nn.avg_pool(
    x, (3, 3), padding=((1, 1), (1, 1)), count_include_pad=False
  )


def _shrink(x: jax.Array) -> jax.Array:
  return nn.max_pool(x, (3, 3), strides=(2, 2))
