"""One layer of the VAR transformer: attention, feed-forward, AdaLN.

    x += gamma1 Attn(LN(x) (1 + scale1) + shift1)
    x += gamma2 FFN(LN(x) (1 + scale2) + shift2)

The modulation vectors come from the class embedding (DiT, 2212.09748); the
layer norms have no affine of their own.
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
STREAM = ("batch", "length", "embed")
_HEADS = ("batch", "length", "heads")
_MLP = ("batch", "length", "mlp")

# What the forward pass keeps of a layer: all, the results of the projections
# (attention and everything elementwise is computed again), its input only.
REMAT_POLICIES = {
  "none": jax.checkpoint_policies.everything_saveable,
  "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
  "full": jax.checkpoint_policies.nothing_saveable,
}


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
  remat: str = "none"  # what the backward pass computes again: none|dots|full
  dtype: str = "float32"  # of matmul inputs; parameters are float32

  def __post_init__(self):
    object.__setattr__(self, "scales", self.schedule.sizes)
    if isinstance(self.remat, bool):  # written before there was a choice
      object.__setattr__(self, "remat", "full" if self.remat else "none")
    if self.remat not in REMAT_POLICIES:
      raise ValueError(
        f"remat {self.remat!r} is not known; use one of "
        f"{', '.join(REMAT_POLICIES)}."
      )
    for name in ("depth", "width", "heads", "num_classes", "vocab_size"):
      if getattr(self, name) < 1:
        raise ValueError(f"{name} {getattr(self, name)} is below 1; use more.")
    for name in ("dropout", "drop_path"):
      if not 0.0 <= getattr(self, name) < 1.0:
        raise ValueError(
          f"{name} {getattr(self, name)} is not in [0, 1); 0 turns it off."
        )
    if not 0.0 < self.norm_eps < 1.0:
      raise ValueError(f"norm_eps {self.norm_eps} is not in (0, 1); use 1e-6.")
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


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=("k_BLD", "v_BLD"),
  meta_fields=("length",),
)
@dataclasses.dataclass(frozen=True)
class Past:
  """Keys and values of coarser scales: the first `length` tokens of both.

  They are cut inside the loop over layers, where the cut is part of a copy that
  attention makes anyhow.
  """

  k_BLD: jax.Array
  v_BLD: jax.Array
  length: int


class LayerNoise(NamedTuple):
  """What makes one layer's pass random."""

  drop_path: jax.Array  # rate of this layer
  key: jax.Array


class Attention(nn.Module):
  cfg: VARConfig
  attend: Callable
  dot_general: Callable

  @nn.compact
  def __call__(self, x_BlD, past):
    """Return ([B, l, D], (k_BlD, v_BlD)), seeing a `Past` if it is not None."""
    cfg = self.cfg
    B, l, D = x_BlD.shape
    q_BlD, k_BlD, v_BlD = QKV(cfg, self.dot_general, name="mat_qkv")(x_BlD)
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
      # Built from the levels in the program: as a constant it has L^2 bytes.
      level_l = jnp.asarray(cfg.schedule.level_ids()[:l])
      mask_ll = level_l[:, None] >= level_l
      k_BTD, v_BTD = k_BlD, v_BlD
    else:
      # A scale sees itself and all that came before: nothing to mask.
      mask_ll = None
      seen = slice(past.length)
      k_BTD = jnp.concatenate([past.k_BLD[:, seen], k_BlD], axis=1)
      v_BTD = jnp.concatenate([past.v_BLD[:, seen], v_BlD], axis=1)
    out_BlNK = self.attend(q_BlNK, split(k_BTD), split(v_BTD), mask_ll)
    out_BlD = constrain(out_BlNK.reshape(B, l, D), _HEADS)
    proj = _dense(cfg, D, normal(cfg.residual_std), "proj", self.dot_general)
    return proj(out_BlD), (k_BlD, v_BlD)


class QKV(nn.Module):
  """The projection to queries, keys and values: one matrix [D, 3D]."""

  cfg: VARConfig
  dot_general: Callable

  @nn.compact
  def __call__(self, x_BlD) -> list[jax.Array]:
    """Return q, k and v, each [B, l, D]."""
    cfg, D = self.cfg, self.cfg.width
    kernel_DE = self.param("kernel", normal(cfg.init_std), (D, 3 * D))
    # In three before the product: the heads of each are split alike.
    kernel_D3E = kernel_DE.astype(cfg.dtype).reshape(D, 3, D)
    kernel_D3E = constrain(kernel_D3E, (None, None, "heads"))
    qkv_Bl3E = self.dot_general(
      x_BlD.astype(cfg.dtype),
      kernel_D3E,
      (((2,), (0,)), ((), ())),
      precision=layers.matmul_precision(cfg.dtype),
    )
    return [constrain(qkv_Bl3E[:, :, i], _HEADS) for i in range(3)]


class FeedForward(nn.Module):
  cfg: VARConfig
  dot_general: Callable

  @nn.compact
  def __call__(self, x_BlD):
    cfg = self.cfg
    F = round(cfg.width * cfg.mlp_ratio)
    dense = functools.partial(_dense, cfg, dot_general=self.dot_general)
    h_BlF = dense(F, normal(cfg.init_std), "fc1")(x_BlD)
    # VAR: GELU is the tanh approximation.
    h_BlF = nn.gelu(constrain(h_BlF, _MLP), approximate=True)
    return dense(cfg.width, normal(cfg.residual_std), "fc2")(h_BlF)


class Block(nn.Module):
  """One layer: x += gamma1 Attn(AdaLN(x)); x += gamma2 FFN(AdaLN(x))."""

  cfg: VARConfig
  attend: Callable
  dot_general: Callable = jax.lax.dot_general

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
    how = (cfg, self.attend, self.dot_general)
    h_BlD, kv = Attention(*how, name="attn")(h_BlD, past)
    x_BlD = x_BlD + self.branch(h_BlD * gamma1, noise, keys[0])

    h_BlD = layers.modulate(
      layers.layer_norm(x_BlD, cfg.norm_eps), scale2, shift2
    )
    h_BlD = FeedForward(cfg, self.dot_general, name="ffn")(h_BlD)
    x_BlD = x_BlD + self.branch(h_BlD * gamma2, noise, keys[1])

    return constrain(x_BlD, STREAM), (None if past is None else kv)

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


def normal(std: float):
  # VAR: truncated at the absolute values -2 and 2, which is no truncation.
  return nn.initializers.normal(std)


def _dense(cfg, features, kernel_init, name, dot_general=jax.lax.dot_general):
  """Return a projection that multiplies in cfg.dtype."""
  return nn.Dense(
    features,
    dtype=cfg.dtype,
    precision=layers.matmul_precision(cfg.dtype),
    kernel_init=kernel_init,
    dot_general=dot_general,
    name=name,
  )
