"""The VAR transformer: GPT-2-style, adaptive layer norm, next-scale prediction.

    p(r_1, .., r_S) = prod_s p(r_s | r_1, .., r_{s-1})        (paper eq. 6)

One pass predicts all tokens of a scale at once. The input of scale s is the
image as reconstructed from the coarser scales, brought down to the size of
scale s (`Tokenizer.inputs`); scale 0 starts from the class embedding.
"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from var_jax.models import layers
from var_jax.models.blocks import (
  REMAT_POLICIES,
  STREAM,
  AdaLinear,
  Block,
  LayerNoise,
  Past,
  VARConfig,
  constrain,
  normal,
)


class Modulation(NamedTuple):
  """All that a label decides; it does not depend on the scale."""

  cond_BD: jax.Array
  blocks_RB6D: jax.Array  # gamma1, gamma2, scale1, scale2, shift1, shift2
  head_B2D: jax.Array  # scale, shift


class KVCache(NamedTuple):
  """Keys and values of the scales drawn so far, heads side by side in D."""

  k_RBLD: jax.Array
  v_RBLD: jax.Array

  @classmethod
  def create(cls, cfg: VARConfig, batch: int) -> "KVCache":
    shape = (cfg.depth, batch, cfg.schedule.num_tokens, cfg.width)
    empty = cls(jnp.zeros(shape, cfg.dtype), jnp.zeros(shape, cfg.dtype))
    return empty.constrained()

  def constrained(self) -> "KVCache":
    axes = ("layers", "batch", "length", "heads")
    return KVCache(*(constrain(c_RBLD, axes) for c_RBLD in self))


class VAR(nn.Module):
  """The transformer. Labels are 0..C-1, or -1 for unconditional.

  Args:
    attend: the attention function, with the signature of `layers.attend`.
    dot_general: what projections of tokens multiply with.
  """

  cfg: VARConfig
  attend: Callable = layers.attend
  dot_general: Callable = jax.lax.dot_general

  def setup(self):
    cfg = self.cfg
    D, S, init = cfg.width, len(cfg.schedule), normal(cfg.init_std)
    # One row more than classes: the last is the unconditional label.
    self.class_emb = self.param("class_emb", init, (cfg.num_classes + 1, D))
    self.pos_start = self.param("pos_start", init, (cfg.schedule.end(0), D))
    self.pos = self.param("pos", init, (cfg.schedule.num_tokens, D))
    self.lvl_emb = self.param("lvl_emb", init, (S, D))
    # VAR: embeddings and head stay float32 where the blocks are bfloat16.
    dense = functools.partial(
      nn.Dense, precision=layers.HIGHEST, dot_general=self.dot_general
    )
    self.word_emb = dense(D, kernel_init=init)
    self.head = dense(
      cfg.vocab_size,
      kernel_init=normal(cfg.init_std * cfg.init_head),
    )
    self.head_ada = AdaLinear(cfg, (cfg.init_adaln,) * 2)
    gains = (cfg.init_adaln_gamma,) * 2 + (cfg.init_adaln,) * 4
    if cfg.shared_adaln:
      self.shared_ada = AdaLinear(cfg, (1.0,) * 6)
      self.ada_gss = self.param(
        "ada_gss", _shared_shift_init(gains), (cfg.depth, 6, D)
      )
    else:
      self.ada = over_layers(AdaLinear, cfg)(cfg, gains)
    block = Block
    if cfg.remat != "none":
      policy = REMAT_POLICIES[cfg.remat]
      block = nn.remat(Block, prevent_cse=False, policy=policy)
    self.blocks = over_layers(block, cfg)(cfg, self.attend, self.dot_general)

  def __call__(
    self,
    labels_B: jax.Array,
    inputs_BlZ: jax.Array,
    key: jax.Array | None = None,
  ) -> jax.Array:
    """Return teacher-forced logits [B, L, V] in float32.

    Args:
      labels_B: int, -1 where the label is dropped.
      inputs_BlZ: what `Tokenizer.inputs` returns, float32 [B, L - n_0, Z], or
        its first scales only; the logits then cover those and one more.
      key: randomness of dropout and stochastic depth; None turns both off.
    """
    modulation = self.modulate(labels_B)
    start_BlD = self.embed_start(modulation)
    x_BlD = jnp.concatenate([start_BlD, self.word_emb(inputs_BlZ)], axis=1)
    x_BlD = self.add_position(x_BlD, 0)
    x_BlD, _ = self.run_blocks(x_BlD, modulation, None, key)
    return self.to_logits(x_BlD, modulation)

  def step(
    self,
    s: int,
    inputs_BlZ: jax.Array | None,
    modulation: Modulation,
    cache: KVCache,
  ) -> tuple[jax.Array, KVCache]:
    """Return logits [B, l, V] of scale s, and the cache with its k and v.

    Args:
      inputs_BlZ: the image so far at the size of scale s; unused for s = 0.
      cache: holds the scales before s.
    """
    start = self.cfg.schedule.start(s)
    x_BlD = self.embed_scale(s, inputs_BlZ, modulation)
    past = Past(*cache, length=start)
    x_BlD, (k_RBlD, v_RBlD) = self.run_blocks(x_BlD, modulation, past, None)
    scale = slice(start, start + x_BlD.shape[1])
    cache = KVCache(
      cache.k_RBLD.at[:, :, scale].set(k_RBlD),
      cache.v_RBLD.at[:, :, scale].set(v_RBlD),
    ).constrained()
    return self.to_logits(x_BlD, modulation), cache

  def modulate(self, labels_B: jax.Array) -> Modulation:
    """Return the modulation table of `labels_B`, once for all scales."""
    rows_B = jnp.where(labels_B < 0, self.cfg.num_classes, labels_B)
    cond_BD = self.class_emb[rows_B]
    _, head_B2D = self.head_ada(cond_BD)
    if self.cfg.shared_adaln:
      _, shared_B6D = self.shared_ada(cond_BD)
      blocks_RB6D = shared_B6D + self.ada_gss[:, None]
    else:
      _, blocks_RB6D = self.ada(cond_BD)
    return Modulation(cond_BD, blocks_RB6D, head_B2D)

  def embed_scale(
    self, s: int, inputs_BlZ: jax.Array | None, modulation: Modulation
  ) -> jax.Array:
    """Return the input of the first layer at scale s, [B, l, D]."""
    x_BlD = self.word_emb(inputs_BlZ) if s else self.embed_start(modulation)
    return self.add_position(x_BlD, self.cfg.schedule.start(s))

  def embed_start(self, modulation: Modulation) -> jax.Array:
    return modulation.cond_BD[:, None] + self.pos_start

  def add_position(self, x_BlD: jax.Array, start: int) -> jax.Array:
    """Add level and position embedding of tokens start .. start + l - 1."""
    tokens = slice(start, start + x_BlD.shape[1])
    level_l = self.cfg.schedule.level_ids()[tokens]
    return x_BlD + (self.lvl_emb[level_l] + self.pos[tokens])

  def run_blocks(self, x_BlD, modulation, past, key):
    noise = layer_noise(self.cfg, key)
    x_BlD = constrain(x_BlD, STREAM)
    return self.blocks(x_BlD, modulation.blocks_RB6D, past, noise)

  def to_logits(self, x_BlD: jax.Array, modulation: Modulation) -> jax.Array:
    scale_B1D, shift_B1D = jnp.split(modulation.head_B2D, 2, axis=1)
    x_BlD = layers.layer_norm(x_BlD, self.cfg.norm_eps)
    return self.head(layers.modulate(x_BlD, scale_B1D, shift_B1D))


def layer_noise(cfg: VARConfig, key: jax.Array | None) -> LayerNoise | None:
  """Return what makes the layers random, stacked over them."""
  if key is None:
    return None
  return LayerNoise(
    jnp.linspace(0.0, cfg.drop_path, cfg.depth),
    jax.random.split(key, cfg.depth),
  )


def over_layers(module, cfg: VARConfig):
  """Stack a module's parameters over R layers and scan it over them."""
  return nn.scan(
    module,
    variable_axes={"params": 0},
    split_rngs={"params": True},
    length=cfg.depth,
  )


def _shared_shift_init(gains: tuple[float, ...]):
  def init(key, shape, dtype=jnp.float32):
    gains_61 = jnp.asarray(gains, dtype)[:, None]
    return (
      jax.random.normal(key, shape, dtype) / math.sqrt(shape[-1]) * gains_61
    )

  return init
