"""Ways of drawing the same numbers, and options that change them."""

import dataclasses

import golden_files
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import var_jax
from var_jax.generation import by_layer, memory, sampler, step
from var_jax.generation.sampler import Options
from var_jax.models.transformer import KVCache

MODELS, PARAMS = golden_files.pair("A")
SCALES = MODELS.var.cfg.schedule
FREE = Options(2.0, 40, 0.9)
KEY = jax.random.key(5)


def generate(labels, *, keys_B=None, options=FREE, models=MODELS, **how):
  labels_B = jnp.array(labels)
  if keys_B is None:
    keys_B = sampler.image_keys(KEY, len(labels_B))
  return sampler.generate(models, PARAMS, labels_B, keys_B, options, **how)


def drawn(labels, **how):
  """Return the tokens of all scales, and f_hat of the last."""
  labels_B = jnp.array(labels)
  keys_B = sampler.image_keys(KEY, len(labels_B))
  scales = list(
    sampler.draw_scales(MODELS, PARAMS, labels_B, keys_B, FREE, **how)
  )
  tokens = [scale.tokens_Bl for scale in scales]
  return np.concatenate(tokens, axis=1), scales[-1].f_hat_BhwZ


def compiled() -> int:
  programs = by_layer.LAYER_PROGRAMS.values()
  programs = (*programs, by_layer.leave_program, sampler.scale_program)
  return sum(program._cache_size() for program in programs)


def margins(labels, options) -> np.ndarray:
  """Return by how much each drawn token [B, L] beat the next one."""
  labels_B = jnp.array(labels)
  keys_B = sampler.image_keys(KEY, len(labels_B))
  state, modulation = step.start(MODELS, PARAMS, labels_B, True)
  found = []
  for s in range(len(SCALES)):
    shape_lV = (SCALES.end(s) - SCALES.start(s), MODELS.var.cfg.vocab_size)
    keys_s = [jax.random.fold_in(jax.random.fold_in(k, s), 0) for k in keys_B]
    noise_BlV = jnp.stack([jax.random.gumbel(k, shape_lV) for k in keys_s])
    state, _, logits_BlV = step.scale_step(
      MODELS, s, PARAMS, state, modulation, options,
      step.Noise(noise_BlV, None), True, None,
    )  # fmt: skip
    ordered = np.sort(logits_BlV + noise_BlV, axis=-1)
    found.append(ordered[..., -1] - ordered[..., -2])
  return np.concatenate(found, axis=1)


def assert_same_draws(ours_BL, theirs_BL, labels):
  """Name each draw that differs, with the margin that rounding overcame."""
  different = np.argwhere(np.asarray(ours_BL) != np.asarray(theirs_BL))
  if len(different):
    margins_BL = margins(labels, FREE)
    flipped = {(int(b), int(i)): margins_BL[b, i] for b, i in different}
    raise AssertionError(f"draws and their margins: {flipped}")


@pytest.mark.parametrize(
  "how",
  [
    dict(),
    dict(guided=(1, 3), smooth=True),
  ],
  ids=str,
)
def test_one_program_draws_what_one_a_scale_draws(how):
  labels = [3, -1, 7]
  fused = generate(labels, fused=True, **how)
  for one_each in (False, True):
    tokens_BL, f_hat_BhwZ = drawn(labels, layer_programs=one_each, **how)
    if not how:
      assert_same_draws(fused.tokens_BL, tokens_BL, labels)
    np.testing.assert_array_equal(fused.tokens_BL, tokens_BL)
    image_BHW3 = sampler.decode(MODELS, PARAMS, f_hat_BhwZ)
    golden_files.assert_close(fused.images_BHW3, image_BHW3)


def test_one_image_is_that_of_a_batch_of_64():
  labels = [i % 11 - 1 for i in range(64)]
  together = generate(labels, fused=True)
  keys_B = sampler.image_keys(KEY, 64)
  alone = [
    generate(labels[i : i + 1], keys_B=keys_B[i : i + 1], fused=False)
    for i in range(64)
  ]
  assert_same_draws(
    np.concatenate([x.tokens_BL for x in alone]), together.tokens_BL, labels
  )
  golden_files.assert_close(
    np.concatenate([x.images_BHW3 for x in alone]), together.images_BHW3
  )


