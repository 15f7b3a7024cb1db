"""Tokenizer training: `var-jax train --config configs/tokenizer.py:PRESET`."""

import ml_collections

from var_jax import TokenizerConfig, demo
from var_jax.models.scales import SCALES
from var_jax.training.config import run_config, section
from var_jax.training.optim import OptimizerConfig
from var_jax.training.tokenizer_step import TokenizerLossConfig

# Of the model; what is not named is a released value (TokenizerConfig).
PRESETS = {
  "imagenet256": dict(scales=SCALES[256]),
  "imagenet512": dict(scales=SCALES[512]),
  "openimages256": dict(scales=SCALES[256]),
  # For machines without an accelerator: 32 and 64 px, 4x4 and 8x8 latents.
  "fashion32": dict(scales=(1, 2, 3, 4)),
  "emoji64": dict(scales=(1, 2, 3, 4, 6, 8)),
  "digits32": {},  # the demo's
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
_SMALL = dict(
  vocab_size=512,
  latent_channels=16,
  channels=16,
  channel_mults=(1, 1, 2, 4),
  norm_groups=8,
  encoder_blocks=1,
  decoder_blocks=1,
  num_phis=0,
)


def get_config(preset: str = "imagenet256") -> ml_collections.ConfigDict:
  """Return the config of a preset; docs/tokenizer.md says why each number."""
  if preset not in PRESETS:
    raise ValueError(
      f"preset {preset!r} is not known; use one of {', '.join(PRESETS)}."
    )
  if preset == "digits32":
    return demo.tokenizer_config()
  if preset in ("fashion32", "emoji64"):
    return _small(preset)
  return _tiny() if preset == "tiny" else _released(preset)


def _released(preset: str) -> ml_collections.ConfigDict:
  config = run_config("tokenizer")
  large = preset == "imagenet512"
  config.steps = 200_000
  config.ema_decay = 0.9999
  config.data.source = (
    "folder:/path/to/openimages"
    if preset == "openimages256"
    else "folder:/path/to/imagenet"
  )
  config.data.batch_size = 64 if large else 256
  config.data.flip = True
  config.data.workers = 8

  config.model = section(TokenizerConfig, **PRESETS[preset])
  config.model.dtype = "auto"  # bfloat16 decoder on TPU and GPU
  config.loss = section(
    TokenizerLossConfig,
    lpips_weight=1.0,
    scale_dropout=0.1,
    revive_every=50,
    kmeans_rounds=5,
  )
  config.lpips_path = "/path/to/lpips"
  config.collapse.update(policy="revive", every=1000)
  config.adversary.update(weight=0.5, start=20_000, lecam=0.001)
  config.optimizer = section(
    OptimizerConfig, schedule="cos", warmup_fraction=0.01, weight_decay=0.005
  )
  config.adversary_optimizer.update(schedule="cos", warmup_fraction=0.0)
  return config


def _small(preset: str) -> ml_collections.ConfigDict:
  config = run_config("tokenizer")
  config.ema_decay = 0.99
  config.data.source = f"npz:/path/to/{preset}_train.npz"
  config.data.transform = "resize"
  config.model = section(TokenizerConfig, **_SMALL, **PRESETS[preset])
  config.loss = section(TokenizerLossConfig, revive_every=50)
  config.optimizer = section(
    OptimizerConfig, schedule="cos", warmup_fraction=0.04, weight_decay=0.005
  )
  config.checkpoint_every = 500
  config.keep_checkpoints = 1
  if preset == "fashion32":
    config.steps = 2000
    config.data.batch_size = 32
    config.optimizer.learning_rate = 2e-3 * 8  # at a batch of 256
  else:
    config.steps = 1500
    config.data.batch_size = 16
    config.loss.update(kmeans_rounds=5, scale_dropout=0.1)
    config.optimizer.learning_rate = 2e-3 * 16
  return config


def _tiny() -> ml_collections.ConfigDict:
  config = run_config("tokenizer")
  config.steps = 100
  config.ema_decay = 0.999
  config.data.source = "digits"
  config.data.batch_size = 16
  config.data.transform = "resize"
  config.data.flip = True
  config.model = section(TokenizerConfig, **PRESETS["tiny"])
  config.loss = section(TokenizerLossConfig, revive_every=50)
  config.optimizer = section(
    OptimizerConfig, schedule="cos", warmup_fraction=0.01, weight_decay=0.005
  )
  config.log_every = config.checkpoint_every = 20
  config.pictures = 2
  return config
