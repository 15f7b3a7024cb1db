"""How fast a device can be at best: its peaks, and the least that must happen.

    seconds >= sum over parts of max(FLOPs / peak, bytes / bandwidth)

The parts of a drawn batch are the modulation table, each scale and the decoder.
Bytes are the weights once a part and the cache once a scale; activations are
left out. Embeddings, head and quantiser are float32 products, which take so
many passes of the matrix unit on TPU (`planning.bounds`); they count as one
here, so that the bound holds on any device.
"""

import re
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from var_jax.bench import timing
from var_jax.models.tokenizer import TokenizerConfig
from var_jax.models.transformer import VARConfig
from var_jax.training import flops

# Bytes a second of a device's memory, from the makers' data sheets.
_BANDWIDTHS = {
  "TPU v4": 1228e9,
  "TPU v5 lite": 819e9,
  "TPU v5e": 819e9,
  "TPU v5": 2765e9,
  "TPU v5p": 2765e9,
  "TPU v6 lite": 1600e9,
  "TPU v6e": 1600e9,
  "NVIDIA A100 80GB": 2039e9,
  "NVIDIA A100-SXM4-40GB": 1555e9,
  "NVIDIA A100-SXM4-80GB": 2039e9,
  "NVIDIA H100 PCIe": 2000e9,
  "NVIDIA H100 NVL": 3900e9,
  "NVIDIA H100": 3350e9,
  "NVIDIA H200": 4800e9,
}


class Peaks(NamedTuple):
  """What a device can do in a second, of products in one dtype."""

  flops: float
  bandwidth: float
  source: str  # "data sheet" or "measured"


class Bound(NamedTuple):
  """Least seconds of a batch."""

  modulation: float
  scales: tuple[float, ...]
  decoder: float

  @property
  def transformer(self) -> float:
    return self.modulation + sum(self.scales)


def peaks(dtype: str) -> Peaks:
  """Return what the first device can do; measured where nothing is known."""
  kind = jax.devices()[0].device_kind
  rates = [
    rate
    for name, rate in sorted(_BANDWIDTHS.items(), key=lambda x: -len(x[0]))
    if re.match(re.escape(name) + r"\b", kind)
  ]
  products = flops.peak(kind)
  if products and rates and dtype == "bfloat16":
    return Peaks(products, rates[0], "data sheet")
  return Peaks(_measured_flops(dtype), _measured_bandwidth(), "measured")


def _measured_flops(dtype: str, size: int = 4096) -> float:
  a = jax.random.normal(jax.random.key(0), (size, size), dtype)
  multiply = jax.jit(lambda a: a @ a)
  times = timing.time_calls(lambda: multiply(a), seconds=2.0, repeats=20)
  return 2.0 * size**3 / min(times)


def _measured_bandwidth(count: int = 2**27) -> float:
  x = jnp.ones(count)
  add = jax.jit(lambda x: x + 1.0)
  times = timing.time_calls(lambda: add(x), seconds=1.0, repeats=20)
  return 2.0 * x.nbytes / min(times)


def scale_flops(cfg: VARConfig, s: int, rows: int) -> float:
  """Return the FLOPs of scale s of one image."""
  scales = cfg.schedule
  start, end = scales.start(s), scales.end(s)
  return rows * (
    flops.var_seen(cfg, end)
    - flops.var_seen(cfg, start)
    + flops.var_ends(cfg, end)
    - (flops.var_ends(cfg, start) if start else 0.0)
  )


def of_draw(
  cfg: VARConfig, tokenizer: TokenizerConfig, batch: int, rows: int, has: Peaks
) -> Bound:
  """Return the bound of drawing a batch.

  Args:
    rows: of the transformer an image: 2 with guidance.
  """
  D, width = cfg.width, jnp.dtype(cfg.dtype).itemsize
  F = round(D * cfg.mlp_ratio)
  layers = cfg.depth * (4 * D * D + 2 * D * F) * width
  ends = 4 * D * (cfg.latent_channels + cfg.vocab_size)
  adaptations = 1 if cfg.shared_adaln else cfg.depth

  def least(products: float, held: float) -> float:
    return max(products / has.flops, held / has.bandwidth)

  # No token at all: what is left is the modulation table.
  modulation = least(
    batch * rows * flops.var_seen(cfg, 0), (6 * adaptations + 2) * D * D * width
  )
  scales = []
  for s in range(len(cfg.schedule)):
    cache = batch * rows * 2 * cfg.depth * cfg.schedule.end(s) * D * width
    products = batch * scale_flops(cfg, s, rows)
    scales.append(least(products, layers + ends + cache))
  decoder = least(batch * flops.tokenizer_forward(tokenizer).decoder, 0.0)
  return Bound(modulation, tuple(scales), decoder)


def exponent(sizes: list[float], values: list[float]) -> float:
  """Return b of the least squares fit values = a sizes^b, in logarithms."""
  return float(np.polyfit(np.log(sizes), np.log(values), 1)[0])
