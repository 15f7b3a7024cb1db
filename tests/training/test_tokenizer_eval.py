"""What an evaluation says of a tokenizer, against NumPy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_models

from var_jax import images
from var_jax.evaluation import inception
from var_jax.evaluation.statistics import Moments
from var_jax.models import perceptual, quantizer
from var_jax.models.tokenizer import Tokenizer
from var_jax.training import evaluation, tokenizer_eval, tokenizer_step

CFG = tiny_models.tokenizer_config((1, 3, 6))
TOKENIZER = Tokenizer(CFG)
REAL = 5
QUICK = {"xla_backend_optimization_level": 0}


def batch():
  """Return eight rows, five of them real."""
  rng = np.random.default_rng(0)
  pixels = rng.integers(0, 256, (8, *CFG.image_shape, 3), np.uint8)
  return {"image": pixels, "real": np.arange(8) < REAL}


@functools.cache
def evaluated():
  """Return (variables, the real images, sums)."""
  variables = tokenizer_step.init_params(
    TOKENIZER, jax.random.key(0, impl="rbg")
  )
  eval_step = jax.jit(tokenizer_eval.make_eval_step(TOKENIZER))
  sums = eval_step(variables, {}, batch())
  image_BHW3 = images.to_float(batch()["image"][:REAL])
  return variables, image_BHW3, jax.device_get(sums)


def summary():
  _, _, sums = evaluated()
  sums = dict(sums)
  count = sums.pop("count")
  return tokenizer_eval.summary({k: v / count for k, v in sums.items()}, {})


def test_measures_are_summed_over_real_images():
  variables, image_BHW3, sums = evaluated()
  assert sums["count"] == REAL
  again_BHW3, quantized = jax.jit(TOKENIZER.apply)(variables, image_BHW3)
  l2_B = np.square(again_BHW3 - image_BHW3).mean(axis=(1, 2, 3))
  np.testing.assert_allclose(sums["l2"], l2_B.sum(), rtol=1e-5)
  np.testing.assert_allclose(
    sums["quantizer_loss"], REAL * quantized.loss, rtol=1e-5
  )
  expected = np.sum(10 * np.log10(4 / l2_B))
  np.testing.assert_allclose(sums["psnr"], expected, rtol=1e-5)


def test_ssim_is_that_of_gaussian_windows():
  variables, image_BHW3, sums = evaluated()
  again_BHW3, _ = jax.jit(TOKENIZER.apply)(variables, image_BHW3)
  again_BHW3 = np.clip(again_BHW3, -1, 1)
  x, y = (np.float64(v) / 2 + 0.5 for v in (again_BHW3, image_BHW3))
  at = np.arange(11) - 5
  line = np.exp(-(at**2) / (2 * 1.5**2))
  window = np.outer(line, line) / line.sum() ** 2

  def blurred(v):
    cut = np.lib.stride_tricks.sliding_window_view(v, (11, 11), axis=(1, 2))
    return np.einsum("bhwcij,ij->bhwc", cut, window)

  mx, my = blurred(x), blurred(y)
  vx, vy = blurred(x * x) - mx**2, blurred(y * y) - my**2
  vxy = blurred(x * y) - mx * my
  c1, c2 = 0.01**2, 0.03**2
  found = (2 * mx * my + c1) * (2 * vxy + c2)
  found /= (mx**2 + my**2 + c1) * (vx + vy + c2)
  expected = found.mean(axis=(1, 2, 3)).sum()
  np.testing.assert_allclose(sums["ssim"], expected, rtol=1e-4)


def test_each_scale_has_its_health():
  variables, image_BHW3, _ = evaluated()
  f_BhwZ = TOKENIZER.apply(variables, image_BHW3, method="to_latent")
  tokens_BL, f_hats = TOKENIZER.apply(
    variables, f_BhwZ, method="quantize_latent"
  )
  wanted_BLZ = quantizer.wanted_vectors(f_BhwZ, f_hats, CFG.schedule)
  code_BLZ = TOKENIZER.apply(variables, tokens_BL, method="lookup")
  found, before = summary(), np.square(f_BhwZ).mean()
  for s in range(3):
    cut = slice(CFG.schedule.start(s), CFG.schedule.end(s))
    tokens_Bl = np.asarray(tokens_BL[:, cut])
    _, counts = np.unique(tokens_Bl, return_counts=True)
    share = counts / counts.sum()
    after = np.square(f_BhwZ - f_hats[s]).mean()
    expected = {
      "codes_used": len(counts),
      "perplexity": np.exp(-np.sum(share * np.log(share))),
      "explained": 1 - after / before,
      "residual_energy": after,
      "commitment": np.square(wanted_BLZ - code_BLZ)[:, cut].mean(),
    }
    before = after
    for name, value in expected.items():
      assert found[name][str(s)] == pytest.approx(value, rel=1e-4, abs=1e-6)
  used = len(np.unique(tokens_BL)) / 16
  assert found["code_share"] == used


def test_lpips_is_measured_where_there_are_weights(monkeypatch):
  """A stand-in for the distance, which has its own tests."""
  variables, image_BHW3, sums = evaluated()
  assert "lpips" not in sums

  def distance(weights, a_BHW3, b_BHW3):
    return weights["gain"] * jnp.mean(a_BHW3 - 2 * b_BHW3, axis=(1, 2, 3))

  monkeypatch.setattr(perceptual, "distance", distance)
  eval_step = tokenizer_eval.make_eval_step(TOKENIZER, with_lpips=True)
  sums = jax.jit(eval_step)(variables, {"lpips": {"gain": 3.0}}, batch())
  again_BHW3, _ = jax.jit(TOKENIZER.apply)(variables, image_BHW3)
  expected = 3 * (again_BHW3 - 2 * image_BHW3).mean(axis=(1, 2, 3)).sum()
  np.testing.assert_allclose(sums["lpips"], expected, rtol=1e-4)


def test_rfid_is_of_the_features_of_pixels_before_and_after():
  variables, image_BHW3, sums = evaluated()
  assert "features" not in sums
  keys = iter(jax.random.split(jax.random.key(2), 400))
  weights = {
    name: jax.random.normal(next(keys), shape) * np.prod(shape[:-1]) ** -0.5
    if name.endswith("kernel")
    else jnp.ones(shape) * name.endswith("scale")
    for name, shape in inception.shapes().items()
  }
  found = jax.jit(
    tokenizer_eval.make_eval_step(TOKENIZER, with_rfid=True),
    compiler_options=QUICK,
  )(variables, {"inception": weights}, batch())
  again_BHW3, _ = jax.jit(TOKENIZER.apply)(variables, image_BHW3)
  network = jax.jit(inception.features, compiler_options=QUICK)
  real_BD, again_BD = (
    np.asarray(network(weights, pixels).pooled_BD)
    for pixels in (batch()["image"][:REAL], images.to_uint8(again_BHW3))
  )
  for name, expected in (("real", real_BD), ("again", again_BD)):
    here = np.asarray(found["features"][name])[:REAL]
    atol = 1e-4 * np.abs(expected).max()
    np.testing.assert_allclose(here, expected, atol=atol)
  moments = {}
  for rows in (slice(0, 3), slice(3, 8)):
    part = {name: x[rows] for name, x in found["features"].items()}
    evaluation._add(moments, part, found["real"][rows])
  sums = {k: v for k, v in sums.items() if k != "count"}
  means = {k: v / REAL for k, v in sums.items()}
  # Of C = A'A and D = B'B, tr (C D)^(1/2) is the nuclear norm of A B'.
  real_ND, again_ND = (
    (x - x.mean(axis=0)) / (REAL - 1) ** 0.5 for x in (real_BD, again_BD)
  )
  apart = np.square(real_BD.mean(axis=0) - again_BD.mean(axis=0)).sum()
  traces = np.square(real_ND).sum() + np.square(again_ND).sum()
  expected = apart + traces - 2 * np.linalg.norm(real_ND @ again_ND.T, "nuc")
  rfid = tokenizer_eval.summary(means, moments)["rfid"]
  assert rfid == pytest.approx(expected, rel=1e-3)
  assert "rfid" not in tokenizer_eval.summary(means, {})
  one = {name: Moments.of(x[:1]) for name, x in found["features"].items()}
  assert "rfid" not in tokenizer_eval.summary(means, one)
