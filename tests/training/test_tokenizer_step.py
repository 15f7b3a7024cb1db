"""Tokenizer training: code counts, revival, parts, refused steps."""

import functools

import golden_files
import jax
import jax.numpy as jnp
import numpy as np
import optax

from var_jax.models import quantizer
from var_jax.models.tokenizer import Tokenizer, TokenizerConfig
from var_jax.training import tokenizer_step
from var_jax.training.state import TrainState

CFG = TokenizerConfig(
  vocab_size=16,
  latent_channels=4,
  channels=8,
  norm_groups=4,
  channel_mults=(1, 1),
  encoder_blocks=1,
  decoder_blocks=1,
  scales=(1, 2),
)
TOKENIZER = Tokenizer(CFG)
# Here a program takes longer to compile than to run.
QUICK = {"xla_backend_optimization_level": 0}
LOSS = tokenizer_step.TokenizerLossConfig(revive_every=1, revive_below=0.5)


@functools.cache
def params():
  return tokenizer_step.init_params(TOKENIZER, jax.random.key(0, impl="rbg"))


def images():
  return jax.random.uniform(jax.random.key(1), (8, 4, 4, 3), minval=-1.0)


def revived(hits_SV, step):
  state = TrainState.create(
    params(), optax.sgd(0.1), use_ema=False, code_hits_SV=hits_SV
  ).replace(step=jnp.int32(step))
  revive = jax.jit(
    tokenizer_step._revive, static_argnums=(0, 1), compiler_options=QUICK
  )
  return revive(TOKENIZER, LOSS, state, images(), jax.random.key(2))


def wanted_vectors():
  f_BhwZ = TOKENIZER.apply(params(), images(), method="to_latent")
  _, f_hats = TOKENIZER.apply(params(), f_BhwZ, method="quantize_latent")
  wanted = quantizer.wanted_vectors(f_BhwZ, f_hats, CFG.schedule)
  return np.asarray(wanted).reshape(-1, 4)


def test_dead_codes_move_onto_wanted_vectors_and_living_ones_stay():
  hits_SV = jnp.ones((2, 16)).at[:, 3:6].set(0.0)
  state = revived(hits_SV, step=50)
  before, after = (
    np.asarray(tree["params"]["codebook"]) for tree in (params(), state.params)
  )
  living = np.setdiff1d(np.arange(16), [3, 4, 5])
  np.testing.assert_array_equal(after[living], before[living])
  wanted = wanted_vectors()
  for code in after[3:6]:
    nearest = np.abs(wanted - code).max(axis=1).min()
    assert nearest < 0.1 * wanted.std()  # 0.01 of it, five times over and more
  # They count as alive until the next look.
  hits_V = state.code_hits_SV.sum(axis=0)
  assert np.all(hits_V[3:6] >= LOSS.revive_below * hits_V.mean())


def test_before_the_first_step_all_codes_come_from_data():
  state = revived(jnp.zeros((2, 16)), step=0)
  wanted = wanted_vectors()
  for code in np.asarray(state.params["params"]["codebook"]):
    assert np.abs(wanted - code).max(axis=1).min() < 0.1 * wanted.std()


def test_codes_are_counted_by_scale():
  tokens_BL = jnp.array([[3, 0, 0, 1, 2], [3, 5, 5, 5, 5]])
  hits_SV = tokenizer_step.count_codes(tokens_BL, CFG.schedule, 16)
  expected = np.zeros((2, 16))
  expected[0, 3] = 2
  expected[1, [0, 1, 2, 5]] = [2, 1, 1, 4]
  np.testing.assert_array_equal(hits_SV, expected)


def test_even_use_is_full_use():
  usage = tokenizer_step.code_usage(jnp.full((2, 16), 2.0), cells=32)
  np.testing.assert_array_equal(usage, [100.0, 100.0])


SCHEDULES = (lambda step: 0.5, lambda step: 0.25)


@functools.cache
def step_of(revive_every=0, accumulate=1):
  return jax.jit(
    tokenizer_step.make_step(
      TOKENIZER,
      optax.adam(1e-2),
      tokenizer_step.TokenizerLossConfig(revive_every=revive_every),
      ema_decay=0.9,
      seed=0,
      accumulate=accumulate,
      schedules=SCHEDULES,
    ),
    compiler_options=QUICK,
  )


def fresh():
  return TrainState.create(
    params(), optax.adam(1e-2), use_ema=True, code_hits_SV=jnp.zeros((2, 16))
  )


def batch():
  return {"image": np.uint8((np.asarray(images()) + 1) * 127.5)}


def test_the_first_step_counts_as_it_is_and_learns():
  state, first = step_of()(fresh(), batch())
  np.testing.assert_array_equal(state.code_hits_SV.sum(axis=1), [8.0, 32.0])
  for _ in range(20):
    state, last = step_of()(state, batch())
  assert last["l2"] < first["l2"]
  assert int(state.step) == 21


def test_a_step_in_parts_equals_one_in_one_piece():
  whole, expected = step_of()(fresh(), batch())
  state, metrics = step_of(accumulate=4)(fresh(), batch())
  # Adam's first step is the sign of a gradient: compare the moments.
  for actual, wanted in (
    (state.opt_state, whole.opt_state),
    (metrics, expected),
    (state.code_hits_SV, whole.code_hits_SV),
  ):
    jax.tree.map(golden_files.assert_close, actual, wanted)


def test_a_refused_step_leaves_no_trace():
  """Neither counted nor revived codes, though it is time to revive."""
  broken = jax.tree.map(jnp.copy, fresh().params)
  broken["params"]["post_quant_conv"]["bias"] *= jnp.nan
  state = fresh().replace(params=broken)
  after, metrics = step_of(revive_every=1)(state, batch())
  assert metrics["skipped"] == 1.0
  jax.tree.map(
    np.testing.assert_array_equal, after, state.replace(step=jnp.int32(1))
  )


def test_what_a_step_reports():
  _, metrics = step_of()(fresh(), batch())
  assert sorted(metrics) == [
    "code_usage", "grad_norm", "l2", "learning_rate", "loss", "psnr",
    "quantizer_loss", "residual_energy", "skipped", "update_norm",
    "weight_decay",
  ]  # fmt: skip
  assert (metrics["learning_rate"], metrics["weight_decay"]) == (0.5, 0.25)
  assert all(np.shape(x) == () for x in jax.tree.leaves(metrics))


def test_an_evaluation_sums_measures_of_real_images():
  shown = batch() | {"real": np.arange(8) < 5}
  sums = jax.jit(tokenizer_step.make_eval_step(TOKENIZER))(params(), shown)
  assert sums["count"] == 5
  image_BHW3 = np.float32(shown["image"][:5] / 127.5 - 1.0)
  reconstruction_BHW3, quantized = jax.jit(TOKENIZER.apply)(
    params(), image_BHW3
  )
  l2_B = np.square(reconstruction_BHW3 - image_BHW3).mean(axis=(1, 2, 3))
  np.testing.assert_allclose(sums["l2"], l2_B.sum(), rtol=1e-5)
  np.testing.assert_allclose(
    sums["quantizer_loss"], 5 * quantized.loss, rtol=1e-5
  )
  expected = np.sum(10 * np.log10(4 / l2_B))
  np.testing.assert_allclose(sums["psnr"], expected, rtol=1e-5)
