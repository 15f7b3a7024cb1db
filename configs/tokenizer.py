"""Tokenizer training: `var-jax train --config configs/tokenizer.py:PRESET`."""

import ml_collections

from var_jax import TokenizerConfig
from var_jax.models.scales import SCALES
from var_jax.training.config import run_config, section
from var_jax.training.optim import OptimizerConfig
from var_jax.training.tokenizer_step import TokenizerLossConfig

# Of the model; what is not named is a released value (TokenizerConfig).
PRESETS = {
  "released256": dict(scales=SCALES[256]),
  "released512": dict(scales=SCALES[512]),
  # 64 px, for machines without an accelerator.
  "small64": dict(
    vocab_size=512,
    latent_channels=16,
    channels=32,
    scales=(1, 2, 3, 4),
  ),
  # 32 px, Fashion-MNIST on two CPU cores, see docs/benchmarks.md.
  "fashion32": dict(
    vocab_size=512,
    latent_channels=16,
    channels=16,
    channel_mults=(1, 1, 2, 4),
    norm_groups=8,
    encoder_blocks=1,
    decoder_blocks=1,
    scales=(1, 2, 3, 4),
    num_phis=0,
  ),
  # 64 px, emoji on two CPU cores: 8x8 latents, whose finest scale is a half of
  # all tokens.
  "emoji64": dict(
    vocab_size=512,
    latent_channels=16,
    channels=16,
    channel_mults=(1, 1, 2, 4),
    norm_groups=8,
    encoder_blocks=1,
    decoder_blocks=1,
    scales=(1, 2, 3, 4, 6, 8),
    num_phis=0,
  ),
  # 16 px, for tests: one step takes milliseconds.
  "tiny": dict(
    vocab_size=32,
    latent_channels=4,
    channels=32,
    channel_mults=(1, 1, 1),
    encoder_blocks=1,
    decoder_blocks=1,
    scales=(1, 2, 4),
  ),
}


def get_config(preset: str = "released256") -> ml_collections.ConfigDict:
  """Return the config of a preset.

  The losses are L2 and the quantiser's. Batch, rate and steps were never
  published for the released tokenizer; these are a start, not a recipe.
  """
  if preset not in PRESETS:
    raise ValueError(
      f"preset {preset!r} is not known; use one of {', '.join(PRESETS)}."
    )
  config = run_config("tokenizer")
  config.steps = 100_000
  config.ema_decay = 0.999
  config.data.source = "folder:/path/to/imagenet"
  config.data.batch_size = 256
  config.data.flip = True
  config.data.workers = 8

  config.model = section(TokenizerConfig, **PRESETS[preset])
  config.model.dtype = "auto"  # bfloat16 decoder on TPU and GPU
  config.loss = section(TokenizerLossConfig, revive_every=50)
  config.optimizer = section(
    OptimizerConfig, schedule="cos", warmup_fraction=0.01, weight_decay=0.005
  )
  if preset == "fashion32":
    config.steps = 2000
    config.ema_decay = 0.99
    config.data.source = "npz:/path/to/fashion_mnist_train.npz"
    config.data.batch_size = 32
    config.data.transform = "resize"
    config.data.flip = False
    config.data.workers = 0
    config.optimizer.learning_rate = 2e-3 * 8  # at a batch of 256
    config.optimizer.warmup_fraction = 0.04
    config.checkpoint_every = 500
    config.keep_checkpoints = 1
  elif preset == "emoji64":
    config.steps = 1500
    config.ema_decay = 0.99
    config.data.source = "npz:/path/to/emoji64_train.npz"
    config.data.batch_size = 16
    config.data.transform = "resize"
    config.data.flip = False  # flags and letters are not what their mirror is
    config.data.workers = 0
    config.optimizer.learning_rate = 2e-3 * 16  # at a batch of 256
    config.optimizer.warmup_fraction = 0.04
    config.checkpoint_every = 500
    config.keep_checkpoints = 1
  elif preset == "tiny":
    config.steps = 100
    config.data.source = "digits"
    config.data.batch_size = 16
    config.data.transform = "resize"
    config.data.workers = 0
    config.log_every = config.checkpoint_every = 20
    config.pictures = 2
  return config
