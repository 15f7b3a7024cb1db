"""One scale of next-scale sampling, as functions of arrays.

    logits = VAR(f_hat of the scales so far, at the size of s)
    tokens = draw(guided, filtered logits)        all of scale s at once
    f_hat += phi(bicubic(codebook[tokens]))

`sampler.py` makes programs of these. Offsets are static, so no mask is needed.
"""

import contextlib
import functools
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from var_jax.generation import logits as logits_lib
from var_jax.models.blocks import constrain
from var_jax.models.tokenizer import Tokenizer
from var_jax.models.transformer import VAR, KVCache, Modulation

Params = Any

_IMAGE = ("batch", None, None, None)


class Models(NamedTuple):
  """The two networks, without parameters; static under jit.

  Args:
    context: entered around each program: on a mesh, what gives logical axes a
      meaning.
    row_shards: that a batch lies in.
    decode_rows: of a shard, decoded at once; all of them if 0.
  """

  tokenizer: Tokenizer
  var: VAR
  context: Callable[[], AbstractContextManager] = contextlib.nullcontext
  row_shards: int = 1
  decode_rows: int = 0


class ModelParams(NamedTuple):
  tokenizer: Params
  var: Params


class Options(NamedTuple):
  """How tokens are drawn. Traced: changing a number compiles nothing.

  The defaults are the setting of the published FID.

  Args:
    temperature: that logits are divided by after guidance; one, or one a scale.
  """

  guidance: jax.Array | float = 1.5
  top_k: jax.Array | int = 900
  top_p: jax.Array | float = 0.96
  temperature: jax.Array | float = 1.0


class Given(NamedTuple):
  """Tokens that an edit keeps, at one scale."""

  tokens_Bl: jax.Array
  keep_l: jax.Array  # bool


class Noise(NamedTuple):
  """Gumbel noise of one scale."""

  draw_BlV: jax.Array
  mix_BlV: jax.Array | None  # of the smooth mode; None where it is off


class State(NamedTuple):
  """What one scale hands to the next."""

  cache: KVCache
  f_hat_BhwZ: jax.Array


def start(models, params, labels_B, guided) -> tuple[State, Modulation]:
  """Return the empty state, and the modulation table for all scales."""
  cfg, B = models.var.cfg, labels_B.shape[0]
  if guided:  # one batch of 2B rows, the unconditional half below
    labels_B = jnp.concatenate([labels_B, jnp.full_like(labels_B, -1)])
  modulation = models.var.apply(params.var, labels_B, method="modulate")
  f_hat_BhwZ = jnp.zeros((B, *cfg.schedule.grid, cfg.latent_channels))
  state = State(
    KVCache.create(cfg, labels_B.shape[0]), constrain(f_hat_BhwZ, _IMAGE)
  )
  return state, modulation


def conditional_half(state, modulation) -> tuple[State, Modulation]:
  """Return both without the unconditional half."""
  B = len(state.f_hat_BhwZ)
  cache = KVCache(*(c_RBLD[:, :B] for c_RBLD in state.cache)).constrained()
  return State(cache, state.f_hat_BhwZ), first_rows(modulation, B)


def first_rows(modulation: Modulation, rows: int) -> Modulation:
  return Modulation(
    modulation.cond_BD[:rows],
    modulation.blocks_RB6D[:, :rows],
    modulation.head_B2D[:rows],
  )


def draw_scale(
  models, s, guided, smooth, params, state, modulation, keys_B, options, given
) -> tuple[State, jax.Array]:
  """Draw the noise of scale s and take the step."""
  noise = draw_noise(models, s, keys_B, smooth)
  state, tokens_Bl, _ = scale_step(
    models, s, params, state, modulation, options, noise, guided, given
  )
  return state, tokens_Bl


def draw_noise(models, s, keys_B, smooth) -> Noise:
  scales = models.var.cfg.schedule
  shape_lV = (scales.end(s) - scales.start(s), models.var.cfg.vocab_size)

  def gumbel(use: int) -> jax.Array:
    # An image's noise follows from its own key alone.
    def of_image(key):
      key = jax.random.fold_in(jax.random.fold_in(key, s), use)
      return jax.random.gumbel(key, shape_lV)

    return jax.vmap(of_image)(keys_B)

  return Noise(gumbel(0), gumbel(1) if smooth else None)


