"""The tokenizer against the recorded official one, and its laws."""

import dataclasses
import fnmatch
import functools
import re

import flax.linen as nn
import flax.traverse_util
import golden_files
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_files import nhwc

from var_jax.checkpoints import torch_format
from var_jax.models import quantizer
from var_jax.models.scales import ScaleSchedule
from var_jax.models.tokenizer import Tokenizer, TokenizerConfig
from var_jax.models.vae import Decoder, Encoder
from var_jax.training import codes
from var_jax.training.state import to_float_images

# float32 needs less than half of this here; 1e-4 is what all goldens may take.
assert_close = functools.partial(golden_files.assert_close, tolerance=2e-5)
CASES = [(share, cosine) for share in (0, 1, 4) for cosine in (False, True)]
every_case = pytest.mark.parametrize("share, cosine", CASES)

RECTANGLES = ((1, 1), (2, 3), (3, 4), (4, 6))


# Reading the parameters traces the whole model: once a case.
tokenizer_of = functools.cache(golden_files.tokenizer)
entries_of = functools.cache(
  lambda cfg: tuple(torch_format.tokenizer_entries(cfg))
)


def recorded(share=4, cosine=False):
  return golden_files.arrays(f"vae_share{share}_znorm{int(cosine)}.npz")


def images():
  return nhwc(recorded()["img"])


def by_scale(arrays, stem):
  return [arrays[f"{stem}_{s}"] for s in range(4)]


def tokens_of(arrays, stem="ids"):
  return np.concatenate(by_scale(arrays, stem), axis=1)


@functools.partial(jax.jit, static_argnums=0, static_argnames="with_features")
def compiled(module, variables, x, **options):
  return module.apply(variables, x, **options)


def share_networks(next_method, args, kwargs, context):
  """Compile the convolutions once for all cases: they do not differ."""
  module = context.module
  if isinstance(module, (Encoder, Decoder)) and len(module.path) == 1:
    alone = module.clone(parent=None, name=None)
    return compiled(alone, module.variables, *args, **kwargs)
  return next_method(*args, **kwargs)


def run(case, method, *args, **kwargs):
  cfg, params = tokenizer_of(*case)
  with nn.intercept_methods(share_networks):
    return Tokenizer(cfg).apply(params, *args, method=method, **kwargs)


@functools.cache
def encoded(share=4, cosine=False):
  """Return (f_BhwZ, tokens_BL, f_hat after each scale) of all images."""
  case = share, cosine
  f_BhwZ = run(case, "to_latent", images())
  return f_BhwZ, *run(case, "quantize_latent", f_BhwZ)


@functools.cache
def trained(share, cosine):
  """Return (loss, (mse, quantized)) and gradients of the training forward.

  The gradients are of the parameters, by official name, and of f.
  """
  cfg, params = tokenizer_of(share, cosine)
  image_BHW3 = images()[:2]

  def loss_fn(params, offset_BhwZ):
    def perturb(next_method, args, kwargs, context):
      out = next_method(*args, **kwargs)
      return out + offset_BhwZ if context.method_name == "to_latent" else out

    with nn.intercept_methods(perturb), nn.intercept_methods(share_networks):
      reconstruction_BHW3, quantized = Tokenizer(cfg).apply(params, image_BHW3)
    mse = jnp.mean(jnp.square(reconstruction_BHW3 - image_BHW3))
    return mse + quantized.loss, (mse, quantized)

  value, (grads, f_grad_BhwZ) = jax.value_and_grad(
    loss_fn, argnums=(0, 1), has_aux=True
  )(params, jnp.zeros((2, 4, 4, 8)))
  tensors = golden_files.to_official(grads["params"], entries_of(cfg))
  return value, tensors, f_grad_BhwZ


def test_pixels_are_scaled_as_recorded():
  image_BHW3 = to_float_images(nhwc(recorded()["img_u8"]))
  assert_close(image_BHW3, images(), tolerance=1e-7)


