"""What the public API refuses: one line with value, limit and remedy."""

import math
import numbers
import operator

import jax
import jax.numpy as jnp
import numpy as np

from var_jax.generation import memory
from var_jax.generation.step import ModelParams, Models, Options
from var_jax.models.scales import ScaleSchedule
from var_jax.models.tokenizer import TokenizerConfig
from var_jax.models.transformer import VARConfig
from var_jax.parallel import multihost


def labels(labels_B, cfg: VARConfig | None) -> jax.Array:
  """Return labels as int32 [B]."""
  if cfg is None:
    raise ValueError(
      "this checkpoint is a tokenizer alone; load a transformer's workdir."
    )
  labels_B = _array(labels_B, "labels")
  if labels_B.ndim == 1 and not labels_B.size:
    raise ValueError("labels are empty; give at least one.")
  if labels_B.ndim != 1 or not np.issubdtype(labels_B.dtype, np.integer):
    raise ValueError(
      f"labels are {labels_B.dtype} {labels_B.shape}; give integers [B]."
    )
  outside = labels_B[(labels_B < -1) | (labels_B >= cfg.num_classes)]
  if outside.size:
    raise ValueError(
      f"label {outside[0]} is outside 0..{cfg.num_classes - 1}; "
      "use -1 for unconditional."
    )
  return jnp.asarray(labels_B, jnp.int32)


def options(
  guidance, top_k, top_p, temperature, cfg: TokenizerConfig
) -> Options:
  """Return the options as traced numbers."""
  for name, value in (
    ("guidance", guidance),
    ("top_k", top_k),
    ("top_p", top_p),
  ):
    if not isinstance(value, numbers.Real | np.generic | jax.Array):
      raise ValueError(f"{name} {value!r} is not a number; give one.")
  with np.errstate(over="ignore"):
    finite = np.isfinite(np.float32(guidance))
  if not finite:
    raise ValueError(
      f"guidance {guidance} is not finite in float32; 0 turns it off."
    )
  if not math.isfinite(top_k) or top_k < 0 or top_k != int(top_k):
    raise ValueError(f"top_k {top_k} is not a count; 0 turns it off.")
  if not 0.0 <= top_p <= 1.0:
    raise ValueError(f"top_p {top_p} is not in [0, 1]; 0 turns it off.")
  temperature_S = _array(temperature, "temperature")
  S = len(cfg.schedule)
  if temperature_S.shape not in ((), (S,)):
    raise ValueError(
      f"temperature has shape {temperature_S.shape}; give one number, or "
      f"{S}, one a scale."
    )
  with np.errstate(over="ignore", under="ignore"):
    temperature_S = np.broadcast_to(temperature_S.astype(np.float32), (S,))
  wrong = temperature_S[~np.isfinite(temperature_S) | (temperature_S <= 0)]
  if wrong.size:
    raise ValueError(
      f"temperature {wrong[0]} is not above 0 and finite in float32; 1 changes "
      "nothing, top_k 1 is greedy."
    )
  return Options(
    jnp.float32(guidance),
    jnp.int32(min(int(top_k), cfg.vocab_size)),
    jnp.float32(top_p),
    jnp.asarray(temperature_S),
  )


def guided_scales(scales, cfg: VARConfig) -> tuple[int, int]:
  """Return the first scale with guidance and the first after it."""
  S = len(cfg.schedule)
  if scales is None:
    return 0, S
  try:
    first, stop = map(operator.index, scales)
  except (TypeError, ValueError):
    raise ValueError(
      f"guided_scales {scales!r} are no two scales; give (first, stop) like "
      f"(0, {S})."
    ) from None
  if not 0 <= first < stop <= S:
    raise ValueError(
      f"guided_scales ({first}, {stop}) are not within the {S} scales; use "
      f"0 <= first < stop <= {S}, or guidance 0."
    )
  return first, stop


