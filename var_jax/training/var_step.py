"""One training step of the transformer: frozen tokenizer, cross-entropy.

images -encode-> tokens_BL -accumulate-> inputs_BLZ
labels, inputs -VAR-> logits_BLV, compared with tokens_BL

With a token cache the first arrow is done already. In progressive training
everything ends at the scale that the stage has reached.
"""

import dataclasses

import jax
import jax.numpy as jnp
import optax

from var_jax.models.tokenizer import Tokenizer
from var_jax.models.transformer import VAR
from var_jax.training import losses, optim, progressive
from var_jax.training.accumulation import mean_over_parts
from var_jax.training.guard import GuardConfig, judge
from var_jax.training.state import (
  TrainState,
  sample_keys,
  step_key,
  to_float_images,
)

# What a key is for; part of every key, so that no two uses share one.
LABEL_DROPOUT, NETWORK = 1, 2

_GUARD = GuardConfig()


@dataclasses.dataclass(frozen=True)
class VARLossConfig:
  """Args:
  label_dropout: share of samples trained without their label.
  label_smoothing: of the training loss; metrics are without.
  """

  label_dropout: float = 0.1
  label_smoothing: float = 0.0

  def __post_init__(self):
    for name in ("label_dropout", "label_smoothing"):
      if not 0.0 <= getattr(self, name) <= 1.0:
        raise ValueError(
          f"{name} {getattr(self, name)} is not in [0, 1]; 0 turns it off."
        )


def init_params(var: VAR, key: jax.Array):
  """Return fresh parameters."""
  return jax.jit(lambda key: _init(var, key))(key)


def init_class_emb(var: VAR, key: jax.Array) -> jax.Array:
  """Return what `init_params` has as class embedding, [C + 1, D]."""
  # What jit need not return is not computed.
  return jax.jit(lambda key: _init(var, key)["params"]["class_emb"])(key)


def _init(var: VAR, key: jax.Array):
  labels_1 = jnp.zeros((1,), jnp.int32)
  inputs_10Z = jnp.zeros((1, 0, var.cfg.latent_channels))
  return var.init(key, labels_1, inputs_10Z)


def make_step(
  var: VAR,
  tokenizer: Tokenizer,
  optimizer: optax.GradientTransformation,
  cfg: VARLossConfig,
  *,
  ema_decay: float,
  seed: int,
  accumulate: int = 1,
  guard: GuardConfig = _GUARD,
  schedules: optim.Schedules | None = None,
  stage: int | None = None,
  newest_weight: optim.Schedule | None = None,
):
  """Return step(state, tokenizer_params, batch) -> (state, metrics).

  A batch has "label" int32 [B], "position" uint32 [B] and either "image"
  uint8 [B, H, W, 3] or its "tokens" [B, L]: then nothing is encoded.

  Args:
    accumulate: parts that the batch is taken in, one after another. Dropout
      and stochastic depth draw for each part; all else is as in one piece.
    schedules: reported as learning_rate and weight_decay.
    stage: the finest scale that is trained, see `progressive.stage`; without
      it all are. Metrics of finer scales and of the tail then have no key.
    newest_weight: of the loss of that scale as a function of the step, see
      `progressive.newest_scale_weight`; 1 without it.
  """
  scales = var.cfg.schedule
  last = len(scales) - 1
  if stage is not None and not 0 <= stage <= last:
    raise ValueError(f"stage {stage} is not a scale; use 0 .. {last}.")
  finest = last if stage is None else stage

  def weights_of(step) -> jax.Array | None:
    if finest == last:
      return None
    newest = newest_weight(step) if newest_weight else 1.0
    return progressive.token_weights(scales, finest, newest)

  def step(state: TrainState, tokenizer_params, batch):
    weights_l = weights_of(state.step)

    def gradients(part, number):
      """Return (gradients, metrics, share of each code) of a part."""
      tokens_Bl = _tokens(tokenizer, tokenizer_params, part)
      tokens_Bl = tokens_Bl[:, : scales.end(finest)]
      inputs_BlZ = tokenizer.apply(tokenizer_params, tokens_Bl, method="inputs")
      labels_B = _some_labels(part, cfg.label_dropout, seed)
      key = step_key(seed, NETWORK, state.step)
      if accumulate > 1:
        key = jax.random.fold_in(key, number)

      def loss_fn(params):
        logits_BlV = var.apply(params, labels_B, inputs_BlZ, key)
        loss = losses.cross_entropy(
          logits_BlV, tokens_Bl, weights_l, cfg.label_smoothing
        )
        return loss, logits_BlV

      (loss, logits_BlV), grads = jax.value_and_grad(loss_fn, has_aux=True)(
        state.params
      )
      metrics = losses.token_metrics(logits_BlV, tokens_Bl, scales)
      shares_V = losses.code_shares(logits_BlV)
      return grads, {"loss": loss, **metrics}, shares_V

    grads, metrics, shares_V = mean_over_parts(gradients, batch, accumulate)
    after, updates = state.apply_gradients(grads, optimizer, ema_decay)
    # Of a token: the loss grows with a stage, and that is no spike.
    after, health = judge(
      guard, state, after, metrics["loss_mean"], grads, updates
    )
    return after, {
      **metrics,
      "code_use": losses.code_use(shares_V),
      **health,
      **optim.rates(schedules, state.step),
    }

  return step


def make_eval_step(var: VAR, tokenizer: Tokenizer):
  """Return eval_step(params, tokenizer_params, batch) -> sums over samples.

  A batch is that of a training step without positions, and with "real" [B]:
  False for what only fills the batch. The sums are of `losses.token_metrics`
  and "count". VAR: here no label is dropped, nothing is smoothed.
  """

  def eval_step(params, tokenizer_params, batch):
    tokens_BL = _tokens(tokenizer, tokenizer_params, batch)
    inputs_BLZ = tokenizer.apply(tokenizer_params, tokens_BL, method="inputs")
    logits_BLV = var.apply(params, batch["label"], inputs_BLZ)
    of_samples = losses.sample_metrics(logits_BLV, tokens_BL, var.cfg.schedule)
    return losses.sum_of_real(of_samples, batch["real"])

  return eval_step


def _tokens(tokenizer: Tokenizer, params, batch) -> jax.Array:
  """Return the tokens of a batch, int32 [B, L]."""
  if "tokens" in batch:
    return batch["tokens"].astype(jnp.int32)
  image_BHW3 = to_float_images(batch["image"])
  return tokenizer.apply(params, image_BHW3, method="encode")


def _some_labels(batch, rate: float, seed: int) -> jax.Array:
  """Return the labels, of which each position decides whether it is dropped."""
  keys_B = sample_keys(seed, LABEL_DROPOUT, batch["position"])
  drop_B = jax.vmap(lambda key: jax.random.bernoulli(key, rate))(keys_B)
  return losses.drop_labels(batch["label"], drop_B)
