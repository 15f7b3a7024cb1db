"""The digits demo: a tokenizer and a VAR from nothing, judged by a stranger.

Real scanned digits (scikit-learn, 1,797 images) are split 70/30. Both models
see the 70% only. The judge, a support vector classifier, is fitted on the
same 70% of real digits and first has to prove itself on the other 30%.
"""

import time
from typing import Any

import jax
import ml_collections
import numpy as np
from etils import epath

from var_jax import api, files, images
from var_jax.data import sources
from var_jax.training import loop

SAMPLES_A_CLASS = 50
SAMPLING = dict(guidance=1.0, top_k=0, top_p=0.95)

# name in metrics.json: (bound, True where it is a lower one)
BOUNDS = {
  "judge_accuracy": (0.97, True),
  "sample_accuracy": (0.95, True),
  "worst_class_accuracy": (0.85, True),
  "novelty": (0.8, True),
  "token_copies": (0.02, False),
  "diversity": (0.5, True),
}


def tokenizer_config() -> ml_collections.ConfigDict:
  """Return the tokenizer's config: 32 px, 4x4 latent, scales 1, 2, 4."""
  config = _common("tokenizer", steps=600, batch_size=64)
  config.ema_decay = 0.99
  config.model = ml_collections.ConfigDict(
    dict(
      vocab_size=128,
      latent_channels=16,
      channels=16,
      channel_mults=(1, 1, 2, 4),
      norm_groups=8,
      encoder_blocks=1,
      decoder_blocks=1,
      scales=(1, 2, 4),
      num_phis=0,
    )
  )
  config.loss = ml_collections.ConfigDict(dict(revive_every=50))
  # Rates are written for a batch of 256.
  config.optimizer = ml_collections.ConfigDict(
    dict(learning_rate=2e-3 * 4, schedule="cos", warmup_steps=20)
  )
  return config


def var_config(tokenizer_path: str = "") -> ml_collections.ConfigDict:
  """Return the transformer's config: 4 layers of 128, 1.2M parameters."""
  config = _common("var", steps=2000, batch_size=32)
  config.tokenizer_path = tokenizer_path
  config.ema_decay = 0.995
  config.model = ml_collections.ConfigDict(
    dict(depth=4, width=128, heads=4, dropout=0.1, drop_path=0.0)
  )
  config.loss = ml_collections.ConfigDict(dict(label_dropout=0.1))
  config.optimizer = ml_collections.ConfigDict(
    dict(learning_rate=1e-3 * 8, schedule="cos", warmup_steps=100)
  )
  return config


def _common(kind: str, steps: int, batch_size: int):
  config = ml_collections.ConfigDict()
  config.kind, config.seed, config.steps = kind, 0, steps
  config.data = ml_collections.ConfigDict(
    dict(source="digits", batch_size=batch_size, transform="jitter", flip=False)
  )
  config.log_every, config.checkpoint_every = 100, 500
  config.keep_checkpoints = 1
  return config
