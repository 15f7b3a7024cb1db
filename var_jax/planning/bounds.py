"""How fast a step can be at best: arithmetic, memory and links, each alone.

    seconds >= max(compute, memory, ici, dcn)

Counted are products, the state that has to cross HBM, and collectives that the
sharding asks for, each at the peak rate of its unit. A program needs more and
overlaps less; one that is faster does something else.
"""

import math
import re
from collections.abc import Mapping
from typing import NamedTuple

from jax.sharding import Mesh

from var_jax.models.blocks import VARConfig
from var_jax.models.tokenizer import TokenizerConfig
from var_jax.parallel import mesh as mesh_lib
from var_jax.parallel import rules
from var_jax.planning import memory
from var_jax.planning.asked import Training
from var_jax.planning.topology import Chip
from var_jax.training import flops
from var_jax.training.tokenizer_training import TokenizerTraining
from var_jax.training.var_training import VARTraining

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


def of_step(training: Training, mesh: Mesh, chip: Chip) -> Bounds:
  """Return the bounds of a training step.

  Args:
    training: on any mesh.
  """
  config = training.config
  if isinstance(training, TokenizerTraining):
    each = tokenizer_products(training.cfg)
  else:
    encoded = None if config.data.token_cache else training.tokenizer.cfg
    each = var_products(training.cfg, encoded, _last_tokens(training))
  traffic = of_step_traffic(training, mesh)
  return Bounds(
    compute=config.data.batch_size * each / mesh.size / chip.flops,
    # The state is read once and written once, at least.
    memory=2 * memory.state_bytes(training, mesh) / chip.hbm_rate,
    ici=traffic.ici / chip.ici_rate,
    dcn=traffic.dcn / chip.dcn_rate,
  )


def of_step_traffic(training: Training, mesh: Mesh) -> Traffic:
  """Return what a training step sends."""
  config = training.config
  shapes = memory.parameter_shapes(training)
  parts = config.accumulate
  if isinstance(training, TokenizerTraining):
    return gradients(shapes, mesh.shape, "float32", parts)
  traffic = gradients(shapes, mesh.shape, training.cfg.dtype, parts)
  rows = config.data.batch_size / mesh_lib.row_shards(mesh)
  tokens = _last_tokens(training)
  summed = train_sums(training.cfg, tokens, rows, mesh.shape)
  return traffic._replace(ici=traffic.ici + summed)


def of_draw(training: VARTraining, mesh: Mesh, images: int, chip: Chip):
  """Return the bounds of drawing so many images at once, with guidance.

  Args:
    training: on any mesh.
  """
  cfg = training.cfg
  products = images * sample_products(cfg, training.tokenizer.cfg)
  shapes = memory.parameter_shapes(training)
  times, rows = len(cfg.schedule), 2 * images / mesh_lib.row_shards(mesh)
  held = sent = 0.0
  for path, shape in shapes.items():
    # What makes the modulation table is read once, the rest at every scale.
    reads = 1 if _MODULATION.match(path) else times
    held += reads * _held(path, shape, mesh.shape, cfg.dtype)
    sent += reads * _gathered(path, shape, mesh.shape, cfg.dtype)
  sent += forward_sums(cfg, cfg.schedule.num_tokens, rows, mesh.shape)
  return Bounds(
    compute=products / mesh.size / chip.flops,
    memory=held / chip.hbm_rate,
    ici=sent / chip.ici_rate,
    dcn=0.0,
  )


_MODULATION = re.compile(r"(shared_|head_)?ada|class_emb")


def _last_tokens(training: VARTraining) -> int:
  """Return the tokens of an image in the last stage."""
  last = training.stage_of(training.config.steps - 1)
  return training.work(last).tokens_per_image


def var_products(
  cfg: VARConfig, tokenizer: TokenizerConfig | None, tokens: int
) -> float:
  """Return the bfloat16 FLOPs that a training image takes.

  Attention counts what the mask shows: splash skips the rest.

  Args:
    tokenizer: None where tokens are cached.
    tokens: of the scales that are trained.
  """
  layers = _passes(cfg.dtype) * flops.var_seen(cfg, tokens)
  total = 3 * (layers + FLOAT32_PASSES * flops.var_ends(cfg, tokens))
  if tokenizer is not None:
    total += FLOAT32_PASSES * flops.tokenizer_forward(tokenizer).encode
  return total


def tokenizer_products(cfg: TokenizerConfig) -> float:
  """Return the bfloat16 FLOPs that a training image takes."""
  counts = flops.tokenizer_forward(cfg)
  float32 = 3 * (counts.encoder + counts.accumulate) + counts.search
  return FLOAT32_PASSES * float32 + 3 * _passes(cfg.dtype) * counts.decoder


def sample_products(cfg: VARConfig, tokenizer: TokenizerConfig) -> float:
  """Return the bfloat16 FLOPs that a guided image takes, decoder included."""
  L = cfg.schedule.num_tokens
  counts = flops.tokenizer_forward(tokenizer)
  return (
    2 * _passes(cfg.dtype) * flops.var_seen(cfg, L)
    + FLOAT32_PASSES * (2 * flops.var_ends(cfg, L) + counts.accumulate)
    + _passes(cfg.dtype) * counts.decoder  # `load` gives both one dtype
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
  gradient is scattered; a gradient is summed over all copies. Slices are joined
  last: each chip of a slice exchanges its own part.

  Args:
    shapes: of the parameters, by path.
    sizes: of the mesh's axes.
    dtype: of matmul inputs: layers are gathered in it, the rest in float32.
    parts: that a batch is taken in.
  """
  ici = dcn = 0.0
  for path, shape in shapes.items():
    held = _held(path, shape, sizes, dtype)
    copies = sizes["data"]
    if "fsdp" in _split_over(path, shape):
      ici += 3 * _gathered(path, shape, sizes, dtype)
      held /= sizes["fsdp"]
    else:
      copies *= sizes["fsdp"]
    ici += 2 * _rest(copies) * held
    dcn += 2 * _rest(sizes["slice"]) * held / copies
  return Traffic(parts * ici, parts * dcn)


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


def _held(path: str, shape, sizes: Mapping[str, int], dtype: str) -> float:
  """Return a parameter's bytes on a chip when nothing is split over fsdp."""
  split = sizes["model"] if "model" in _split_over(path, shape) else 1
  return _width(path, dtype) * math.prod(shape) / split


def _gathered(path: str, shape, sizes: Mapping[str, int], dtype: str) -> float:
  """Return the bytes over ICI of having a parameter whole on each chip."""
  if "fsdp" not in _split_over(path, shape):
    return 0.0
  return _rest(sizes["fsdp"]) * _held(path, shape, sizes, dtype)


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
