"""Transformer training: chance, parts, stages, refused steps, evaluation."""

import dataclasses
import functools

import golden_files
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from var_jax.models.transformer import VAR
from var_jax.training import losses, optim, var_step
from var_jax.training.state import TrainState, sample_keys, step_key

SGD = optax.sgd(1.0)
# Here a program takes longer to compile than to run.
QUICK = {"xla_backend_optimization_level": 0}
ADAM = optim.OptimizerConfig(learning_rate=1e-2, warmup_fraction=0.5)
TEN_STEPS = dict(steps=10, batch_size=256)
SCHEDULES = optim.schedules(ADAM, **TEN_STEPS)


@functools.cache
def step_of(label_dropout, optimizer=SGD, model=None, **options):
  """Return the compiled step of variant A, or of a changed one."""
  models, _ = golden_files.pair("A")
  step = var_step.make_step(
    VAR(model) if model else models.var,
    models.tokenizer,
    optimizer,
    var_step.VARLossConfig(label_dropout=label_dropout),
    ema_decay=0.0,
    seed=0,
    **options,
  )
  return jax.jit(step, compiler_options=QUICK)


def frozen():
  return golden_files.pair("A")[1].tokenizer


def fresh(optimizer=SGD):
  _, params = golden_files.pair("A")
  return TrainState.create(params.var, optimizer, use_ema=False)


def plain(state=None):
  """Take the step that most tests know, on two samples three times over."""
  step = step_of(0.0, schedules=SCHEDULES, stage=3)
  return step(state or fresh(), frozen(), token_batch([0, 1] * 3))


def token_batch(positions, labels=(3, 7, -1, 0)):
  """Return what a token cache gives for the recorded images."""
  images = golden_files.arrays("vae_share4_znorm0.npz")
  tokens_BL = np.concatenate([images[f"ids_{s}"] for s in range(4)], axis=1)
  return {
    "tokens": tokens_BL[np.array(positions) % 4].astype(np.uint16),
    "label": np.array(labels, np.int32)[np.array(positions) % 4],
    "position": np.array(positions, np.uint32),
  }


def assert_trees_close(actual, expected, tolerance):
  jax.tree.map(
    lambda a, b: golden_files.assert_close(a, b, tolerance), actual, expected
  )


def take(label_dropout, labels, positions):
  _, params = golden_files.pair("A")
  pixels = golden_files.arrays("vae_share4_znorm0.npz")["img_u8"]
  rows = np.array(positions) % 4
  batch = {
    "image": golden_files.nhwc(pixels)[rows],
    "label": np.array(labels, np.int32),
    "position": np.array(positions, np.uint32),
  }
  return step_of(label_dropout)(fresh(), params.tokenizer, batch)[1]


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


@pytest.mark.parametrize("name", ["plain", "prog_si=3(last)"])
def test_a_step_on_cached_tokens_is_the_recorded_one(name):
  _, metrics = plain()
  assert_recorded(metrics, name)
  golden_files.assert_close(
    metrics["loss_tail"],
    golden_files.table("train_step_trials.json")[name]["metrics"]["Lt"],
  )
  np.testing.assert_array_equal(
    metrics["loss_tail"], metrics["loss_scale"]["3"]
  )


def assert_recorded(metrics, name):
  recorded = golden_files.table("train_step_trials.json")[name]
  expected = recorded["metrics"]
  golden_files.assert_close(metrics["grad_norm"], recorded["grad_norm"])
  golden_files.assert_close(metrics["loss_mean"], expected["Lm"])
  golden_files.assert_close(100 * metrics["accuracy_mean"], expected["Accm"])


def test_a_step_in_parts_equals_one_in_one_piece():
  whole, expected = plain()
  step = step_of(0.0, schedules=SCHEDULES, accumulate=2)
  state, metrics = step(fresh(), frozen(), token_batch([0, 1] * 3))
  # Noise of float32 in sums over 180 tokens, once through the network.
  assert_trees_close(state.params, whole.params, 5e-6)
  assert_trees_close(metrics, expected, 5e-6)


def test_parts_draw_their_own_noise():
  cfg = dataclasses.replace(golden_files.VARIANTS["A"], dropout=0.5)
  step = step_of(0.0, model=cfg, accumulate=2, stage=0)
  loss, again, turned = (
    step(fresh(), frozen(), token_batch(rows))[1]["loss"]
    for rows in ([0, 1], [0, 1], [1, 0])
  )
  assert loss == again
  assert loss != turned


@pytest.mark.parametrize("stage", [1, 2])
def test_stages_take_the_recorded_steps(stage):
  step = step_of(0.0, stage=stage, newest_weight=growing_weight)
  state = fresh().replace(step=jnp.int32(10))
  _, metrics = step(state, frozen(), token_batch([0, 1] * 3))
  assert_recorded(metrics, f"prog_si={stage}")
  # Where the official trainer says -1 there is nothing to say.
  assert "loss_tail" not in metrics and "accuracy_tail" not in metrics
  assert sorted(metrics["loss_scale"]) == [str(s) for s in range(stage + 1)]

  state = fresh().replace(step=jnp.int32(3))
  _, metrics = step(state, frozen(), token_batch([0, 1, 2] * 2))
  expected = golden_files.arrays("var_A_train.npz")[f"prog{stage}_loss_wp0.3"]
  golden_files.assert_close(metrics["loss"], expected[0])
  assert step._cache_size() == 1  # a stage is compiled once


