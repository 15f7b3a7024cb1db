"""Refuse the update of a step that went wrong, on the device.

An update is refused where the loss or the gradient norm is not finite, and,
if asked for, where the loss is a spike: above `spike_factor` times its
running mean. The state then stays what it was and only the clock goes on, so
that the next step sees other samples. What the host does about it is the
policy: it reads the metric "skipped", a step late, and need not wait for it.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax

from var_jax.training.state import TrainState

POLICIES = ("stop", "skip", "rollback")


@dataclasses.dataclass(frozen=True)
class GuardConfig:
  """Args:
  policy: after a refused update, stop the run, skip the batch, or go back
    to the last checkpoint and pass the batch by.
  spike_factor: of the running mean, above which a loss is a spike; 0 looks
    for none.
  warmup: steps before spikes are looked for.
  decay: of the running mean; it is a plain mean until that is slower.
  """

  policy: str = "stop"
  spike_factor: float = 0.0
  warmup: int = 100
  decay: float = 0.99

  def __post_init__(self):
    if self.policy not in POLICIES:
      raise ValueError(
        f"policy {self.policy!r} is not known; use one of "
        f"{', '.join(POLICIES)}."
      )
    if self.spike_factor and not self.spike_factor > 1.0:
      raise ValueError(
        f"spike_factor {self.spike_factor} is not above 1; 0 turns it off."
      )
    if self.warmup < 0:
      raise ValueError(f"warmup {self.warmup} is negative; use 0 for none.")
    if not 0.0 <= self.decay < 1.0:
      raise ValueError(f"decay {self.decay} is not in [0, 1); use 0.99.")


def judge(
  cfg: GuardConfig,
  before: TrainState,
  after: TrainState,
  loss: jax.Array,
  grads,
  updates,
  also: Any = (),
) -> tuple[TrainState, dict[str, jax.Array]]:
  """Return `after`, or `before` with its clock, and how large the step was.

  Args:
    loss: of a token or pixel, so that a batch with more of them is no spike.
    updates: what the optimiser added to the parameters.
    also: a tree that must be finite too.
  """
  grad_norm = optax.tree.norm(grads)
  finite = jnp.isfinite(optax.tree.norm(also))
  refused = is_refused(cfg, before, loss, grad_norm) | ~finite
  after = after.replace(running_loss=running_mean(cfg, before, loss))
  state = jax.tree.map(
    lambda old, new: jnp.where(refused, old, new), before, after
  )
  metrics = {
    "grad_norm": grad_norm,
    "update_norm": jnp.where(refused, 0.0, optax.tree.norm(updates)),
    "skipped": refused.astype(jnp.float32),
  }
  return state.replace(step=after.step), metrics


def is_refused(
  cfg: GuardConfig, state: TrainState, loss: jax.Array, grad_norm: jax.Array
) -> jax.Array:
  """Return whether the update is refused, a bool scalar."""
  refused = ~(jnp.isfinite(loss) & jnp.isfinite(grad_norm))
  if cfg.spike_factor:
    # 0 stands for no loss yet: all steps so far may have been refused.
    looked_for = (state.step >= cfg.warmup) & (state.running_loss > 0)
    refused |= looked_for & (loss > cfg.spike_factor * state.running_loss)
  return refused


def running_mean(
  cfg: GuardConfig, state: TrainState, loss: jax.Array
) -> jax.Array:
  """Return the running mean with this loss in it."""
  mean = state.running_loss
  decay = jnp.minimum(cfg.decay, state.step / (state.step + 1.0))
  decay = jnp.where(mean > 0, decay, 0.0)
  return decay * mean + (1.0 - decay) * loss
