"""Next-scale sampling: programs of the steps in `step.py`.

The same functions run in two ways. `draw_scales` has one program a scale, for
those who want to see each: cache and f_hat are arrays of the caller, allocated
once and donated from program to program; on a CPU there is one a layer.
`generate` has all scales and the decoder in one program.
"""

import contextlib
import functools
from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp

from var_jax.generation import by_layer, step
from var_jax.generation.ahead import Ahead
from var_jax.generation.step import Given, ModelParams, Models, Options
from var_jax.models import cpu


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
  guided: bool | tuple[int, int] = True,
  smooth: bool = False,
  given: tuple[Given, ...] | None = None,
  layer_programs: bool | None = None,
) -> Iterator[Drawn]:
  """Yield the scales coarse to fine.

  Args:
    labels_B: 0..C-1, or -1 for unconditional.
    keys_B: one key an image; nothing else about an image is random.
    guided: False skips the unconditional half; the same as guidance 0. (a, b):
      guidance acts from scale a up to, not with, scale b; after those there is
      no unconditional half.
    smooth: feed the next scale a mixture of codes instead of the drawn ones.
    given: a scale each, the tokens to keep in place of drawn ones.
    layer_programs: one a layer, or one for all layers of a scale; None takes
      the first where `by_layer.suits`.
  """

  def on_mesh(program):
    # Not around the loop: between two scales the caller's context holds.
    def run(*args):
      with models.context():
        return program(*args)

    return run

  programs = (start_program, conditional_program, scale_program)
  if layer_programs is None:
    layer_programs = by_layer.suits(params)
  if layer_programs:
    params = by_layer.unstack(params)
    programs = by_layer.programs()
  programs = map(on_mesh, programs)
  scales = _each_scale(
    programs, models, params, labels_B, keys_B, options, given, guided, smooth
  )
  for s, (state, tokens_Bl) in enumerate(scales):
    yield Drawn(s, tokens_Bl, state.f_hat_BhwZ)


def generate(
  models: Models,
  params: ModelParams,
  labels_B: jax.Array,
  keys_B: jax.Array,
  options: Options,
  *,
  guided: bool | tuple[int, int] = True,
  smooth: bool = False,
  given: tuple[Given, ...] | None = None,
  fused: bool | None = None,
) -> Sample:
  """Return images of `labels_B`.

  Args:
    fused: one program for all, or one a scale and one for the decoder; None
      leaves it to the platform. The rest is as in `draw_scales`.
  """
  how = dict(guided=guided, smooth=smooth)
  if _is_fused(fused):
    with models.context():
      return fused_program(
        models, params, labels_B, keys_B, options, given, **how
      )
  drawn = None
  tokens = []
  for drawn in draw_scales(
    models, params, labels_B, keys_B, options, given=given, **how
  ):
    tokens.append(drawn.tokens_Bl)
  images_BHW3 = decode(models, params, drawn.f_hat_BhwZ)
  return Sample(images_BHW3, jnp.concatenate(tokens, axis=1))


def compile_ahead(
  models: Models,
  params: ModelParams,
  labels_B: jax.Array,
  keys_B: jax.Array,
  options: Options,
  *,
  guided: bool | tuple[int, int] = True,
  smooth: bool = False,
  fused: bool | None = None,
) -> None:
  """Compile what `generate` of the same arguments takes.

  A program a layer is many programs, which are compiled side by side. Programs
  of a scale, and all on a mesh unless fused, are called once.
  """
  arrays = (models, params, labels_B, keys_B, options)
  how = dict(guided=guided, smooth=smooth)
  if _is_fused(fused):
    with models.context():
      fused_program.lower(*arrays, None, **how).compile()
    return
  on_mesh = models.context is not contextlib.nullcontext
  if on_mesh or not by_layer.suits(params):
    jax.block_until_ready(generate(*arrays, **how, fused=False))
    return
  ahead = Ahead()
  programs = by_layer.programs(ahead.through)
  unstacked = by_layer.unstack(params)
  scales = _each_scale(
    programs, models, unstacked, labels_B, keys_B, options, None, guided, smooth
  )
  last, _ = list(scales)[-1]
  ahead.through(decode_program)(models, params, last.f_hat_BhwZ)
  ahead.compile()


def _is_fused(fused: bool | None) -> bool:
  return jax.default_backend() != "cpu" if fused is None else fused


def decode(
  models: Models, params: ModelParams, f_hat_BhwZ: jax.Array
) -> jax.Array:
  """Return the image of f_hat, clipped to [-1, 1]."""
  with models.context():
    return decode_program(models, params, f_hat_BhwZ)


def _each_scale(
  programs, models, params, labels_B, keys_B, options, given, guided, smooth
) -> Iterator[tuple[step.State, jax.Array]]:
  """Yield (state, tokens) after each scale.

  Args:
    programs: `start`, `conditional_half` and `draw_scale` of `step`, or jitted.
  """
  start, conditional_half, draw_scale = programs
  scales = guided_scales(models, guided)
  state, modulation = start(models, params, labels_B, bool(scales))
  for s in range(len(models.var.cfg.schedule)):
    if s == scales.stop and scales:
      state, modulation = conditional_half(state, modulation)
    state, tokens_Bl = draw_scale(
      models,
      s,
      s in scales,
      smooth,
      params,
      state,
      modulation,
      keys_B,
      options,
      given and given[s],
    )
    yield state, tokens_Bl


def guided_scales(models: Models, guided: bool | tuple[int, int]) -> range:
  """Return the scales that guidance acts on; empty: there is none."""
  if isinstance(guided, bool):
    guided = (0, len(models.var.cfg.schedule) if guided else 0)
  return range(*guided)


@functools.partial(jax.jit, static_argnames=("models", "guided", "smooth"))
def fused_program(
  models, params, labels_B, keys_B, options, given, *, guided, smooth
) -> Sample:
  """Draw all scales and decode them."""
  parts = (step.start, step.conditional_half, step.draw_scale)
  scales = _each_scale(
    parts, models, params, labels_B, keys_B, options, given, guided, smooth
  )
  drawn = list(scales)
  state, tokens = drawn[-1][0], [tokens_Bl for _, tokens_Bl in drawn]
  images_BHW3 = step.to_images(models, params, state.f_hat_BhwZ)
  return Sample(images_BHW3, jnp.concatenate(tokens, axis=1))


decode_program = cpu.Jit(step.to_images, static_argnums=0)
start_program = jax.jit(step.start, static_argnames=("models", "guided"))
conditional_program = jax.jit(step.conditional_half)
scale_program = jax.jit(
  step.draw_scale,
  static_argnames=("models", "s", "guided", "smooth"),
  donate_argnames="state",
)
