"""Multi-scale residual quantisation against recorded runs and plain loops."""

import golden_files
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from var_jax.models import quantizer, resize
from var_jax.models.quantizer import QuantizerParams
from var_jax.models.scales import SCALES, ScaleSchedule

PHI_CASES = [
  (int(K), int(SN), tuple(index))
  for K, entry in golden_files.table("phi_index.json")["K"].items()
  for SN, index in entry["per_scales"].items()
]


@pytest.mark.parametrize("num_phis, num_scales, expected", PHI_CASES)
def test_phi_index_follows_the_tick_rule(num_phis, num_scales, expected):
  assert quantizer.phi_index(num_phis, num_scales) == expected


def test_released_phis_at_the_exact_ties():
  assert quantizer.phi_index(4, 10) == (0, 0, 1, 1, 1, 2, 2, 3, 3, 3)


def random_params(key, V=300, Z=6, P=2):
  keys = jax.random.split(key, 3)
  return QuantizerParams(
    jax.random.normal(keys[0], (V, Z)),
    0.2 * jax.random.normal(keys[1], (P, 3, 3, Z, Z)),
    0.1 * jax.random.normal(keys[2], (P, Z)),
  )


@pytest.mark.parametrize("chunk", [512, 128, 7])
@pytest.mark.parametrize("distance", ["euclidean", "cosine"])
def test_nearest_code_equals_all_distances_at_once(
  monkeypatch, chunk, distance
):
  monkeypatch.setattr(quantizer, "CODE_CHUNK", chunk)
  x_BTZ = np.asarray(jax.random.normal(jax.random.key(0), (3, 20, 6)), "f8")
  codebook_VZ = np.asarray(jax.random.normal(jax.random.key(1), (300, 6)), "f8")
  ours = quantizer.nearest_code(
    jnp.float32(x_BTZ), jnp.float32(codebook_VZ), distance
  )
  if distance == "euclidean":
    cost = np.square(x_BTZ[:, :, None] - codebook_VZ).sum(-1)
  else:
    unit = codebook_VZ / np.linalg.norm(codebook_VZ, axis=-1, keepdims=True)
    cost = -np.einsum("btz,vz->btv", x_BTZ, unit)
  np.testing.assert_array_equal(ours, cost.argmin(-1))


def test_of_two_equal_codes_the_first_is_taken(monkeypatch):
  monkeypatch.setattr(quantizer, "CODE_CHUNK", 4)
  codebook_VZ = jnp.tile(jnp.eye(3), (4, 1))  # each code four times
  ids = quantizer.nearest_code(jnp.eye(3)[None], codebook_VZ, "euclidean")
  np.testing.assert_array_equal(ids, [[0, 1, 2]])


def test_the_search_never_holds_batch_tokens_codes():
  B, T, V, Z = 4, 64, 2048, 8

  def search(x_BTZ, codebook_VZ):
    return quantizer.nearest_code(x_BTZ, codebook_VZ, "euclidean")

  lowered = jax.jit(search).lower(jnp.zeros((B, T, Z)), jnp.zeros((V, Z)))
  temporaries = lowered.compile().memory_analysis().temp_size_in_bytes
  assert quantizer.CODE_CHUNK < V
  assert temporaries < B * T * V * 4 / 2


