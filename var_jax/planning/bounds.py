"""How fast a step can be at best: arithmetic, memory and links, each alone.

    seconds >= max(compute, memory, ici, dcn)

Counted are products, arrays that have to cross HBM, and collectives that the
sharding asks for, each at the peak rate of its unit. A program can need more
and overlap less; none can be faster.
"""

import math
from collections.abc import Mapping
from typing import NamedTuple

from var_jax.models.tokenizer import TokenizerConfig
from var_jax.models.transformer import VARConfig
from var_jax.parallel import rules
from var_jax.training import flops

# Precision.HIGHEST takes a float32 product in so many bfloat16 ones.
FLOAT32_PASSES = 6


class Traffic(NamedTuple):
  """Bytes out of one chip in a step."""

  ici: float
  dcn: float


class Bounds(NamedTuple):
  """Seconds of a step, or of a batch that is drawn."""

  compute: float
  memory: float
  ici: float
  dcn: float


def var_products(
  cfg: VARConfig, tokenizer: TokenizerConfig | None, tokens: int
) -> float:
  """Return the bfloat16 FLOPs that a training image takes.

  Args:
    tokenizer: None where tokens are cached.
    tokens: of the scales that are trained.
  """
  ends = flops.var_ends(cfg, tokens)
  blocks = flops.var_forward(cfg, tokens) - ends
  total = 3 * (_passes(cfg.dtype) * blocks + FLOAT32_PASSES * ends)
  if tokenizer is not None:
    total += FLOAT32_PASSES * flops.tokenizer_forward(tokenizer).encode
  return total


def tokenizer_products(cfg: TokenizerConfig) -> float:
  """Return the bfloat16 FLOPs that a training image takes."""
  counts = flops.tokenizer_forward(cfg)
  float32 = 3 * (counts.encoder + counts.accumulate) + counts.search
  return FLOAT32_PASSES * float32 + 3 * _passes(cfg.dtype) * counts.decoder


def sample_products(cfg: VARConfig, tokenizer: TokenizerConfig) -> float:
  """Return the bfloat16 FLOPs that a guided image takes."""
  ends = 2 * flops.var_ends(cfg, cfg.schedule.num_tokens)
  blocks = flops.var_sample(cfg, rows=2) - ends
  counts = flops.tokenizer_forward(tokenizer)
  return (
    _passes(cfg.dtype) * blocks
    + FLOAT32_PASSES * (ends + counts.accumulate)
    + _passes(tokenizer.dtype) * counts.decoder
  )


def _passes(dtype: str) -> int:
  return FLOAT32_PASSES if dtype == "float32" else 1


def gradients(
  shapes: Mapping[str, tuple[int, ...]],
  sizes: Mapping[str, int],
  dtype: str,
  parts: int,
) -> Traffic:
  """Return the traffic of parameters and their gradients.

  What lies in parts is gathered for the forward and the backward pass, and its
  gradient is scattered; the rest of a gradient is summed.

  Args:
    shapes: of the parameters, by path.
    sizes: of the mesh's axes.
    dtype: of matmul inputs: layers are gathered in it, the rest in float32.
    parts: that a batch is taken in.
  """
  ici = dcn = 0.0
  for path, shape in shapes.items():
    over = _split_over(path, shape)
    held = _width(path, dtype) * math.prod(shape)
    if "model" in over:
      held /= sizes["model"]
    if "fsdp" in over:
      ici += 3 * _rest(sizes["fsdp"]) * held
      held /= sizes["fsdp"]
    else:
      ici += 2 * _rest(sizes["fsdp"]) * held
    ici += 2 * _rest(sizes["data"]) * held
    dcn += 2 * _rest(sizes["slice"]) * held
  return Traffic(parts * ici, parts * dcn)


def gathered(
  shapes: Mapping[str, tuple[int, ...]], sizes: Mapping[str, int], dtype: str
) -> float:
  """Return the bytes over ICI of gathering all parameters once."""
  total = 0.0
  for path, shape in shapes.items():
    over = _split_over(path, shape)
    if "fsdp" in over:
      held = _width(path, dtype) * math.prod(shape)
      if "model" in over:
        held /= sizes["model"]
      total += _rest(sizes["fsdp"]) * held
  return total


def train_sums(
  cfg: VARConfig, tokens: int, rows: float, sizes: Mapping[str, int]
) -> float:
  """Return the bytes over ICI of what heads and MLP parts add up to.

  Args:
    rows: of the batch, that a chip works on.
  """
  forward = forward_sums(cfg, tokens, rows, sizes)
  # Backward as often as forward; with remat attention once more.
  return forward * (2.5 if cfg.remat == "full" else 2)


def forward_sums(
  cfg: VARConfig, tokens: int, rows: float, sizes: Mapping[str, int]
) -> float:
  """Return the same of the forward pass: attention and MLP of each layer."""
  held = _width("blocks/", cfg.dtype) * rows * tokens * cfg.width
  return cfg.depth * 2 * 2 * _rest(sizes["model"]) * held


def _width(path: str, dtype: str) -> int:
  """Return the bytes of a parameter's element where it is multiplied."""
  layers = path.startswith(("blocks/", "ada/"))
  return 2 if layers and dtype == "bfloat16" else 4


def _split_over(path: str, shape: tuple[int, ...]) -> set[str]:
  if not shape:
    return set()
  table = dict(rules.AXIS_RULES)
  return {axis for name in rules.axes_of(path) for axis in table.get(name, ())}


def _rest(parts: int) -> float:
  """Return the share of an array that the other chips of a group have."""
  return (parts - 1) / parts
