"""One scale of sampling as a program a layer, for CPUs.

A scan over layers copies each layer's weights out of their stack first; here
they are views of it, and one program serves all layers of a scale. Its kernels
depend on the rows. The functions are those of `step.py`, called from the host.
"""

import functools
from typing import Any, NamedTuple

import jax
import numpy as np

from var_jax.generation import step
from var_jax.generation.step import ModelParams, State
from var_jax.models import cpu, cpu_attention, layers
from var_jax.models.blocks import Block, Past

# Below, Eigen's products are faster than XLA's YNN kernels, up to twice.
_FEW_ROWS = 64


class LayeredParams(NamedTuple):
  """The transformer's parameters, layer by layer."""

  blocks: tuple[Any, ...]
  rest: Any  # as Linen has them, without the blocks


def suits(params: ModelParams) -> bool:
  """Return whether parameters are values on the first device, a CPU."""
  first = jax.local_devices()[0]

  def here(leaf) -> bool:
    if isinstance(leaf, jax.core.Tracer):
      return False
    return isinstance(leaf, np.ndarray) or leaf.devices() == {first}

  return first.platform == "cpu" and all(map(here, jax.tree.leaves(params)))


def unstack(params: ModelParams) -> ModelParams:
  """Return the same parameters with views of the transformer's layers.

  Layers that do not lie at whole cache lines are copies.
  """
  rest = dict(params.var["params"])
  blocks = jax.tree.map(np.asarray, rest.pop("blocks"))
  depth = len(jax.tree.leaves(blocks)[0])
  # What is in place already is not copied by device_put.
  views = jax.device_put(
    [jax.tree.map(lambda x, r=r: x[r], blocks) for r in range(depth)]
  )
  return ModelParams(
    params.tokenizer, LayeredParams(tuple(views), {"params": rest})
  )


def programs(through=lambda program: program):
  """Return what `step` has: start, conditional_half and draw_scale.

  Args:
    through: takes a jitted function and returns what is called in its place.
  """
  layer = {few: through(program) for few, program in LAYER_PROGRAMS.items()}
  ends = [through(program) for program in (enter_program, leave_program)]
  first = through(start_program)

  def start(models, params, labels_B, guided):
    return first(models, _rest(params), labels_B, guided)

  draw = functools.partial(draw_scale, *ends, layer)
  return start, through(conditional_half), draw


@functools.partial(jax.jit, static_argnames=("models", "guided"))
def start_program(models, params, labels_B, guided):
  """Return what `step.start` does, with a cache a layer."""
  state, modulation = step.start(models, params, labels_B, guided)
  caches = tuple(zip(*state.cache, strict=True))
  return State(caches, state.f_hat_BhwZ), modulation


@jax.jit
def conditional_half(state, modulation):
  """Return both without the unconditional half."""
  B = len(state.f_hat_BhwZ)
  caches = jax.tree.map(lambda c_BLD: c_BLD[:B], state.cache)
  modulation = step.first_rows(modulation, B)
  return State(caches, state.f_hat_BhwZ), modulation


def draw_scale(
  enter, leave, layer, models, s, guided, smooth, params, state, modulation,
  keys_B, options, given,
) -> tuple[State, jax.Array]:  # fmt: skip
  """Return what `step.draw_scale` does; the state is donated to it.

  Args:
    enter, leave, layer: programs; of a layer by whether there are few rows.
  """
  rest = _rest(params)
  caches, f_hat_BhwZ = state
  x_BlD = enter(models, s, rest, f_hat_BhwZ, modulation)
  rows = x_BlD.shape[0] * x_BlD.shape[1]
  program = layer[rows <= _FEW_ROWS]
  after = []
  for r, block in enumerate(params.var.blocks):
    own = (np.int32(r), caches[r])
    x_BlD, cache = program(
      models.var, s, block, x_BlD, modulation.blocks_RB6D, *own
    )
    after.append(cache)
  f_hat_BhwZ, tokens_Bl = leave(
    models, s, guided, smooth, rest, x_BlD, f_hat_BhwZ, modulation, keys_B,
    options, given,
  )  # fmt: skip
  return State(tuple(after), f_hat_BhwZ), tokens_Bl


def _rest(params: ModelParams) -> ModelParams:
  return ModelParams(params.tokenizer, params.var.rest)


@functools.partial(jax.jit, static_argnames=("models", "s"))
def enter_program(models, s, params, f_hat_BhwZ, modulation) -> jax.Array:
  """Return the input of the first layer, [B, l, D]."""
  inputs_BlZ = step.scale_inputs(models, s, params, f_hat_BhwZ, modulation)
  return models.var.apply(
    params.var, s, inputs_BlZ, modulation, method="embed_scale"
  )


def _layer(var, s, block, x_BlD, modulation_RB6D, r, cache):
  """Return the output of layer r, and its cache with keys and values of s."""
  start = var.cfg.schedule.start(s)
  plain = var.attend is layers.attend
  attend = cpu_attention.attend if plain else var.attend
  x_BlD, kv = Block(var.cfg, attend).apply(
    {"params": block}, x_BlD, modulation_RB6D[r], Past(*cache, start), None
  )
  scale = slice(start, start + x_BlD.shape[1])
  cache = tuple(
    c_BLD.at[:, scale].set(c_BlD)
    for c_BLD, c_BlD in zip(cache, kv, strict=True)
  )
  return x_BlD, cache


_compiled = functools.partial(
  jax.jit,
  _layer,
  static_argnames=("var", "s"),
  donate_argnames=("x_BlD", "cache"),
)
LAYER_PROGRAMS = {  # by whether there are few rows
  False: _compiled(),
  True: _compiled(compiler_options=cpu.compiler_options("cpu")),
}


@functools.partial(
  jax.jit,
  static_argnames=("models", "s", "guided", "smooth"),
  donate_argnames="f_hat_BhwZ",
)
def leave_program(
  models, s, guided, smooth, params, x_BlD, f_hat_BhwZ, modulation, keys_B,
  options, given,
) -> tuple[jax.Array, jax.Array]:  # fmt: skip
  """Return f_hat after scale s, and its tokens [B, l]."""
  logits_BlV = models.var.apply(
    params.var, x_BlD, modulation, method="to_logits"
  )
  noise = step.draw_noise(models, s, keys_B, smooth)
  f_hat_BhwZ, tokens_Bl, _ = step.take_tokens(
    models, s, params, f_hat_BhwZ, logits_BlV, options, noise, guided, given
  )
  return f_hat_BhwZ, tokens_Bl
