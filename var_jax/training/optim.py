"""AdamW as VAR uses it: schedules, decay groups, global-norm clip."""

import dataclasses
import math
import re
from collections.abc import Callable
from typing import Any

import flax.traverse_util
import jax
import jax.numpy as jnp
import optax

Schedule = Callable[[jax.Array], jax.Array]
Schedules = tuple[Schedule, Schedule]  # learning rate, weight decay


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
  """Defaults are those of the official trainer.

  Args:
    learning_rate: at a batch of 256 samples; grows with the batch.
    schedule: cos, lin, lin0, lin00, lin<T> or exp, see `learning_rate_factor`.
    warmup_fraction: of the steps, from warmup_start to 1, both factors of
      the peak.
    final_factor: of the peak, at the last step.
    weight_decay_end: reached by half a cosine; None keeps weight_decay.
    clip_norm: of all gradients together; 0 turns clipping off.
  """

  learning_rate: float = 1e-4
  schedule: str = "lin0"
  warmup_fraction: float = 0.02
  warmup_start: float = 0.005
  final_factor: float = 0.01
  b1: float = 0.9
  b2: float = 0.95
  eps: float = 1e-8
  weight_decay: float = 0.05
  weight_decay_end: float | None = None
  clip_norm: float = 2.0

  def __post_init__(self):
    _hold_until(self.schedule)
    if not 0 < self.learning_rate < math.inf:
      raise ValueError(
        f"learning_rate {self.learning_rate} is not a rate above 0; use one."
      )
    for name in ("b1", "b2", "warmup_fraction"):
      if not 0.0 <= getattr(self, name) < 1.0:
        raise ValueError(
          f"{name} {getattr(self, name)} is not in [0, 1); use such a value."
        )
    for name in ("warmup_start", "final_factor"):
      if not 0.0 <= getattr(self, name) <= 1.0:
        raise ValueError(
          f"{name} {getattr(self, name)} is not in [0, 1]; it is a factor of "
          "the peak rate."
        )
    for name in ("clip_norm", "weight_decay", "eps", "weight_decay_end"):
      value = getattr(self, name)
      if value is not None and not value >= 0:
        raise ValueError(f"{name} {value} is negative; 0 turns it off.")


# Of a tokenizer that is fine-tuned, by path.
PARTS = {
  "all": r".*",
  "decoder": r"(decoder|post_quant_conv)/.*",
  "quantizer": r"codebook|phi_kernel|phi_bias",
}


def only(part: str, tree: Any) -> Any:
  """Return gradients or updates with 0 for all but a part of a tokenizer."""
  if part == "all":
    return tree
  flat = flax.traverse_util.flatten_dict(tree["params"], sep="/")
  kept = {
    path: leaf if re.fullmatch(PARTS[part], path) else jnp.zeros_like(leaf)
    for path, leaf in flat.items()
  }
  return {"params": flax.traverse_util.unflatten_dict(kept, sep="/")}


def make_optimizer(
  cfg: OptimizerConfig, *, steps: int, batch_size: int, part: str = "all"
) -> optax.GradientTransformationExtraArgs:
  """Return the optimiser of a run of `steps` steps.

  Its update takes the clock as `step=`, and the rates follow that: where an
  update is refused the moments stand still and the schedule does not.

  Args:
    part: one of PARTS, that alone moves.
  """
  adamw = optax.chain(
    optax.scale_by_adam(cfg.b1, cfg.b2, cfg.eps),
    _decay_and_scale(*schedules(cfg, steps=steps, batch_size=batch_size), part),
  )
  # Without a clip something without state is in its place: a run can go on
  # with one or the other.
  clip = optax.identity()
  if cfg.clip_norm:
    clip = optax.clip_by_global_norm(cfg.clip_norm)
  return optax.chain(clip, adamw)


