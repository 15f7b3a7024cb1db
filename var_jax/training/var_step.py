"""One training step of the transformer: frozen tokenizer, cross-entropy.

images -encode-> tokens_BL -accumulate-> inputs_BLZ
labels, inputs -VAR-> logits_BLV, compared with tokens_BL
"""

import dataclasses

import jax
import jax.numpy as jnp
import optax

from var_jax.models.tokenizer import Tokenizer
from var_jax.models.transformer import VAR
from var_jax.training import losses
from var_jax.training.state import (
  TrainState,
  sample_keys,
  step_key,
  to_float_images,
)

# What a key is for; part of every key, so that no two uses share one.
LABEL_DROPOUT, NETWORK = 1, 2


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
):
  """Return step(state, tokenizer_params, batch) -> (state, metrics)."""

  def step(state: TrainState, tokenizer_params, batch):
    image_BHW3 = to_float_images(batch["image"])
    tokens_BL = tokenizer.apply(tokenizer_params, image_BHW3, method="encode")
    inputs_BLZ = tokenizer.apply(tokenizer_params, tokens_BL, method="inputs")
    keys_B = sample_keys(seed, LABEL_DROPOUT, batch["position"])
    drop_B = jax.vmap(lambda k: jax.random.bernoulli(k, cfg.label_dropout))(
      keys_B
    )
    labels_B = losses.drop_labels(batch["label"], drop_B)
    key = step_key(seed, NETWORK, state.step)

    def loss_fn(params):
      logits_BLV = var.apply(params, labels_B, inputs_BLZ, key)
      loss = losses.cross_entropy(
        logits_BLV, tokens_BL, smoothing=cfg.label_smoothing
      )
      return loss, logits_BLV

    (loss, logits_BLV), grads = jax.value_and_grad(loss_fn, has_aux=True)(
      state.params
    )
    metrics = {
      "loss": loss,
      **losses.token_metrics(logits_BLV, tokens_BL, var.cfg.schedule),
      "grad_norm": optax.tree.norm(grads),
    }
    return state.apply_gradients(grads, optimizer, ema_decay), metrics

  return step
