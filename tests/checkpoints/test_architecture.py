"""The released files' names and shapes say what they are."""

import collections

import golden_files
import numpy as np
import pytest

from var_jax.checkpoints import architecture, torch_format
from var_jax.checkpoints.architecture import Settings
from var_jax.models.scales import SCALES
from var_jax.models.tokenizer import TokenizerConfig
from var_jax.models.transformer import VARConfig


def manifest(name):
  """Return tensors of the manifest's shapes that take no memory."""
  return collections.OrderedDict(
    (tensor, np.broadcast_to(np.zeros((), dtype), shape))
    for tensor, (shape, dtype) in golden_files.table(
      f"manifest_{name}.json"
    ).items()
  )


@pytest.mark.parametrize("depth", [16, 20, 24, 30, 36])
def test_released_transformers_are_recognised(depth):
  scales = SCALES[512 if depth == 36 else 256]
  expected = VARConfig.official(depth, scales=scales, shared_adaln=depth == 36)
  tensors = manifest(f"var_d{depth}")
  tensors |= torch_format.var_buffers(expected)
  assert architecture.infer_var(tensors, Settings()) == expected
  names = {entry.official for entry in torch_format.var_entries(expected)}
  assert names | set(torch_format.var_buffers(expected)) == set(tensors)


@pytest.mark.parametrize("resolution", [256, 512])
def test_the_released_tokenizer_is_recognised(resolution):
  tensors = manifest("vae_ch160v4096z32")
  said = Settings(scales=SCALES[resolution])
  expected = TokenizerConfig(scales=SCALES[resolution])
  assert architecture.infer_tokenizer(tensors, said) == expected


def test_settings_of_two_sources_are_put_together():
  flags = Settings(heads=3, distance="cosine")
  file = Settings(norm_eps=1e-5, distance="cosine")
  both = Settings(heads=3, distance="cosine", norm_eps=1e-5)
  assert flags.agree(file, "config.json") == both
  with pytest.raises(ValueError, match="distance is cosine by .*, but x says"):
    flags.agree(Settings(distance="euclidean"), "x")
  file = Settings(quant_resi=0.0)
  assert Settings().agree(file, "x").quant_resi == 0.0
  with pytest.raises(ValueError, match="quant_resi is 0.5 by"):
    Settings(quant_resi=0.5).agree(file, "x")
