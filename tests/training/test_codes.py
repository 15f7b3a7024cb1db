"""Codes that live: counted, started from data, moved, and collapse named."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny_models

from var_jax.models import quantizer
from var_jax.models.tokenizer import Tokenizer
from var_jax.training import codes, tokenizer_step
from var_jax.training.codes import CollapseConfig
from var_jax.training.state import TrainState

CFG = tiny_models.tokenizer_config()
TOKENIZER = Tokenizer(CFG)
# Here a program takes longer to compile than to run.
QUICK = {"xla_backend_optimization_level": 0}
BELOW = 0.5


@functools.cache
def params():
  return tokenizer_step.init_params(TOKENIZER, jax.random.key(0, impl="rbg"))


def images():
  """Return noise around another level each, so that averages differ too."""
  noise = jax.random.uniform(jax.random.key(1), (8, 4, 4, 3), minval=-0.4)
  return noise / 2 + jnp.linspace(-0.7, 0.7, 8)[:, None, None, None]


def state_of(hits_SV, codebook_VZ=None, step=50):
  variables = params()
  if codebook_VZ is not None:
    variables = {"params": {**variables["params"], "codebook": codebook_VZ}}
  return TrainState.create(
    variables,
    optax.sgd(0.1),
    use_ema=False,
    code_hits_SV=hits_SV,
    explained_S=jnp.array([0.5, 0.5]),
    grace_V=jnp.zeros(16),
    rate=jnp.ones(()),
  ).replace(step=jnp.int32(step))


def codebook_of(state):
  return np.asarray(state.params["params"]["codebook"])


def latents(variables):
  return TOKENIZER.apply(variables, images(), method="to_latent")


def wanted_vectors(variables, scale=None):
  f_BhwZ = latents(variables)
  _, f_hats = TOKENIZER.apply(variables, f_BhwZ, method="quantize_latent")
  wanted_BLZ = quantizer.wanted_vectors(f_BhwZ, f_hats, CFG.schedule)
  if scale is not None:
    wanted_BLZ = wanted_BLZ[
      :, CFG.schedule.start(scale) : CFG.schedule.end(scale)
    ]
  return np.asarray(wanted_BLZ).reshape(-1, 4)


def assert_near(code, wanted_MZ):
  # A hundredth of the spread, five times over and more.
  assert np.abs(wanted_MZ - code).max(axis=1).min() < 0.1 * wanted_MZ.std()


def move(state, dead_V, wanted_by_S=None):
  moved = jax.jit(codes.move_dead, static_argnums=0, compiler_options=QUICK)
  key = jax.random.key(2)
  f_BhwZ = latents(state.params)
  return moved(TOKENIZER, state, f_BhwZ, key, dead_V, wanted_by_S)


def test_dead_codes_move_onto_wanted_vectors_and_living_ones_stay():
  before = state_of(jnp.ones((2, 16)).at[:, 3:6].set(0.0))
  after = move(before, codes.dead(before, BELOW))
  living = np.setdiff1d(np.arange(16), [3, 4, 5])
  np.testing.assert_array_equal(
    codebook_of(after)[living], codebook_of(before)[living]
  )
  for code in codebook_of(after)[3:6]:
    assert_near(code, wanted_vectors(params()))
  # They count as alive until the next look.
  assert not np.any(codes.dead(after, BELOW))


def test_codes_can_be_moved_to_what_one_scale_wants():
  before = state_of(jnp.ones((2, 16)).at[:, 3:9].set(0.0))
  after = move(before, codes.dead(before, BELOW), jnp.array([True, False]))
  coarse, fine = (wanted_vectors(params(), s) for s in (0, 1))
  for code in codebook_of(after)[3:9]:
    to_coarse = np.abs(coarse - code).max(axis=1).min()
    assert to_coarse < np.abs(fine - code).max(axis=1).min()


def start(rounds):
  started = jax.jit(
    codes.start_from_data, static_argnums=(0, 4), compiler_options=QUICK
  )
  state = state_of(jnp.zeros((2, 16)), step=0)
  f_BhwZ = latents(state.params)
  return started(TOKENIZER, state, f_BhwZ, jax.random.key(2), rounds)


def test_without_rounds_the_first_codes_are_vectors_of_the_data():
  for code in codebook_of(start(0)):
    assert_near(code, wanted_vectors(params()))


def test_a_round_of_k_means_moves_codes_to_the_means_of_their_residuals():
  state = start(0)
  f_BhwZ = latents(state.params)
  tokens_BL, _ = TOKENIZER.apply(state.params, f_BhwZ, method="quantize_latent")
  wanted_MZ, tokens_M = wanted_vectors(state.params), np.ravel(tokens_BL)
  after = codebook_of(start(1))
  for code in range(16):
    chosen = wanted_MZ[tokens_M == code]
    if len(chosen):
      np.testing.assert_allclose(after[code], chosen.mean(axis=0), atol=1e-5)
    else:
      assert_near(after[code], wanted_MZ)


def test_rounds_of_k_means_bring_codes_nearer():
  def apart(state):
    wanted_MZ = wanted_vectors(state.params)
    difference = wanted_MZ[:, None] - codebook_of(state)
    return np.square(difference).sum(-1).min(1).mean()

  assert apart(start(8)) < 0.9 * apart(start(0))


def test_k_means_needs_no_revival():
  """A step of a rate of next to nothing: the codes are those of the start."""
  step = tokenizer_step.make_step(
    TOKENIZER,
    optax.sgd(1e-9),
    tokenizer_step.TokenizerLossConfig(kmeans_rounds=2),
    ema_decay=0.0,
    seed=0,
  )
  state = state_of(jnp.zeros((2, 16)), far_codes(), step=0)
  state = state.replace(opt_state=optax.sgd(1e-9).init(state.params))
  batch = {"image": np.uint8((np.asarray(images()) + 1) * 127.5)}
  after, _ = jax.jit(step, compiler_options=QUICK)(state, {}, batch)
  assert np.abs(codebook_of(state)).min() >= 30.0
  assert np.abs(codebook_of(after)).max() < 10.0


def test_codes_are_counted_by_scale():
  tokens_BL = jnp.array([[3, 0, 0, 1, 2], [3, 5, 5, 5, 5]])
  hits_SV = codes.count_codes(tokens_BL, CFG.schedule, 16)
  expected = np.zeros((2, 16))
  expected[0, 3] = 2
  expected[1, [0, 1, 2, 5]] = [2, 1, 1, 4]
  np.testing.assert_array_equal(hits_SV, expected)


def test_even_use_is_full_use():
  usage = codes.code_usage(jnp.full((2, 16), 2.0), cells=32)
  np.testing.assert_array_equal(usage, [100.0, 100.0])


def test_perplexity_is_the_number_of_codes_in_even_use():
  hits_SV = jnp.zeros((4, 16)).at[0].set(3.0).at[1, :4].set(7.0)
  hits_SV = hits_SV.at[2, 0].set(5.0).at[3, :2].set(jnp.array([3.0, 1.0]))
  entropy = -(0.75 * np.log(0.75) + 0.25 * np.log(0.25))
  np.testing.assert_allclose(
    codes.perplexity(hits_SV), [16, 4, 1, np.exp(entropy)], rtol=1e-6
  )


def test_a_scale_explains_a_share_of_what_reaches_it():
  found = codes.explained(jnp.float32(8.0), jnp.array([4.0, 3.0, 4.5, 90.0]))
  np.testing.assert_allclose(found, [0.5, 0.25, -0.5, -1.0], rtol=1e-6)


@pytest.mark.parametrize(
  "step, hits_SV, explained_S, expected",
  [
    (20, [[1, 1, 1, 1], [1, 1, 1, 1]], [0.5, 0.5], [False, False]),
    (20, [[9, 0, 0, 0], [1, 1, 1, 1]], [0.5, 0.5], [True, False]),
    (20, [[1, 1, 1, 1], [1, 1, 1, 1]], [0.5, 0.001], [False, True]),
    (20, [[1, 1, 1, 1], [1, 1, 1, 1]], [-0.5, 0.5], [True, False]),
    (15, [[9, 0, 0, 0], [9, 0, 0, 0]], [0.0, 0.0], [False, False]),
    (0, [[0, 0, 0, 0], [0, 0, 0, 0]], [0.0, 0.0], [False, False]),
  ],
)
def test_a_scale_collapses_where_it_says_nothing(
  step, hits_SV, explained_S, expected
):
  state = state_of(jnp.array(hits_SV, jnp.float32), step=step).replace(
    explained_S=jnp.array(explained_S)
  )
  found = codes.collapsed(CollapseConfig(every=10), state)
  np.testing.assert_array_equal(found, expected)
  assert not np.any(codes.collapsed(CollapseConfig(every=0), state))


def test_the_least_used_eighth_can_move_where_none_is_dead():
  hits_SV = jnp.tile(jnp.arange(10.0, 26.0)[::-1], (2, 1))
  state = state_of(hits_SV)
  assert not np.any(codes.dead(state, 0.03))
  np.testing.assert_array_equal(
    np.flatnonzero(codes.least_used(state, 0.03)), [14, 15]
  )
  many = state_of(hits_SV.at[:, :5].set(0.0))
  np.testing.assert_array_equal(
    np.flatnonzero(codes.least_used(many, 0.03)), np.arange(5)
  )


def train(policy, steps, codebook_VZ, learning_rate=1e-6):
  """Return the state and the metrics of each step."""
  step = jax.jit(
    tokenizer_step.make_step(
      TOKENIZER,
      optax.adam(learning_rate),
      tokenizer_step.TokenizerLossConfig(),
      ema_decay=0.0,
      seed=0,
      collapse=CollapseConfig(policy=policy, every=10),
    ),
    compiler_options=QUICK,
  )
  state = state_of(jnp.zeros((2, 16)), codebook_VZ, step=0)
  state = state.replace(opt_state=optax.adam(learning_rate).init(state.params))
  batch = {"image": np.uint8((np.asarray(images()) + 1) * 127.5)}
  metrics = []
  for _ in range(steps):
    state, found = step(state, {}, batch)
    metrics.append(jax.device_get(found))
  return state, metrics


def far_codes():
  """Return codes that are no use: one for all, and none nearer than it."""
  return 30.0 + jnp.linspace(0.0, 1.0, 16)[:, None] * jnp.ones(4)


def test_a_provoked_collapse_is_named_and_moved_codes_end_it():
  _, left = train("report", 41, far_codes())
  assert [m["collapsed"] for m in left][10::10] == [{"0": 1.0, "1": 1.0}] * 4
  assert not any(any(m["collapsed"].values()) for m in left[1:10])
  state, restored = train("revive", 61, far_codes())
  assert restored[10]["collapsed"] == {"0": 1.0, "1": 1.0}
  assert restored[60]["collapsed"] == {"0": 0.0, "1": 0.0}
  assert np.all(codes.perplexity(state.code_hits_SV) > 2.0)
  assert np.all(state.explained_S > 0.01)


def test_a_collapse_can_halve_the_rate():
  state, metrics = train("lower", 31, far_codes(), learning_rate=1e-3)
  assert [m["rate"] for m in metrics[8:12]] == [1.0, 1.0, 0.5, 0.5]
  assert metrics[30]["rate"] == state.rate == 0.125
  assert metrics[10]["update_norm"] < 0.6 * metrics[9]["update_norm"]


@pytest.mark.parametrize(
  "fields, message",
  [
    (dict(policy="pray"), "policy 'pray' is not known"),
    (dict(every=-1), "every -1 is negative"),
    (dict(min_explained=1.0), "min_explained 1.0 is not below 1"),
    (dict(min_perplexity=-2.0), r"min_perplexity -2.0 is not in \[0, inf\)"),
  ],
)
def test_what_makes_no_sense_is_refused(fields, message):
  with pytest.raises(ValueError, match=message):
    CollapseConfig(**fields)
