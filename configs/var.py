"""Transformer training: `var-jax train --config configs/var.py:PRESET`."""

import ml_collections

from var_jax import VARConfig
from var_jax.training.config import section
from var_jax.training.optim import OptimizerConfig
from var_jax.training.var_step import VARLossConfig

IMAGENET_STEPS_PER_EPOCH = {768: 1669, 1024: 1252}  # 1,281,167 images

# The published recipes: depth, batch, epochs, base rate, gain of the AdaLN
# gammas at the start, final rate factor, final weight decay (None: constant).
PRESETS = {
  "d16": (16, 768, 200, 1e-4, 1e-3, 0.1, None),
  "d20": (20, 768, 250, 1e-4, 1e-3, 0.1, None),
  "d24": (24, 768, 350, 8e-5, 1e-4, 0.01, None),
  "d30": (30, 1024, 350, 8e-5, 1e-5, 0.01, 0.08),
  "d36-512": (36, 768, 350, 8e-5, 5e-6, 0.01, 0.08),
  # Unpublished, for smaller budgets.
  "d8": (8, 768, 200, 1e-4, 1e-3, 0.1, None),
  "d12": (12, 768, 200, 1e-4, 1e-3, 0.1, None),
  "tiny": (2, 16, None, 1e-2, 1e-1, 0.1, None),
}


def get_config(preset: str = "d16") -> ml_collections.ConfigDict:
  """Return the config of a preset.

  The scale list, codebook and class count are those of the tokenizer and the
  data; d36-512 wants a tokenizer of the 512 px scale list.
  """
  if preset not in PRESETS:
    raise ValueError(
      f"preset {preset!r} is not known; use one of {', '.join(PRESETS)}."
    )
  depth, batch_size, epochs, rate, gamma, final, decay_end = PRESETS[preset]
  config = ml_collections.ConfigDict()
  config.kind = "var"
  config.seed = 0
  config.tokenizer_path = ""  # the workdir of a trained tokenizer
  config.init_from = ""  # a workdir to start from; its tokenizer by default
  config.ema_decay = 0.0  # VAR: no average of the weights

  config.data = ml_collections.ConfigDict()
  config.data.source = "folder:/path/to/imagenet"
  config.data.batch_size = batch_size
  config.data.transform = "crop"  # crop | jitter | resize
  config.data.flip = False

  # VAR: width 64 and one head a layer of depth, drop path growing with it.
  config.model = section(
    VARConfig,
    without=("num_classes", "vocab_size", "latent_channels", "scales"),
    depth=depth,
    width=64 * depth,
    heads=depth,
    drop_path=0.1 * depth / 24,
    shared_adaln=preset == "d36-512",
    init_adaln_gamma=gamma,
    remat=depth > 16,
    dtype="auto",
  )
  config.loss = section(VARLossConfig)
  # VAR: warm-up takes a fiftieth of the epochs.
  config.optimizer = section(
    OptimizerConfig,
    learning_rate=rate,  # at a batch of 256
    final_factor=final,
    warmup_fraction=1 / 50,
    weight_decay_end=decay_end,
  )

  config.log_every = 50
  config.checkpoint_every = 2000
  config.keep_checkpoints = 2

  if preset == "tiny":
    config.steps = 100
    config.data.source = "digits"
    config.data.transform = "resize"
    config.log_every = config.checkpoint_every = 20
  else:
    config.steps = epochs * IMAGENET_STEPS_PER_EPOCH[batch_size]
  return config