@pytest.mark.parametrize("rows", [1, 4])
def test_a_batch_decoded_in_parts_is_the_batch_decoded_whole(rows):
  f_hat_BhwZ = jax.random.normal(KEY, (6, *SCALES.grid, 8))
  whole = sampler.decode(MODELS, PARAMS, f_hat_BhwZ)
  in_parts = sampler.decode(
    MODELS._replace(decode_rows=rows), PARAMS, f_hat_BhwZ
  )
  golden_files.assert_close(in_parts, whole)


def test_parts_are_equal_and_no_larger_than_allowed():
  parts = {(6, 4): 2, (7, 4): 7, (64, 32): 2, (8, 8): 1, (5, 0): 1, (1, 9): 1}
  for (rows, limit), expected in parts.items():
    assert step._parts(rows, limit) == expected


def test_guidance_in_all_scales_is_guidance():
  every = generate([3, 7], guided=(0, len(SCALES)))
  np.testing.assert_array_equal(every.tokens_BL, generate([3, 7]).tokens_BL)


def test_guidance_in_a_range_ends_with_it_and_begins_with_it():
  """Up to a range's end the tokens are those of guidance, from its start."""
  greedy = Options(4.0, 1, 0.0)
  guided = generate([3, 7], options=greedy).tokens_BL
  plain = generate([3, 7], options=greedy, guided=False).tokens_BL
  early = generate([3, 7], options=greedy, guided=(0, 3)).tokens_BL
  late = generate([3, 7], options=greedy, guided=(2, 4)).tokens_BL
  np.testing.assert_array_equal(
    early[:, : SCALES.end(2)], guided[:, : SCALES.end(2)]
  )
  np.testing.assert_array_equal(
    late[:, : SCALES.end(1)], plain[:, : SCALES.end(1)]
  )
  # The coarsest scale has no guidance in either.
  assert np.any(early[:, SCALES.start(3) :] != guided[:, SCALES.start(3) :])
  assert np.any(late[:, SCALES.start(2) :] != plain[:, SCALES.start(2) :])


def test_after_a_range_there_is_no_unconditional_half():
  drawn = sampler.draw_scales(
    MODELS, PARAMS, jnp.array([3, 7]), sampler.image_keys(KEY, 2), FREE,
    guided=(0, 2),
  )  # fmt: skip
  assert len(list(drawn)) == len(SCALES)
  state, modulation = step.start(MODELS, PARAMS, jnp.array([3, 7]), True)
  halved, halved_modulation = step.conditional_half(state, modulation)
  assert state.cache.k_RBLD.shape[1] == 4
  assert halved.cache.k_RBLD.shape[1] == 2
  alone = step.start(MODELS, PARAMS, jnp.array([3, 7]), False)[1]
  jax.tree.map(np.testing.assert_array_equal, halved_modulation, alone)


def test_temperature_divides_the_guided_logits_before_the_filters():
  noise_BlV = jnp.zeros((2, 1, MODELS.var.cfg.vocab_size))
  found = []
  for temperature in (1.0, jnp.array([0.25, 1.0, 1.0, 1.0])):
    state, modulation = step.start(MODELS, PARAMS, jnp.array([3, 7]), True)
    _, _, logits_BlV = step.scale_step(
      MODELS, 0, PARAMS, state, modulation, Options(2.0, 0, 0.0, temperature),
      step.Noise(noise_BlV, None), True, None,
    )  # fmt: skip
    found.append(np.asarray(logits_BlV))
  np.testing.assert_allclose(found[1], 4.0 * found[0], rtol=1e-6)


def test_a_temperature_a_scale_acts_on_that_scale():
  cold = Options(2.0, 0, 0.0, jnp.array([1.0, 1.0, 1e-6, 1.0]))
  ours = generate([3, 7], options=cold).tokens_BL
  warm = generate([3, 7], options=Options(2.0, 0, 0.0)).tokens_BL
  cut = SCALES.start(2)
  np.testing.assert_array_equal(ours[:, :cut], warm[:, :cut])
  other_key = sampler.image_keys(jax.random.key(6), 2)
  given = tuple(
    step.Given(ours[:, SCALES.start(s) : SCALES.end(s)], jnp.bool_([s < 2]))
    for s in range(len(SCALES))
  )
  # Cold, any key draws the likeliest token of what came before.
  again = generate([3, 7], options=cold, keys_B=other_key, given=given)
  scale = slice(SCALES.start(2), SCALES.end(2))
  np.testing.assert_array_equal(again.tokens_BL[:, scale], ours[:, scale])


