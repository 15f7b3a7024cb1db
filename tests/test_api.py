"""The public API: what goes in, what comes out, and what is refused."""

import dataclasses
import functools
import os
import subprocess
import sys

import golden_files
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import var_jax
from var_jax.checkpoints import store, weights
from var_jax.checkpoints.description import Description
from var_jax.generation import sampler

KEY = jax.random.key(0)


@functools.cache
def model():
  models, params = golden_files.pair("A")
  return var_jax.Model(models, params)


def images():
  recorded = golden_files.arrays("vae_share4_znorm0.npz")
  return golden_files.nhwc(recorded["img"])


def test_config_describes_both_models():
  assert model().config.tokenizer == golden_files.TOKENIZER
  assert model().config.transformer == golden_files.VARIANTS["A"]


def test_encode_and_decode_equal_the_recorded_run():
  recorded = golden_files.arrays("vae_share4_znorm0.npz")
  tokens_BL = model().encode(images())
  expected = np.concatenate([recorded[f"ids_{s}"] for s in range(4)], axis=1)
  np.testing.assert_array_equal(tokens_BL, expected)
  assert tokens_BL.dtype == jnp.int32
  golden_files.assert_close(
    model().decode(tokens_BL[:2]), golden_files.nhwc(recorded["recon_last"])
  )


def test_other_scale_lists_encode_images_of_other_shapes():
  recorded = golden_files.arrays("vae_share4_znorm0.npz")
  scales = [1, (2, 3), (3, 4), (4, 6)]
  tokens_BL = model().encode(golden_files.nhwc(recorded["rect_img"]), scales)
  expected = [recorded[f"rect_ids_{s}"] for s in range(4)]
  np.testing.assert_array_equal(tokens_BL, np.concatenate(expected, axis=1))
  golden_files.assert_close(
    model().decode(tokens_BL, scales),
    golden_files.nhwc(recorded["rect_recon"]),
  )


def test_logits_equal_the_recorded_run():
  recorded = golden_files.arrays("var_A_train.npz")
  labels_B = np.where(recorded["labels"] == 10, -1, recorded["labels"])
  logits_BLV = model().logits(labels_B, recorded["gt_ids"].astype(np.int32))
  golden_files.assert_close(logits_BLV, recorded["logits"])


def test_the_last_preview_is_the_sample():
  sample = model().sample([3, -1], KEY, top_k=50)
  previews = list(model().stream([3, -1], KEY, top_k=50))
  assert [preview.scale for preview in previews] == [0, 1, 2, 3]
  tokens = [preview.tokens_Bl for preview in previews]
  np.testing.assert_array_equal(
    np.concatenate(tokens, axis=1), sample.tokens_BL
  )
  np.testing.assert_array_equal(previews[-1].preview_BHW3, sample.images_BHW3)


def test_a_preview_outlives_the_next_scale():
  first, *_ = list(model().stream([3, 7], KEY))
  assert np.isfinite(first.preview_BHW3).all()


def test_a_top_k_beyond_the_vocabulary_is_off():
  first, second = (model().sample([3], KEY, top_k=k) for k in (0, 10**10))
  np.testing.assert_array_equal(first.tokens_BL, second.tokens_BL)


def test_an_old_style_key_draws_what_the_new_one_draws():
  first, second = (
    model().sample([3], key, top_k=9)
    for key in (jax.random.key(4), jax.random.PRNGKey(4))
  )
  np.testing.assert_array_equal(first.tokens_BL, second.tokens_BL)


def test_edit_keeps_what_it_is_told_to():
  keep_hw = np.zeros((4, 4), bool)
  keep_hw[:2] = True
  sample = model().edit(images()[:2], keep_hw, [3, -1], KEY)
  given = model().encode(images()[:2])
  last = slice(14, 30)
  kept = keep_hw.ravel()
  np.testing.assert_array_equal(
    sample.tokens_BL[:, last][:, kept], given[:, last][:, kept]
  )
  assert np.any(sample.tokens_BL[:, last][:, ~kept] != given[:, last][:, ~kept])
  np.testing.assert_allclose(
    model().decode(sample.tokens_BL), sample.images_BHW3, atol=1e-5
  )


def test_to_uint8_rounds_and_clips():
  values = np.array([-2.0, -1.0, 0.0, 0.0039, 1.0, 3.0])
  np.testing.assert_array_equal(
    var_jax.to_uint8(values), [0, 0, 128, 128, 255, 255]
  )
  levels = np.arange(256, dtype=np.uint8)
  np.testing.assert_array_equal(var_jax.to_uint8(levels / 127.5 - 1.0), levels)


