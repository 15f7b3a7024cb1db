"""The sampler against recorded runs, and the laws it lives by."""

import functools
import re

import golden_files
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from var_jax.generation import by_layer, sampler, step
from var_jax.generation import logits as logits_lib
from var_jax.generation.sampler import Options

GREEDY = dict(top_k=1, top_p=0.0)
SCALES = golden_files.TOKENIZER.schedule


def generate(variant, labels, seed=0, guided=True, **how):
  options = Options(
    **{k: how.pop(k) for k in list(how) if k in Options._fields}
  )
  labels_B = jnp.array(labels)
  keys_B = sampler.image_keys(jax.random.key(seed), len(labels))
  return sampler.generate(
    *golden_files.pair(variant), labels_B, keys_B, options, guided=guided, **how
  )


@pytest.mark.parametrize("variant", "ABC")
@pytest.mark.parametrize("guidance", [0.0, 1.5, 4.0])
def test_greedy_run_equals_the_recorded_one(variant, guidance):
  recorded = golden_files.arrays(f"var_{variant}_ar.npz")
  name = f"cfg{guidance}_"
  sample = generate(variant, [3, 7], guidance=guidance, **GREEDY)
  np.testing.assert_array_equal(sample.tokens_BL, recorded[name + "ids"])
  golden_files.assert_close(
    sample.images_BHW3, golden_files.to_ours(recorded[name + "image"])
  )


@pytest.mark.parametrize("variant", "ABC")
def test_unconditional_greedy_run_equals_the_recorded_one(variant):
  recorded = golden_files.arrays(f"var_{variant}_ar.npz")
  sample = generate(variant, [-1, -1], guidance=1.5, **GREEDY)
  np.testing.assert_array_equal(sample.tokens_BL, recorded["uncond_cfg1.5_ids"])


def follow(
  variant, labels, options, tokens=None, gumbel=None, recorded_f_hats=None
):
  """Take the recorded tokens or mixture noise; return logits, f_hats, inputs.

  Logits are (raw of both halves, guided, filtered), concatenated over scales.
  """
  models, params = golden_files.pair(variant)
  state, modulation = sampler.start_program(
    models, params, jnp.array(labels), True
  )
  raws, guideds, filtereds, f_hats, inputs = [], [], [], [], []
  take = jax.jit(step.scale_step, static_argnums=(0, 1, 7))
  var_step = jax.jit(
    functools.partial(models.var.apply, method="step"), static_argnums=1
  )
  for s in range(len(SCALES)):
    tokens_slice = slice(SCALES.start(s), SCALES.end(s))
    inputs_BlZ = models.tokenizer.apply(
      params.tokenizer, state.f_hat_BhwZ, s, method="next_input"
    )
    inputs.append(inputs_BlZ)
    raw, _ = var_step(
      params.var, s, jnp.tile(inputs_BlZ, (2, 1, 1)), modulation, state.cache
    )
    raws.append(raw)
    guideds.append(
      logits_lib.guide(*jnp.split(raw, 2), options.guidance * SCALES.ratio(s))
    )
    # Noise that lets the recorded token win, whatever its logit.
    wins = jnp.zeros((2, raw.shape[1], raw.shape[2]))
    if tokens is not None:
      wins = 1e9 * jax.nn.one_hot(tokens[:, tokens_slice], raw.shape[2])
    mix = None if gumbel is None else gumbel[:, tokens_slice]
    noise = step.Noise(wins, mix)
    state, drawn, filtered = take(
      models, s, params, state, modulation, options, noise, True, None
    )
    if tokens is not None:
      np.testing.assert_array_equal(drawn, tokens[:, tokens_slice])
    filtereds.append(filtered)
    f_hats.append(state.f_hat_BhwZ)
    if recorded_f_hats is not None:
      recorded_f_hat = jnp.asarray(golden_files.nhwc(recorded_f_hats[s]))
      state = state._replace(f_hat_BhwZ=recorded_f_hat)
  joined = [np.concatenate(x, axis=1) for x in (raws, guideds, filtereds)]
  return *joined, f_hats, np.concatenate(inputs[1:], axis=1)


