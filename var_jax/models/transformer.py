"""The VAR transformer: GPT-2-style, adaptive layer norm, next-scale prediction.

    p(r_1, .., r_S) = prod_s p(r_s | r_1, .., r_{s-1})        (paper eq. 6)

One pass predicts all tokens of a scale at once. The input of scale s is the
image as reconstructed from the coarser scales, brought down to the size of
scale s (`Tokenizer.inputs`); scale 0 starts from the class embedding.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from var_jax.models import layers
from var_jax.models.scales import SCALES, ScaleSchedule, Size

constrain = nn.with_logical_constraint


@dataclasses.dataclass(frozen=True)
class VARConfig:
  """Architecture and initialisation. Defaults are the released VAR-d16."""

  depth: int = 16  # R
  width: int = 1024  # D
  heads: int = 16  # N
  mlp_ratio: float = 4.0
  num_classes: int = 1000
  vocab_size: int = 4096  # V
  latent_channels: int = 32  # Z
  scales: tuple[Size, ...] = SCALES[256]
  shared_adaln: bool = False  # one AdaLN projection for all layers (d36)
  qk_norm: bool = True
  norm_eps: float = 1e-6
  dropout: float = 0.0  # after the attention and MLP projections
  drop_path: float = 0.1 * 16 / 24  # of the last layer; linear from 0
  init_head: float = 0.02
  init_adaln: float = 0.5
  init_adaln_gamma: float = 1e-3
  remat: bool = False
  dtype: str = "float32"  # of matmul inputs; parameters are float32

  def __post_init__(self):
    object.__setattr__(self, "scales", self.schedule.sizes)
    if self.width % self.heads:
      raise ValueError(
        f"width {self.width} is not divisible by {self.heads} heads; "
        "use a multiple."
      )

  @classmethod
  def official(cls, depth: int, **overrides) -> "VARConfig":
    """Return the published shape of a depth: width 64R, R heads."""
    published = dict(width=64 * depth, heads=depth, drop_path=0.1 * depth / 24)
    return cls(depth=depth, **(published | overrides))

  @property
  def schedule(self) -> ScaleSchedule:
    return ScaleSchedule(self.scales)

  @property
  def head_dim(self) -> int:
    return self.width // self.heads

  @property
  def init_std(self) -> float:
    return math.sqrt(1.0 / (3.0 * self.width))

  @property
  def residual_std(self) -> float:
    """Return the initial std of projections back into the residual stream."""
    return self.init_std / math.sqrt(2 * self.depth)


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
    return cls(jnp.zeros(shape, cfg.dtype), jnp.zeros(shape, cfg.dtype))


class LayerNoise(NamedTuple):
  """What makes one layer's pass random."""

  drop_path: jax.Array  # rate of this layer
  key: jax.Array


class Attention(nn.Module):
  cfg: VARConfig
  attend: Callable

  @nn.compact
  def __call__(self, x_BlD, past):
    """Return ([B, l, D], (k_BlD, v_BlD)); `past` holds coarser scales' k, v."""
    cfg = self.cfg
    B, l, D = x_BlD.shape
    qkv_BlE = _dense(
      cfg, 3 * D, _normal(cfg.init_std), "mat_qkv", use_bias=False
    )(x_BlD)
    q_BlD, k_BlD, v_BlD = jnp.split(qkv_BlE, 3, axis=-1)
    # VAR: q and v have a bias, k has none.
    q_bias_D = self.param("q_bias", nn.initializers.zeros, (D,))
    v_bias_D = self.param("v_bias", nn.initializers.zeros, (D,))
    split = functools.partial(
      jnp.reshape, shape=(B, -1, cfg.heads, cfg.head_dim)
    )
    q_BlNK = split(q_BlD.astype(jnp.float32) + q_bias_D)
    k_BlNK = split(k_BlD)
    v_BlD = (v_BlD + v_bias_D).astype(cfg.dtype)
    if cfg.qk_norm:
      log_scale_N = self.param(
        "scale_mul", nn.initializers.constant(math.log(4.0)), (cfg.heads,)
      )
      # VAR: one learned log scale a head, clamped at log 100.
      scale_N1 = jnp.exp(jnp.minimum(log_scale_N, math.log(100.0)))[:, None]
      q_BlNK = layers.l2_normalize(q_BlNK) * scale_N1
      k_BlNK = layers.l2_normalize(k_BlNK)
    else:
      # VAR: q is scaled by 0.25/sqrt(K), not 1/sqrt(K).
      q_BlNK = q_BlNK * (0.25 / math.sqrt(cfg.head_dim))
    q_BlNK = q_BlNK.astype(cfg.dtype)
    k_BlD = k_BlNK.astype(cfg.dtype).reshape(B, l, D)
    if past is None:
      mask_ll = cfg.schedule.block_causal_mask()[:l, :l]
      k_BTD, v_BTD = k_BlD, v_BlD
    else:
      # A scale sees itself and all that came before: nothing to mask.
      mask_ll = None
      k_BTD = jnp.concatenate([past[0], k_BlD], axis=1)
      v_BTD = jnp.concatenate([past[1], v_BlD], axis=1)
    out_BlNK = self.attend(q_BlNK, split(k_BTD), split(v_BTD), mask_ll)
    out_BlD = _dense(cfg, D, _normal(cfg.residual_std), "proj")(
      out_BlNK.reshape(B, l, D)
    )
    return out_BlD, (k_BlD, v_BlD)


