"""Tokenizer training: code counts, revival, parts, refused steps."""

import functools

import golden_files
import jax
import jax.numpy as jnp
import numpy as np
import optax
import tiny_models

from var_jax.models.tokenizer import Tokenizer
from var_jax.training import tokenizer_step
from var_jax.training.state import TrainState

CFG = tiny_models.tokenizer_config()
TOKENIZER = Tokenizer(CFG)
# Here a program takes longer to compile than to run.
QUICK = {"xla_backend_optimization_level": 0}


@functools.cache
def params():
  return tokenizer_step.init_params(TOKENIZER, jax.random.key(0, impl="rbg"))


def images():
  return jax.random.uniform(jax.random.key(1), (8, 4, 4, 3), minval=-1.0)


SCHEDULES = (lambda step: 0.5, lambda step: 0.25)


@functools.cache
def step_of(revive_every=0, accumulate=1):
  return jax.jit(
    tokenizer_step.make_step(
      TOKENIZER,
      optax.adam(1e-2),
      tokenizer_step.TokenizerLossConfig(revive_every=revive_every),
      ema_decay=0.9,
      seed=0,
      accumulate=accumulate,
      schedules=SCHEDULES,
    ),
    compiler_options=QUICK,
  )


def fresh():
  return TrainState.create(
    params(),
    optax.adam(1e-2),
    use_ema=True,
    code_hits_SV=jnp.zeros((2, 16)),
    explained_S=jnp.ones(2),
    grace_V=jnp.zeros(16),
    rate=jnp.ones(()),
  )


def batch():
  return {"image": np.uint8((np.asarray(images()) + 1) * 127.5)}


def test_the_first_step_counts_as_it_is_and_learns():
  state, first = step_of()(fresh(), {}, batch())
  np.testing.assert_array_equal(state.code_hits_SV.sum(axis=1), [8.0, 32.0])
  for _ in range(20):
    state, last = step_of()(state, {}, batch())
  assert last["l2"] < first["l2"]
  assert int(state.step) == 21


def test_a_step_in_parts_equals_one_in_one_piece():
  whole, expected = step_of()(fresh(), {}, batch())
  state, metrics = step_of(accumulate=4)(fresh(), {}, batch())
  # Adam's first step is the sign of a gradient: compare the moments.
  for actual, wanted in (
    (state.opt_state, whole.opt_state),
    (metrics, expected),
    (state.code_hits_SV, whole.code_hits_SV),
  ):
    jax.tree.map(golden_files.assert_close, actual, wanted)


def test_a_refused_step_leaves_no_trace():
  """Neither counted nor revived codes, though it is time to revive."""
  broken = jax.tree.map(jnp.copy, fresh().params)
  broken["params"]["post_quant_conv"]["bias"] *= jnp.nan
  state = fresh().replace(params=broken)
  after, metrics = step_of(revive_every=1)(state, {}, batch())
  assert metrics["skipped"] == 1.0
  jax.tree.map(
    np.testing.assert_array_equal, after, state.replace(step=jnp.int32(1))
  )


def test_what_a_step_reports():
  _, metrics = step_of()(fresh(), {}, batch())
  assert sorted(metrics) == [
    "code_usage", "collapsed", "explained", "grad_norm", "l2",
    "learning_rate", "loss", "perplexity", "psnr", "quantizer_loss", "rate",
    "residual_energy", "skipped", "update_norm", "weight_decay",
  ]  # fmt: skip
  assert (metrics["learning_rate"], metrics["weight_decay"]) == (0.5, 0.25)
  # The rate in effect: a collapse may have lowered it.
  lowered = fresh().replace(rate=jnp.float32(0.25))
  _, metrics = step_of()(lowered, {}, batch())
  assert (metrics["learning_rate"], metrics["weight_decay"]) == (0.125, 0.25)
  assert all(np.shape(x) == () for x in jax.tree.leaves(metrics))
