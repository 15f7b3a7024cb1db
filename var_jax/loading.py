"""From a workdir to a model, laid out for the devices there are."""

import contextlib
import dataclasses
import functools
import math

import jax
from etils import epath

from var_jax.api import Model
from var_jax.generation.sampler import ModelParams, Models
from var_jax.models.layers import resolve_dtype
from var_jax.models.tokenizer import Tokenizer, TokenizerConfig
from var_jax.models.transformer import VAR, VARConfig
from var_jax.parallel import attention, rules
from var_jax.parallel import mesh as mesh_lib

# Pixels that the decoder takes at once: more is no faster. On an H100 64 images
# of 256x256 pixels take a tenth less time at once than eight at a time, and six
# times the memory; on a CPU one after the other is fastest.
_PIXELS = {"cpu": 256 * 256}
_PIXELS_OF_ACCELERATORS = 32 * 256 * 256


def load(
  path: epath.PathLike,
  *,
  mesh: jax.sharding.Mesh | None = None,
  dtype: str | None = None,
  weights: str = "ema",
) -> Model:
  """Return the model of a workdir, at its newest step.

  Args:
    path: what `var-jax convert` wrote, or a training workdir; or one of its
      steps, WORKDIR/checkpoints/STEP. A transformer's contains its frozen
      tokenizer; a tokenizer alone encodes and decodes.
    mesh: of Auto axes, as `parallel.mesh.make_mesh` returns it: batches are
      split over slice, data and fsdp, a transformer's parameters over fsdp and
      model; other axes change nothing. The first device by default.
    dtype: of matmul inputs, "float32" or "bfloat16"; by default float32 on
      CPU and bfloat16 elsewhere. Parameters that meet nothing else are held
      in it.
    weights: "ema" (falls back to "raw" where none was kept) or "raw".

  Raises:
    ValueError: there is no checkpoint, it cannot be read, or it is not what
      its checksums say; or its parameters do not divide on the mesh.
  """
  # Here and not above: sampling a model in memory needs no Orbax.
  from var_jax.checkpoints import weights as weights_lib

  dtype = resolve_dtype(dtype)
  sharding, context, shards = None, contextlib.nullcontext, 1
  if mesh is not None:
    shards = mesh_lib.row_shards(mesh)
    rules.check_divides(mesh, weights_lib.shapes(path))
    sharding = functools.partial(rules.sharding, mesh)
    context = rules.Context(mesh)
  description, tokenizer_params, var_params = weights_lib.read_models(
    path, weights=weights, sharding=sharding, dtype=dtype
  )
  tokenizer = dataclasses.replace(description.tokenizer, dtype=dtype)
  var = description.transformer
  return Model(
    Models(
      Tokenizer(tokenizer),
      var and sampling_var(dataclasses.replace(var, dtype=dtype)),
      context,
      shards,
      decode_rows(tokenizer),
    ),
    ModelParams(tokenizer_params, var_params),
    description.class_names,
    mesh,
  )


def sampling_var(cfg: VARConfig, platform: str | None = None) -> VAR:
  """Return the transformer with the attention that suits sampling.

  Args:
    platform: by default that of the first device.
  """
  return VAR(cfg, attention.unmasked(platform, cfg.dtype))


def decode_rows(cfg: TokenizerConfig, platform: str | None = None) -> int:
  """Return the images that a device decodes at once."""
  platform = platform or jax.default_backend()
  pixels = _PIXELS.get(platform, _PIXELS_OF_ACCELERATORS)
  return max(1, pixels // math.prod(cfg.image_shape))
