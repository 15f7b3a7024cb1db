"""Convolutional encoder and decoder of the tokenizer (VQGAN, 2012.09841).

Residual levels, halved between them, single-head attention at the coarsest.
Released preset: 160 channels, multipliers 1 1 2 2 4, 16 pixels a latent cell.
NHWC throughout; any height and width that the downsampling divides.
"""

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from var_jax.models import cpu, layers


class GroupNorm(nn.Module):
  """Normalise groups of channels over all positions, in float32."""

  groups: int
  epsilon: float = 1e-6

  @nn.compact
  def __call__(self, x_BhwZ: jax.Array) -> jax.Array:
    Z = x_BhwZ.shape[-1]
    scale_Z = self.param("scale", nn.initializers.ones, (Z,))
    bias_Z = self.param("bias", nn.initializers.zeros, (Z,))
    # E[x^2] - E[x]^2 would cancel.
    centred_BhwZ = x_BhwZ.astype(jnp.float32)
    centred_BhwZ -= self._mean(centred_BhwZ)
    variance_B11Z = self._mean(jnp.square(centred_BhwZ))
    factor_B11Z = scale_Z * jax.lax.rsqrt(variance_B11Z + self.epsilon)
    return centred_BhwZ * factor_B11Z + bias_Z

  def _mean(self, x_BhwZ: jax.Array) -> jax.Array:
    """Return the mean of each channel's group, [B, 1, 1, Z]."""
    B, h, w, Z = x_BhwZ.shape
    sum_BZ = cpu.sum_positions(x_BhwZ.reshape(B, h * w, Z))
    sum_BG = sum_BZ.reshape(B, self.groups, -1).sum(-1)
    mean_BZ = jnp.repeat(
      sum_BG / float(h * w * Z // self.groups), Z // self.groups, 1
    )
    return mean_BZ[:, None, None]


class ConvKit(nn.Module):
  """The convolution and the norm that all parts of the network share."""

  dtype: Any = jnp.float32
  norm_groups: int = 32

  def conv(self, features: int, name: str, kernel: int = 3, **kwargs):
    kwargs.setdefault("padding", kernel // 2)
    return nn.Conv(
      features,
      (kernel, kernel),
      dtype=self.dtype,
      precision=layers.matmul_precision(self.dtype),
      conv_general_dilated=cpu.convolve,
      name=name,
      **kwargs,
    )

  def norm(self, x_BhwZ: jax.Array, name: str) -> jax.Array:
    """Normalise groups of channels, float32 inside, `dtype` outside."""
    norm = GroupNorm(self.norm_groups, name=name)
    return norm(x_BhwZ).astype(self.dtype)

  @property
  def kit(self) -> dict[str, Any]:
    """Return what parts hand on to their parts."""
    return dict(dtype=self.dtype, norm_groups=self.norm_groups)


class ResBlock(ConvKit):
  """x + conv(swish(norm(conv(swish(norm(x))))))."""

  features: int = 0

  @nn.compact
  def __call__(self, x_BhwZ):
    h_BhwZ = nn.swish(self.norm(x_BhwZ, "norm1"))
    h_BhwZ = self.conv(self.features, "conv1")(h_BhwZ)
    h_BhwZ = nn.swish(self.norm(h_BhwZ, "norm2"))
    h_BhwZ = self.conv(self.features, "conv2")(h_BhwZ)
    if x_BhwZ.shape[-1] != self.features:
      x_BhwZ = self.conv(self.features, "nin_shortcut", kernel=1)(x_BhwZ)
    return x_BhwZ + h_BhwZ


class AttnBlock(ConvKit):
  """x + proj(attention(norm(x))), one head over all latent cells."""

  @nn.compact
  def __call__(self, x_BhwZ):
    B, h, w, Z = x_BhwZ.shape
    qkv_BhwE = self.conv(3 * Z, "qkv", kernel=1)(self.norm(x_BhwZ, "norm"))
    q, k, v = jnp.split(qkv_BhwE.reshape(B, h * w, 1, 3 * Z), 3, axis=-1)
    out_BT1Z = layers.attend(q * Z**-0.5, k, v, None)
    return x_BhwZ + self.conv(Z, "proj_out", kernel=1)(
      out_BT1Z.reshape(x_BhwZ.shape)
    )


class Encoder(ConvKit):
  """Image [B, H, W, 3] to latent [B, h, w, Z]."""

  channels: int = 160
  channel_mults: Sequence[int] = (1, 1, 2, 2, 4)
  blocks: int = 2
  latent_channels: int = 32

  @nn.compact
  def __call__(self, image_BHW3):
    last, kit = len(self.channel_mults) - 1, self.kit
    x = self.conv(self.channels, "conv_in")(image_BHW3)
    for level, mult in enumerate(self.channel_mults):
      for block in range(self.blocks):
        name = f"down_{level}_block_{block}"
        x = ResBlock(**kit, features=mult * self.channels, name=name)(x)
        if level == last:
          x = AttnBlock(**kit, name=f"down_{level}_attn_{block}")(x)
      if level != last:
        # VAR: padded by one pixel at the right and the bottom only.
        downsample = self.conv(
          x.shape[-1],
          f"down_{level}_downsample",
          strides=2,
          padding=((0, 1), (0, 1)),
        )
        x = downsample(x)
    x = _middle(x, kit)
    x = nn.swish(self.norm(x, "norm_out"))
    return self.conv(self.latent_channels, "conv_out")(x)


class Decoder(ConvKit):
  """Latent [B, h, w, Z] to image [B, H, W, 3] in float32, not clipped."""

  channels: int = 160
  channel_mults: Sequence[int] = (1, 1, 2, 2, 4)
  blocks: int = 3

  @nn.compact
  def __call__(self, latent_BhwZ, with_features: bool = False):
    """Return the image, or (image, what the last convolution takes)."""
    last, kit = len(self.channel_mults) - 1, self.kit
    x = self.conv(self.channel_mults[-1] * self.channels, "conv_in")(
      latent_BhwZ
    )
    x = _middle(x, kit)
    for level, mult in reversed(list(enumerate(self.channel_mults))):
      for block in range(self.blocks):
        name = f"up_{level}_block_{block}"
        x = ResBlock(**kit, features=mult * self.channels, name=name)(x)
        if level == last:
          x = AttnBlock(**kit, name=f"up_{level}_attn_{block}")(x)
      if level != 0:
        x = jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2)
        x = self.conv(x.shape[-1], f"up_{level}_upsample")(x)
    x = nn.swish(self.norm(x, "norm_out"))
    image_BHW3 = self.conv(3, "conv_out")(x).astype(jnp.float32)
    return (image_BHW3, x) if with_features else image_BHW3


def last_kernel_gradient(x_BHWZ: jax.Array, grad_BHW3: jax.Array) -> jax.Array:
  """Return the gradient of the decoder's last kernel, [3, 3, Z, 3].

  Args:
    x_BHWZ: what the last convolution takes.
    grad_BHW3: of the image.
  """

  def image_of(kernel_33Z3):
    return jax.lax.conv_general_dilated(
      x_BHWZ,
      kernel_33Z3,
      window_strides=(1, 1),
      padding="SAME",
      dimension_numbers=("NHWC", "HWIO", "NHWC"),
      precision=layers.matmul_precision(x_BHWZ.dtype),
    )

  shape = (3, 3, x_BHWZ.shape[-1], 3)
  kernel = jax.ShapeDtypeStruct(shape, x_BHWZ.dtype)
  (found,) = jax.linear_transpose(image_of, kernel)(
    grad_BHW3.astype(x_BHWZ.dtype)
  )
  return found.astype(jnp.float32)


def _middle(x_BhwZ, kit):
  features = x_BhwZ.shape[-1]
  x_BhwZ = ResBlock(**kit, features=features, name="mid_block_1")(x_BhwZ)
  x_BhwZ = AttnBlock(**kit, name="mid_attn_1")(x_BhwZ)
  return ResBlock(**kit, features=features, name="mid_block_2")(x_BhwZ)