@pytest.mark.parametrize("variant", "ABC")
@pytest.mark.parametrize("guidance", [0.0, 1.5, 4.0])
def test_every_array_of_a_greedy_run_equals_the_recorded_one(variant, guidance):
  recorded = golden_files.arrays(f"var_{variant}_ar.npz")
  name = f"cfg{guidance}_"
  raw, guided, _, f_hats, inputs = follow(
    variant, [3, 7], Options(guidance, **GREEDY)
  )
  golden_files.assert_close(raw, recorded[name + "raw_logits"])
  golden_files.assert_close(guided, recorded[name + "logits"])
  golden_files.assert_close(inputs, recorded[name + "next"])
  for ours, f_hat in zip(f_hats, recorded[name + "fhat"], strict=True):
    golden_files.assert_close(ours, golden_files.nhwc(f_hat))
  top = np.sort(guided, axis=-1)
  golden_files.assert_close(
    top[..., -1] - top[..., -2], recorded[name + "margin"]
  )


@pytest.mark.parametrize("variant", "ABC")
def test_unconditional_logits_equal_the_recorded_ones(variant):
  recorded = golden_files.arrays(f"var_{variant}_ar.npz")
  _, guided, *_ = follow(variant, [-1, -1], Options(1.5, **GREEDY))
  golden_files.assert_close(guided, recorded["uncond_cfg1.5_logits"])
  top = np.sort(guided, axis=-1)
  golden_files.assert_close(
    top[..., -1] - top[..., -2], recorded["uncond_cfg1.5_margin"]
  )


def assert_filtered_close(ours, recorded):
  np.testing.assert_array_equal(np.isfinite(ours), np.isfinite(recorded))
  kept = np.isfinite(recorded)
  golden_files.assert_close(ours[kept], recorded[kept])


def test_filtered_logits_along_recorded_draws_equal_the_recorded_ones():
  """torch's generator is not reproduced: its draws are fed in."""
  recorded = golden_files.arrays("var_A_ar.npz")
  _, guided, filtered, *_ = follow(
    "A",
    [1, 2],
    Options(1.5, 20, 0.9),
    tokens=recorded["tk20tp0.9_ids"],
  )
  golden_files.assert_close(guided, recorded["tk20tp0.9_logits"])
  assert_filtered_close(filtered, recorded["tk20tp0.9_masked_logits"])


def test_smooth_run_with_recorded_noise_equals_the_recorded_one():
  """Each scale starts from the recorded f_hat of the one before.

  The temperature, 0.0135 at the last scale, divides every rounding error, and
  the next scale would divide the sum of them again.
  """
  recorded = golden_files.arrays("var_A_ar.npz")
  models, params = golden_files.pair("A")
  _, guided, filtered, f_hats, _ = follow(
    "A",
    [1, 2],
    Options(1.5, 20, 0.9),
    gumbel=jnp.asarray(recorded["smooth_gumbel"]),
    recorded_f_hats=recorded["smooth_fhat"],
  )
  golden_files.assert_close(guided, recorded["smooth_logits"])
  assert_filtered_close(filtered, recorded["smooth_masked_logits"])
  for ours, f_hat in zip(f_hats, recorded["smooth_fhat"], strict=True):
    golden_files.assert_close(ours, golden_files.nhwc(f_hat))
  image = sampler.decode(models, params, f_hats[-1])
  golden_files.assert_close(
    image, golden_files.to_ours(recorded["smooth_image"])
  )
  for s in range(len(SCALES)):
    l = slice(SCALES.start(s), SCALES.end(s))
    weights = logits_lib.smooth_weights(
      filtered[:, l], recorded["smooth_gumbel"][:, l], SCALES.ratio(s)
    )
    h_BlZ = models.tokenizer.apply(params.tokenizer, weights, method="mix")
    golden_files.assert_close(h_BlZ, recorded["smooth_h"][:, l])


def test_an_image_is_the_same_whatever_batch_it_is_drawn_in():
  labels = [3, 7, -1, 0, 9]
  together = generate("A", labels, seed=5, guidance=2.0, top_k=40, top_p=0.9)
  key = jax.random.key(5)
  models, params = golden_files.pair("A")
  for i in (0, 2, 4):
    alone = sampler.generate(
      models,
      params,
      jnp.array(labels[i : i + 1]),
      jax.random.fold_in(key, i)[None],
      Options(2.0, 40, 0.9),
    )
    np.testing.assert_array_equal(alone.tokens_BL[0], together.tokens_BL[i])
    np.testing.assert_allclose(
      alone.images_BHW3[0], together.images_BHW3[i], rtol=0, atol=1e-5
    )


