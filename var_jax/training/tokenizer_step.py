"""One training step of the tokenizer, and of what it plays against.

    loss = L2 + L1 + quantiser loss + LPIPS + adversary     (paper eq. 5)

each with its weight; what is reported and judged as "loss" is without the last,
which is no measure of progress. All of it looks at one reconstruction: the
gradients of the image are added up before they go back through the tokenizer,
and the discriminator is trained beside it on the same images.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from var_jax.models import perceptual
from var_jax.models.layers import mean_square
from var_jax.models.tokenizer import Tokenizer
from var_jax.training import adversary_step, codes, optim
from var_jax.training.accumulation import mean_over_parts
from var_jax.training.adversary_step import Against
from var_jax.training.codes import CollapseConfig
from var_jax.training.guard import GuardConfig, judge
from var_jax.training.state import (
  TrainState,
  sample_keys,
  step_key,
  to_float_images,
)

# What a key is for, see var_step.
REVIVAL, SCALE_DROPOUT, RESTORATION = 3, 4, 7

_GUARD = GuardConfig()
_COLLAPSE = CollapseConfig()


@dataclasses.dataclass(frozen=True)
class TokenizerLossConfig:
  """Args:
  l2_weight, l1_weight: of the mean square and absolute difference of pixels.
  quantizer_weight: of the quantiser loss.
  lpips_weight: of the perceptual distance; needs config.lpips_path.
  scale_dropout: share of samples that are decoded from their first scales
    only, from 1 to S-1 of them, so that coarse scales carry meaning.
  revive_every: steps between looks for dead codes; 0 never looks.
  revive_below: share of an even use below which a code is dead.
  kmeans_rounds: that the first codes are found with. They start from data
    where this or revive_every is set.
  """

  l2_weight: float = 1.0
  l1_weight: float = 0.0
  quantizer_weight: float = 1.0
  lpips_weight: float = 0.0
  scale_dropout: float = 0.0
  revive_every: int = 0
  revive_below: float = 0.03
  kmeans_rounds: int = 0

  def __post_init__(self):
    for field in dataclasses.fields(self):
      value = getattr(self, field.name)
      if not 0 <= value < math.inf:
        raise ValueError(
          f"{field.name} {value} is not in [0, inf); 0 turns it off."
        )
    for name in ("scale_dropout", "revive_below"):
      if getattr(self, name) > 1.0:
        raise ValueError(
          f"{name} {getattr(self, name)} is above 1; it is a share."
        )


def init_params(tokenizer: Tokenizer, key: jax.Array):
  """Return fresh parameters."""
  image_1HW3 = jnp.zeros((1, *tokenizer.cfg.image_shape, 3))
  return jax.jit(tokenizer.init)(key, image_1HW3)


def make_step(
  tokenizer: Tokenizer,
  optimizer: optax.GradientTransformation,
  cfg: TokenizerLossConfig,
  *,
  ema_decay: float,
  seed: int,
  accumulate: int = 1,
  guard: GuardConfig = _GUARD,
  collapse: CollapseConfig = _COLLAPSE,
  against: Against | None = None,
  schedules: optim.Schedules | None = None,
  trained: str = "all",
):
  """Return step(state, frozen, batch) -> (state, metrics).

  A batch has "image" uint8 [B, H, W, 3], and "position" uint32 [B] where
  anything random is asked of a sample. `frozen` is {"lpips": weights} where
  LPIPS has a weight.

  Args:
    accumulate: parts that the batch is taken in, one after another; dead
      codes are looked for in the whole batch, and each part has an adaptive
      weight of its own.
    against: the discriminator, whose state is `state.adversary`; None where
      there is none, or before it starts.
    schedules: reported as learning_rate and weight_decay.
    trained: one of `optim.PARTS`; the rest has gradients of 0.
  """
  scales, V = tokenizer.cfg.schedule, tokenizer.cfg.vocab_size

  def step(state: TrainState, frozen, batch):
    before = state
    state, collapsed_S = _tend(tokenizer, cfg, collapse, seed, state, batch)

    def gradients(part, number):
      """Return (gradients, those of D, metrics, draws of each code)."""
      image_BHW3 = to_float_images(part["image"])
      kept_B = _kept_scales(part, cfg.scale_dropout, len(scales), seed)

      def generate(params):
        again_BHW3, features_BHWZ, quantized = tokenizer.apply(
          params, image_BHW3, kept_B, method="reconstruct"
        )
        return (again_BHW3, quantized.loss), (features_BHWZ, quantized)

      (again_BHW3, _), pull, (features_BHWZ, quantized) = jax.vjp(
        generate, state.params, has_aux=True
      )
      # Of pixels and features; its gradient is of the image.
      compare = _compare(cfg, frozen, image_BHW3, tokenizer.cfg.dtype)
      (rest, metrics), image_grad = jax.value_and_grad(compare, has_aux=True)(
        again_BHW3
      )
      adversary_grads = ()
      if against is not None:
        listened = (state.adversary, image_BHW3, again_BHW3)
        image_grad, adversary_grads, of_adversary = adversary_step.play(
          against, seed, part, listened, image_grad, features_BHWZ
        )
        metrics |= of_adversary
      (grads,) = pull((image_grad, jnp.float32(cfg.quantizer_weight)))
      grads = optim.only(trained, grads)
      loss = rest + cfg.quantizer_weight * quantized.loss
      metrics |= {
        "loss": loss,
        "quantizer_loss": quantized.loss,
        "residual_energy": _per_scale(quantized.residual_energy_S),
      }
      explained_S = codes.explained(
        quantized.latent_energy, quantized.residual_energy_S
      )
      hits_SV = codes.count_codes(quantized.tokens_BL, scales, V)
      return grads, adversary_grads, metrics, hits_SV, explained_S

    grads, adversary_grads, metrics, hits_SV, explained_S = mean_over_parts(
      gradients, batch, accumulate
    )
    after, updates = state.apply_gradients(grads, optimizer, ema_decay)
    after = codes.counted(after, state, accumulate * hits_SV, explained_S)
    if against is not None:
      after = adversary_step.advance(
        against, state, after, adversary_grads, metrics
      )
    # A refused step leaves no trace, revived codes included. Where D's loss is
    # not a number its gradient may be 0.
    also = (adversary_grads, metrics.get("discriminator_loss", 0.0))
    after, health = judge(
      guard, before, after, metrics["loss"], grads, updates, also
    )
    area = batch["image"].shape[0] * scales.grid[0] * scales.grid[1]
    return after, {
      **metrics,
      "psnr": _psnr(metrics["l2"]),
      "code_usage": _per_scale(codes.code_usage(after.code_hits_SV, area)),
      # As the step found them, and as `collapsed` was judged by.
      "explained": _per_scale(before.explained_S),
      "perplexity": _per_scale(codes.perplexity(before.code_hits_SV)),
      "collapsed": _per_scale(collapsed_S.astype(jnp.float32)),
      "rate": after.rate,
      **health,
      **_rates(schedules, state),
    }

  return step


def _tend(
  tokenizer, cfg, collapse, seed, state, batch
) -> tuple[TrainState, jax.Array]:
  """Look after the codes before a step; return also what collapses, [S]."""
  collapsed_S = codes.collapsed(collapse, state)
  found = jnp.any(collapsed_S)
  tends = bool(cfg.revive_every or cfg.kmeans_rounds)
  mends = collapse.policy == "revive"
  which = jnp.int32(0)
  if tends:
    every = cfg.revive_every
    time = state.step % every == 0 if every else False
    which = jnp.where(codes.is_new(state), 1, jnp.where(time, 2, 0))

  def look_after(state):
    """Move codes; in one branch, so that latents are compiled only once."""
    image_BHW3 = to_float_images(batch["image"])
    f_BhwZ = tokenizer.apply(state.params, image_BHW3, method="to_latent")
    key = step_key(seed, REVIVAL, state.step)

    def start(state):
      return codes.start_from_data(
        tokenizer, state, f_BhwZ, key, cfg.kmeans_rounds
      )

    def revive(state):
      dead_V = codes.dead(state, cfg.revive_below)
      return codes.move_dead(tokenizer, state, f_BhwZ, key, dead_V)

    def restore(state):
      key = step_key(seed, RESTORATION, state.step)
      moved_V = codes.least_used(state, cfg.revive_below)
      return codes.move_dead(
        tokenizer, state, f_BhwZ, key, moved_V, collapsed_S
      )

    if tends:
      state = jax.lax.switch(which, [_as_it_is, start, revive], state)
    if mends:
      state = jax.lax.cond(found, restore, _as_it_is, state)
    return state

  if tends or mends:
    due = (which > 0) | (found & mends)
    state = jax.lax.cond(due, look_after, _as_it_is, state)
  if collapse.policy == "lower":
    state = state.replace(
      rate=jnp.where(found, codes.lowered(state.rate), state.rate)
    )
  return state, collapsed_S


def _as_it_is(state: TrainState) -> TrainState:
  return state


def _rates(schedules, state: TrainState) -> dict[str, jax.Array]:
  """Return the rates in effect."""
  rates = optim.rates(schedules, state.step)
  if "learning_rate" in rates:
    rates["learning_rate"] *= state.rate
  return rates


def _kept_scales(part, rate: float, count: int, seed: int) -> jax.Array | None:
  """Return how many scales each sample is decoded from; None for all."""
  if not rate or count == 1:
    return None

  def of_sample(key):
    drop_key, keep_key = jax.random.split(key)
    kept = jax.random.randint(keep_key, (), 1, count)
    return jnp.where(jax.random.bernoulli(drop_key, rate), kept, count)

  keys_B = sample_keys(seed, SCALE_DROPOUT, part["position"])
  return jax.vmap(of_sample)(keys_B)


def _compare(cfg, frozen, image_BHW3, dtype) -> Callable[[jax.Array], Any]:
  """Return what compares a reconstruction with the image: (loss, metrics)."""

  def compare(again_BHW3):
    apart_BHW3 = again_BHW3 - image_BHW3
    metrics = {"l2": mean_square(apart_BHW3)}
    loss = cfg.l2_weight * metrics["l2"]
    if cfg.l1_weight:
      of_images_B = jnp.mean(jnp.abs(apart_BHW3), axis=(1, 2, 3))
      metrics["l1"] = jnp.mean(of_images_B)
      loss += cfg.l1_weight * metrics["l1"]
    if cfg.lpips_weight:
      metrics["lpips"] = jnp.mean(
        perceptual.distance(frozen["lpips"], again_BHW3, image_BHW3, dtype)
      )
      loss += cfg.lpips_weight * metrics["lpips"]
    return loss, metrics

  return compare


def _psnr(l2: jax.Array) -> jax.Array:
  """Return dB of a mean square error in [-1, 1]."""
  return 10.0 * jnp.log10(4.0 / l2)


def _per_scale(values_S: jax.Array) -> dict[str, jax.Array]:
  return {str(s): values_S[s] for s in range(values_S.shape[0])}
