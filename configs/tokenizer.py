"""Tokenizer training: `var-jax train --config configs/tokenizer.py:PRESET`."""

import ml_collections

SCALES_256 = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)
SCALES_512 = (1, 2, 3, 4, 6, 9, 13, 18, 24, 32)

# Of the model; what is not named is a released value (TokenizerConfig).
PRESETS = {
  "released256": dict(scales=SCALES_256),
  "released512": dict(scales=SCALES_512),
  # 64 px, for machines without an accelerator.
  "small64": dict(
    vocab_size=512,
    latent_channels=16,
    channels=32,
    scales=(1, 2, 3, 4),
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
  config = ml_collections.ConfigDict()
  config.kind = "tokenizer"
  config.seed = 0
  config.steps = 100_000
  config.ema_decay = 0.999

  config.data = ml_collections.ConfigDict()
  config.data.source = "folder:/path/to/imagenet"
  config.data.batch_size = 256
  config.data.transform = "crop"  # crop | jitter | resize
  config.data.flip = True

  config.model = ml_collections.ConfigDict(PRESETS[preset])
  config.model.dtype = "auto"  # bfloat16 decoder on TPU and GPU

  config.loss = ml_collections.ConfigDict()
  config.loss.quantizer_weight = 1.0
  config.loss.revive_every = 50
  config.loss.revive_below = 0.03

  config.optimizer = ml_collections.ConfigDict()
  config.optimizer.learning_rate = 1e-4  # at a batch of 256
  config.optimizer.schedule = "cos"
  config.optimizer.warmup_steps = 1000
  config.optimizer.weight_decay = 0.005
  config.optimizer.clip_norm = 2.0

  config.log_every = 50
  config.checkpoint_every = 2000
  config.keep_checkpoints = 2

  if preset == "tiny":
    config.steps = 100
    config.data.source = "digits"
    config.data.batch_size = 16
    config.data.transform = "resize"
    config.optimizer.warmup_steps = 10
    config.log_every = config.checkpoint_every = 20
  return config
