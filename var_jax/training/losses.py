"""Cross-entropy over token maps (paper section 3.2; weights of the trainer)."""

import jax
import jax.numpy as jnp
import optax

from var_jax.models.scales import ScaleSchedule


def drop_labels(labels_B: jax.Array, drop_B: jax.Array) -> jax.Array:
  """Return labels with -1, unconditional, where `drop_B` is True."""
  return jnp.where(drop_B, -1, labels_B)


def cross_entropy(
  logits_BLV: jax.Array,
  tokens_BL: jax.Array,
  weights_L: jax.Array | None = None,
  smoothing: float = 0.0,
) -> jax.Array:
  """Return sum_L w_L CE, averaged over the batch.

  Args:
    weights_L: of the tokens; 1/L each by default, so that the finest scales
      count most.
    smoothing: share of the target spread evenly over V.
  """
  loss_BL = token_loss(logits_BLV, tokens_BL, smoothing)
  if weights_L is None:
    return jnp.mean(loss_BL)
  return jnp.mean(jnp.sum(loss_BL * weights_L, axis=-1))


def token_loss(
  logits_BLV: jax.Array, tokens_BL: jax.Array, smoothing: float = 0.0
) -> jax.Array:
  """Return the cross-entropy of each token, [B, L] in nats."""
  loss_BL = optax.softmax_cross_entropy_with_integer_labels(
    logits_BLV, tokens_BL
  )
  if not smoothing:
    return loss_BL
  uniform_BL = -jnp.mean(jax.nn.log_softmax(logits_BLV), axis=-1)
  return (1.0 - smoothing) * loss_BL + smoothing * uniform_BL


def token_metrics(
  logits_BLV: jax.Array, tokens_BL: jax.Array, scales: ScaleSchedule
) -> dict[str, jax.Array]:
  """Return loss and accuracy (a fraction) over all tokens and the last scale.

  The loss is without label smoothing.
  """
  loss_BL = token_loss(logits_BLV, tokens_BL)
  right_BL = jnp.argmax(logits_BLV, axis=-1) == tokens_BL
  tail = slice(scales.start(len(scales) - 1), None)
  return {
    "loss_mean": jnp.mean(loss_BL),
    "loss_tail": jnp.mean(loss_BL[:, tail]),
    "accuracy_mean": jnp.mean(right_BL),
    "accuracy_tail": jnp.mean(right_BL[:, tail]),
  }
