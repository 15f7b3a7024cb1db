"""Tokenizer training: code counts, revival of dead codes."""

import functools

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
  return jax.jit(tokenizer_step._revive, static_argnums=(0, 1))(
    TOKENIZER, LOSS, state, images(), jax.random.key(2)
  )


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


def test_the_first_step_counts_as_it_is_and_learns():
  optimizer = optax.adam(1e-2)
  step = jax.jit(
    tokenizer_step.make_step(
      TOKENIZER,
      optimizer,
      tokenizer_step.TokenizerLossConfig(),
      ema_decay=0.0,
      seed=0,
    )
  )
  state = TrainState.create(
    params(), optimizer, use_ema=False, code_hits_SV=jnp.zeros((2, 16))
  )
  batch = {"image": np.uint8((np.asarray(images()) + 1) * 127.5)}
  state, first = step(state, batch)
  np.testing.assert_array_equal(state.code_hits_SV.sum(axis=1), [8.0, 32.0])
  for _ in range(20):
    state, last = step(state, batch)
  assert last["l2"] < first["l2"]
  assert int(state.step) == 21