BAD_DRAWS = [
  (dict(labels_B=[10]), r"label 10 is outside 0\.\.9"),
  (dict(labels_B=[-2]), "label -2 is outside"),
  (dict(labels_B=[]), "labels are empty"),
  (dict(labels_B=[1.5]), "labels are float64"),
  (dict(labels_B=3), "give integers"),
  (dict(guidance=float("nan")), "guidance nan is not finite"),
  (dict(guidance=float("inf")), "guidance inf is not finite"),
  (dict(guidance=1e39), r"guidance 1e\+39 is not finite in float32"),
  (dict(top_k=-1), "top_k -1 is not a count"),
  (dict(top_k=2.5), "top_k 2.5 is not a count"),
  (dict(top_k=float("inf")), "top_k inf is not a count"),
  (dict(top_p=1.1), r"top_p 1.1 is not in \[0, 1\]"),
  (dict(top_p=-0.1), "top_p -0.1"),
  (dict(top_p=float("nan")), "top_p nan"),
  (dict(key=jax.random.split(KEY, 3)), r"keys of shape \(3,\) do not match"),
  (dict(key=0), "key 0 is no JAX key"),
  (dict(top_k="a"), "top_k 'a' is not a number"),
  (dict(top_p=None), "top_p None is not a number"),
  (dict(guidance="a"), "guidance 'a' is not a number"),
  (dict(labels_B=[[1], [2, 3]]), "labels are no array"),
  (dict(key=np.zeros(2)), "key is float64"),
]


@pytest.mark.parametrize("change, message", BAD_DRAWS)
@pytest.mark.parametrize("method", ["sample", "stream"])
def test_draws_that_make_no_sense_are_errors(method, change, message):
  arguments = dict(labels_B=[1, 2], key=KEY) | change
  with pytest.raises(ValueError, match=message):
    getattr(model(), method)(**arguments)


@pytest.mark.parametrize(
  "change, message",
  [
    (dict(method="repaint"), "method 'repaint' is not known"),
    (dict(keep_hw=np.ones((4, 5), bool)), r"not bool \(4, 4\)"),
    (dict(keep_hw=np.ones((4, 4))), "keep_hw is float64"),
    (dict(labels_B=[1, 2, 3]), "3 labels do not match 2 images"),
    (dict(images_BHW3=np.zeros((2, 64, 65, 3))), "do not fit scales"),
  ],
)
def test_edits_that_make_no_sense_are_errors(change, message):
  arguments = dict(
    images_BHW3=images()[:2],
    keep_hw=np.ones((4, 4), bool),
    labels_B=[1, 2],
    key=KEY,
  )
  with pytest.raises(ValueError, match=message):
    model().edit(**(arguments | change))


@pytest.mark.parametrize(
  "call, message",
  [
    (lambda m: m.encode(np.zeros((1, 48, 64, 3))), r"\(48, 64\) pixels"),
    (lambda m: m.encode("x"), "images are no array"),
    (lambda m: m.encode(np.zeros((64, 64, 3))), r"give \[B, H, W, 3\]"),
    (lambda m: m.encode(np.zeros((1, 64, 64, 3), np.uint8)), "uint8"),
    (lambda m: m.encode(np.zeros((0, 64, 64, 3))), r"images are \(0, 64"),
    (lambda m: m.decode(np.zeros((0, 30), int)), r"tokens are int64 \(0, 30\)"),
    (lambda m: m.encode(np.zeros((1, 64, 64, 3)), (4, 2)), "decreases"),
    (lambda m: m.decode(np.zeros((1, 29), int)), r"give integers \[B, 30\]"),
    (lambda m: m.decode(np.zeros((1, 30))), "tokens are float"),
    (lambda m: m.decode(np.full((1, 30), 128)), r"128 is outside 0\.\.127"),
    (lambda m: m.decode(np.full((1, 30), -1)), "token -1 is outside"),
    (
      lambda m: m.logits([1, 2], np.zeros((1, 30), int)),
      "2 labels do not match 1",
    ),
  ],
)
def test_images_and_tokens_that_do_not_fit_are_errors(call, message):
  with pytest.raises(ValueError, match=message):
    call(model())


def test_a_tokenizer_alone_encodes_but_does_not_sample():
  models, params = golden_files.pair("A")
  alone = var_jax.Model(models._replace(var=None), params._replace(var=None))
  assert alone.config.transformer is None
  assert alone.encode(images()).shape == (4, 30)
  for call in (
    lambda: alone.sample([1], KEY),
    lambda: alone.stream([1], KEY),
    lambda: alone.logits([1], np.zeros((1, 30), int)),
  ):
    with pytest.raises(ValueError, match="is a tokenizer alone"):
      call()