def scale_step(
  models: Models,
  s: int,
  params: ModelParams,
  state: State,
  modulation: Modulation,
  options: Options,
  noise: Noise,
  guided: bool,
  given: Given | None,
) -> tuple[State, jax.Array, jax.Array]:
  """Return the state after scale s, its tokens [B, l], its filtered logits.

  Args:
    guided: guidance acts; else an unconditional half only fills the cache.
  """
  inputs_BlZ = scale_inputs(models, s, params, state.f_hat_BhwZ, modulation)
  logits_BlV, cache = models.var.apply(
    params.var, s, inputs_BlZ, modulation, state.cache, method="step"
  )
  f_hat_BhwZ, tokens_Bl, logits_BlV = take_tokens(
    models,
    s,
    params,
    state.f_hat_BhwZ,
    logits_BlV,
    options,
    noise,
    guided,
    given,
  )
  return State(cache, f_hat_BhwZ), tokens_Bl, logits_BlV


def scale_inputs(models, s, params, f_hat_BhwZ, modulation) -> jax.Array:
  """Return what the transformer sees of f_hat at scale s, in each half."""
  inputs_BlZ = models.tokenizer.apply(
    params.tokenizer, f_hat_BhwZ, s, method="next_input"
  )
  halves = len(modulation.cond_BD) // len(inputs_BlZ)
  return jnp.concatenate([inputs_BlZ] * halves)


def take_tokens(
  models, s, params, f_hat_BhwZ, logits_BlV, options, noise, guided, given
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Return f_hat with the drawn tokens, these, and the filtered logits.

  Args:
    logits_BlV: of scale s, in each half.
  """
  scales = models.var.cfg.schedule
  ratio = scales.ratio(s)
  tokenizer = functools.partial(models.tokenizer.apply, params.tokenizer)
  halves = len(logits_BlV) // len(f_hat_BhwZ)
  logits_BlV, *unconditional = jnp.split(logits_BlV, halves)
  if guided:
    # VAR: guidance grows with the scale; the coarsest one is not guided.
    logits_BlV = logits_lib.guide(
      logits_BlV, *unconditional, options.guidance * ratio
    )
  temperature_S = jnp.broadcast_to(options.temperature, (len(scales),))
  logits_BlV = logits_BlV / temperature_S[s]
  logits_BlV = logits_lib.keep_top_k(logits_BlV, options.top_k)
  logits_BlV = logits_lib.keep_top_p(logits_BlV, options.top_p)
  tokens_Bl = logits_lib.draw(logits_BlV, noise.draw_BlV)

  if noise.mix_BlV is None:
    h_BlZ = tokenizer(tokens_Bl, method="lookup")
  else:
    weights_BlV = logits_lib.smooth_weights(logits_BlV, noise.mix_BlV, ratio)
    h_BlZ = tokenizer(weights_BlV, method="mix")
  if given is not None:
    tokens_Bl = jnp.where(given.keep_l, given.tokens_Bl, tokens_Bl)
    kept_BlZ = tokenizer(given.tokens_Bl, method="lookup")
    h_BlZ = jnp.where(given.keep_l[:, None], kept_BlZ, h_BlZ)

  f_hat_BhwZ = constrain(
    tokenizer(f_hat_BhwZ, h_BlZ, s, method="add_scale"), _IMAGE
  )
  return f_hat_BhwZ, constrain(tokens_Bl, ("batch", "length")), logits_BlV


def to_images(models, params, f_hat_BhwZ) -> jax.Array:
  def of_rows(f_hat_bhwZ):
    image_bHW3 = models.tokenizer.apply(
      params.tokenizer, f_hat_bhwZ, method="to_image"
    )
    return constrain(jnp.clip(image_bHW3, -1.0, 1.0), _IMAGE)

  B = len(f_hat_BhwZ)
  parts = _parts(B // models.row_shards, models.decode_rows)
  if parts == 1:
    return of_rows(f_hat_BhwZ)
  # Part i has rows i, i + parts, ..: on a mesh, as many of every shard.
  f_hat_bPhwZ = f_hat_BhwZ.reshape(B // parts, parts, *f_hat_BhwZ.shape[1:])
  image_PbHW3 = jax.lax.map(of_rows, f_hat_bPhwZ.swapaxes(0, 1))
  image_bPHW3 = image_PbHW3.swapaxes(0, 1)
  return constrain(image_bPHW3.reshape(B, *image_bPHW3.shape[2:]), _IMAGE)


def _parts(rows: int, limit: int) -> int:
  """Return in how many equal parts no part has more than `limit` rows."""
  if not limit:
    return 1
  return min(
    p for p in range(1, rows + 1) if not rows % p and rows <= p * limit
  )
