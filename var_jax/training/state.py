"""What a training run carries from step to step."""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax


@flax.struct.dataclass
class TrainState:
  """A pytree; a checkpoint is this and the next sample position."""

  step: jax.Array  # int32, steps taken
  params: Any
  opt_state: optax.OptState
  running_loss: jax.Array  # of the steps not refused; 0 before the first
  ema: Any = None  # of params; None where it is off
  # Of a tokenizer only.
  code_hits_SV: jax.Array | None = None  # running count of draws
  grace_V: jax.Array | None = None  # draws that a moved code is given
  explained_S: jax.Array | None = None  # of the energy that reaches a scale
  rate: jax.Array | None = None  # that the learning rate is multiplied by
  adversary: Any = None  # a discriminator's state; None where there is none

  @classmethod
  def create(cls, params, optimizer, *, use_ema: bool, **fields):
    return cls(
      step=jnp.zeros((), jnp.int32),
      params=params,
      opt_state=optimizer.init(params),
      running_loss=jnp.zeros(()),
      ema=jax.tree.map(jnp.copy, params) if use_ema else None,
      **fields,
    )

  def apply_gradients(
    self, grads, optimizer, ema_decay: float
  ) -> tuple["TrainState", Any]:
    """Return the state after one optimiser step, and what was added."""
    # Rates follow this clock, not the updates that the optimiser has counted.
    updates, opt_state = optax.with_extra_args_support(optimizer).update(
      grads, self.opt_state, self.params, step=self.step
    )
    if self.rate is not None:
      updates = jax.tree.map(lambda u: self.rate * u, updates)
    params = optax.apply_updates(self.params, updates)
    ema = self.ema
    if ema is not None:
      # Early steps weigh more, so that the initial values are forgotten.
      decay = jnp.minimum(ema_decay, (1.0 + self.step) / (10.0 + self.step))
      ema = optax.incremental_update(params, ema, 1.0 - decay)
    state = self.replace(
      step=self.step + 1, params=params, opt_state=opt_state, ema=ema
    )
    return state, updates


def to_float_images(image_BHW3: jax.Array) -> jax.Array:
  """Return float32 in [-1, 1] from uint8."""
  return image_BHW3.astype(jnp.float32) / 127.5 - 1.0


def to_pixels(image_BHW3: jax.Array) -> jax.Array:
  """Return uint8 from [-1, 1]: clipped, then rounded."""
  return jnp.round(jnp.clip((image_BHW3 + 1.0) * 127.5, 0, 255)).astype("uint8")


def sample_keys(seed: int, use: int, position_B: jax.Array) -> jax.Array:
  """Return one key a sample, a function of (seed, use, position) alone."""
  key = jax.random.fold_in(jax.random.key(seed), use)
  return jax.vmap(lambda p: jax.random.fold_in(key, p))(position_B)


def step_key(seed: int, use: int, step: jax.Array) -> jax.Array:
  """Return the key of a step, a function of (seed, use, step) alone."""
  return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), use), step)
