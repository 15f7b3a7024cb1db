"""A patch discriminator and what it tells the tokenizer (paper section 3.2).

    L_D = mean relu(1 - D(x)) / 2 + mean relu(1 + D(x^)) / 2       hinge loss
    L_G = -w mean D(x^),   w = weight |dL_rec/dW| / |d(-mean D(x^))/dW|

W is the decoder's last kernel (VQGAN, 2012.09841, eq. 7). Before D sees them,
real and reconstructed images go through the same kinds of differentiable
augmentation (2006.10738); LeCAM (2104.03310) keeps D's outputs near running
means of what it says of the other kind.
"""

import dataclasses
import math
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from var_jax.models.vae import ConvKit

_MAX_WEIGHT = 1e4  # of the ratio of gradients, as VQGAN has it
_CUTOUT, _SHIFT = 1 / 2, 1 / 8  # of a side


@dataclasses.dataclass(frozen=True)
class AdversaryConfig:
  """Args:
  weight: of what the discriminator says, in the tokenizer's loss; 0: there is
    no discriminator.
  start: steps before it is trained and listened to.
  adaptive: multiply the weight by the ratio of gradients.
  lecam: weight of the LeCAM regulariser; 0 turns it off.
  lecam_decay: of the running means.
  augment: augment what the discriminator sees.
  channels: of its first layer; they double from layer to layer, up to 8 times.
  layers: that halve the picture.
  norm_groups: of its norms.
  """

  weight: float = 0.0
  start: int = 0
  adaptive: bool = True
  lecam: float = 0.0
  lecam_decay: float = 0.99
  augment: bool = True
  channels: int = 64
  layers: int = 3
  norm_groups: int = 32

  def __post_init__(self):
    if self.start < 0:
      raise ValueError(
        f"start {self.start} is below 0; 0 is from the first step on."
      )
    for name in ("weight", "lecam"):
      if not 0 <= getattr(self, name) < math.inf:
        raise ValueError(
          f"{name} {getattr(self, name)} is not in [0, inf); 0 turns it off."
        )
    if not 0.0 <= self.lecam_decay < 1.0:
      raise ValueError(
        f"lecam_decay {self.lecam_decay} is not in [0, 1); use 0.99."
      )
    for name in ("channels", "layers", "norm_groups"):
      if getattr(self, name) < 1:
        raise ValueError(f"{name} {getattr(self, name)} is below 1; use more.")
    if self.channels % self.norm_groups:
      raise ValueError(
        f"channels {self.channels} do not split into "
        f"{self.norm_groups} groups for GroupNorm; use a multiple, or fewer "
        "norm_groups."
      )


@flax.struct.dataclass
class Adversary:
  """The state of a discriminator in training."""

  params: Any
  opt_state: Any
  real: jax.Array  # running mean of what it says of real images
  fake: jax.Array  # and of reconstructions


class PatchDiscriminator(ConvKit):
  """Image [B, H, W, 3] to a logit a patch, float32 [B, i, j]; high is real."""

  channels: int = 64
  layers: int = 3

  @nn.compact
  def __call__(self, image_BHW3: jax.Array) -> jax.Array:
    def conv(x, features, name, strides):
      made = self.conv(features, name, 4, strides=strides, padding="SAME")
      return made(x)

    x = conv(image_BHW3, self.channels, "patch_in", 2)
    x = nn.leaky_relu(x, 0.2)
    for i in range(1, self.layers + 1):
      features = self.channels * min(2**i, 8)
      # The last of them keeps the size.
      x = conv(x, features, f"patch_conv_{i}", 2 if i < self.layers else 1)
      x = nn.leaky_relu(self.norm(x, f"patch_norm_{i}"), 0.2)
    logit_Bij1 = conv(x, 1, "patch_out", 1)
    return logit_Bij1[..., 0].astype(jnp.float32)


def make_discriminator(cfg: AdversaryConfig, dtype) -> PatchDiscriminator:
  return PatchDiscriminator(
    dtype=jnp.dtype(dtype),
    norm_groups=cfg.norm_groups,
    channels=cfg.channels,
    layers=cfg.layers,
  )


def hinge(real_Bij: jax.Array, fake_Bij: jax.Array) -> jax.Array:
  """Return the discriminator's loss."""
  return 0.5 * (
    jnp.mean(jax.nn.relu(1.0 - real_Bij))
    + jnp.mean(jax.nn.relu(1.0 + fake_Bij))
  )


def lecam(
  real_Bij: jax.Array, fake_Bij: jax.Array, real: jax.Array, fake: jax.Array
) -> jax.Array:
  """Return the LeCAM regulariser, given the running means of both."""
  return jnp.mean(jnp.square(jax.nn.relu(real_Bij - fake))) + jnp.mean(
    jnp.square(jax.nn.relu(real - fake_Bij))
  )


def adaptive_weight(of_rest, of_adversary) -> jax.Array:
  """Return the ratio of two gradients of the last kernel, in 0 .. 1e4."""
  ratio = jnp.linalg.norm(of_rest.ravel()) / (
    jnp.linalg.norm(of_adversary.ravel()) + 1e-4
  )
  return jnp.clip(ratio, 0.0, _MAX_WEIGHT)


def augment(image_BHW3: jax.Array, keys_B: jax.Array) -> jax.Array:
  """Return images in other colours, shifted and with a square cut out.

  Differentiable in the image; zeros come in from outside.
  """
  return jax.vmap(_augment)(image_BHW3, keys_B)


def _augment(image_HW3: jax.Array, key: jax.Array) -> jax.Array:
  keys = jax.random.split(key, 5)
  H, W, _ = image_HW3.shape
  brightness = jax.random.uniform(keys[0], minval=-0.5, maxval=0.5)
  saturation = jax.random.uniform(keys[1], minval=0.0, maxval=2.0)
  contrast = jax.random.uniform(keys[2], minval=0.5, maxval=1.5)
  image_HW3 = image_HW3 + brightness
  grey_HW1 = jnp.mean(image_HW3, axis=-1, keepdims=True)
  image_HW3 = (image_HW3 - grey_HW1) * saturation + grey_HW1
  mean = jnp.mean(image_HW3)
  image_HW3 = (image_HW3 - mean) * contrast + mean
  # Shifted by a slice of a padded image.
  most = (round(H * _SHIFT), round(W * _SHIFT))
  padded = jnp.pad(image_HW3, ((most[0],) * 2, (most[1],) * 2, (0, 0)))
  shift_2 = jax.random.randint(keys[3], (2,), 0, 2 * jnp.array(most) + 1)
  image_HW3 = jax.lax.dynamic_slice(padded, (*shift_2, 0), image_HW3.shape)
  hole = jnp.array([round(H * _CUTOUT), round(W * _CUTOUT)])
  # Its middle may be anywhere, so a part of it may lie outside.
  middle_2 = jax.random.randint(keys[4], (2,), 0, jnp.array([H, W]) + 1)
  first_2 = middle_2 - hole // 2
  rows_H = (jnp.arange(H) >= first_2[0]) & (jnp.arange(H) < (first_2 + hole)[0])
  cols_W = (jnp.arange(W) >= first_2[1]) & (jnp.arange(W) < (first_2 + hole)[1])
  return jnp.where((rows_H[:, None] & cols_W)[..., None], 0.0, image_HW3)
