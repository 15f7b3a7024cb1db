"""Names and layouts of the official PyTorch checkpoints <-> our trees.

One table of patterns for each model gives every parameter its official name.
The rest is transposition (convolutions are OIHW there and HWIO here,
projections [out, in] there and [in, out] here) and stacking, since our blocks
are scanned over layers and our phis lie in one array. NumPy only: reading and
writing the files is somebody else's work.
"""

import collections
import functools
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np

from var_jax.models.tokenizer import Tokenizer, TokenizerConfig
from var_jax.models.transformer import VAR, VARConfig

# (our path, official name); {r} counts what we stack on axis 0.
_VAR_NAMES = (
  (r"class_emb", "class_emb.weight"),
  (r"pos_start", "pos_start"),
  (r"pos", "pos_1LC"),
  (r"lvl_emb", "lvl_embed.weight"),
  (r"word_emb/(\w+)", r"word_embed.\1"),
  (r"ada/linear/(\w+)", r"blocks.{r}.ada_lin.1.\1"),
  (r"shared_ada/linear/(\w+)", r"shared_ada_lin.1.\1"),
  (r"ada_gss", "blocks.{r}.ada_gss"),
  (r"blocks/attn/scale_mul", "blocks.{r}.attn.scale_mul_1H11"),
  (r"blocks/attn/([qv]_bias)", r"blocks.{r}.attn.\1"),
  (r"blocks/attn/(\w+)/(\w+)", r"blocks.{r}.attn.\1.\2"),
  (r"blocks/ffn/(\w+)/(\w+)", r"blocks.{r}.ffn.\1.\2"),
  (r"head_ada/linear/(\w+)", r"head_nm.ada_lin.1.\1"),
  (r"head/(\w+)", r"head.\1"),
)
_TOKENIZER_NAMES = (
  (r"(\w+)/(down|up)_(\d)_(\w+)_(\d)/(\w+)/(\w+)", r"\1.\2.\3.\4.\5.\6.\7"),
  (r"(\w+)/(down|up)_(\d)_(\w+sample)/(\w+)", r"\1.\2.\3.\4.conv.\5"),
  (r"(\w+)/mid_(\w+)/(\w+)/(\w+)", r"\1.mid.\2.\3.\4"),
  (r"((?:en|de)coder)/(\w+)/(\w+)", r"\1.\2.\3"),
  (r"((?:post_)?quant_conv)/(\w+)", r"\1.\2"),
  (r"codebook", "quantize.embedding.weight"),
  (r"phi_(\w+)", r"quantize.quant_resi.PHI.\1"),
)
_LEAF_NAMES = {"kernel": "weight", "scale": "weight"}

# Tensors of the official files that are no parameters.
CODE_HITS = "quantize.ema_vocab_hit_SV"
_BUFFERS = re.compile(
  r"lvl_1L|attn_bias_for_masking|blocks\.\d+\.attn\.zero_k_bias"
  rf"|{re.escape(CODE_HITS)}"
)


class Entry(NamedTuple):
  """One official tensor and where it lives in our tree."""

  official: str
  path: str
  index: int | None  # on axis 0 of our array; None where it is all of it
  shape: tuple[int, ...]  # of ours, without axis 0 where there is an index


def var_entries(cfg: VARConfig) -> Iterator[Entry]:
  """Yield the entries of a transformer."""
  return _entries(abstract_var(cfg), _VAR_NAMES, "")


def tokenizer_entries(cfg: TokenizerConfig) -> Iterator[Entry]:
  """Yield the entries of a tokenizer."""
  # VAR: the phis' name tells how they are shared.
  phi = {0: "{r}", 1: "qresi"}.get(cfg.num_phis, "qresi_ls.{r}")
  return _entries(abstract_tokenizer(cfg), _TOKENIZER_NAMES, phi)


@functools.cache
def abstract_var(cfg: VARConfig) -> dict[str, Any]:
  """Return the parameter tree of a transformer as shapes and dtypes."""
  inputs_1lZ = jax.ShapeDtypeStruct((1, 0, cfg.latent_channels), jnp.float32)
  labels_1 = jax.ShapeDtypeStruct((1,), jnp.int32)
  init = jax.eval_shape(VAR(cfg).init, jax.random.key(0), labels_1, inputs_1lZ)
  return init["params"]


@functools.cache
def abstract_tokenizer(cfg: TokenizerConfig) -> dict[str, Any]:
  """Return the parameter tree of a tokenizer as shapes and dtypes."""
  # A shape and no array: a mistyped scale list must not take memory.
  image_1HW3 = jax.ShapeDtypeStruct((1, *cfg.image_shape, 3), jnp.float32)
  init = jax.eval_shape(Tokenizer(cfg).init, jax.random.key(0), image_1HW3)
  return init["params"]


def is_buffer(name: str) -> bool:
  """Return whether an official tensor is none of the parameters."""
  return bool(_BUFFERS.fullmatch(name))


def official_tensors(
  arrays: Mapping[str, np.ndarray], entries: Iterable[Entry]
) -> Iterator[tuple[str, np.ndarray]]:
  """Yield the official (name, tensor) of `entries`.

  Args:
    arrays: our parameters by path; those that `entries` name.
  """
  for entry in entries:
    array = np.asarray(arrays[entry.path])
    if entry.index is not None:
      array = array[entry.index]
    yield entry.official, _to_layout(entry, array)