def test_one_key_means_fold_in_of_the_image_number():
  key = jax.random.key(3)
  keys_B = sampler.image_keys(key, 4)
  expected = [jax.random.fold_in(key, i) for i in range(4)]
  assert jnp.all(keys_B == jnp.stack(expected))
  assert jnp.all(sampler.image_keys(keys_B, 4) == keys_B)


def test_guidance_zero_equals_leaving_the_unconditional_half_out():
  both = generate("A", [3, 7], guidance=0.0, top_k=40, top_p=0.9)
  half = generate("A", [3, 7], guidance=0.0, top_k=40, top_p=0.9, guided=False)
  np.testing.assert_array_equal(both.tokens_BL, half.tokens_BL)


def test_top_k_of_one_draws_the_same_from_any_key():
  first = generate("A", [3, 7], seed=0, **GREEDY)
  second = generate("A", [3, 7], seed=1, **GREEDY)
  np.testing.assert_array_equal(first.tokens_BL, second.tokens_BL)
  free = [
    generate("A", [3, 7], seed=seed, top_k=0, top_p=0.0) for seed in (0, 1)
  ]
  assert np.any(free[0].tokens_BL != free[1].tokens_BL)


def test_images_follow_from_the_tokens_unless_smooth():
  models, params = golden_files.pair("A")
  decode = jax.jit(functools.partial(models.tokenizer.apply, method="decode"))
  sharp = generate("A", [3, 7], top_k=0, top_p=0.0)
  golden_files.assert_close(
    decode(params.tokenizer, sharp.tokens_BL), sharp.images_BHW3
  )
  smooth = generate("A", [3, 7], top_k=0, top_p=0.0, smooth=True)
  difference = decode(params.tokenizer, smooth.tokens_BL) - smooth.images_BHW3
  assert np.abs(difference).max() > 1e-2


def test_changing_a_number_compiles_nothing_new():
  programs = by_layer.LAYER_PROGRAMS.values()
  programs = (*programs, by_layer.leave_program)
  generate("A", [3, 7], guidance=1.0, top_k=5, top_p=0.5)
  sizes = [program._cache_size() for program in programs]
  assert max(sizes) > 0
  generate("A", [1, 2], guidance=3.0, top_k=9, top_p=0.9)
  assert [program._cache_size() for program in programs] == sizes


def test_cache_and_f_hat_are_donated():
  models, params = golden_files.pair("A")
  labels_B = jnp.array([3, 7])
  state, modulation = sampler.start_program(models, params, labels_B, True)
  options = Options(1.5, 0, 0.0)
  keys_B = sampler.image_keys(jax.random.key(0), 2)
  sampler.scale_program(
    models, 1, True, False, params, state, modulation, keys_B, options, None
  )
  assert state.cache.k_RBLD.is_deleted() and state.f_hat_BhwZ.is_deleted()


def test_scale_programs_have_no_mask_and_every_dot_says_its_precision():
  """Lowered for TPU, where an unmarked float32 dot runs in bfloat16 passes."""
  models, params = golden_files.pair("A")
  state, modulation = jax.eval_shape(
    lambda: sampler.start_program(models, params, jnp.array([3, 7]), True)
  )
  keys_B = jax.eval_shape(lambda: sampler.image_keys(jax.random.key(0), 2))
  traced = sampler.scale_program.trace(
    models, 2, True, False, params, state, modulation, keys_B,
    Options(1.5, 0, 0.0), None,
  )  # fmt: skip
  text = traced.lower(lowering_platforms=("tpu",)).as_text()
  # A masked softmax selects among attention logits, [2B, N, l, T].
  assert not re.search(r"stablehlo.select.*tensor<4x4x9x14xf32>", text)
  assert "tensor<4x4x9x14xf32>" in text
  heavy = [
    line
    for line in text.splitlines()
    if "stablehlo.dot_general" in line or "stablehlo.convolution" in line
  ]
  assert heavy
  for line in heavy:
    assert line.count("HIGHEST") == 2, line
