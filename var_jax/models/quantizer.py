"""Multi-scale residual quantisation (paper section 3.2, algorithms 1 and 2).

The latent f is explained coarse to fine. Scale s looks at what is left of f,
averaged down to its size, takes the nearest code for each cell, and adds

    f_hat += phi_s(bicubic(codebook[tokens_s])),   phi(x) = (1-r) x + r conv(x)

Everything here is float32 at full matmul precision: a token is a decision,
and a rounded distance makes another one.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from var_jax.models import resize
from var_jax.models.layers import HIGHEST, l2_normalize, mean_square
from var_jax.models.scales import ScaleSchedule

# Codes compared at once; bounds the distance array to B x T x this.
CODE_CHUNK = 512


class QuantizerParams(NamedTuple):
  """What the quantiser learns: codes and P phis."""

  codebook_VZ: jax.Array
  phi_kernel_P33ZZ: jax.Array | None  # None where phi is the identity
  phi_bias_PZ: jax.Array | None


class Quantized(NamedTuple):
  """All that a training step wants to know of one quantisation."""

  f_hat_BhwZ: jax.Array  # straight-through: value of f_hat, gradient of f
  loss: jax.Array
  tokens_BL: jax.Array
  latent_energy: jax.Array  # mean square of f
  residual_energy_S: jax.Array  # of what scale s leaves of it


@functools.cache
def phi_index(num_phis: int, num_scales: int) -> tuple[int, ...]:
  """Return which phi each scale uses: the nearest of P ticks in [0, 1].

  VAR: the ticks are spread differently for exactly four phis, and s/(S-1)
  falls midway between two ticks at s = 2 and 7 of ten scales. float64 and
  this order of operations decide those as the released weights expect.
  """
  margin = 1 / 3 / num_phis if num_phis == 4 else 1 / 2 / num_phis
  ticks_P = np.linspace(margin, 1 - margin, num_phis)
  last = max(num_scales - 1, 1)
  return tuple(
    int(np.argmin(np.abs(ticks_P - s / last))) for s in range(num_scales)
  )


def nearest_code(
  x_BTZ: jax.Array, codebook_VZ: jax.Array, distance: str
) -> jax.Array:
  """Return the id of each vector's nearest code, int32 [B, T].

  Codes are compared in chunks with a running minimum: [B, T, V] never exists.

  Args:
    distance: "euclidean", or "cosine" for the largest cosine.
  """
  V, Z = codebook_VZ.shape
  chunk = min(CODE_CHUNK, V)
  padding = -V % chunk
  if distance == "cosine":
    x_BTZ, codebook_VZ = l2_normalize(x_BTZ), l2_normalize(codebook_VZ)
    offset_V = jnp.zeros(V)
  else:
    # |x|^2 is the same for all codes and left out.
    offset_V = 0.5 * jnp.sum(jnp.square(codebook_VZ), axis=-1)
  # Codes that only fill the last chunk are infinitely far.
  offset_V = jnp.pad(offset_V, (0, padding), constant_values=jnp.inf)
  codebook_VZ = jnp.pad(codebook_VZ, ((0, padding), (0, 0)))

  def compare(best, chunk_codes):
    best_cost_BT, best_id_BT = best
    first, codes_CZ, offset_C = chunk_codes
    dot_BTC = jnp.einsum("btz,cz->btc", x_BTZ, codes_CZ, precision=HIGHEST)
    cost_BTC = offset_C - dot_BTC
    id_BT = jnp.argmin(cost_BTC, axis=-1).astype(jnp.int32)
    cost_BT = jnp.min(cost_BTC, axis=-1)
    closer_BT = cost_BT < best_cost_BT
    return (
      jnp.where(closer_BT, cost_BT, best_cost_BT),
      jnp.where(closer_BT, first + id_BT, best_id_BT),
    ), None

  nowhere = (
    jnp.full(x_BTZ.shape[:2], jnp.inf),
    jnp.zeros(x_BTZ.shape[:2], jnp.int32),
  )
  chunks = (
    jnp.arange(0, V, chunk, dtype=jnp.int32),
    codebook_VZ.reshape(-1, chunk, Z),
    offset_V.reshape(-1, chunk),
  )
  (_, id_BT), _ = jax.lax.scan(compare, nowhere, chunks)
  return id_BT


def apply_phi(
  x_BhwZ: jax.Array, params: QuantizerParams, index: int, quant_resi: float
) -> jax.Array:
  """Return (1-r) x + r conv(x) with the convolution number `index`."""
  conv_BhwZ = jax.lax.conv_general_dilated(
    x_BhwZ,
    params.phi_kernel_P33ZZ[index],
    window_strides=(1, 1),
    padding="SAME",
    dimension_numbers=("NHWC", "HWIO", "NHWC"),
    precision=HIGHEST,
  )
  conv_BhwZ += params.phi_bias_PZ[index]
  return (1.0 - quant_resi) * x_BhwZ + quant_resi * conv_BhwZ


def contribution(
  h_BijZ: jax.Array,
  params: QuantizerParams,
  s: int,
  scales: ScaleSchedule,
  quant_resi: float,
) -> jax.Array:
  """Return what the code map of scale s adds to f_hat, [B, h, w, Z]."""
  h_BhwZ = resize.bicubic(h_BijZ, scales.grid)
  if params.phi_kernel_P33ZZ is None:
    return h_BhwZ
  index = phi_index(params.phi_kernel_P33ZZ.shape[0], len(scales))[s]
  return apply_phi(h_BhwZ, params, index, quant_resi)


def quantize(
  f_BhwZ: jax.Array,
  params: QuantizerParams,
  scales: ScaleSchedule,
  quant_resi: float,
  distance: str,
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
  """Return tokens [B, L] and f_hat [B, h, w, Z] after each scale.

  Gradients reach the codebook and the phis through f_hat; the choice of
  tokens has none.
  """
  f_BhwZ = jax.lax.stop_gradient(f_BhwZ)
  f_hat_BhwZ = jnp.zeros_like(f_BhwZ)
  tokens, f_hats = [], []
  for s, shape in enumerate(scales.shapes):
    rest_BijZ = resize.area(f_BhwZ - f_hat_BhwZ, shape)
    tokens_Bl = nearest_code(
      jax.lax.stop_gradient(_flatten(rest_BijZ)),
      jax.lax.stop_gradient(params.codebook_VZ),
      distance,
    )
    # VAR: the cosine rule also adds the code as it is, not normalised.
    h_BijZ = params.codebook_VZ[tokens_Bl].reshape(rest_BijZ.shape)
    f_hat_BhwZ += contribution(h_BijZ, params, s, scales, quant_resi)
    tokens.append(tokens_Bl)
    f_hats.append(f_hat_BhwZ)
  return jnp.concatenate(tokens, axis=1), tuple(f_hats)


def wanted_vectors(
  f_BhwZ: jax.Array, f_hats: tuple[jax.Array, ...], scales: ScaleSchedule
) -> jax.Array:
  """Return the residual that each token was chosen for, [B, L, Z]."""
  before = (jnp.zeros_like(f_BhwZ), *f_hats[:-1])
  return jnp.concatenate(
    [next_input(f_BhwZ - f, s, scales) for s, f in enumerate(before)], axis=1
  )


def accumulate(
  tokens_BL: jax.Array,
  params: QuantizerParams,
  scales: ScaleSchedule,
  quant_resi: float,
) -> tuple[jax.Array, ...]:
  """Return f_hat [B, h, w, Z] after each scale that the tokens cover."""
  f_hat_BhwZ, f_hats = 0.0, []
  for s in range(scales.covered(tokens_BL.shape[1])):
    tokens_Bl = tokens_BL[:, scales.start(s) : scales.end(s)]
    h_BlZ = params.codebook_VZ[tokens_Bl]
    h_BijZ = h_BlZ.reshape(h_BlZ.shape[0], *scales.shapes[s], -1)
    f_hat_BhwZ += contribution(h_BijZ, params, s, scales, quant_resi)
    f_hats.append(f_hat_BhwZ)
  return tuple(f_hats)


def next_input(
  f_hat_BhwZ: jax.Array, s: int, scales: ScaleSchedule
) -> jax.Array:
  """Return f_hat at the size of scale s, [B, l, Z]: the input of scale s."""
  return _flatten(resize.area(f_hat_BhwZ, scales.shapes[s]))


def quantize_for_training(
  f_BhwZ: jax.Array,
  params: QuantizerParams,
  scales: ScaleSchedule,
  quant_resi: float,
  distance: str,
  beta: float,
  kept_B: jax.Array | None = None,
) -> Quantized:
  """Quantise with the straight-through gradient and the commitment loss.

    loss = mean_s  beta |f - sg(f_hat_s)|^2 + |sg(f) - f_hat_s|^2

  f_hat_s is cumulative: each scale is asked to explain all of f.

  Args:
    kept_B: how many scales f_hat is made of, 1..S, a number a sample; all of
      them if None. The loss is that of all scales anyhow.
  """
  f_BhwZ = f_BhwZ.astype(jnp.float32)
  tokens_BL, f_hats = quantize(f_BhwZ, params, scales, quant_resi, distance)
  stop = jax.lax.stop_gradient
  commit_S = [mean_square(stop(f_hat) - f_BhwZ) for f_hat in f_hats]
  codes_S = [mean_square(f_hat - stop(f_BhwZ)) for f_hat in f_hats]
  loss = beta * jnp.mean(jnp.stack(commit_S)) + jnp.mean(jnp.stack(codes_S))
  f_hat_BhwZ = f_hats[-1]
  if kept_B is not None:
    f_hat_BhwZ = jnp.stack(f_hats)[kept_B - 1, jnp.arange(len(f_BhwZ))]
  return Quantized(
    f_BhwZ + stop(f_hat_BhwZ - f_BhwZ),
    loss,
    tokens_BL,
    stop(mean_square(f_BhwZ)),
    stop(jnp.stack(codes_S)),
  )


def _flatten(x_BijZ):
  B, i, j, Z = x_BijZ.shape
  return x_BijZ.reshape(B, i * j, Z)
