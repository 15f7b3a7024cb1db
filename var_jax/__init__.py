"""var_jax: visual autoregressive modeling by next-scale prediction in JAX."""

from var_jax.api import Model
from var_jax.generation.sampler import Sample
from var_jax.images import to_uint8
from var_jax.loading import load
from var_jax.models.tokenizer import Tokenizer, TokenizerConfig
from var_jax.models.transformer import VAR, VARConfig

__all__ = [
  "VAR",
  "Model",
  "Sample",
  "Tokenizer",
  "TokenizerConfig",
  "VARConfig",
  "load",
  "to_uint8",
  "train",
]
__version__ = "0.1.0"


def train(config, workdir) -> None:
  """Train what `config` describes; see `var_jax.training.loop.train`."""
  # Here and not above: sampling must not import optimisers and data readers.
  from var_jax.training import loop

  loop.train(config, workdir)
