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
  logits_BlV: jax.Array, tokens_Bl: jax.Array, scales: ScaleSchedule
) -> dict[str, jax.Array | dict[str, jax.Array]]:
  """Return loss and accuracy (a fraction): of all tokens, of the last scale
  ("tail") and of each scale by its number.

  The loss is without label smoothing. Where the tokens are those of the first
  scales only, the others and the tail have no key.
  """
  metrics_B = sample_metrics(logits_BlV, tokens_Bl, scales)
  return jax.tree.map(jnp.mean, metrics_B)


def sample_metrics(
  logits_BlV: jax.Array, tokens_Bl: jax.Array, scales: ScaleSchedule
) -> dict[str, jax.Array | dict[str, jax.Array]]:
  """Return the same of each sample, [B]."""
  of_tokens = {
    "loss": token_loss(logits_BlV, tokens_Bl),
    "accuracy": jnp.argmax(logits_BlV, axis=-1) == tokens_Bl,
  }
  covered = scales.covered(tokens_Bl.shape[1])
  metrics = {}
  for name, values_Bl in of_tokens.items():
    by_scale = {
      str(s): jnp.mean(values_Bl[:, scales.start(s) : scales.end(s)], axis=1)
      for s in range(covered)
    }
    metrics[f"{name}_mean"] = jnp.mean(values_Bl, axis=1)
    if covered == len(scales):
      metrics[f"{name}_tail"] = by_scale[str(covered - 1)]
    metrics[f"{name}_scale"] = by_scale
  return metrics


def sum_of_real(of_samples, real_B: jax.Array) -> dict[str, jax.Array]:
  """Return the sums of [B, ..] measures of real samples, and their "count"."""

  def total(x_B):
    real = real_B.reshape(-1, *[1] * (x_B.ndim - 1))
    return jnp.sum(jnp.where(real, x_B, 0.0), axis=0)

  sums = jax.tree.map(total, of_samples)
  return {**sums, "count": jnp.sum(real_B.astype(jnp.float32))}


def code_shares(logits_BlV: jax.Array) -> jax.Array:
  """Return the share of tokens for which each code is the likeliest, [V]."""
  V = logits_BlV.shape[-1]
  likeliest_M = jnp.argmax(logits_BlV, axis=-1).ravel()
  return jnp.bincount(likeliest_M, length=V) / likeliest_M.size


def code_use(shares_V: jax.Array) -> jax.Array:
  """Return the share of codes that are predicted at all, percent.

  VAR: a code counts from a thousandth of an even use on.
  """
  return 100.0 * jnp.mean(shares_V > 0.001 / shares_V.shape[0])