class FeedForward(nn.Module):
  cfg: VARConfig

  @nn.compact
  def __call__(self, x_BlD):
    cfg = self.cfg
    F = round(cfg.width * cfg.mlp_ratio)
    h_BlF = _dense(cfg, F, _normal(cfg.init_std), "fc1")(x_BlD)
    # VAR: GELU is the tanh approximation.
    h_BlF = nn.gelu(h_BlF, approximate=True)
    return _dense(cfg, cfg.width, _normal(cfg.residual_std), "fc2")(h_BlF)


class Block(nn.Module):
  """One layer: x += gamma1 Attn(AdaLN(x)); x += gamma2 FFN(AdaLN(x))."""

  cfg: VARConfig
  attend: Callable

  @nn.compact
  def __call__(self, x_BlD, modulation_B6D, past, noise):
    """Return (x_BlD, this scale's (k_BlD, v_BlD), or None without a past)."""
    cfg = self.cfg
    gamma1, gamma2, scale1, scale2, shift1, shift2 = jnp.split(
      modulation_B6D, 6, axis=1
    )
    keys = [None, None] if noise is None else jax.random.split(noise.key)

    h_BlD = layers.modulate(
      layers.layer_norm(x_BlD, cfg.norm_eps), scale1, shift1
    )
    h_BlD, kv = Attention(cfg, self.attend, name="attn")(h_BlD, past)
    x_BlD = x_BlD + self.branch(h_BlD * gamma1, noise, keys[0])

    h_BlD = layers.modulate(
      layers.layer_norm(x_BlD, cfg.norm_eps), scale2, shift2
    )
    h_BlD = FeedForward(cfg, name="ffn")(h_BlD)
    x_BlD = x_BlD + self.branch(h_BlD * gamma2, noise, keys[1])

    x_BlD = constrain(x_BlD, ("batch", "length", "embed"))
    return x_BlD, (None if past is None else kv)

  def branch(self, h_BlD, noise, key):
    """Apply dropout and stochastic depth to a residual branch."""
    if noise is None:
      return h_BlD
    element_key, path_key = jax.random.split(key)
    if self.cfg.dropout:
      h_BlD = layers.dropout(h_BlD, self.cfg.dropout, element_key)
    if self.cfg.drop_path:
      h_BlD = layers.drop_path(h_BlD, noise.drop_path, path_key)
    return h_BlD


class AdaLinear(nn.Module):
  """SiLU, then one projection to all modulation vectors of a layer."""

  cfg: VARConfig
  gains: tuple[float, ...]  # of init_std, one a vector

  @nn.compact
  def __call__(self, cond_BD):
    """Return (cond_BD, [B, vectors, D] float32); the first is scan's carry."""
    cfg, D, C = self.cfg, self.cfg.width, len(self.gains)

    def kernel_init(key, shape, dtype):
      gains_E = jnp.repeat(jnp.asarray(self.gains, dtype), D)
      return jax.random.normal(key, shape, dtype) * cfg.init_std * gains_E

    dense = _dense(cfg, C * D, kernel_init, "linear")
    vectors_BE = dense(nn.silu(cond_BD)).astype(jnp.float32)
    return cond_BD, vectors_BE.reshape(-1, C, D)


