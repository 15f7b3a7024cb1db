"""What a transformer's training step holds on a chip, without compiling it.

    peak = state + tokenizer + batch + max(encoder, saved + gradients + layer)

What a step is given is exact. The rest counts the arrays that are alive when
most are, where XLA for TPU was seen to have them: docs/pods.md has both numbers
for each row of its table.
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
  frozen: float  # the tokenizer's part that encodes
  batch: float
  saved: float  # by the forward pass for the backward pass
  working: float  # all else that is alive at the peak

  @property
  def peak(self) -> float:
    return sum(self)


def estimate(
  training: VARTraining,
  mesh: jax.sharding.Mesh,
  *,
  remat: str | None = None,
  accumulate: int | None = None,
) -> Estimate:
  """Return what a step holds on a mesh, or would hold with other settings.

  Args:
    training: on any mesh.
    remat, accumulate: in place of the config's.

  Raises:
    ValueError: the parameters or the batch do not divide on the mesh.
  """
  config, cfg = training.config, training.cfg
  parts = accumulate or config.accumulate
  mesh_lib.check_batch(mesh, config.data.batch_size, parts)
  rows = config.data.batch_size / mesh_lib.row_shards(mesh)
  tokens = training.work(training.stage_of(config.steps - 1)).tokens_per_image
  state = state_bytes(training, mesh)
  gradients = _bytes(mesh, training.like.params)
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
  if encoder > saved + working:
    saved, working = 0.0, encoder
  frozen = _frozen(training)
  return Estimate(state, frozen, rows * _sample(training), saved, working)


def state_bytes(training: VARTraining | TokenizerTraining, mesh) -> int:
  """Return the bytes of the state that a chip holds."""
  return _bytes(mesh, training.like)


def parameter_shapes(training) -> dict[str, tuple[int, ...]]:
  """Return the shapes of the parameters, by path."""
  leaves = jax.tree_util.tree_leaves_with_path(training.like.params)
  return {rules.name_of(path): leaf.shape for path, leaf in leaves}


def _bytes(mesh, tree) -> int:
  lies = rules.shardings(mesh, tree)
  return sum(
    math.prod(_tiled(where.shard_shape(leaf.shape))) * leaf.dtype.itemsize
    for leaf, where in zip(
      jax.tree.leaves(tree), jax.tree.leaves(lies), strict=True
    )
  )


def _tiled(shape: tuple[int, ...]) -> tuple[int, ...]:
  """Return a shape as it lies in memory, in tiles of 8 by 128."""
  if len(shape) < 2:
    return shape
  *rest, i, j = shape
  low, high = sorted((i, j))
  return *rest, -(-low // 8) * 8, -(-high // 128) * 128


def _frozen(training: VARTraining) -> int:
  """Return the bytes of what a step needs of the tokenizer."""
  shapes = compiling.tokenizer_shapes(training.tokenizer)
  unused = {"decoder", "post_quant_conv"}
  if training.config.data.token_cache:
    unused |= {"encoder", "quant_conv"}
  used = [v for k, v in shapes["params"].items() if k not in unused]
  return sum(4 * leaf.size for leaf in jax.tree.leaves(used))


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
_UNKEPT = 4.0
# Arrays of the stream's size, float32, in the backward pass of a layer: those
# that a model axis does not split, and those it does.
_WHOLE, _SPLIT = 5.0, 12.5
# Float32 arrays of the encoder's finest level.
_FINEST = 4.9
