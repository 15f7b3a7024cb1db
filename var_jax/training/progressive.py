"""Progressive training: coarse scales first, finer ones as the run goes on.

Stage s trains on scales 0 .. s alone. A run begins at stage `first`, takes
the others one after another at even distances, and is at the last stage, the
whole model, from the fraction `until` of its steps on. Each stage is a
program of its own; within one nothing is compiled again.

The learning rate is left to its own schedule. The official trainer silently
puts lin<until> in its place: set `optimizer.schedule` to that to do the same.
"""

import bisect
import dataclasses

import jax
import jax.numpy as jnp

from var_jax.models.scales import ScaleSchedule


@dataclasses.dataclass(frozen=True)
class ProgressiveConfig:
  """Args:
  until: fraction of the steps after which all scales are trained; 0 trains
    them all from the start.
  first: the finest scale of the first stage.
  warmup_fraction: of the steps, over which a scale that joins in the middle
    gains its weight.
  """

  until: float = 0.0
  first: int = 4
  warmup_fraction: float = 1 / 300

  def __post_init__(self):
    if not 0.0 <= self.until <= 1.0:
      raise ValueError(
        f"until {self.until} is not in [0, 1]; 0 trains all scales at once."
      )
    if self.first < 0:
      raise ValueError(f"first {self.first} is negative; 0 is one token.")
    if not 0.0 <= self.warmup_fraction < 1.0:
      raise ValueError(
        f"warmup_fraction {self.warmup_fraction} is not in [0, 1); 0 turns it "
        "off."
      )


def stage(
  cfg: ProgressiveConfig,
  step: int,
  steps: int,
  warmup_steps: float,
  num_scales: int,
) -> int:
  """Return the finest scale that step `step` of 0 .. steps-1 trains.

  Args:
    warmup_steps: of the learning rate; the first stage lasts longer.
  """
  last, end = num_scales - 1, steps * cfg.until
  if not cfg.until:
    return last
  if cfg.first > last:
    raise ValueError(
      f"config.progressive: first {cfg.first} is not one of {num_scales} "
      f"scales; use 0 .. {last}."
    )
  if step <= warmup_steps:
    return cfg.first
  if step >= end:
    return last
  progress = (step - warmup_steps) / (end - warmup_steps)
  # VAR: a half is rounded to the even number, as Python does.
  return cfg.first + round(progress * (last - cfg.first))


def newest_scale_weight(
  cfg: ProgressiveConfig,
  step: jax.Array,
  at_stage: int,
  steps: int,
  warmup_steps: float,
  num_scales: int,
) -> jax.Array:
  """Return the weight of the newest scale's loss, in [0.01, 1].

  It grows linearly over the first steps of a stage. VAR: neither in the first
  stage, which the learning rate warms up, nor in the last.

  Args:
    step: may be traced; the other arguments may not.
    at_stage: what `stage` returns for the step.
  """
  ramp = cfg.warmup_fraction * steps
  if at_stage in (cfg.first, num_scales - 1) or not ramp:
    return jnp.ones(())
  begin = bisect.bisect_left(
    range(steps),
    at_stage,
    key=lambda k: stage(cfg, k, steps, warmup_steps, num_scales),
  )
  return jnp.clip((step - begin + 1) / ramp, 0.01, 1.0)


def token_weights(
  scales: ScaleSchedule, at_stage: int, newest: jax.Array
) -> jax.Array:
  """Return the loss weights of the tokens of scales 0 .. at_stage, [l].

  A token weighs 1/L of all L tokens, as it does when all are trained.
  """
  weights_l = jnp.full(scales.end(at_stage), 1.0 / scales.num_tokens)
  return weights_l.at[scales.start(at_stage) :].multiply(newest)