def batch_size(size) -> None:
  if not isinstance(size, int | np.integer) or size < 1:
    raise ValueError(f"batch size {size!r} is no number of 1 or more; use 1.")


def fits(batch: int, models: Models, params: ModelParams) -> None:
  """Raise ValueError if so many images at once are too large for a device."""
  available = memory.of_device()
  if available is None:
    return
  rows = -(-batch // models.row_shards)
  fixed, each = memory.of_parameters(params), memory.of_image(models)
  if fixed + rows * each > available:
    most = int((available - fixed) // each) * models.row_shards
    raise ValueError(
      f"{batch} images at once take about {(fixed + rows * each) / 2**30:.1f} "
      f"GiB a device, of {available / 2**30:.1f}; draw at most {max(most, 0)} "
      "at once."
    )


def key(key, batch: int) -> jax.Array:
  """Return one typed key, or as many as there are labels."""
  if not isinstance(key, jax.Array | np.ndarray):
    raise ValueError(f"key {key!r} is no JAX key; give jax.random.key(seed).")
  if key.dtype == np.uint32:  # jax.random.PRNGKey
    key = jax.random.wrap_key_data(jnp.asarray(key))
  if not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
    raise ValueError(
      f"key is {key.dtype} {key.shape}, no JAX key; give jax.random.key(seed)."
    )
  if key.shape not in ((), (batch,)):
    raise ValueError(
      f"keys of shape {key.shape} do not match {batch} labels; give one key, "
      "or one a label."
    )
  return key


def images(
  images_BHW3, schedule: ScaleSchedule, cfg: TokenizerConfig
) -> jax.Array:
  """Return images as float32."""
  if not isinstance(images_BHW3, jax.Array):
    images_BHW3 = _array(images_BHW3, "images")
  shape = images_BHW3.shape
  if len(shape) != 4 or shape[-1] != 3 or not shape[0]:
    raise ValueError(f"images are {shape}; give [B, H, W, 3].")
  if not jnp.issubdtype(images_BHW3.dtype, jnp.floating):
    raise ValueError(
      f"images are {images_BHW3.dtype}; give float32 in [-1, 1]."
    )
  wanted = tuple(n * cfg.downsampling for n in schedule.grid)
  if shape[1:3] != wanted:
    raise ValueError(
      f"images of {shape[1:3]} pixels do not fit scales {schedule.sizes}, "
      f"which need {wanted}; resize them."
    )
  return jnp.asarray(images_BHW3, jnp.float32)


def tokens(
  tokens_BL, schedule: ScaleSchedule, cfg: TokenizerConfig
) -> jax.Array:
  """Return tokens as int32 [B, L]."""
  tokens_BL = _array(tokens_BL, "tokens")
  fits = tokens_BL.shape[1:] == (schedule.num_tokens,) and tokens_BL.size
  if not fits or not np.issubdtype(tokens_BL.dtype, np.integer):
    raise ValueError(
      f"tokens are {tokens_BL.dtype} {tokens_BL.shape}; give integers "
      f"[B, {schedule.num_tokens}]."
    )
  outside = tokens_BL[(tokens_BL < 0) | (tokens_BL >= cfg.vocab_size)]
  if outside.size:
    raise ValueError(
      f"token {outside[0]} is outside 0..{cfg.vocab_size - 1}; "
      "use ids of this tokenizer."
    )
  return jnp.asarray(tokens_BL, jnp.int32)


def _array(value, name: str) -> np.ndarray:
  """Return an array of numbers, the whole of it in each process."""
  if isinstance(value, jax.Array):
    value = multihost.gathered(value)
  try:
    array = np.asarray(value)
  except ValueError:  # ragged
    array = np.asarray(None)
  if array.dtype.kind not in "biuf" and array.dtype.kind != "V":
    raise ValueError(
      f"{name} are no array of numbers; give a JAX or NumPy one."
    )
  return array