@every_case
def test_recorded_phis_are_the_ones_in_use(share, cosine):
  cfg, params = tokenizer_of(share, cosine)
  tensors = golden_files.to_official(params["params"], entries_of(cfg))
  for name, weight in recorded(share, cosine).items():
    if name.startswith("w."):
      np.testing.assert_array_equal(tensors[name[2:]], weight)


def test_latents_equal_the_recorded_ones():
  arrays = recorded()
  out_BhwZ = run((4, False), lambda module, x: module.encoder(x), images())
  assert_close(out_BhwZ, nhwc(arrays["enc_out"]))
  assert_close(encoded()[0], nhwc(arrays["quant_conv_out"]))


@every_case
def test_tokens_and_f_hats_equal_the_recorded_ones(share, cosine):
  arrays = recorded(share, cosine)
  _, tokens_BL, f_hats = encoded(share, cosine)
  np.testing.assert_array_equal(tokens_BL, tokens_of(arrays))
  for ours, theirs in zip(f_hats, by_scale(arrays, "fhat"), strict=True):
    assert_close(ours, nhwc(theirs))


@every_case
def test_transformer_inputs_equal_the_recorded_ones(share, cosine):
  arrays = recorded(share, cosine)
  inputs_BLZ = run((share, cosine), "inputs", tokens_of(arrays))
  assert_close(inputs_BLZ, arrays["var_input"])


@every_case
def test_reconstructions_equal_the_recorded_ones(share, cosine):
  arrays = recorded(share, cosine)
  tokens_3L = tokens_of(arrays)[:3]
  decoded_3HW3 = run((share, cosine), "decode", tokens_3L)
  assert_close(decoded_3HW3[:2], nhwc(arrays["recon_last"]))
  assert_close(decoded_3HW3[2:], nhwc(arrays["fhat_to_img"]))
  assert np.abs(decoded_3HW3).max() == 1.0


def test_unclipped_images_equal_the_recorded_ones():
  arrays = recorded()
  f_hat_BhwZ = nhwc(arrays["fhat_3"])
  out_BhwZ = run(
    (4, False), lambda module, x: module.post_quant_conv(x), f_hat_BhwZ
  )
  assert_close(out_BhwZ, nhwc(arrays["post_quant_conv_out_last"]))
  raw_3HW3 = run((4, False), "to_image", f_hat_BhwZ[:3])
  assert_close(raw_3HW3[:2], nhwc(arrays["dec_raw_last"]))


def test_an_image_after_each_scale_equals_the_recorded_one():
  arrays = recorded()
  f_hats = run((4, False), "accumulate", tokens_of(arrays)[:3])
  for f_hat_3hwZ, image in zip(f_hats, arrays["recon_each"], strict=True):
    raw_3HW3 = run((4, False), "to_image", f_hat_3hwZ)
    assert_close(np.clip(raw_3HW3[:2], -1, 1), nhwc(image))


def test_a_rectangular_image_equals_the_recorded_run():
  arrays = recorded()
  scales = ScaleSchedule(RECTANGLES)
  tokens_BL = run((4, False), "encode", nhwc(arrays["rect_img"]), scales)
  np.testing.assert_array_equal(tokens_BL, tokens_of(arrays, "rect_ids"))
  image_BHW3 = run((4, False), "decode", tokens_BL, scales)
  assert_close(image_BHW3, nhwc(arrays["rect_recon"]))


def test_a_repeated_scale_equals_the_recorded_run():
  scales = ScaleSchedule((1, 2, 2, 3, 4))
  tokens_BL, _ = run((4, False), "quantize_latent", encoded()[0], scales)
  np.testing.assert_array_equal(tokens_BL, recorded()["ids_pn12234"])


@every_case
def test_the_training_forward_equals_the_recorded_one(share, cosine):
  arrays = recorded(share, cosine)
  (loss, (mse, quantized)), _, f_grad_BhwZ = trained(share, cosine)
  assert_close(quantized.f_hat_BhwZ, nhwc(arrays["tr_fhat"]))
  assert_close(quantized.loss[None], arrays["tr_vq_loss"])
  assert_close(mse[None], arrays["tr_mse"])
  assert_close(loss[None], arrays["tr_loss"])
  assert_close(f_grad_BhwZ, nhwc(arrays["tr_grad_f"]))


