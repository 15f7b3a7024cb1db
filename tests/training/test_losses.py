"""Cross-entropy and metrics against NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_files import assert_close

from var_jax.models.scales import ScaleSchedule
from var_jax.training import losses

SCALES = ScaleSchedule((1, 2, (2, 3)))
B, L, V = 3, 11, 7


def example():
  keys = jax.random.split(jax.random.key(0))
  logits_BLV = 3.0 * jax.random.normal(keys[0], (B, L, V))
  tokens_BL = jax.random.randint(keys[1], (B, L), 0, V)
  return logits_BLV, tokens_BL


def expected_loss(logits_BLV, tokens_BL, smoothing):
  """Return -sum_v target_v log p_v, [B, L], in float64."""
  logits_BLV = np.asarray(logits_BLV, "f8")
  odds_BLV = np.exp(logits_BLV)
  log_p_BLV = logits_BLV - np.log(odds_BLV.sum(-1, keepdims=True))
  target_BLV = (1 - smoothing) * np.eye(V)[tokens_BL] + smoothing / V
  return -(target_BLV * log_p_BLV).sum(-1)


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
def test_the_loss_of_a_token_equals_numpy(smoothing):
  logits_BLV, tokens_BL = example()
  assert_close(
    losses.token_loss(logits_BLV, tokens_BL, smoothing),
    expected_loss(logits_BLV, tokens_BL, smoothing),
    tolerance=1e-6,
  )


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_tokens_weigh_the_same_unless_told(smoothing):
  logits_BLV, tokens_BL = example()
  loss_BL = expected_loss(logits_BLV, tokens_BL, smoothing)
  loss = losses.cross_entropy(logits_BLV, tokens_BL, smoothing=smoothing)
  np.testing.assert_allclose(loss, loss_BL.mean(), rtol=2e-6)
  even_L = jnp.full(L, 1 / L)
  loss = losses.cross_entropy(logits_BLV, tokens_BL, even_L, smoothing)
  np.testing.assert_allclose(loss, loss_BL.mean(), rtol=2e-6)


def test_weights_are_summed_over_tokens_and_averaged_over_the_batch():
  logits_BLV, tokens_BL = example()
  weights_L = np.linspace(0.0, 2.0, L)
  loss = losses.cross_entropy(logits_BLV, tokens_BL, weights_L)
  loss_BL = expected_loss(logits_BLV, tokens_BL, 0.0)
  expected = (loss_BL * weights_L).sum(-1).mean()
  np.testing.assert_allclose(loss, expected, rtol=2e-6)


def test_metrics_are_of_all_tokens_and_of_the_last_scale():
  logits_BLV, tokens_BL = example()
  # Right where a token is even, so that the shares are not 0 or 1.
  bonus_BLV = 50.0 * jax.nn.one_hot(tokens_BL, V)
  logits_BLV += bonus_BLV * (np.arange(L) % 2 == 0)[:, None]
  metrics = losses.token_metrics(logits_BLV, tokens_BL, SCALES)
  loss_BL = expected_loss(logits_BLV, tokens_BL, 0.0)
  right_BL = np.asarray(logits_BLV).argmax(-1) == tokens_BL
  np.testing.assert_allclose(metrics["loss_mean"], loss_BL.mean(), rtol=2e-6)
  np.testing.assert_allclose(
    metrics["loss_tail"], loss_BL[:, 5:].mean(), rtol=2e-6
  )
  assert metrics["accuracy_mean"] == pytest.approx(right_BL.mean())
  assert metrics["accuracy_tail"] == pytest.approx(right_BL[:, 5:].mean())
  assert right_BL[:, 5:].mean() != right_BL.mean()
  for s, tokens in enumerate([slice(0, 1), slice(1, 5), slice(5, 11)]):
    np.testing.assert_allclose(
      metrics["loss_scale"][str(s)], loss_BL[:, tokens].mean(), rtol=2e-6
    )
    assert metrics["accuracy_scale"][str(s)] == pytest.approx(
      right_BL[:, tokens].mean()
    )
  assert len(metrics["loss_scale"]) == len(metrics["accuracy_scale"]) == 3


def test_metrics_of_the_first_scales_have_no_tail():
  logits_BLV, tokens_BL = example()
  metrics = losses.token_metrics(logits_BLV[:, :5], tokens_BL[:, :5], SCALES)
  loss_BL = expected_loss(logits_BLV, tokens_BL, 0.0)[:, :5]
  np.testing.assert_allclose(metrics["loss_mean"], loss_BL.mean(), rtol=2e-6)
  assert sorted(metrics) == [
    "accuracy_mean",
    "accuracy_scale",
    "loss_mean",
    "loss_scale",
  ]
  assert sorted(metrics["loss_scale"]) == ["0", "1"]


def test_samples_that_only_fill_a_batch_are_not_summed():
  of_samples = {"loss": jnp.array([1.0, jnp.nan, 4.0])}
  sums = losses.sum_of_real(of_samples, jnp.array([True, False, True]))
  assert sums == {"loss": 5.0, "count": 2.0}


def test_codes_that_are_predicted_often_enough_are_in_use():
  """As the official trainer counts: more than 0.001/V of the tokens."""
  logits_BLV = jnp.zeros((2, 2000, 4)).at[..., 1].set(1.0)
  logits_BLV = logits_BLV.at[0, 0, 2].set(2.0)  # one of 4000
  logits_BLV = logits_BLV.at[1, 7:9, 3].set(2.0)
  shares_V = losses.code_shares(logits_BLV)
  np.testing.assert_allclose(shares_V, [0, 3997 / 4e3, 1 / 4e3, 2 / 4e3])
  # 0.001 / 4 is one of 4000, which is not more than that.
  np.testing.assert_allclose(losses.code_use(shares_V), 50.0)


def test_dropped_labels_are_unconditional():
  labels_B = jnp.array([0, 3, 9])
  dropped_B = losses.drop_labels(labels_B, jnp.array([True, False, True]))
  np.testing.assert_array_equal(dropped_B, [-1, 3, -1])