class VAR(nn.Module):
  """The transformer. Labels are 0..C-1, or -1 for unconditional.

  Args:
    attend: the attention function, with the signature of `layers.attend`.
  """

  cfg: VARConfig
  attend: Callable = layers.attend

  def setup(self):
    cfg = self.cfg
    D, S, normal = cfg.width, len(cfg.schedule), _normal(cfg.init_std)
    # One row more than classes: the last is the unconditional label.
    self.class_emb = self.param("class_emb", normal, (cfg.num_classes + 1, D))
    self.pos_start = self.param("pos_start", normal, (cfg.schedule.end(0), D))
    self.pos = self.param("pos", normal, (cfg.schedule.num_tokens, D))
    self.lvl_emb = self.param("lvl_emb", normal, (S, D))
    # VAR: embeddings and head stay float32 where the blocks are bfloat16.
    self.word_emb = nn.Dense(D, kernel_init=normal, precision=layers.HIGHEST)
    self.head = nn.Dense(
      cfg.vocab_size,
      kernel_init=_normal(cfg.init_std * cfg.init_head),
      precision=layers.HIGHEST,
    )
    self.head_ada = AdaLinear(cfg, (cfg.init_adaln,) * 2)
    gains = (cfg.init_adaln_gamma,) * 2 + (cfg.init_adaln,) * 4
    if cfg.shared_adaln:
      self.shared_ada = AdaLinear(cfg, (1.0,) * 6)
      self.ada_gss = self.param(
        "ada_gss", _shared_shift_init(gains), (cfg.depth, 6, D)
      )
    else:
      self.ada = _over_layers(AdaLinear, cfg)(cfg, gains)
    block = nn.remat(Block, prevent_cse=False) if cfg.remat else Block
    self.blocks = _over_layers(block, cfg)(cfg, self.attend)

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
    x_BlD = self.word_emb(inputs_BlZ) if s else self.embed_start(modulation)
    x_BlD = self.add_position(x_BlD, start)
    past = tuple(c_RBLD[:, :, :start] for c_RBLD in cache)
    x_BlD, kv = self.run_blocks(x_BlD, modulation, past, None)
    cache = KVCache(
      *(
        c.at[:, :, start : start + new.shape[2]].set(new)
        for c, new in zip(cache, kv)
      )
    )
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

  def embed_start(self, modulation: Modulation) -> jax.Array:
    return modulation.cond_BD[:, None] + self.pos_start

  def add_position(self, x_BlD: jax.Array, start: int) -> jax.Array:
    """Add level and position embedding of tokens start .. start + l - 1."""
    tokens = slice(start, start + x_BlD.shape[1])
    level_l = self.cfg.schedule.level_ids()[tokens]
    return x_BlD + (self.lvl_emb[level_l] + self.pos[tokens])

  def run_blocks(self, x_BlD, modulation, past, key):
    noise = None
    if key is not None:
      noise = LayerNoise(
        jnp.linspace(0.0, self.cfg.drop_path, self.cfg.depth),
        jax.random.split(key, self.cfg.depth),
      )
    x_BlD = constrain(x_BlD, ("batch", "length", "embed"))
    return self.blocks(x_BlD, modulation.blocks_RB6D, past, noise)

  def to_logits(self, x_BlD: jax.Array, modulation: Modulation) -> jax.Array:
    scale_B1D, shift_B1D = jnp.split(modulation.head_B2D, 2, axis=1)
    x_BlD = layers.layer_norm(x_BlD, self.cfg.norm_eps)
    return self.head(layers.modulate(x_BlD, scale_B1D, shift_B1D))


def _over_layers(module, cfg: VARConfig):
  """Stack a module's parameters over R layers and scan it over them."""
  return nn.scan(
    module,
    variable_axes={"params": 0},
    split_rngs={"params": True},
    length=cfg.depth,
  )


def _normal(std: float):
  # VAR: truncated at the absolute values -2 and 2, which is no truncation.
  return nn.initializers.normal(std)


def _shared_shift_init(gains: tuple[float, ...]):
  def init(key, shape, dtype=jnp.float32):
    gains_61 = jnp.asarray(gains, dtype)[:, None]
    return (
      jax.random.normal(key, shape, dtype) / math.sqrt(shape[-1]) * gains_61
    )

  return init


def _dense(
  cfg: VARConfig, features: int, kernel_init, name: str, use_bias=True
):
  """Return a projection that multiplies in cfg.dtype."""
  return nn.Dense(
    features,
    use_bias=use_bias,
    dtype=cfg.dtype,
    precision=layers.matmul_precision(cfg.dtype),
    kernel_init=kernel_init,
    name=name,
  )
