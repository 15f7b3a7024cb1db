"""LPIPS, a distance of images by what VGG16 sees (1801.03924).

    d(x, y) = sum_l mean_hw  w_l . (f_l(x)/|f_l(x)| - f_l(y)/|f_l(y)|)^2

f_l are the features after the last ReLU before each of VGG16's poolings and at
its end, w_l learned weights of channels. The weights are public and not part of
this project: `var-jax convert --lpips` makes a folder of them.
"""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from var_jax.models import layers

# Convolutions before each tap, and their channels.
BLOCKS = ((2, 64), (2, 128), (3, 256), (3, 512), (3, 512))
MIN_SIDE = 16  # of an image: it is halved four times

# Of the images the distance was learned with, in [-1, 1].
_MEAN_3 = (-0.030, -0.088, -0.188)
_STD_3 = (0.458, 0.448, 0.450)


def shapes() -> dict[str, tuple[int, ...]]:
  """Return the shapes of all weights: conv{i}_kernel, conv{i}_bias, head{l}."""
  found, width, i = {}, 3, 0
  for l, (convs, channels) in enumerate(BLOCKS):
    for _ in range(convs):
      found[f"conv{i}_kernel"] = (3, 3, width, channels)
      found[f"conv{i}_bias"] = (channels,)
      width, i = channels, i + 1
    found[f"head{l}"] = (channels,)
  return found


def distance(
  weights: Mapping[str, jax.Array],
  x_BHW3: jax.Array,
  y_BHW3: jax.Array,
  dtype: Any = jnp.float32,
) -> jax.Array:
  """Return the distance of each pair of images in [-1, 1], float32 [B].

  Args:
    weights: as `shapes` has them.
    y_BHW3: has no gradient.
    dtype: of the inputs of convolutions.
  """
  total_B = jnp.zeros(len(x_BHW3))
  # Apart, not as one batch: on a mesh that would move features about.
  pairs = zip(
    _features(weights, x_BHW3, dtype),
    _features(weights, jax.lax.stop_gradient(y_BHW3), dtype),
    strict=True,
  )
  for l, (f_BijF, g_BijF) in enumerate(pairs):
    apart_BijF = jnp.square(_directions(f_BijF) - _directions(g_BijF))
    total_B += jnp.mean(apart_BijF @ weights[f"head{l}"], axis=(1, 2))
  return total_B


def _directions(f_BijF: jax.Array) -> jax.Array:
  """Return vectors of channels at length 1, with a gradient of 0 at 0."""
  f_BijF = f_BijF.astype(jnp.float32)
  squared_Bij1 = jnp.sum(jnp.square(f_BijF), axis=-1, keepdims=True)
  somewhere_Bij1 = squared_Bij1 > 0
  root_Bij1 = jnp.sqrt(jnp.where(somewhere_Bij1, squared_Bij1, 1.0))
  return f_BijF / (jnp.where(somewhere_Bij1, root_Bij1, 0.0) + 1e-10)


def _features(weights, image_BHW3, dtype):
  """Yield what VGG16 sees at each tap, [B, i, j, F]."""
  x = (image_BHW3 - jnp.asarray(_MEAN_3)) / jnp.asarray(_STD_3)
  i = 0
  for l, (convs, _) in enumerate(BLOCKS):
    if l:
      x = nn.max_pool(x, (2, 2), strides=(2, 2))
    for _ in range(convs):
      x = jax.lax.conv_general_dilated(
        x.astype(dtype),
        weights[f"conv{i}_kernel"].astype(dtype),
        window_strides=(1, 1),
        padding="SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        precision=layers.matmul_precision(dtype),
      )
      x = jax.nn.relu(x + weights[f"conv{i}_bias"].astype(dtype))
      i += 1
    yield x
