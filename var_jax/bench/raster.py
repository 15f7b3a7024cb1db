"""Raster order with the same transformer: one token a step.

    p(t_1, .., t_L) = prod_i p(t_i | t_1, .., t_{i-1})        (paper eq. 1)

Blocks, width, modulation, head and sampler are those of VAR; a single scale of
n x n tokens is drawn left to right, top to bottom, in n^2 steps. With a cache a
step sees one token; without, as in the paper's O(n^6), it computes all of them
again.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp

from var_jax.generation import logits as logits_lib
from var_jax.generation.step import Options
from var_jax.models import layers
from var_jax.models.blocks import AdaLinear, Block, Past, VARConfig, normal
from var_jax.models.transformer import KVCache, layer_noise, over_layers
from var_jax.training import flops


class Raster(nn.Module):
  """The transformer. Labels are 0..C-1, or -1 for unconditional.

  Args:
    cfg: of one scale, n x n tokens.

  Raises:
    ValueError: there are more scales, or it is not square.
  """

  cfg: VARConfig

  def __post_init__(self):
    shapes = self.cfg.schedule.shapes
    if len(shapes) != 1 or shapes[0][0] != shapes[0][1]:
      raise ValueError(
        f"scales {self.cfg.scales} are no single square grid; use one like "
        "(16,)."
      )
    super().__post_init__()

  def setup(self):
    cfg = self.cfg
    D, init = cfg.width, normal(cfg.init_std)
    self.class_emb = self.param("class_emb", init, (cfg.num_classes + 1, D))
    self.token_emb = self.param("token_emb", init, (cfg.vocab_size, D))
    self.pos = self.param("pos", init, (cfg.schedule.num_tokens, D))
    self.head = nn.Dense(
      cfg.vocab_size,
      kernel_init=normal(cfg.init_std * cfg.init_head),
      precision=layers.HIGHEST,
    )
    self.head_ada = AdaLinear(cfg, (cfg.init_adaln,) * 2)
    gains = (cfg.init_adaln_gamma,) * 2 + (cfg.init_adaln,) * 4
    self.ada = over_layers(AdaLinear, cfg)(cfg, gains)
    self.blocks = over_layers(Block, cfg)(cfg, _causal)

  def __call__(
    self,
    labels_B: jax.Array,
    tokens_BL: jax.Array,
    key: jax.Array | None = None,
  ) -> jax.Array:
    """Return teacher-forced logits [B, L, V]; the last token is not read.

    Args:
      key: randomness of dropout and stochastic depth; None turns both off.
    """
    cond_BD, blocks_RB6D, head_B2D = self.modulate(labels_B)
    x_BLD = jnp.concatenate(
      [cond_BD[:, None], self.token_emb[tokens_BL[:, :-1]]], axis=1
    )
    noise = layer_noise(self.cfg, key)
    x_BLD, _ = self.blocks(x_BLD + self.pos, blocks_RB6D, None, noise)
    return self.to_logits(x_BLD, head_B2D)

  def modulate(self, labels_B: jax.Array):
    """Return the class embedding and the modulation of layers and head."""
    rows_B = jnp.where(labels_B < 0, self.cfg.num_classes, labels_B)
    cond_BD = self.class_emb[rows_B]
    _, head_B2D = self.head_ada(cond_BD)
    _, blocks_RB6D = self.ada(cond_BD)
    return cond_BD, blocks_RB6D, head_B2D

  def embed(self, cond_BD: jax.Array, token_B: jax.Array, i: jax.Array):
    """Return the input [B, 1, D] of step i, which sees token i - 1."""
    x_BD = jnp.where(i == 0, cond_BD, self.token_emb[token_B])
    return (x_BD + self.pos[i])[:, None]

  def to_logits(self, x_BlD: jax.Array, head_B2D: jax.Array) -> jax.Array:
    scale_B1D, shift_B1D = jnp.split(head_B2D, 2, axis=1)
    x_BlD = layers.layer_norm(x_BlD, self.cfg.norm_eps)
    return self.head(layers.modulate(x_BlD, scale_B1D, shift_B1D))


def init_params(model: Raster, key: jax.Array):
  """Return fresh parameters."""
  tokens_1L = jnp.zeros((1, model.cfg.schedule.num_tokens), jnp.int32)
  return model.init(key, jnp.zeros((1,), jnp.int32), tokens_1L)


def loss(
  model: Raster,
  params,
  labels_B: jax.Array,
  tokens_BL: jax.Array,
  key: jax.Array,
  label_dropout: float = 0.1,
) -> jax.Array:
  """Return the mean cross entropy, some labels and parts of layers dropped."""
  label_key, network_key = jax.random.split(key)
  drop_B = jax.random.bernoulli(label_key, label_dropout, labels_B.shape)
  logits_BLV = model.apply(
    params, jnp.where(drop_B, -1, labels_B), tokens_BL, network_key
  )
  log_probs_BLV = jax.nn.log_softmax(logits_BLV)
  chosen_BL1 = jnp.take_along_axis(log_probs_BLV, tokens_BL[..., None], axis=-1)
  return -jnp.mean(chosen_BL1)


@functools.partial(jax.jit, static_argnames=("model", "guided", "cached"))
def generate(
  model: Raster,
  params,
  labels_B: jax.Array,
  keys_B: jax.Array,
  options: Options,
  *,
  guided: bool = True,
  cached: bool = True,
) -> jax.Array:
  """Return tokens [B, L].

  Guidance has the same strength at every step: there are no scales to grow
  over. Other options are as in VAR's sampler.

  Args:
    keys_B: one key an image; nothing else about an image is random.
    cached: False computes all positions again at every step.
  """
  B = len(labels_B)
  if guided:  # one batch of 2B rows, the unconditional half below
    labels_B = jnp.concatenate([labels_B, jnp.full_like(labels_B, -1)])
  rows, L = len(labels_B), model.cfg.schedule.num_tokens
  cond_BD, blocks_RB6D, head_B2D = model.apply(
    params, labels_B, method="modulate"
  )

  def of_cache(carry, i):
    cache, tokens_BL = carry
    token_B = tokens_BL[:, jnp.maximum(i - 1, 0)]
    x_B1D = model.apply(
      params, cond_BD, jnp.tile(token_B, rows // B), i, method="embed"
    )
    x_B1D, cache = _step(model, params, x_B1D, blocks_RB6D, cache, i)
    return cache, model.apply(params, x_B1D, head_B2D, method="to_logits")

  def of_all(carry, i):
    _, tokens_BL = carry
    tokens_BL = jnp.tile(tokens_BL, (rows // B, 1))
    logits_BLV = model.apply(params, labels_B, tokens_BL)
    return None, jax.lax.dynamic_slice_in_dim(logits_BLV, i, 1, axis=1)

  def step(carry, i):
    cache, logits_B1V = (of_cache if cached else of_all)(carry, i)
    token_B1 = _draw(logits_B1V, keys_B, options, guided, i)
    tokens_BL = jax.lax.dynamic_update_slice(carry[1], token_B1, (0, i))
    return (cache, tokens_BL), None

  cache = KVCache.create(model.cfg, rows) if cached else None
  start = cache, jnp.zeros((B, L), jnp.int32)
  (_, tokens_BL), _ = jax.lax.scan(step, start, jnp.arange(L))
  return tokens_BL


def _draw(logits_B1V, keys_B, options: Options, guided: bool, i) -> jax.Array:
  if guided:
    logits_B1V = logits_lib.guide(
      *jnp.split(logits_B1V, 2), jnp.float32(options.guidance)
    )
  logits_B1V = logits_B1V / options.temperature
  logits_B1V = logits_lib.keep_top_k(logits_B1V, options.top_k)
  logits_B1V = logits_lib.keep_top_p(logits_B1V, options.top_p)

  def of_image(key):
    return jax.random.gumbel(jax.random.fold_in(key, i), logits_B1V.shape[1:])

  return logits_lib.draw(logits_B1V, jax.vmap(of_image)(keys_B))


def _step(model: Raster, params, x_B1D, blocks_RB6D, cache: KVCache, i):
  """Return x after all layers and the cache with token i."""
  cfg = model.cfg

  def layer(x_B1D, of_layer):
    layer_params, modulation_B6D, *kv = of_layer
    block = Block(cfg, functools.partial(_with_cache, *kv, i))
    # The cache stays where it is: a block that joined it would copy it.
    empty_B0D = x_B1D[:, :0].astype(cfg.dtype)
    return block.apply(
      {"params": layer_params},
      x_B1D,
      modulation_B6D,
      Past(empty_B0D, empty_B0D, 0),
      None,
    )

  x_B1D, new = jax.lax.scan(
    layer, x_B1D, (params["params"]["blocks"], blocks_RB6D, *cache)
  )

  def write(c_RBLD, x_RB1D):
    return jax.lax.dynamic_update_slice(c_RBLD, x_RB1D, (0, 0, i, 0))

  return x_B1D, KVCache(*map(write, cache, new))


def _with_cache(k_BLD, v_BLD, i, q_B1NK, k_B1NK, v_B1NK, mask) -> jax.Array:
  """Return attention of a token to the first i of a cache and to itself."""
  heads = (*k_BLD.shape[:2], *q_B1NK.shape[2:])
  precision = layers.matmul_precision(q_B1NK.dtype)
  product = functools.partial(
    jnp.einsum, precision=precision, preferred_element_type=jnp.float32
  )
  past_BN1L = product("blnk,btnk->bnlt", q_B1NK, k_BLD.reshape(heads))
  seen_L = jnp.arange(k_BLD.shape[1]) < i
  past_BN1L = jnp.where(seen_L, past_BN1L, -jnp.inf)
  self_BN11 = product("blnk,btnk->bnlt", q_B1NK, k_B1NK)
  weights = jax.nn.softmax(
    jnp.concatenate([past_BN1L, self_BN11], axis=-1), axis=-1
  ).astype(v_BLD.dtype)
  out_B1NK = product("bnlt,btnk->blnk", weights[..., :-1], v_BLD.reshape(heads))
  out_B1NK += product("bnlt,btnk->blnk", weights[..., -1:], v_B1NK)
  return out_B1NK.astype(v_BLD.dtype)


def _causal(q_BLNK, k_BLNK, v_BLNK, mask_LL) -> jax.Array:
  """Return plain attention under the mask of raster order.

  The one that a block brings lets tokens of a scale see each other.
  """
  positions_L = jnp.arange(q_BLNK.shape[1])
  causal_LL = positions_L[:, None] >= positions_L
  return layers.attend(q_BLNK, k_BLNK, v_BLNK, causal_LL)


def sample_flops(cfg: VARConfig, rows: int, cached: bool) -> float:
  """Return the FLOPs of drawing one image's tokens.

  Args:
    rows: 2 with guidance, else 1.
    cached: False counts all positions, masked ones too, at every step.
  """
  L = cfg.schedule.num_tokens
  head = 2.0 * L * cfg.width * cfg.vocab_size
  if cached:
    layers_only = flops.var_seen(cfg, L)
    # Of the L^2 pairs of a scale, (L + 1) L / 2 are seen in raster order.
    hidden = cfg.depth * 4.0 * cfg.width * (L * L - (L + 1) * L / 2)
    return rows * (layers_only - hidden + head)
  once = flops.var_seen(cfg, 0)
  return rows * (once + L * (flops.var_seen(cfg, L) - once + head))