def growing_weight(step):
  return step / 10


def test_the_first_stage_may_be_one_token():
  """It crashes the official trainer."""
  step = step_of(0.0, stage=0)
  state, first = step(fresh(), frozen(), token_batch([0, 1]))
  np.testing.assert_allclose(first["loss"], first["loss_mean"] / 30, rtol=1e-6)
  _, second = step(state, frozen(), token_batch([0, 1]))
  assert second["loss"] < first["loss"]


def test_a_stage_that_there_is_not_is_refused():
  with pytest.raises(ValueError, match="stage 4 is not a scale; use 0 .. 3"):
    step_of(0.0, stage=4)


def test_what_a_step_reports():
  rate, decay = SCHEDULES
  _, metrics = plain(fresh().replace(step=jnp.int32(3)))
  assert sorted(metrics) == [
    "accuracy_mean", "accuracy_scale", "accuracy_tail", "code_use",
    "grad_norm", "learning_rate", "loss", "loss_mean", "loss_scale",
    "loss_tail", "skipped", "update_norm", "weight_decay",
  ]  # fmt: skip
  assert all(np.shape(x) == () for x in jax.tree.leaves(metrics))
  np.testing.assert_allclose(metrics["learning_rate"], rate(3), rtol=1e-6)
  np.testing.assert_allclose(metrics["weight_decay"], decay(3), rtol=1e-6)
  # A gradient step of rate 1 is as long as the gradient.
  np.testing.assert_allclose(
    metrics["update_norm"], metrics["grad_norm"], rtol=1e-6
  )


def test_a_loss_that_is_no_number_leaves_the_state():
  state = fresh()
  bias_V = state.params["params"]["head"]["bias"]
  params = jax.tree.map(jnp.copy, state.params)
  params["params"]["head"]["bias"] = bias_V.at[5].set(jnp.nan)
  state = state.replace(params=params)
  after, metrics = plain(state)
  assert np.isnan(metrics["loss"]) and metrics["skipped"] == 1.0
  jax.tree.map(
    np.testing.assert_array_equal, after, state.replace(step=jnp.int32(1))
  )


def test_bfloat16_multiplies_and_keeps_float32():
  cfg = dataclasses.replace(golden_files.VARIANTS["A"], dtype="bfloat16")
  optimizer = optim.make_optimizer(ADAM, **TEN_STEPS)
  step = step_of(0.0, optimizer, model=cfg)
  state = fresh(optimizer)
  after, metrics = step(state, frozen(), token_batch([0, 1] * 3))
  for old, new in zip(
    jax.tree.leaves(state.params), jax.tree.leaves(after.params), strict=True
  ):
    assert new.dtype == jnp.float32
    assert np.any(old != new)
  kept = [x.dtype for x in jax.tree.leaves(after.opt_state) if x.ndim]
  assert set(kept) == {jnp.dtype("float32")}
  _, exact = plain()
  assert metrics["loss"] != exact["loss"]
  # bfloat16 has eight bits.
  np.testing.assert_allclose(metrics["loss"], exact["loss"], rtol=2**-8)


@pytest.mark.parametrize("variant", "ABC")
def test_an_evaluation_equals_the_recorded_one(variant):
  models, params = golden_files.pair(variant)
  evaluate = jax.jit(
    var_step.make_eval_step(models.var, models.tokenizer),
    compiler_options=QUICK,
  )
  sums = []
  # The last batch is filled up with a sample that counts for nothing.
  for positions, real in (([0, 1, 2], [1, 1, 1]), ([3, 0, 0], [1, 0, 0])):
    batch = token_batch(positions) | {"real": np.array(real, bool)}
    sums.append(evaluate(params.var, params.tokenizer, batch))
  total = jax.tree.map(lambda *x: sum(x), *sums)
  expected = golden_files.table("optim.json")["eval_ep"][variant]
  assert total["count"] == expected["tot"]
  mean = jax.tree.map(lambda x: x / total["count"], total)
  golden_files.assert_close(mean["loss_mean"], expected["L_mean"])
  golden_files.assert_close(mean["loss_tail"], expected["L_tail"])
  golden_files.assert_close(100 * mean["accuracy_mean"], expected["acc_mean"])
  golden_files.assert_close(100 * mean["accuracy_tail"], expected["acc_tail"])
  np.testing.assert_array_equal(mean["loss_scale"]["3"], mean["loss_tail"])


def test_images_are_evaluated_like_their_tokens():
  models, params = golden_files.pair("A")
  evaluate = jax.jit(
    var_step.make_eval_step(models.var, models.tokenizer),
    compiler_options=QUICK,
  )
  batch = token_batch([0, 1]) | {"real": np.ones(2, bool)}
  pixels = golden_files.arrays("vae_share4_znorm0.npz")["img_u8"]
  shown = {"image": golden_files.nhwc(pixels)[:2], **batch}
  del shown["tokens"]
  of_tokens, of_images = (
    evaluate(params.var, params.tokenizer, one) for one in (batch, shown)
  )
  assert_trees_close(of_images, of_tokens, 1e-6)