@every_case
def test_gradients_equal_the_recorded_ones(share, cosine):
  arrays = recorded(share, cosine)
  _, grads, _ = trained(share, cosine)
  for name, grad in arrays.items():
    if name.startswith("grad."):
      ours = grads[name.removeprefix("grad.")]
      assert_close(ours, grad, tolerance=5e-5)


@every_case
def test_gradient_norms_equal_the_recorded_ones(share, cosine):
  arrays = recorded(share, cosine)
  _, grads, _ = trained(share, cosine)
  names = arrays["gradnorm_names"]
  assert sorted(names) == sorted(grads)
  norms = np.array([np.linalg.norm(grads[n].astype("f8")) for n in names])
  expected = arrays["gradnorm_values"]
  # Some are nothing but rounding: a bias before a norm of single channels.
  atol = 1e-7 * expected.max()
  np.testing.assert_allclose(norms, expected, rtol=2e-5, atol=atol)


@every_case
def test_code_usage_equals_the_recorded_one(share, cosine):
  hits_SV = golden_files.state_dict("vae_tiny.pth.xz")[
    "quantize.ema_vocab_hit_SV"
  ]
  usage_S = codes.code_usage(jnp.asarray(hits_SV), 2 * 4 * 4)
  assert_close(usage_S, recorded(share, cosine)["tr_usages"], tolerance=1e-6)


@functools.cache
def block_outputs():
  """Return the output of each block for the first image, [Z, h, w]."""
  cfg, params = tokenizer_of()

  @jax.jit
  def reconstruct(params, image_1HW3):
    return Tokenizer(cfg).apply(
      params,
      image_1HW3,
      method=lambda tokenizer, x: tokenizer.decode(tokenizer.encode(x)),
      capture_intermediates=lambda module, method: (
        method == "__call__" and len(module.path) in (1, 2)
      ),
      mutable=["intermediates"],
    )

  _, captured = reconstruct(params, images()[:1])
  flat = flax.traverse_util.flatten_dict(captured["intermediates"], sep="/")
  return {
    path.removesuffix("/__call__"): np.moveaxis(np.asarray(out[0]), -1, 1)
    for path, out in flat.items()
  }


BLOCKS = golden_files.table("vae_activation_stats.json")


@pytest.mark.parametrize("official", BLOCKS)
def test_block_outputs_have_the_recorded_statistics(official):
  network, *rest = official.split(".")
  out = block_outputs()["/".join([network, *filter(None, ["_".join(rest)])])]
  expected = BLOCKS[official]
  assert list(out.shape) == expected["shape"]
  largest = np.abs(out).max()
  atol = 1e-4 * largest
  ends = np.concatenate([out.ravel()[:8], out.ravel()[-8:]])
  np.testing.assert_allclose(
    ends, expected["first8"] + expected["last8"], rtol=0, atol=atol
  )
  out = out.astype("f8")
  np.testing.assert_allclose(out.mean(), expected["mean"], rtol=0, atol=atol)
  # torch.std divides by n - 1.
  np.testing.assert_allclose(
    out.std(ddof=1), expected["std"], rtol=0, atol=atol
  )


def test_every_block_has_recorded_statistics():
  official = {re.sub(r"[./]", "_", name) for name in BLOCKS}
  assert {name.replace("/", "_") for name in block_outputs()} == official


