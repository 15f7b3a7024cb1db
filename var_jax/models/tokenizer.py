"""The tokenizer: image <-> tokens of all scales, coarse to fine."""

import dataclasses
import math

import flax.linen as nn
import jax
import jax.numpy as jnp

from var_jax.models import layers, quantizer
from var_jax.models.quantizer import Quantized, QuantizerParams
from var_jax.models.scales import SCALES, ScaleSchedule, Size
from var_jax.models.vae import Decoder, Encoder

DISTANCES = ("euclidean", "cosine")


@dataclasses.dataclass(frozen=True)
class TokenizerConfig:
  """Architecture. Defaults are the released vae_ch160v4096z32."""

  vocab_size: int = 4096  # V
  latent_channels: int = 32  # Z
  channels: int = 160
  channel_mults: tuple[int, ...] = (1, 1, 2, 2, 4)  # halved between levels
  encoder_blocks: int = 2  # a level
  decoder_blocks: int = 3
  norm_groups: int = 32
  scales: tuple[Size, ...] = SCALES[256]
  num_phis: int = 4  # shared by the scales; 0: one phi a scale
  quant_resi: float = 0.5  # r of phi; 0: phi is the identity
  beta: float = 0.25  # weight of the commitment term
  distance: str = "euclidean"
  dtype: str = "float32"  # of the decoder; all else is float32

  def __post_init__(self):
    object.__setattr__(self, "scales", self.schedule.sizes)
    object.__setattr__(self, "channel_mults", tuple(self.channel_mults))
    sizes = ("vocab_size", "latent_channels", "channels", "norm_groups")
    for name in (*sizes, "encoder_blocks", "decoder_blocks"):
      if getattr(self, name) < 1:
        raise ValueError(f"{name} {getattr(self, name)} is below 1; use more.")
    if self.distance not in DISTANCES:
      raise ValueError(
        f"distance {self.distance!r} is not known; use one of {DISTANCES}."
      )
    if self.channels % self.norm_groups:
      raise ValueError(
        f"channels {self.channels} do not split into {self.norm_groups} "
        "groups for GroupNorm; use a multiple, or fewer norm_groups."
      )
    if not 0 <= self.quant_resi < math.inf:
      raise ValueError(
        f"quant_resi {self.quant_resi} is no number of 0 or more; use 0.5."
      )
    if self.num_phis < 0:
      raise ValueError(f"num_phis {self.num_phis} is negative; use 0 or more.")

  @property
  def schedule(self) -> ScaleSchedule:
    return ScaleSchedule(self.scales)

  @property
  def downsampling(self) -> int:
    """Return the pixels a latent cell covers, per side."""
    return 2 ** (len(self.channel_mults) - 1)

  @property
  def image_shape(self) -> tuple[int, int]:
    h, w = self.schedule.grid
    return h * self.downsampling, w * self.downsampling

  @property
  def phi_count(self) -> int:
    """Return P, the phis that there are parameters for."""
    if not self.quant_resi:
      return 0
    return self.num_phis or len(self.scales)


