"""512 px, 2,240 tokens: the d36 preset, made narrow, from images to a loss."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import var as var_presets
from var_jax.models.scales import SCALES
from var_jax.models.tokenizer import TokenizerConfig
from var_jax.models.transformer import VAR
from var_jax.parallel import mesh as mesh_lib
from var_jax.training import tokenizer_step
from var_jax.training.var_training import VARTraining

TOKENIZER = TokenizerConfig(
  vocab_size=32,
  latent_channels=4,
  channels=8,
  norm_groups=4,
  encoder_blocks=1,
  decoder_blocks=1,
  scales=SCALES[512],
)


def training(attention="plain", tokenizer=TOKENIZER):
  config = var_presets.get_config("d36-512")
  # At the preset's 5e-6 a layer would hardly be felt.
  config.model.update(depth=2, width=32, heads=2, init_adaln_gamma=1.0)
  config.data.batch_size = 2
  config.steps = 40
  config.optimizer.learning_rate = 0.5  # at a batch of 256
  config.attention = attention
  mesh = mesh_lib.make_mesh(devices=jax.devices()[:1])
  return VARTraining.of(config, mesh, tokenizer, 5)


def batch(made):
  rng = np.random.default_rng(0)
  image_BHW3 = rng.integers(0, 256, (2, 512, 512, 3), dtype=np.uint8)
  image_BHW3[1] = image_BHW3[1] // 8  # not of one kind
  zeros_B2 = np.zeros((2, 2), np.uint32)
  return mesh_lib.to_devices(
    made.mesh,
    {
      "image": image_BHW3,
      "label": np.array([1, 4], np.int32),
      "index": np.arange(2, dtype=np.uint32),
      "position": np.arange(2, dtype=np.uint32),
      "skipped": np.zeros(2, np.int32),
      "raw_digest": zeros_B2,
      "digest": zeros_B2,
    },
  )


def test_the_512_preset_learns_a_batch():
  made = training()
  assert made.cfg.schedule.num_tokens == 2240 and made.cfg.shared_adaln
  key = jax.random.key(1)
  frozen = tokenizer_step.init_params(made.tokenizer, key)
  state, images, losses = made.placed(made.fresh), batch(made), []
  for _ in range(8):
    state, metrics = made.step(None)(state, frozen, images)
    losses.append(float(metrics["loss_mean"]))
  assert losses[-1] < 0.97 * losses[0], losses
  assert metrics["loss_scale"].keys() == {str(s) for s in range(10)}


def test_splash_gives_the_loss_and_gradient_of_plain_attention():
  made = {
    "plain": training(),
    "splash": training("splash"),
    "blind": training(),
  }
  # What a test that cannot tell would take for attention too.
  made["blind"].__dict__["var"] = VAR(
    made["blind"].cfg, lambda q, k, v, mask: jnp.zeros_like(q)
  )
  frozen = tokenizer_step.init_params(
    made["plain"].tokenizer, jax.random.key(1)
  )
  found = {}
  for name, each in made.items():
    state = each.placed(each.fresh)
    _, metrics = each.step(None)(state, frozen, batch(each))
    found[name] = np.array([metrics["loss"], metrics["grad_norm"]])
  np.testing.assert_allclose(found["splash"], found["plain"], rtol=1e-5)
  # Ten times the tolerance and more.
  assert np.all(np.abs(found["blind"] / found["plain"] - 1) > 1e-4)


def test_a_tokenizer_of_another_size_is_refused():
  other = dataclasses.replace(TOKENIZER, scales=SCALES[256])
  with pytest.raises(ValueError, match="image_size 512 is not .* 256"):
    training(tokenizer=other)