def test_quantize_equals_the_residual_loop():
  """What is left of f plus f_hat is f, at every scale."""
  scales = ScaleSchedule((1, 2, (2, 3), (4, 6)))
  params = random_params(jax.random.key(0))
  f_BhwZ = jax.random.normal(jax.random.key(1), (2, 4, 6, 6))
  tokens_BL, f_hats = quantizer.quantize(
    f_BhwZ, params, scales, 0.5, "euclidean"
  )

  rest_BhwZ = np.asarray(f_BhwZ)
  for s, (i, j) in enumerate(scales.shapes):
    pooled = np.asarray(resize.area(jnp.asarray(rest_BhwZ), (i, j)))
    distance = np.square(pooled[..., None, :] - params.codebook_VZ).sum(-1)
    ids = distance.argmin(-1)
    tokens = tokens_BL[:, scales.start(s) : scales.end(s)]
    np.testing.assert_array_equal(tokens, ids.reshape(2, -1))
    added = quantizer.contribution(
      params.codebook_VZ[ids], params, s, scales, 0.5
    )
    rest_BhwZ = rest_BhwZ - np.asarray(added)
    np.testing.assert_allclose(rest_BhwZ + f_hats[s], f_BhwZ, rtol=0, atol=2e-5)


def test_accumulate_rebuilds_f_hat_from_tokens_alone():
  scales = ScaleSchedule((1, 2, 4))
  params = random_params(jax.random.key(2))
  f_BhwZ = jax.random.normal(jax.random.key(3), (2, 4, 4, 6))
  tokens_BL, f_hats = quantizer.quantize(
    f_BhwZ, params, scales, 0.5, "euclidean"
  )
  for ours, expected in zip(
    quantizer.accumulate(tokens_BL, params, scales, 0.5), f_hats, strict=True
  ):
    np.testing.assert_array_equal(ours, expected)


def test_wanted_vectors_are_what_the_tokens_were_chosen_for():
  scales = ScaleSchedule((1, 2, 4))
  params = random_params(jax.random.key(4))
  f_BhwZ = jax.random.normal(jax.random.key(5), (2, 4, 4, 6))
  tokens_BL, f_hats = quantizer.quantize(
    f_BhwZ, params, scales, 0.5, "euclidean"
  )
  wanted_BLZ = quantizer.wanted_vectors(f_BhwZ, f_hats, scales)
  chosen = quantizer.nearest_code(wanted_BLZ, params.codebook_VZ, "euclidean")
  np.testing.assert_array_equal(chosen, tokens_BL)


@pytest.mark.parametrize("share", [0, 4])
def test_ten_scales_equal_the_recorded_run(share):
  recorded = golden_files.arrays("quant10.npz")
  scales = ScaleSchedule(SCALES[256])
  tensors = golden_files.state_dict("vae_tiny.pth.xz")
  phi = tensors if share == 4 else recorded
  stem = (
    "quantize.quant_resi.qresi_ls."
    if share
    else ("share0_w.quantize.quant_resi.")
  )
  P = share or 10
  kernels = [phi[f"{stem}{p}.weight"].transpose(2, 3, 1, 0) for p in range(P)]
  params = QuantizerParams(
    jnp.asarray(tensors["quantize.embedding.weight"]),
    jnp.stack(kernels),
    jnp.stack([phi[f"{stem}{p}.bias"] for p in range(P)]),
  )
  f_BhwZ = golden_files.nhwc(recorded[f"share{share}_f"])
  tokens_BL, f_hats = quantizer.quantize(
    f_BhwZ, params, scales, 0.5, "euclidean"
  )
  np.testing.assert_array_equal(tokens_BL, recorded[f"share{share}_ids"])
  for ours, f_hat in zip(f_hats, recorded[f"share{share}_fhat"], strict=True):
    golden_files.assert_close(ours, golden_files.nhwc(f_hat))
  inputs = [
    quantizer.next_input(f_hats[s - 1], s, scales) for s in range(1, 10)
  ]
  golden_files.assert_close(
    np.concatenate(inputs, axis=1), recorded[f"share{share}_var_input"]
  )


def test_quant_resi_zero_has_no_phi():
  scales = ScaleSchedule((1, 2))
  params = QuantizerParams(jnp.eye(3), None, None)
  h_BijZ = jax.random.normal(jax.random.key(0), (1, 2, 2, 3))
  np.testing.assert_array_equal(
    quantizer.contribution(h_BijZ, params, 1, scales, 0.0), h_BijZ
  )
