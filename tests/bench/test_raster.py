"""Raster order: the cache changes nothing, and no token sees the future."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from var_jax.bench import raster
from var_jax.generation import sampler
from var_jax.generation.sampler import Options
from var_jax.models.transformer import VARConfig

CFG = VARConfig(
  depth=2,
  width=32,
  heads=2,
  num_classes=5,
  vocab_size=24,
  scales=(4,),
  init_adaln_gamma=0.5,
  init_head=1.0,
)
MODEL = raster.Raster(CFG)
PARAMS = raster.init_params(MODEL, jax.random.key(0))
LABELS = jnp.array([1, -1, 3])
FREE = Options(2.0, 12, 0.9, 0.8)


def generate(labels_B=LABELS, keys=None, options=FREE, **how):
  if keys is None:
    keys = sampler.image_keys(jax.random.key(7), len(labels_B))
  return raster.generate(MODEL, PARAMS, labels_B, keys, options, **how)


@pytest.mark.parametrize("guided", [True, False])
def test_without_a_cache_the_same_tokens_are_drawn(guided):
  cached = generate(guided=guided)
  np.testing.assert_array_equal(cached, generate(guided=guided, cached=False))
  assert len(np.unique(cached)) > 5


def test_greedy_tokens_are_the_likeliest_of_teacher_forced_logits():
  tokens_BL = generate(options=Options(1.5, 1, 0.0), guided=True)
  conditional = MODEL.apply(PARAMS, LABELS, tokens_BL)
  unconditional = MODEL.apply(PARAMS, jnp.full_like(LABELS, -1), tokens_BL)
  likeliest_BL = (2.5 * conditional - 1.5 * unconditional).argmax(-1)
  np.testing.assert_array_equal(tokens_BL, likeliest_BL)


def test_logits_follow_from_the_tokens_before_alone():
  tokens_BL = generate()
  logits_BLV = MODEL.apply(PARAMS, LABELS, tokens_BL)
  for i in (0, 5, 15):
    changed_BL = tokens_BL.at[:, i].add(1) % CFG.vocab_size
    others_BLV = MODEL.apply(PARAMS, LABELS, changed_BL)
    same_L = np.all(np.asarray(logits_BLV == others_BLV), axis=(0, 2))
    np.testing.assert_array_equal(same_L, np.arange(16) <= i)


def test_an_image_is_the_same_whatever_batch_it_is_drawn_in():
  together = generate()
  keys_B = sampler.image_keys(jax.random.key(7), 3)
  alone = generate(LABELS[2:], keys_B[2:])
  np.testing.assert_array_equal(alone[0], together[2])


def test_guidance_zero_equals_leaving_the_unconditional_half_out():
  options = FREE._replace(guidance=0.0)
  np.testing.assert_array_equal(
    generate(options=options), generate(options=options, guided=False)
  )


def test_loss_is_the_mean_cross_entropy_and_its_labels_are_dropped():
  tokens_BL, key = generate(), jax.random.key(1)
  for dropout, labels_B in ((0.0, LABELS), (1.0, jnp.full_like(LABELS, -1))):
    logits_BLV = np.asarray(MODEL.apply(PARAMS, labels_B, tokens_BL), float)
    odds_BLV = np.exp(logits_BLV)
    probs_BLV = odds_BLV / odds_BLV.sum(-1, keepdims=True)
    chosen_BL = np.take_along_axis(probs_BLV, tokens_BL[..., None], -1)
    calm = raster.Raster(dataclasses.replace(CFG, drop_path=0.0))
    loss = raster.loss(calm, PARAMS, LABELS, tokens_BL, key, dropout)
    np.testing.assert_allclose(loss, -np.log(chosen_BL).mean(), rtol=1e-5)


def test_flops_equal_a_count_by_hand():
  L, D, R, V = 16, 32, 2, 24
  once = 2 * (R * 6 * D * D + 2 * D * D)  # modulation of layers and head
  weights = 2 * R * 12 * D * D
  head = 2 * D * V
  pairs = sum(i + 1 for i in range(L))
  cached = once + L * (weights + head) + 4 * R * D * pairs
  free = once + L * (L * (weights + head) + 4 * R * D * L * L)
  assert raster.sample_flops(CFG, 1, cached=True) == cached
  assert raster.sample_flops(CFG, 2, cached=False) == 2 * free


@pytest.mark.parametrize("scales", [(1, 4), ((2, 3),)])
def test_scales_in_raster_order_are_one_square(scales):
  with pytest.raises(ValueError, match="no single square grid"):
    raster.Raster(VARConfig(scales=scales))


def test_layers_are_random_where_a_key_is_given():
  cfg = dataclasses.replace(CFG, dropout=0.5, drop_path=0.5)
  model, tokens_BL = raster.Raster(cfg), generate()

  def logits(key):
    return np.asarray(model.apply(PARAMS, LABELS, tokens_BL, key))

  keys = jax.random.split(jax.random.key(2))
  np.testing.assert_array_equal(logits(keys[0]), logits(keys[0]))
  assert np.any(logits(keys[0]) != logits(keys[1]))
  plain = MODEL.apply(PARAMS, LABELS, tokens_BL)
  np.testing.assert_array_equal(logits(None), plain)
