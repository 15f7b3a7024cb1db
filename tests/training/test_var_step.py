"""Transformer training: what is random follows from the position alone."""

import functools

import golden_files
import jax
import jax.numpy as jnp
import numpy as np
import optax

from var_jax.training import losses, var_step
from var_jax.training.state import TrainState, sample_keys, step_key


@functools.cache
def step_of(label_dropout):
  models, _ = golden_files.pair("A")
  step = var_step.make_step(
    models.var,
    models.tokenizer,
    optax.sgd(0.0),
    var_step.VARLossConfig(label_dropout=label_dropout),
    ema_decay=0.0,
    seed=0,
  )
  return jax.jit(step)


def take(label_dropout, labels, positions):
  _, params = golden_files.pair("A")
  pixels = golden_files.arrays("vae_share4_znorm0.npz")["img_u8"]
  rows = np.array(positions) % 4
  batch = {
    "image": golden_files.nhwc(pixels)[rows],
    "label": np.array(labels, np.int32),
    "position": np.array(positions, np.uint32),
  }
  state = TrainState.create(params.var, optax.sgd(0.0), use_ema=False)
  return step_of(label_dropout)(state, params.tokenizer, batch)[1]


def test_the_loss_is_the_recorded_one_without_dropout():
  recorded = golden_files.arrays("var_A_train.npz")
  labels = np.where(recorded["labels"] == 10, -1, recorded["labels"])
  metrics = take(0.0, labels, [0, 1, 2])
  golden_files.assert_close(metrics["loss"], recorded["loss_ls0.0"][0])
  golden_files.assert_close(metrics["loss_mean"], recorded["val_Lmean"][0])
  golden_files.assert_close(metrics["loss_tail"], recorded["val_Ltail"][0])


def test_dropping_every_label_is_training_unconditionally():
  dropped = take(1.0, [3, 7, 1], [0, 1, 2])
  unconditional = take(0.0, [-1, -1, -1], [0, 1, 2])
  np.testing.assert_allclose(dropped["loss"], unconditional["loss"], rtol=1e-6)
  assert abs(dropped["loss"] - take(0.0, [3, 7, 1], [0, 1, 2])["loss"]) > 1e-3


def test_what_a_sample_drops_does_not_depend_on_its_batch():
  together = take(0.5, [3, 7, 1, 2], [0, 1, 2, 3])["loss"]
  turned = take(0.5, [1, 2, 3, 7], [2, 3, 0, 1])["loss"]
  np.testing.assert_allclose(together, turned, rtol=1e-6)


def test_keys_differ_by_seed_use_and_position_or_step():
  positions = jnp.arange(3, dtype=jnp.uint32)
  keys = [
    *sample_keys(0, 1, positions),
    *sample_keys(0, 2, positions),
    *sample_keys(1, 1, positions),
    *[step_key(0, 2, jnp.int32(step)) for step in range(3)],
  ]
  data = {tuple(np.asarray(jax.random.key_data(key))) for key in keys}
  # A step key of a use is a sample key of that use: uses must not be shared.
  assert len(data) == 9


def test_a_tenth_of_the_labels_is_dropped():
  keys_B = sample_keys(
    0, var_step.LABEL_DROPOUT, jnp.arange(20_000, dtype=jnp.uint32)
  )
  drop_B = jax.vmap(lambda key: jax.random.bernoulli(key, 0.1))(keys_B)
  # Five standard deviations.
  assert abs(drop_B.mean() - 0.1) < 5 * np.sqrt(0.09 / 20_000)
  labels_B = losses.drop_labels(jnp.arange(20_000), drop_B)
  np.testing.assert_array_equal(labels_B == -1, drop_B)