def from_official(
  tensors: Mapping[str, np.ndarray], entries: Iterable[Entry]
) -> dict[str, Any]:
  """Return our parameter tree; each tensor is read and copied once.

  Raises:
    ValueError: a tensor is missing, unknown, of the wrong shape or dtype, or
      holds numbers that are not finite.
  """
  entries = list(entries)
  known = {entry.official for entry in entries}
  for entry in entries:
    if entry.official not in tensors:
      raise ValueError(
        f"tensor {entry.official} is missing; give the complete state dict "
        "of this architecture."
      )
  unknown = [
    name for name in tensors if name not in known and not is_buffer(name)
  ]
  if unknown:
    raise ValueError(
      f"tensor {min(unknown)} has no place in this architecture "
      f"({len(unknown)} such); check shared AdaLN, phi mode and depth."
    )
  stacked = collections.Counter(
    entry.path for entry in entries if entry.index is not None
  )
  arrays: dict[str, np.ndarray] = {}
  for entry in entries:
    tensor = tensors[entry.official]
    wanted = _to_layout(entry, np.empty(entry.shape, np.bool_)).shape
    if tensor.shape != wanted:
      raise ValueError(
        f"tensor {entry.official} has shape {tensor.shape}, the architecture "
        f"{wanted}; check depth, width, codebook and scales."
      )
    _check_numbers(entry.official, tensor)
    if entry.index is None:
      arrays[entry.path] = np.array(_from_layout(entry, tensor), order="C")
      continue
    if entry.path not in arrays:
      shape = (stacked[entry.path], *entry.shape)
      arrays[entry.path] = np.empty(shape, np.float32)
    arrays[entry.path][entry.index] = _from_layout(entry, tensor)
  return flax.traverse_util.unflatten_dict(arrays, sep="/")


def var_buffers(cfg: VARConfig) -> dict[str, np.ndarray]:
  """Return what an official transformer file holds besides parameters."""
  mask_LL = cfg.schedule.block_causal_mask()
  bias_LL = np.where(mask_LL, np.float32(0), np.float32(-np.inf))
  buffers = {
    "lvl_1L": cfg.schedule.level_ids().astype(np.int64)[None],
    "attn_bias_for_masking": bias_LL[None, None],
  }
  # VAR: q and v have a bias, k a buffer of zeros in its place.
  for r in range(cfg.depth):
    name = f"blocks.{r}.attn.zero_k_bias"
    buffers[name] = np.zeros(cfg.width, np.float32)
  return buffers


def check_var_buffers(
  tensors: Mapping[str, np.ndarray], cfg: VARConfig
) -> None:
  """Raise ValueError where a buffer of the file is not what we compute."""
  for name, expected in var_buffers(cfg).items():
    if name not in tensors:
      continue
    tensor = tensors[name]
    if tensor.dtype != expected.dtype or not np.array_equal(tensor, expected):
      raise ValueError(
        f"tensor {name}, {tensor.dtype}, is not the {expected.dtype} one of "
        f"scales {cfg.scales}; a model with another attention mask or a bias "
        "of k is not VAR."
      )


def code_hits(
  tensors: Mapping[str, np.ndarray], cfg: TokenizerConfig
) -> np.ndarray | None:
  """Return the moving count of code uses, [S, V], if the file holds it.

  VAR: a count of another number of scales is left out, not an error.
  """
  if CODE_HITS not in tensors:
    return None
  hits_SV = tensors[CODE_HITS]
  if hits_SV.ndim != 2 or hits_SV.shape[1] != cfg.vocab_size:
    raise ValueError(
      f"tensor {CODE_HITS} has shape {hits_SV.shape}, the codebook "
      f"{cfg.vocab_size} codes; give the counts of this codebook."
    )
  _check_numbers(CODE_HITS, hits_SV)
  return hits_SV if hits_SV.shape[0] == len(cfg.scales) else None


def _check_numbers(name: str, tensor: np.ndarray) -> None:
  if tensor.dtype != np.float32:
    raise ValueError(
      f"tensor {name} is {tensor.dtype}, the official files are float32; "
      "convert it with .float() first."
    )
  if not np.isfinite(tensor).all():
    raise ValueError(
      f"tensor {name} holds NaN or infinity; give weights of a sound run."
    )


def _entries(abstract, table, phi) -> Iterator[Entry]:
  flat = flax.traverse_util.flatten_dict(abstract, sep="/")
  for path, leaf in flat.items():
    name = _official_name(path, table).replace("PHI", phi)
    shape = tuple(leaf.shape)
    if "{r}" in name:
      for index in range(shape[0]):
        yield Entry(name.format(r=index), path, index, shape[1:])
    elif phi and path.startswith("phi_"):  # one phi: an axis 0 of length 1
      yield Entry(name, path, 0, shape[1:])
    else:
      yield Entry(name, path, None, shape)


def _official_name(path: str, table) -> str:
  for pattern, replacement in table:
    if match := re.fullmatch(pattern, path):
      name = match.expand(replacement)
      stem, _, leaf = name.rpartition(".")
      return f"{stem}.{_LEAF_NAMES.get(leaf, leaf)}" if stem else leaf
  raise AssertionError(f"{path} has no official name")


def _to_layout(entry: Entry, array: np.ndarray) -> np.ndarray:
  if entry.path.endswith("kernel"):
    if array.ndim == 4:
      return array.transpose(3, 2, 0, 1)
    return array.T
  leaf = entry.path.rpartition("/")[-1]
  if leaf == "scale_mul":
    return array.reshape(1, -1, 1, 1)
  if leaf in ("pos", "pos_start"):
    return array[None]
  return array[None, None] if leaf == "ada_gss" else array


def _from_layout(entry: Entry, array: np.ndarray) -> np.ndarray:
  if entry.path.endswith("kernel"):
    if array.ndim == 4:
      return array.transpose(2, 3, 1, 0)
    return array.T
  return array.reshape(entry.shape)
