"""Refused updates: what stays, what goes on, and what a spike is."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from var_jax.training import guard, optim
from var_jax.training.guard import GuardConfig
from var_jax.training.state import TrainState

STEPS = 20
CFG = optim.OptimizerConfig(
  learning_rate=0.1, schedule="lin00", weight_decay_end=0.5
)
OPTIMIZER = optim.make_optimizer(CFG, steps=STEPS, batch_size=256)
SPIKES = GuardConfig(spike_factor=2.0, warmup=3, decay=0.9)
NAN, INF = float("nan"), float("inf")


def fresh():
  params = {"layer": {"kernel": jnp.array([1.0, -2.0]), "bias": jnp.ones(1)}}
  return TrainState.create(
    params, OPTIMIZER, use_ema=True, code_hits_SV=jnp.ones((2, 3))
  )


@functools.partial(jax.jit, static_argnums=0)
def take(cfg, state, loss, slope=1.0):
  grads = jax.tree.map(lambda p: jnp.full_like(p, slope), state.params)
  after, updates = state.apply_gradients(grads, OPTIMIZER, 0.9)
  after = after.replace(code_hits_SV=state.code_hits_SV + 1.0)
  return guard.judge(cfg, state, after, loss, grads, updates)


def run(cfg, losses):
  """Return (state, [skipped] of each step)."""
  state, skipped = fresh(), []
  for loss in losses:
    state, metrics = take(cfg, state, loss)
    skipped.append(int(metrics["skipped"]))
  return state, skipped


@pytest.mark.parametrize(
  "loss, slope", [(NAN, 1.0), (INF, 1.0), (1.0, NAN), (1.0, INF), (1.0, 3e38)]
)
def test_what_is_not_finite_leaves_all_but_the_clock(loss, slope):
  before, _ = run(GuardConfig(), [1.0, 1.0])
  after, metrics = take(GuardConfig(), before, loss, slope)
  assert metrics["skipped"] == 1.0
  assert metrics["update_norm"] == 0.0
  assert not np.isfinite(metrics["grad_norm"] + loss)
  jax.tree.map(
    np.testing.assert_array_equal, after, before.replace(step=jnp.int32(3))
  )


def test_what_is_finite_changes_all():
  before = fresh()
  after, metrics = take(GuardConfig(), before, 1.0)
  assert metrics["skipped"] == 0.0
  for old, new in zip(
    jax.tree.leaves(before), jax.tree.leaves(after), strict=True
  ):
    assert np.any(old != new)
  moved = jax.tree.map(jnp.subtract, after.params, before.params)
  length = np.sqrt(sum(np.sum(x**2) for x in jax.tree.leaves(moved)))
  np.testing.assert_allclose(metrics["update_norm"], length, rtol=1e-4)
  np.testing.assert_allclose(metrics["grad_norm"], np.sqrt(3.0), rtol=1e-6)


def test_rates_follow_the_clock_and_moments_the_updates():
  state, skipped = run(GuardConfig(), [1.0, NAN, NAN, 1.0])
  assert skipped == [0, 1, 1, 0]
  rate, decay = optim.schedules(CFG, steps=STEPS, batch_size=256)
  kernel = np.array([1.0, -2.0])
  for step in (0, 3):
    # Even gradients: their moments, corrected, are the gradient itself.
    update = 1.0 / (1.0 + CFG.eps) + decay(step) * kernel
    kernel = kernel - rate(step) * update
  np.testing.assert_allclose(state.params["layer"]["kernel"], kernel, rtol=1e-5)


def test_a_loss_far_above_the_running_mean_is_a_spike():
  _, skipped = run(SPIKES, [1.0, 1.0, 1.0, 1.9, 2.5, 1.0, 2.5])
  assert skipped == [0, 0, 0, 0, 1, 0, 1]


def test_early_losses_are_no_spikes():
  _, skipped = run(SPIKES, [1.0, 9.0, 9.0, 1.0])
  assert skipped == [0, 0, 0, 0]


def test_spikes_are_looked_for_only_if_asked():
  _, skipped = run(GuardConfig(warmup=0), [1.0, 1.0, 100.0])
  assert skipped == [0, 0, 0]


def test_the_running_mean_is_that_of_accepted_losses():
  losses = [2.0, 1.0, 1.5, 1.2, NAN, 1.1, 9.0, 1.0]
  state, skipped = run(SPIKES, losses)
  assert skipped == [0, 0, 0, 0, 1, 0, 1, 0]
  mean = 0.0
  for step, (loss, refused) in enumerate(zip(losses, skipped, strict=True)):
    decay = min(0.9, step / (step + 1))
    mean = mean if refused else decay * mean + (1 - decay) * loss
  np.testing.assert_allclose(state.running_loss, mean, rtol=1e-6)


def test_the_first_accepted_loss_is_the_mean():
  state, _ = run(SPIKES, [NAN, NAN, NAN, NAN, 5.0])
  np.testing.assert_allclose(state.running_loss, 5.0, rtol=1e-6)
  _, skipped = run(SPIKES, [NAN, NAN, NAN, NAN, 5.0, 9.0, 12.0])
  assert skipped == [1, 1, 1, 1, 0, 0, 1]


@pytest.mark.parametrize(
  "fields, message",
  [
    (dict(policy="retry"), "policy 'retry' is not known; use one of stop, "),
    (dict(spike_factor=0.5), "spike_factor 0.5 is not above 1"),
    (dict(spike_factor=NAN), "spike_factor nan is not above 1"),
    (dict(warmup=-1), "warmup -1 is negative"),
    (dict(decay=1.0), r"decay 1.0 is not in \[0, 1\)"),
  ],
)
def test_what_makes_no_sense_is_refused(fields, message):
  with pytest.raises(ValueError, match=message):
    GuardConfig(**fields)


@pytest.mark.parametrize("policy", guard.POLICIES)
def test_policies_are_the_hosts_and_change_nothing_here(policy):
  state, skipped = run(GuardConfig(policy=policy), [1.0, NAN])
  assert skipped == [0, 1]
  assert state.step == 2
