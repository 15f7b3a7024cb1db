"""Models that compile in seconds, for tests that train or store one."""

import jax
import numpy as np

from var_jax.checkpoints import torch_format, weights
from var_jax.checkpoints.description import Description
from var_jax.models.tokenizer import TokenizerConfig
from var_jax.models.transformer import VARConfig


def tokenizer_config(scales: tuple[int, ...] = (1, 2)) -> TokenizerConfig:
  """Return two levels: images of twice the finest scale, 16 codes of 4."""
  return TokenizerConfig(
    vocab_size=16,
    latent_channels=4,
    channels=8,
    norm_groups=4,
    channel_mults=(1, 1),
    encoder_blocks=1,
    decoder_blocks=1,
    scales=scales,
  )


def var_config(tokenizer: TokenizerConfig, classes: int = 10) -> VARConfig:
  """Return a transformer of one layer for a tokenizer."""
  return VARConfig(
    depth=1,
    width=16,
    heads=2,
    num_classes=classes,
    vocab_size=tokenizer.vocab_size,
    latent_channels=tokenizer.latent_channels,
    scales=tokenizer.scales,
  )


def write_var(folder, scales: tuple[int, ...] = (1, 2)) -> None:
  """Fill a new or empty folder with a tokenizer and a transformer of noise."""
  tokenizer = tokenizer_config(scales)
  var = var_config(tokenizer)
  rng = np.random.default_rng(0)

  def noise(abstract):
    return jax.tree.map(
      lambda x: rng.normal(0, 0.2, x.shape).astype(x.dtype),
      {"params": abstract},
    )

  weights.write_tokenizer(
    folder,
    Description(tokenizer),
    noise(torch_format.abstract_tokenizer(tokenizer)),
  )
  described = Description(tokenizer, var)
  weights.write_model(folder, described, noise(torch_format.abstract_var(var)))