COVERED = {
  "test_pixels_are_scaled_as_recorded": ("img", "img_u8"),
  "test_recorded_phis_are_the_ones_in_use": ("w.*",),
  "test_latents_equal_the_recorded_ones": ("enc_out", "quant_conv_out"),
  "test_tokens_and_f_hats_equal_the_recorded_ones": ("ids_[0-3]", "fhat_[0-3]"),
  "test_transformer_inputs_equal_the_recorded_ones": ("var_input",),
  "test_reconstructions_equal_the_recorded_ones": (
    "recon_last",
    "fhat_to_img",
  ),
  "test_unclipped_images_equal_the_recorded_ones": (
    "post_quant_conv_out_last",
    "dec_raw_last",
  ),
  "test_an_image_after_each_scale_equals_the_recorded_one": ("recon_each",),
  "test_a_rectangular_image_equals_the_recorded_run": (
    "rect_img",
    "rect_ids_[0-3]",
    "rect_recon",
  ),
  "test_a_repeated_scale_equals_the_recorded_run": ("ids_pn12234",),
  "test_the_training_forward_equals_the_recorded_one": (
    "tr_fhat",
    "tr_vq_loss",
    "tr_mse",
    "tr_loss",
    "tr_grad_f",
  ),
  "test_gradients_equal_the_recorded_ones": ("grad.*",),
  "test_gradient_norms_equal_the_recorded_ones": (
    "gradnorm_names",
    "gradnorm_values",
  ),
  "test_code_usage_equals_the_recorded_one": ("tr_usages",),
}
EXEMPT = {
  "*margin*": "how clear each choice of token was: no output of the model",
  "*notmax*": "f_hat at the size of each scale: nothing in training, sampling "
  "or editing reads it",
  "*same_shape_False*": "the image made from it, for the same reason",
  "ema_*": "the official counter of code use moves once a scale, not once a "
  "step: a defect that we do not repeat",
}


@every_case
def test_every_recorded_array_is_tested_or_exempt(share, cosine):
  assert all(callable(globals()[test]) for test in COVERED)
  patterns = [p for patterns in COVERED.values() for p in patterns]
  for name in recorded(share, cosine):
    matches = [p for p in [*patterns, *EXEMPT] if fnmatch.fnmatchcase(name, p)]
    assert len(matches) == 1, (name, matches)


def test_a_rectangle_comes_back_in_its_own_shape():
  cfg, params = tokenizer_of()
  tokenizer = Tokenizer(dataclasses.replace(cfg, scales=RECTANGLES))
  assert tokenizer.cfg.image_shape == (64, 96)
  image_BHW3 = nhwc(recorded()["rect_img"])
  with nn.intercept_methods(share_networks):
    tokens_BL = tokenizer.apply(params, image_BHW3, method="encode")
    decoded_BHW3 = tokenizer.apply(params, tokens_BL, method="decode")
  inputs_BLZ = tokenizer.apply(params, tokens_BL, method="inputs")
  assert tokens_BL.shape == (1, 1 + 6 + 12 + 24)
  assert tokens_BL.dtype == jnp.int32
  assert inputs_BLZ.shape == (1, 6 + 12 + 24, 8)
  assert decoded_BHW3.shape == image_BHW3.shape


def test_tokens_of_the_first_scales_give_the_inputs_of_those():
  tokens_BL = tokens_of(recorded())
  inputs_BLZ = run((4, False), "inputs", tokens_BL)
  first_BlZ = run((4, False), "inputs", tokens_BL[:, :14])
  np.testing.assert_array_equal(first_BlZ, inputs_BLZ[:, :13])
  assert run((4, False), "inputs", tokens_BL[:, :1]).shape == (4, 0, 8)


def test_the_gradient_passes_straight_through_the_quantiser():
  cfg, params = tokenizer_of()
  weights_BhwZ = jax.random.normal(jax.random.key(0), (4, 4, 4, 8))

  def weighted(tokenizer, f_BhwZ):
    quantized = quantizer.quantize_for_training(
      f_BhwZ,
      tokenizer.quantize,
      cfg.schedule,
      cfg.quant_resi,
      cfg.distance,
      cfg.beta,
    )
    return jnp.sum(quantized.f_hat_BhwZ * weights_BhwZ)

  grad_BhwZ = jax.grad(
    lambda f_BhwZ: Tokenizer(cfg).apply(params, f_BhwZ, method=weighted)
  )(encoded()[0])
  np.testing.assert_array_equal(grad_BhwZ, weights_BhwZ)


