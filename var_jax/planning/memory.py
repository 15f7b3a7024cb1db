"""What a transformer's training step holds on a chip, without compiling it.

    peak = state + tokenizer + batch + max(encoder, saved + gradients + layer)

The first three are counted. The rest is the arrays that are alive when most
are, as XLA for TPU was seen to have them: tests/planning/peaks.json has what it
said, from which the constants below come.
"""

import math
from typing import NamedTuple

import jax

from var_jax.models.blocks import VARConfig
from var_jax.models.tokenizer import TokenizerConfig
from var_jax.parallel import mesh as mesh_lib
from var_jax.parallel import rules
from var_jax.planning import compiling
from var_jax.training.tokenizer_training import TokenizerTraining
from var_jax.training.var_training import VARTraining


class Estimate(NamedTuple):
  """Bytes on one chip."""

  state: float
  frozen: float  # what the step takes of the tokenizer
  batch: float
  activations: float  # and temporaries, where most are alive

  @property
  def peak(self) -> float:
    return sum(self)


def estimate(
  training: VARTraining,
  mesh: jax.sharding.Mesh,
  *,
  remat: str | None = None,
  accumulate: int | None = None,
  batch: int | None = None,
) -> Estimate:
  """Return what a step holds on a mesh, or would hold with other settings.

  Args:
    training: on any mesh.
    remat, accumulate, batch: in place of the config's.

  Raises:
    ValueError: the parameters or the batch do not divide on the mesh.
  """
  config, cfg = training.config, training.cfg
  parts = accumulate or config.accumulate
  batch = batch or config.data.batch_size
  mesh_lib.check_batch(mesh, batch, parts)
  rows = batch / mesh_lib.row_shards(mesh)
  tokens = training.work(training.stage_of(config.steps - 1)).tokens_per_image
  state = _bytes(mesh, training.like, tiled=True)
  gradients = _GRADIENTS * _bytes(mesh, training.like.params)
  model = mesh.shape["model"]
  b = rows / parts
  saved = b * tokens * _saved(cfg, remat or cfg.remat, model)
  working = gradients + b * tokens * _layer(cfg, model)
  if mesh.shape["fsdp"] > 1:
    working += _gathered(cfg, model)
  if parts > 1:
    working += gradients  # the sum so far
  cached = config.data.token_cache
  encoder = 0.0 if cached else b * _encoder(training.tokenizer.cfg)
  activations = max(saved + working, encoder)
  taken, _ = _frozen(training)
  return Estimate(state, taken, rows * _sample(training), activations)


def state_bytes(training: VARTraining | TokenizerTraining, mesh) -> int:
  """Return the bytes of the state that a chip holds."""
  return _bytes(mesh, training.like)


def parameter_shapes(training) -> dict[str, tuple[int, ...]]:
  """Return the shapes of the parameters, by path."""
  leaves = jax.tree_util.tree_leaves_with_path(training.like.params)
  return {rules.name_of(path): leaf.shape for path, leaf in leaves}


def _bytes(mesh, tree, tiled: bool = False) -> int:
  lies = rules.shardings(mesh, tree)
  size = _in_tiles if tiled else tuple
  return sum(
    math.prod(size(where.shard_shape(leaf.shape))) * leaf.dtype.itemsize
    for leaf, where in zip(
      jax.tree.leaves(tree), jax.tree.leaves(lies), strict=True
    )
  )


def _in_tiles(shape: tuple[int, ...]) -> tuple[int, ...]:
  """Return a shape with its smaller last dimension filled up to 8.

  A part of a width, like 1920 / 128 = 15, does not fill the tiles it lies in.
  """
  if len(shape) < 2:
    return shape
  *rest, i, j = shape
  low, high = sorted((i, j))
  return *rest, -(-low // 8) * 8, high


def beside(training: VARTraining) -> int:
  """Return the bytes of the tokenizer that a step does not take: its decoder.

  It is on each chip all the same, for pictures.
  """
  _, left = _frozen(training)
  return left


def _frozen(training: VARTraining) -> tuple[int, int]:
  """Return the bytes of the tokenizer that a step takes, and of the rest."""
  shapes = compiling.tokenizer_shapes(training.tokenizer)
  unused = {"decoder", "post_quant_conv"}
  if training.config.data.token_cache:
    unused |= {"encoder", "quant_conv"}
  taken = left = 0
  for name, leaves in shapes["params"].items():
    size = sum(4 * leaf.size for leaf in jax.tree.leaves(leaves))
    if name in unused:
      left += size
    else:
      taken += size
  return taken, left


def _sample(training: VARTraining) -> int:
  """Return the bytes of a sample on the devices."""
  cfg = training.tokenizer.cfg
  numbers = 4 * (4 + 2 * 2)
  if training.config.data.token_cache:
    return numbers + 2 * cfg.schedule.num_tokens
  return numbers + 3 * math.prod(cfg.image_shape)


def _saved(cfg: VARConfig, remat: str, model: int) -> float:
  """Return the bytes that the layers keep of a token."""
  D, wide = cfg.width, 2 if cfg.dtype == "bfloat16" else 4
  # What "dots" keeps: queries, keys, values, both projections, the wide MLP.
  products = wide * D * (2 + (3 + cfg.mlp_ratio) / model)
  more = {"full": 0.0, "dots": products, "none": _UNKEPT * products}[remat]
  return cfg.depth * (4 * D + more)


def _layer(cfg: VARConfig, model: int) -> float:
  """Return the bytes that the backward pass of a layer needs of a token."""
  return 4 * cfg.width * (_WHOLE + _SPLIT / model)


def _gathered(cfg: VARConfig, model: int) -> float:
  """Return the bytes of a layer's matrices, whole but for heads and MLP."""
  wide = 2 if cfg.dtype == "bfloat16" else 4
  return wide * cfg.width**2 * (4 + 2 * cfg.mlp_ratio) / model


def _encoder(cfg: TokenizerConfig) -> float:
  """Return the bytes that encoding an image needs."""
  H, W = cfg.image_shape
  return _FINEST * 4 * H * W * cfg.channels


# "none" keeps what elementwise steps make of the products too.
_UNKEPT = 7.2
# Gradients, and what there is of updates beside them.
_GRADIENTS = 1.2
# Arrays of the stream's size, float32, in the backward pass of a layer: those
# that a model axis does not split, and those it does.
_WHOLE, _SPLIT = 2.5, 16.5
# Float32 arrays of the encoder's finest level.
_FINEST = 4.9