@pytest.mark.parametrize("batch_size", [1, 3, 5, 8])
def test_a_queue_draws_the_same_whatever_its_batches(batch_size):
  model = var_jax.Model(MODELS, PARAMS)
  labels = [3, 7, -1, 0, 9]
  whole = model.sample(labels, KEY, top_k=40)
  batches = list(model.sample_all(labels, KEY, batch_size, top_k=40))
  sizes = [len(batch.tokens_BL) for batch in batches]
  assert sum(sizes) == 5 and set(sizes[:-1]) <= {batch_size}
  np.testing.assert_array_equal(
    np.concatenate([batch.tokens_BL for batch in batches]), whole.tokens_BL
  )


def test_a_queue_compiles_one_program_for_a_last_batch_that_is_smaller():
  model = var_jax.Model(MODELS, PARAMS)
  next(iter(model.sample_all([1] * 4, KEY, 4, top_k=40)))
  programs = compiled()
  list(model.sample_all([1] * 10, KEY, 4, top_k=40))
  assert compiled() == programs


def test_the_estimate_of_memory_covers_what_is_compiled():
  """Of what a further image adds; both with the decoder in parts of one."""
  models = MODELS._replace(decode_rows=1)

  def held(batch):
    found = sampler.fused_program.lower(
      models, PARAMS, jnp.zeros(batch, jnp.int32),
      sampler.image_keys(KEY, batch), FREE, None, guided=True, smooth=False,
    ).compile().memory_analysis()  # fmt: skip
    return found.output_size_in_bytes + found.temp_size_in_bytes

  each = (held(24) - held(8)) / 16
  assert 0.8 * each < memory.of_image(models) < 3 * each


def test_parameters_count_as_what_a_device_holds():
  sizes = [x.nbytes for x in jax.tree.leaves(PARAMS)]
  on_device = jax.tree.map(jnp.asarray, PARAMS)
  assert memory.of_parameters(on_device) == sum(sizes)


def test_more_images_than_fit_are_refused_with_the_estimate(monkeypatch):
  model = var_jax.Model(MODELS, PARAMS)
  limit = memory.of_parameters(PARAMS) + 10 * memory.of_image(MODELS)
  monkeypatch.setattr(memory, "of_device", lambda: limit)
  assert len(model.sample([1] * 10, KEY).tokens_BL) == 10
  with pytest.raises(ValueError, match="^11 images .* draw at most 10 at once"):
    model.sample([1] * 11, KEY)


def test_the_cache_is_in_the_models_dtype_with_the_width_last():
  cfg = dataclasses.replace(MODELS.var.cfg, dtype="bfloat16")
  cache = KVCache.create(cfg, 2)
  assert cache.k_RBLD.shape == (3, 2, 30, 32)
  assert {c.dtype for c in cache} == {jnp.dtype("bfloat16")}


@pytest.mark.parametrize(
  "how, message",
  [
    (dict(temperature=0), "temperature 0.0 is not above 0"),
    (dict(temperature=[1, 1]), "one number, or 4"),
    (dict(temperature=float("nan")), "temperature nan"),
    (dict(guided_scales=(0, 5)), r"\(0, 5\) are not within the 4 scales"),
    (dict(guided_scales=(2, 2)), r"first < stop <= 4"),
    (dict(guided_scales=(-1, 2)), r"\(-1, 2\)"),
    (dict(guided_scales=3), "3 are no two scales"),
    (dict(guided_scales=(0, 1.5)), "are no two scales"),
  ],
  ids=str,
)
def test_options_that_make_no_sense_are_errors(how, message):
  model = var_jax.Model(MODELS, PARAMS)
  with pytest.raises(ValueError, match=message) as error:
    model.sample([1], KEY, **how)
  assert "\n" not in str(error.value)
  with pytest.raises(ValueError, match=message):
    model.stream([1], KEY, **how)


@pytest.mark.parametrize("size", [0, -1, 1.5, "4"])
def test_batch_sizes_that_make_no_sense_are_errors(size):
  model = var_jax.Model(MODELS, PARAMS)
  with pytest.raises(ValueError, match="batch size .* is no number of 1"):
    next(model.sample_all([1], KEY, size))
