"""How fast a step can be at best: arithmetic, memory and links, each alone.

    seconds >= max(compute, memory, ici, dcn)

Counted are products, arrays that have to cross HBM, and collectives that the
sharding asks for, each at the peak rate of its unit. A program can need more
and overlap less; none can be faster.
"""

import math
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


def of_draw(training: VARTraining, images: int, chip: Chip) -> Bounds:
  """Return the bounds of drawing so many images at once, with guidance."""
  mesh, cfg = training.mesh, training.cfg
  products = images * sample_products(cfg, training.tokenizer.cfg)
  shapes = memory.parameter_shapes(training)
  # Every scale reads all parameters; what other chips hold is gathered.
  elements = sum(map(math.prod, shapes.values()))
  held = _width("blocks/", cfg.dtype) * elements / mesh.shape["model"]
  times, rows = len(cfg.schedule), 2 * images / mesh_lib.row_shards(mesh)
  summed = forward_sums(cfg, cfg.schedule.num_tokens, rows, mesh.shape)
  sent = times * gathered(shapes, mesh.shape, cfg.dtype) + summed
  return Bounds(
    compute=products / mesh.size / chip.flops,
    memory=times * held / chip.hbm_rate,
    ici=sent / chip.ici_rate,
    dcn=0.0,
  )


def _last_tokens(training: VARTraining) -> int:
  """Return the tokens of an image in the last stage."""
  last = training.stage_of(training.config.steps - 1)
  return training.work(last).tokens_per_image


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