def _decay_and_scale(rate: Schedule, decay: Schedule, part: str):
  """Return u -> -rate(step) (u + decay(step) p), decay where the mask is.

  It is 0 for what is not of the part, which would still decay.
  """

  def update(updates, state, params, *, step, **unused):
    scale, weight = -rate(step), decay(step)
    updates = jax.tree.map(
      lambda u, p, decays: scale * (u + weight * p if decays else u),
      updates,
      params,
      decay_mask(params),
    )
    return only(part, updates), state

  return optax.GradientTransformationExtraArgs(optax.init_empty_state, update)


def schedules(
  cfg: OptimizerConfig, *, steps: int, batch_size: int
) -> Schedules:
  """Return learning rate and weight decay as functions of the step."""
  peak = cfg.learning_rate * batch_size / 256
  end = cfg.weight_decay_end
  end = cfg.weight_decay if end is None else end

  def learning_rate(step):
    return peak * learning_rate_factor(
      cfg.schedule,
      step,
      steps=steps,
      warmup_steps=round(cfg.warmup_fraction * steps),
      start=cfg.warmup_start,
      end=cfg.final_factor,
    )

  def weight_decay(step):
    progress = step / max(steps - 1, 1)
    return end + (cfg.weight_decay - end) * _half_cosine(progress)

  return learning_rate, weight_decay


def learning_rate_factor(
  name: str,
  step: jax.Array,
  *,
  steps: int,
  warmup_steps: int,
  start: float,
  end: float,
) -> jax.Array:
  """Return the factor of the peak rate at `step`.

  Linear from `start` to 1 during warm-up; then, with progress p from 0 to 1:

    cos      half a cosine from 1 to `end`
    lin      1 until p = 0.15, then linear to `end`;  lin0: until 0.05,
             lin00: linear from p = 0
    lin<T>   linear all the way, with a bend at p = T, half as far above
             `end` as a line that reaches it there would leave
    exp      1 until p = 0.15, then exponential to `end`
  """
  p = (step - warmup_steps) / max(steps - 1 - warmup_steps, 1)
  hold = _hold_until(name)
  rest = jnp.clip((1.0 - p) / (1.0 - hold), 0.0, 1.0)
  if name == "cos":
    factor = end + (1.0 - end) * _half_cosine(p)
  elif name == "exp":
    factor = end ** (1.0 - rest)
  elif name in _HOLDS:
    factor = end + (1.0 - end) * rest
  else:
    bend = (1.0 + end + (1.0 - end) * (1.0 - hold)) / 2
    before = 1.0 + (bend - 1.0) * p / hold
    factor = jnp.where(p < hold, before, end + (bend - end) * rest)
  warming = start + (1.0 - start) * step / max(warmup_steps, 1)
  return jnp.where(step < warmup_steps, warming, factor)


def decay_mask(params):
  """Return True for what decays: projections, convolutions, class embedding.

  Biases, norms, position and level embeddings, the AdaLN shifts of shared
  AdaLN, the attention scales and the codebook do not.
  """
  flat = flax.traverse_util.flatten_dict(params, sep="/")
  decays = {
    path: path.endswith("kernel") or path.endswith("class_emb") for path in flat
  }
  return flax.traverse_util.unflatten_dict(decays, sep="/")


def rates(of: Schedules | None, step: jax.Array) -> dict[str, jax.Array]:
  """Return what a step reports of its schedules; nothing without them."""
  if of is None:
    return {}
  rate, decay = of
  return {"learning_rate": rate(step), "weight_decay": decay(step)}


_HOLDS = {"cos": 0.0, "lin": 0.15, "lin0": 0.05, "lin00": 0.0, "exp": 0.15}


def _hold_until(name: str) -> float:
  """Return the progress at which a schedule starts to fall, or bends."""
  if name in _HOLDS:
    return _HOLDS[name]
  match = re.fullmatch(r"lin(0\.\d+)", name)
  if match and float(match[1]) > 0:
    return float(match[1])
  raise ValueError(
    f"schedule {name!r} is not known; use one of {', '.join(_HOLDS)}, or "
    "lin<T> with 0 < T < 1."
  )


def _half_cosine(progress):
  """Fall from 1 to 0 over progress 0 .. 1."""
  return 0.5 + 0.5 * jnp.cos(jnp.pi * progress)
