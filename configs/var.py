"""Transformer training: `var-jax train --config configs/var.py:PRESET`.

`PRESET,cached` trains from tokens that `var-jax cache` wrote:
--config.data.token_cache says where.
"""

import ml_collections

from var_jax import VARConfig
from var_jax.training.config import run_config, section
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
  # For two CPU cores, see docs/benchmarks.md: Fashion-MNIST at 32 px, and
  # emoji at 64.
  "fashion32": (5, 32, None, 8e-3, 1e-1, 0.01, None),
  "emoji64": (5, 16, None, 16e-3, 1e-1, 0.01, None),
  "tiny": (2, 16, None, 1e-2, 1e-1, 0.1, None),
}


def get_config(preset: str = "d16") -> ml_collections.ConfigDict:
  """Return the config of a preset.

  The scale list, codebook and class count are those of the tokenizer and the
  data; d36-512 takes a tokenizer of 512 px only.
  """
  name, *suffixes = preset.split(",")
  if name not in PRESETS or suffixes not in ([], ["cached"]):
    raise ValueError(
      f"preset {preset!r} is not known; use one of {', '.join(PRESETS)}, and "
      "one,cached to train from cached tokens."
    )
  config = _config(name)
  if suffixes:
    config.data.token_cache = "/path/to/token_cache"
  return config


def _config(preset: str) -> ml_collections.ConfigDict:
  depth, batch_size, epochs, rate, gamma, final, decay_end = PRESETS[preset]
  config = run_config("var")
  config.data.source = "folder:/path/to/imagenet"
  config.data.batch_size = batch_size
  config.data.workers = 8

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
    remat="full" if depth >= 16 else "none",  # batch 768 on 16 chips of 16 GiB
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
  if preset == "d36-512":
    config.data.image_size = 512
  if preset in ("fashion32", "emoji64"):
    config.steps = {"fashion32": 4000, "emoji64": 3000}[preset]
    config.ema_decay = 0.999
    config.data.source = f"npz:/path/to/{preset}_train.npz"
    config.data.transform = "resize"
    config.data.workers = 0
    config.model.width = 32 * depth
    config.model.drop_path = 0.0
    config.optimizer.schedule = "cos"
    config.optimizer.warmup_fraction = 0.06
  elif preset == "tiny":
    config.steps = 100
    config.data.source = "digits"
    config.data.transform = "resize"
    config.data.workers = 0
    config.log_every = config.checkpoint_every = 20
    config.pictures = 2
  else:
    config.steps = epochs * IMAGENET_STEPS_PER_EPOCH[batch_size]
    config.eval_every = 10_000
    config.checkpoint_every = 2000
    config.keep_every = 50_000
  return config