def test_a_bfloat16_decoder_returns_nearly_the_same_float32_image():
  cfg, params = tokenizer_of()
  cfg = dataclasses.replace(cfg, dtype="bfloat16")
  f_hat_BhwZ = nhwc(recorded()["fhat_3"])[:2]
  to_image = functools.partial(Tokenizer(cfg).apply, method="to_image")
  image_BHW3 = jax.jit(to_image)(params, f_hat_BhwZ)
  assert image_BHW3.dtype == jnp.float32
  error_BHW3 = np.abs(image_BHW3 - nhwc(recorded()["dec_raw_last"]))
  # Some fifty layers in a row, with eight bits each; float32 is near 2^-21.
  assert 2**-12 < error_BHW3.mean() < 2**-5
  assert error_BHW3.max() < 2**-2


def matmuls_on_tpu(fn, *args):
  """Return (operand dtypes, precisions) of each dot and convolution."""
  lowered = jax.jit(fn).trace(*args).lower(lowering_platforms=("tpu",))
  found = []
  for line in lowered.as_text().splitlines():
    if "stablehlo.dot_general" in line or "stablehlo.convolution" in line:
      operands, _ = line.rsplit(" : (", 1)[1].split(") -> ")
      dtypes = tuple(re.findall(r"(bf16|f32)>", operands))
      found.append((dtypes, tuple(re.findall("HIGHEST|DEFAULT", line))))
  return found


FLOAT32 = (("f32", "f32"), ("HIGHEST", "HIGHEST"))


@pytest.mark.parametrize("distance", ["euclidean", "cosine"])
def test_tokens_are_chosen_at_full_precision_on_tpu(distance):
  cfg, params = tokenizer_of(cosine=distance == "cosine")
  encode = functools.partial(Tokenizer(cfg).apply, method="encode")
  matmuls = matmuls_on_tpu(encode, params, images())
  assert len(matmuls) > 30
  assert set(matmuls) == {FLOAT32}


@pytest.mark.parametrize("method", ["inputs", "accumulate"])
def test_transformer_inputs_have_full_precision_on_tpu(method):
  cfg, params = tokenizer_of()
  apply = functools.partial(Tokenizer(cfg).apply, method=method)
  matmuls = matmuls_on_tpu(apply, params, tokens_of(recorded()))
  assert matmuls and set(matmuls) == {FLOAT32}


def test_a_mixture_of_codes_has_full_precision_on_tpu():
  cfg, params = tokenizer_of()
  mix = functools.partial(Tokenizer(cfg).apply, method="mix")
  assert matmuls_on_tpu(mix, params, jnp.ones((2, 4, 128))) == [FLOAT32]


def test_a_bfloat16_decoder_multiplies_in_bfloat16_on_tpu():
  cfg, params = tokenizer_of()
  f_hat_BhwZ = jnp.zeros((2, 4, 4, 8))

  def matmuls(dtype):
    tokenizer = Tokenizer(dataclasses.replace(cfg, dtype=dtype))
    to_image = functools.partial(tokenizer.apply, method="to_image")
    return matmuls_on_tpu(to_image, params, f_hat_BhwZ)

  post_quant_conv, *decoder = matmuls("bfloat16")
  assert post_quant_conv == FLOAT32
  assert {dtypes for dtypes, _ in decoder} == {("bf16", "bf16")}
  full = matmuls("float32")
  assert len(full) == 1 + len(decoder)
  assert set(full) == {FLOAT32}


@pytest.mark.parametrize(
  "wrong, message",
  [
    (dict(channels=100), "channels 100 do not split into 32"),
    (dict(distance="manhattan"), "distance 'manhattan' is not known"),
    (dict(num_phis=-1), "num_phis -1 is negative"),
    (dict(scales=(1, 3, 2)), "decreases from .* to"),
  ],
)
def test_a_config_that_makes_no_sense_is_refused(wrong, message):
  with pytest.raises(ValueError, match=message):
    TokenizerConfig(**wrong)