class Tokenizer(nn.Module):
  """Encoder, multi-scale residual quantiser and decoder.

  Images are float32 [B, H, W, 3] in [-1, 1], tokens int32 [B, L]. Methods
  take the scale list of the config unless given another that ends at the
  grid of the image.
  """

  cfg: TokenizerConfig

  def setup(self):
    cfg, Z = self.cfg, self.cfg.latent_channels
    network = dict(
      channels=cfg.channels,
      channel_mults=cfg.channel_mults,
      norm_groups=cfg.norm_groups,
    )
    self.encoder = Encoder(
      blocks=cfg.encoder_blocks, latent_channels=Z, **network
    )
    self.decoder = Decoder(
      dtype=jnp.dtype(cfg.dtype), blocks=cfg.decoder_blocks, **network
    )
    conv = dict(kernel_size=(3, 3), padding=1, precision=layers.HIGHEST)
    self.quant_conv = nn.Conv(Z, **conv)
    self.post_quant_conv = nn.Conv(Z, **conv)
    codebook = self.param(
      "codebook", nn.initializers.normal(1.0), (cfg.vocab_size, Z)
    )
    kernel, bias = None, None
    if P := cfg.phi_count:
      lecun = nn.initializers.lecun_normal(batch_axis=0)
      kernel = self.param("phi_kernel", lecun, (P, 3, 3, Z, Z))
      bias = self.param("phi_bias", nn.initializers.zeros, (P, Z))
    # NumPy parameters are fine too: a NumPy array takes no traced index.
    self.quantize = QuantizerParams(jnp.asarray(codebook), kernel, bias)

  def __call__(
    self, image_BHW3: jax.Array, kept_B: jax.Array | None = None
  ) -> tuple[jax.Array, Quantized]:
    """Return the reconstruction, not clipped, with training gradients.

    Args:
      kept_B: scales that each is made of, see `quantize_for_training`.
    """
    image_BHW3, _, quantized = self.reconstruct(image_BHW3, kept_B)
    return image_BHW3, quantized

  def reconstruct(
    self, image_BHW3: jax.Array, kept_B: jax.Array | None = None
  ) -> tuple[jax.Array, jax.Array, Quantized]:
    """Return the same, and between them what the last convolution takes."""
    cfg = self.cfg
    quantized = quantizer.quantize_for_training(
      self.to_latent(image_BHW3),
      self.quantize,
      cfg.schedule,
      cfg.quant_resi,
      cfg.distance,
      cfg.beta,
      kept_B,
    )
    latent_BhwZ = self.post_quant_conv(quantized.f_hat_BhwZ)
    return *self.decoder(latent_BhwZ, with_features=True), quantized

  def encode(
    self, image_BHW3: jax.Array, scales: ScaleSchedule | None = None
  ) -> jax.Array:
    """Return tokens [B, L]."""
    f_BhwZ = self.to_latent(image_BHW3)
    return self.quantize_latent(f_BhwZ, scales)[0]

  def decode(
    self, tokens_BL: jax.Array, scales: ScaleSchedule | None = None
  ) -> jax.Array:
    """Return the image of the tokens, clipped to [-1, 1]."""
    f_hat_BhwZ = self.accumulate(tokens_BL, scales)[-1]
    return jnp.clip(self.to_image(f_hat_BhwZ), -1.0, 1.0)

  def inputs(self, tokens_BL: jax.Array) -> jax.Array:
    """Return the teacher-forced transformer input, [B, L - n_0, Z].

    Scale s, from 1 on, sees f_hat of the scales before it at its own size.
    Tokens of the first scales only give the inputs of those.
    """
    f_hats = self.accumulate(tokens_BL)
    inputs = [self.next_input(f, s + 1) for s, f in enumerate(f_hats[:-1])]
    if not inputs:
      return jnp.zeros((tokens_BL.shape[0], 0, self.cfg.latent_channels))
    return jnp.concatenate(inputs, axis=1)

  def to_latent(self, image_BHW3: jax.Array) -> jax.Array:
    """Return f [B, h, w, Z], before quantisation."""
    return self.quant_conv(self.encoder(image_BHW3))

  def to_image(self, f_hat_BhwZ: jax.Array) -> jax.Array:
    """Return the image [B, H, W, 3] of a latent, not clipped."""
    return self.decoder(self.post_quant_conv(f_hat_BhwZ))

  def quantize_latent(
    self, f_BhwZ: jax.Array, scales: ScaleSchedule | None = None
  ) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    """Return tokens [B, L] and f_hat after each scale."""
    cfg = self.cfg
    return quantizer.quantize(
      f_BhwZ,
      self.quantize,
      scales or cfg.schedule,
      cfg.quant_resi,
      cfg.distance,
    )

  def accumulate(
    self, tokens_BL: jax.Array, scales: ScaleSchedule | None = None
  ) -> tuple[jax.Array, ...]:
    """Return f_hat [B, h, w, Z] after each scale."""
    cfg = self.cfg
    return quantizer.accumulate(
      tokens_BL, self.quantize, scales or cfg.schedule, cfg.quant_resi
    )

  def lookup(self, tokens_Bl: jax.Array) -> jax.Array:
    """Return the codes [B, l, Z] of tokens."""
    return self.quantize.codebook_VZ[tokens_Bl]

  def mix(self, weights_BlV: jax.Array) -> jax.Array:
    """Return mixtures of codes [B, l, Z], weighted over the codebook."""
    return jnp.einsum(
      "blv,vz->blz",
      weights_BlV,
      self.quantize.codebook_VZ,
      precision=layers.HIGHEST,
    )

  def add_scale(self, f_hat_BhwZ: jax.Array, h_BlZ: jax.Array, s: int):
    """Return f_hat with the code map of scale s added."""
    cfg = self.cfg
    h_BijZ = h_BlZ.reshape(h_BlZ.shape[0], *cfg.schedule.shapes[s], -1)
    return f_hat_BhwZ + quantizer.contribution(
      h_BijZ, self.quantize, s, cfg.schedule, cfg.quant_resi
    )

  def next_input(self, f_hat_BhwZ: jax.Array, s: int) -> jax.Array:
    """Return the transformer input [B, l, Z] of scale s."""
    return quantizer.next_input(f_hat_BhwZ, s, self.cfg.schedule)
