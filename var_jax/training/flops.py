"""Floating point operations of the models, and what devices can do of them.

    MFU = model FLOPs of a step / (seconds of a step * devices * peak)

Counted are matrix products and convolutions at 2 m n k, padding and masked
products included; norms, softmax and the like are not. Layers that
rematerialisation runs twice count once: MFU asks what the step is worth.
"""

import re
from typing import NamedTuple

from var_jax.models.blocks import VARConfig
from var_jax.models.tokenizer import TokenizerConfig

# Dense bfloat16 FLOP/s of one JAX device by the start of its kind, from the
# makers' data sheets. Up to v3 and again from v7 a device is half a chip.
_PEAKS = {
  "TPU v2": 22.5e12,
  "TPU v3": 61.5e12,
  "TPU v4": 275e12,
  "TPU v4 lite": 137e12,
  "TPU v5 lite": 197e12,
  "TPU v5e": 197e12,
  "TPU v5": 459e12,
  "TPU v5p": 459e12,
  "TPU v6 lite": 918e12,
  "TPU v6e": 918e12,
  "TPU7x": 1153.5e12,
  "NVIDIA A10": 125e12,
  "NVIDIA A100": 312e12,
  "NVIDIA L4": 121e12,
  "NVIDIA L40": 181e12,
  "NVIDIA L40S": 362e12,
  "NVIDIA H100": 989e12,
  "NVIDIA H100 PCIe": 756e12,
  "NVIDIA H100 NVL": 835e12,
  "NVIDIA H200": 989e12,
  "NVIDIA H200 NVL": 835e12,
  "NVIDIA GH200": 989e12,
  "NVIDIA B200": 2250e12,
  "NVIDIA GB200": 2500e12,
}


class TokenizerFlops(NamedTuple):
  """Of one image."""

  encoder: float  # image to latent
  search: float  # latent to tokens, without what `accumulate` counts
  accumulate: float  # tokens to f_hat: enlarging and phis
  decoder: float  # latent to image

  @property
  def encode(self) -> float:
    return self.encoder + self.search + self.accumulate


def peak(device_kind: str) -> float | None:
  """Return the dense bfloat16 FLOP/s of a device, or None if not known."""
  if "MIG" in device_kind:  # a slice of a GPU, with the name of the whole
    return None
  for kind in sorted(_PEAKS, key=len, reverse=True):
    if re.match(re.escape(kind) + r"\b", device_kind):
      return _PEAKS[kind]
  return None


def var_step(
  cfg: VARConfig,
  tokenizer: TokenizerConfig | None,
  tokens: int | None = None,
) -> float:
  """Return the FLOPs of a training step of the transformer, an image.

  A gradient costs two forward passes more. The frozen tokenizer has none.

  Args:
    tokenizer: None where tokens are read from a cache. Its part in the inputs
      is then left out too; it is below a thousandth of a published model.
    tokens: of the first scales, if not of all.
  """
  frozen = 0.0
  if tokenizer is not None:
    counts = tokenizer_forward(tokenizer)
    frozen = counts.encode + counts.accumulate
  return 3.0 * var_forward(cfg, tokens) + frozen


def tokenizer_step(cfg: TokenizerConfig) -> float:
  """Return the FLOPs of a training step of the tokenizer, an image."""
  counts = tokenizer_forward(cfg)
  learned = counts.encoder + counts.accumulate + counts.decoder
  return 3.0 * learned + counts.search


def var_forward(cfg: VARConfig, tokens: int | None = None) -> float:
  """Return the FLOPs of the teacher-forced logits of one image.

  Args:
    tokens: of the first scales, if not of all.
  """
  L = cfg.schedule.num_tokens if tokens is None else tokens
  # The block-causal mask hides products; it does not save them.
  return _var(cfg, L, seen=L * L) + var_ends(cfg, L)


def var_seen(cfg: VARConfig, tokens: int) -> float:
  """Return the FLOPs of layers and modulation of one image's first tokens.

  Counted are the pairs of tokens that the block-causal mask shows, as drawing
  scale by scale computes them.
  """
  scales = cfg.schedule
  ends = [scales.end(s) for s in range(len(scales)) if scales.end(s) <= tokens]
  starts = [0, *ends][:-1]
  seen = sum((b - a) * b for a, b in zip(starts, ends, strict=True))
  return _var(cfg, tokens, seen)


def var_sample(cfg: VARConfig, rows: int) -> float:
  """Return the FLOPs of drawing all scales of one image, without the tokenizer.

  Args:
    rows: 2 with guidance, which has an unconditional half; else 1.
  """
  L = cfg.schedule.num_tokens
  return rows * (var_seen(cfg, L) + var_ends(cfg, L))


