"""How healthy a tokenizer is, on held-out images: all of it, and each scale."""

from collections.abc import Mapping
from typing import Any

import dm_pix
import jax
import jax.numpy as jnp
import numpy as np

from var_jax.evaluation import inception
from var_jax.evaluation.statistics import Moments, frechet_distance
from var_jax.models import perceptual, quantizer
from var_jax.models.layers import mean_square
from var_jax.models.tokenizer import Tokenizer
from var_jax.training import codes, losses
from var_jax.training.state import to_float_images, to_pixels

_WINDOW = 11  # pixels, of SSIM


def make_eval_step(
  tokenizer: Tokenizer, *, with_lpips: bool = False, with_rfid: bool = False
):
  """Return eval_step(params, frozen, batch) -> sums over samples.

  A batch has "image" uint8 [B, H, W, 3] and "real" [B]: False for what only
  fills the batch. The sums are of l2, quantizer_loss, psnr (each image's, in
  dB), ssim, lpips where it is asked for, "count", and what `summary` wants.
  For rFID there are also "features" of the samples, {"real", "again"}
  [B, 2048], and the batch's "real".
  """
  cfg = tokenizer.cfg

  def measure(variables, frozen, image_HW3):
    image_1HW3 = image_HW3[None]
    again_1HW3, quantized = tokenizer.apply(variables, image_1HW3)
    l2 = mean_square(again_1HW3 - image_1HW3)
    found = {
      "l2": l2,
      "quantizer_loss": quantized.loss,
      "psnr": 10.0 * jnp.log10(4.0 / l2),
      "ssim": dm_pix.ssim(
        jnp.clip(again_1HW3, -1.0, 1.0)[0] / 2 + 0.5,
        image_HW3 / 2 + 0.5,
        filter_size=min(_WINDOW, *image_HW3.shape[:2]),
      ),
      "latent_energy": quantized.latent_energy,
      "residual_S": quantized.residual_energy_S,
      "hits_SV": codes.count_codes(
        quantized.tokens_BL, cfg.schedule, cfg.vocab_size
      ),
      "commitment_S": _commitment(tokenizer, variables, image_1HW3),
    }
    if with_lpips:
      (found["lpips"],) = perceptual.distance(
        frozen["lpips"], again_1HW3, image_1HW3
      )
    return found, again_1HW3[0]

  def eval_step(variables, frozen, batch):
    image_BHW3 = to_float_images(batch["image"])
    of_samples, again_BHW3 = jax.vmap(measure, in_axes=(None, None, 0))(
      variables, frozen, image_BHW3
    )
    sums = losses.sum_of_real(of_samples, batch["real"])
    if not with_rfid:
      return sums
    pixels = {"real": batch["image"], "again": to_pixels(again_BHW3)}
    features = {
      name: inception.features(frozen["inception"], pixels_BHW3).pooled_BD
      for name, pixels_BHW3 in pixels.items()
    }
    return sums | {"features": features, "real": batch["real"]}

  return eval_step


def summary(
  means: Mapping[str, Any], moments: Mapping[str, Moments]
) -> dict[str, Any]:
  """Return what means over samples say, a number a measure or a scale.

  Of each scale: codes used, perplexity, the share of the residual energy that
  reaches it which it explains, mean square distance of residuals to their
  codes. code_share is of codes used by any scale. rfid is there where moments
  of features are.
  """
  values = dict(means)
  hits_SV = np.asarray(values.pop("hits_SV"))
  residual_S = np.asarray(values.pop("residual_S"))
  reaches_S = np.append(values.pop("latent_energy"), residual_S[:-1])
  share_SV = hits_SV / hits_SV.sum(axis=1, keepdims=True)
  log_SV = np.log(np.where(share_SV > 0, share_SV, 1.0))
  by_scale = {
    "codes_used": (hits_SV > 0).sum(axis=1),
    "perplexity": np.exp(-np.sum(share_SV * log_SV, axis=1)),
    "explained": 1.0 - residual_S / reaches_S,
    "residual_energy": residual_S,
    "commitment": np.asarray(values.pop("commitment_S")),
  }
  # One image has no covariance.
  if moments and moments["real"].count > 1:
    real, again = (moments[name].gaussian() for name in ("real", "again"))
    values["rfid"] = frechet_distance(real, again)
  values["code_share"] = np.mean(hits_SV.sum(axis=0) > 0)
  return values | {
    name: {str(s): float(value) for s, value in enumerate(value_S)}
    for name, value_S in by_scale.items()
  }


def _commitment(tokenizer, variables, image_1HW3) -> jax.Array:
  """Return the mean square distance of residuals to their codes, [S]."""
  scales = tokenizer.cfg.schedule
  f_1hwZ = tokenizer.apply(variables, image_1HW3, method="to_latent")
  tokens_1L, f_hats = tokenizer.apply(
    variables, f_1hwZ, method="quantize_latent"
  )
  wanted_1LZ = quantizer.wanted_vectors(f_1hwZ, f_hats, scales)
  code_1LZ = tokenizer.apply(variables, tokens_1L, method="lookup")
  squared_L = jnp.mean(jnp.square(wanted_1LZ - code_1LZ), axis=(0, 2))
  return jnp.stack(
    [
      jnp.mean(squared_L[scales.start(s) : scales.end(s)])
      for s in range(len(scales))
    ]
  )