@pytest.mark.parametrize(
  "options, message",
  [
    (dict(dtype="float8"), "dtype 'float8' is not known"),
    (dict(weights="best"), "weights 'best' is not known"),
    (dict(), "does not exist"),
  ],
)
def test_loads_that_make_no_sense_are_errors(tmp_path, options, message):
  with pytest.raises(ValueError, match=message):
    var_jax.load(tmp_path, **options)


@pytest.mark.parametrize("axis, size", [("model", 3), ("fsdp", 5)])
def test_a_mesh_that_does_not_divide_is_refused_by_description(
  tmp_path, axis, size
):
  """There is nothing else to read."""
  models, _ = golden_files.pair("A")
  Description(models.tokenizer.cfg, models.var.cfg).write(tmp_path)
  mesh = jax.sharding.AbstractMesh((size,), (axis,))
  message = f"is not divisible by {axis}={size}; use a mesh like data={size}"
  with pytest.raises(ValueError, match=rf"{message},fsdp=1,model=1\.$"):
    var_jax.load(tmp_path, mesh=mesh)


def test_samples_are_the_same_on_eight_devices(tmp_path):
  """In a process of its own: the number of devices is fixed at the start."""
  models, params = golden_files.pair("A")
  tokenizer = Description(models.tokenizer.cfg)
  weights.write_tokenizer(tmp_path, tokenizer, params.tokenizer)
  checkpoints = store.Store(tmp_path, keep=1)
  checkpoints.save(1, {"params": params.var}, position=0)
  checkpoints.close()
  Description(models.tokenizer.cfg, models.var.cfg).write(tmp_path)
  code = f"""
import jax, numpy as np, var_jax
axes = (jax.sharding.AxisType.Auto,) * 2
mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=axes)
alone = var_jax.load({str(tmp_path)!r})
spread = var_jax.load({str(tmp_path)!r}, mesh=mesh)
key = jax.random.key(0)
ours, theirs = (m.sample([3, -1], key, top_k=50) for m in (alone, spread))
from var_jax.generation import by_layer
assert by_layer.suits(alone.params) and not by_layer.suits(spread.params)
assert len(theirs.images_BHW3.sharding.device_set) == 8
np.testing.assert_array_equal(ours.tokens_BL, theirs.tokens_BL)
fused = spread.sample([3, -1], key, top_k=50, fused=True)
np.testing.assert_array_equal(ours.tokens_BL, fused.tokens_BL)
np.testing.assert_allclose(fused.images_BHW3, ours.images_BHW3, atol=1e-4)
queued = list(spread.sample_all([3, -1, 3], key, 2, top_k=50))
np.testing.assert_array_equal(queued[0].tokens_BL, ours.tokens_BL)
assert len(queued[1].tokens_BL) == 1
np.testing.assert_array_equal(
  spread.encode(np.asarray(ours.images_BHW3)), alone.encode(ours.images_BHW3))
np.testing.assert_allclose(
  spread.decode(ours.tokens_BL), alone.decode(ours.tokens_BL), atol=1e-5)
"""
  flags = "--xla_force_host_platform_device_count=8"
  environment = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
  subprocess.run([sys.executable, "-c", code], check=True, env=environment)


def test_bfloat16_sampling_returns_float32_images_near_the_float32_ones():
  models, params = golden_files.pair("A")
  var = type(models.var)(dataclasses.replace(models.var.cfg, dtype="bfloat16"))
  tokenizer = type(models.tokenizer)(
    dataclasses.replace(models.tokenizer.cfg, dtype="bfloat16")
  )
  half = var_jax.Model(sampler.Models(tokenizer, var), params)
  tokens_BL = model().encode(images())
  decoded = half.decode(tokens_BL)
  assert decoded.dtype == jnp.float32
  # bfloat16 keeps 8 bits: a few hundredths after the tiny decoder's 40 layers.
  golden_files.assert_close(decoded, model().decode(tokens_BL), 0.1)
  logits_BLV = half.logits([1, 2, 3, -1], tokens_BL)
  assert logits_BLV.dtype == jnp.float32
  golden_files.assert_close(
    logits_BLV, model().logits([1, 2, 3, -1], tokens_BL), 0.05
  )
  assert half.sample([3, -1], KEY).images_BHW3.dtype == jnp.float32
