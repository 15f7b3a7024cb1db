"""Next-scale sampling: one jitted program a scale, state in and state out.

    for s in scales:
      logits = VAR(f_hat of the scales so far, at the size of s)
      tokens = draw(guided, filtered logits)        all of scale s at once
      f_hat += phi(bicubic(codebook[tokens]))

The cache and f_hat are arrays that the caller sees, allocated once and donated
from program to program. Offsets are static, so no mask is needed.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator
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
  """The two networks, without parameters; static under jit."""

  tokenizer: Tokenizer
  var: VAR
  # Entered around each program: on a mesh, what gives logical axes a meaning.
  context: Callable[[], AbstractContextManager] = contextlib.nullcontext


class ModelParams(NamedTuple):
  tokenizer: Params
  var: Params


class Options(NamedTuple):
  """How tokens are drawn. Traced: changing a number compiles nothing.

  The defaults are the setting of the published FID.
  """

  guidance: jax.Array | float = 1.5
  top_k: jax.Array | int = 900
  top_p: jax.Array | float = 0.96


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


class Sample(NamedTuple):
  """Images in [-1, 1] and the token ids, scales concatenated."""

  images_BHW3: jax.Array
  tokens_BL: jax.Array


class Drawn(NamedTuple):
  """One scale as it is drawn."""

  scale: int
  tokens_Bl: jax.Array
  f_hat_BhwZ: jax.Array  # donated to the next scale: use it before


def image_keys(key: jax.Array, batch: int) -> jax.Array:
  """Return one key an image: fold_in(key, i), or `key` where it is [B]."""
  if key.ndim:
    return key
  return jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.arange(batch))


def draw_scales(
  models: Models,
  params: ModelParams,
  labels_B: jax.Array,
  keys_B: jax.Array,
  options: Options,
  *,
  guided: bool = True,
  smooth: bool = False,
  given: tuple[Given, ...] | None = None,
) -> Iterator[Drawn]:
  """Yield the scales coarse to fine.

  Args:
    labels_B: 0..C-1, or -1 for unconditional.
    keys_B: one key an image; nothing else about an image is random.
    guided: False skips the unconditional half; the same as guidance 0.
    smooth: feed the next scale a mixture of codes instead of the drawn ones.
    given: a scale each, the tokens to keep in place of drawn ones.
  """
  with models.context():
    state, modulation = start_program(models, params, labels_B, guided)
  for s in range(len(models.var.cfg.schedule)):
    with models.context():
      state, tokens_Bl = scale_program(
        models,
        s,
        guided,
        smooth,
        params,
        state,
        modulation,
        keys_B,
        options,
        given and given[s],
      )
    yield Drawn(s, tokens_Bl, state.f_hat_BhwZ)


def generate(
  models: Models,
  params: ModelParams,
  labels_B: jax.Array,
  keys_B: jax.Array,
  options: Options,
  **how,
) -> Sample:
  """Return images of `labels_B`; arguments as `draw_scales`."""
  drawn = None
  tokens = []
  for drawn in draw_scales(models, params, labels_B, keys_B, options, **how):
    tokens.append(drawn.tokens_Bl)
  images_BHW3 = decode(models, params, drawn.f_hat_BhwZ)
  return Sample(images_BHW3, jnp.concatenate(tokens, axis=1))


def decode(
  models: Models, params: ModelParams, f_hat_BhwZ: jax.Array
) -> jax.Array:
  """Return the image of f_hat, clipped to [-1, 1]."""
  with models.context():
    return decode_program(models, params, f_hat_BhwZ)


@functools.partial(jax.jit, static_argnames="models")
def decode_program(models, params, f_hat_BhwZ) -> jax.Array:
  image_BHW3 = models.tokenizer.apply(
    params.tokenizer, f_hat_BhwZ, method="to_image"
  )
  return constrain(jnp.clip(image_BHW3, -1.0, 1.0), _IMAGE)


@functools.partial(jax.jit, static_argnames=("models", "guided"))
def start_program(models, params, labels_B, guided) -> tuple[State, Modulation]:
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


@functools.partial(
  jax.jit,
  static_argnames=("models", "s", "guided", "smooth"),
  donate_argnames="state",
)
def scale_program(
  models, s, guided, smooth, params, state, modulation, keys_B, options, given
) -> tuple[State, jax.Array]:
  """Draw the noise of scale s and take the step."""
  scales = models.var.cfg.schedule
  shape_lV = (scales.end(s) - scales.start(s), models.var.cfg.vocab_size)

  def gumbel(use: int) -> jax.Array:
    # An image's noise follows from its own key alone.
    def of_image(key):
      key = jax.random.fold_in(jax.random.fold_in(key, s), use)
      return jax.random.gumbel(key, shape_lV)

    return jax.vmap(of_image)(keys_B)

  noise = Noise(gumbel(0), gumbel(1) if smooth else None)
  state, tokens_Bl, _ = scale_step(
    models, s, params, state, modulation, options, noise, guided, given
  )
  return state, tokens_Bl


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
  """Return the state after scale s, its tokens [B, l], its filtered logits."""
  ratio = models.var.cfg.schedule.ratio(s)
  tokenizer = functools.partial(models.tokenizer.apply, params.tokenizer)

  inputs_BlZ = tokenizer(state.f_hat_BhwZ, s, method="next_input")
  if guided:
    inputs_BlZ = jnp.concatenate([inputs_BlZ, inputs_BlZ])
  logits_BlV, cache = models.var.apply(
    params.var, s, inputs_BlZ, modulation, state.cache, method="step"
  )
  if guided:
    # VAR: guidance grows with the scale; the coarsest one is not guided.
    conditional_BlV, unconditional_BlV = jnp.split(logits_BlV, 2)
    logits_BlV = logits_lib.guide(
      conditional_BlV, unconditional_BlV, options.guidance * ratio
    )
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

  f_hat_BhwZ = tokenizer(state.f_hat_BhwZ, h_BlZ, s, method="add_scale")
  state = State(cache, constrain(f_hat_BhwZ, _IMAGE))
  return state, constrain(tokens_Bl, ("batch", "length")), logits_BlV