def var_ends(cfg: VARConfig, tokens: int) -> float:
  """Return the FLOPs of word embedding and head, which are float32."""
  D = cfg.width
  embedding = (tokens - cfg.schedule.end(0)) * cfg.latent_channels * D
  return 2.0 * (embedding + tokens * D * cfg.vocab_size)


def _var(cfg: VARConfig, tokens: int, seen: int) -> float:
  """Return the FLOPs of layers and modulation.

  Args:
    seen: pairs of tokens whose attention is computed.
  """
  D, F = cfg.width, round(cfg.width * cfg.mlp_ratio)
  weights = 3 * D * D + D * D + 2 * D * F  # qkv, projection, MLP
  layers = cfg.depth * (tokens * weights + 2 * seen * D)
  adaptations = 1 if cfg.shared_adaln else cfg.depth
  return 2.0 * (layers + adaptations * 6 * D * D + 2 * D * D)


def tokenizer_forward(cfg: TokenizerConfig) -> TokenizerFlops:
  """Return the FLOPs of the parts of the tokenizer for one image."""
  scales, Z = cfg.schedule, cfg.latent_channels
  h, w = scales.grid
  nearest = 2.0 * scales.num_tokens * cfg.vocab_size * Z
  phi = _conv(h * w, Z, Z) if cfg.phi_count else 0.0
  shrink = enlarge = 0.0
  for i, j in scales.shapes:
    if (i, j) != (h, w):
      # Rows first, then columns: see `resize.resample`.
      shrink += 2.0 * Z * (i * h * w + i * w * j)
      enlarge += 2.0 * Z * (h * i * j + h * j * w)
  return TokenizerFlops(
    encoder=_encoder(cfg),
    search=nearest + shrink,
    accumulate=enlarge + len(scales) * phi,
    decoder=_decoder(cfg),
  )


def _encoder(cfg: TokenizerConfig) -> float:
  """Return the FLOPs of an image's way to the latent."""
  widths, Z = _widths(cfg), cfg.latent_channels
  cells, features = _cells(cfg, 0), cfg.channels
  total = _conv(cells, 3, features)
  for level, width in enumerate(widths):
    cells, last = _cells(cfg, level), level == len(widths) - 1
    for _ in range(cfg.encoder_blocks):
      total += _res_block(cells, features, width)
      total += _attn_block(cells, width) if last else 0.0
      features = width
    if not last:
      total += _conv(_cells(cfg, level + 1), features, features)
  total += _middle(cells, features)
  return total + _conv(cells, features, Z) + _conv(cells, Z, Z)


def _decoder(cfg: TokenizerConfig) -> float:
  """Return the FLOPs of a latent's way to the image."""
  widths, Z = _widths(cfg), cfg.latent_channels
  last, features = len(widths) - 1, widths[-1]
  cells = _cells(cfg, last)
  total = _conv(cells, Z, Z) + _conv(cells, Z, features)
  total += _middle(cells, features)
  for level in reversed(range(len(widths))):
    cells, width = _cells(cfg, level), widths[level]
    for _ in range(cfg.decoder_blocks):
      total += _res_block(cells, features, width)
      total += _attn_block(cells, width) if level == last else 0.0
      features = width
    if level:
      total += _conv(_cells(cfg, level - 1), features, features)
  return total + _conv(cells, features, 3)


def _widths(cfg: TokenizerConfig) -> list[int]:
  return [mult * cfg.channels for mult in cfg.channel_mults]


def _cells(cfg: TokenizerConfig, level: int) -> int:
  """Return the positions of a level; level 0 are the pixels."""
  H, W = cfg.image_shape
  return (H >> level) * (W >> level)


def _conv(cells: int, inputs: int, outputs: int, kernel: int = 3) -> float:
  """Return the FLOPs of a convolution with `cells` output positions."""
  return 2.0 * cells * kernel * kernel * inputs * outputs


def _res_block(cells: int, inputs: int, outputs: int) -> float:
  total = _conv(cells, inputs, outputs) + _conv(cells, outputs, outputs)
  if inputs != outputs:
    total += _conv(cells, inputs, outputs, kernel=1)
  return total


def _attn_block(cells: int, width: int) -> float:
  projections = _conv(cells, width, 4 * width, kernel=1)
  return projections + 2 * 2.0 * cells * cells * width


def _middle(cells: int, width: int) -> float:
  return 2 * _res_block(cells, width, width) + _attn_block(cells, width)
