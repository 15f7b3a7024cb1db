"""Weights in a workdir, read for use and written outside of training.

`store.py` shows the layout. Reading goes straight to devices, writing straight
from NumPy arrays: neither makes a second copy of a large model on the host.
"""

import contextlib
import dataclasses
import re
from collections.abc import Iterator, Mapping
from typing import Any

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from etils import epath

from var_jax import files
from var_jax.checkpoints import checksums, store, torch_format
from var_jax.checkpoints.description import Description, architecture_digest

CHUNK_BYTES = 64 * 2**20  # of a file; who wants a slice reads no more
PART_BYTES = 256 * 2**20  # small parameters are read together

# Parameters that meet nothing but a product in `dtype`: nn.Dense and nn.Conv
# would cast them at each use. The encoder and all norms stay float32.
_ONLY_MULTIPLIED = re.compile(
  r"(blocks/(attn|ffn)/\w+|(shared_|head_)?ada/linear"
  r"|decoder/(?!.*norm)[\w/]+)/(kernel|bias)"
)


def read_models(folder: epath.PathLike, **how) -> tuple[Description, Any, Any]:
  """Return (description, tokenizer variables, transformer variables or None).

  Arguments and errors as of `read_tokenizer`.
  """
  alone, tokenizer = read_tokenizer(folder, **how)
  if not Description.read(folder).transformer:
    return alone, tokenizer, None
  description, transformer = read_transformer(folder, **how)
  # What was trained on is what decodes: the copy's own description counts.
  description = dataclasses.replace(description, tokenizer=alone.tokenizer)
  return description, tokenizer, transformer


def read_tokenizer(
  folder: epath.PathLike,
  *,
  weights: str = "ema",
  sharding: jax.sharding.Sharding | None = None,
  dtype: str = "float32",
) -> tuple[Description, Any]:
  """Return (description, variables) of a workdir's tokenizer.

  Arrays go to their devices as they are read: the host never holds all.

  Args:
    folder: a workdir; its newest step is read. Of a transformer's, its frozen
      tokenizer.
    weights: "ema", which falls back to "raw" where none was kept, or "raw".
    sharding: of every parameter; the first device by default.
    dtype: what parameters that are only ever multiplied in this dtype are
      held in; the others are float32.

  Raises:
    ValueError: there is no checkpoint, it cannot be read, or it is not what
      was written.
  """
  folder = tokenizer_folder(folder)
  description = Description.read(folder)
  abstract = torch_format.abstract_tokenizer(description.tokenizer)
  variables = _read_newest(folder, abstract, weights, sharding, dtype)
  return description, variables


def read_transformer(
  folder: epath.PathLike,
  *,
  weights: str = "ema",
  sharding: jax.sharding.Sharding | None = None,
  dtype: str = "float32",
) -> tuple[Description, Any]:
  """Return (description, variables) of a workdir's transformer.

  Arguments and errors as of `read_tokenizer`.
  """
  folder = epath.Path(folder).absolute()
  description = Description.read(folder)
  if not description.transformer:
    raise ValueError(
      f"{folder} holds a tokenizer alone; give a transformer's workdir."
    )
  abstract = torch_format.abstract_var(description.transformer)
  variables = _read_newest(folder, abstract, weights, sharding, dtype)
  return description, variables


def tokenizer_folder(workdir: epath.PathLike) -> epath.Path:
  """Return where the tokenizer lies: a transformer's is within its workdir."""
  folder = epath.Path(workdir).absolute()
  if not Description.read(folder).transformer:
    return folder
  folder = folder / "tokenizer"
  if not folder.exists():
    raise ValueError(
      f"{folder} is missing: the frozen tokenizer of this transformer; "
      "restore it from a copy of the workdir."
    )
  return folder


def read_parts(
  folder: epath.PathLike, abstract: Any, weights: str
) -> Iterator[dict[str, np.ndarray]]:
  """Yield all parameters of the newest step by path, a part at a time.

  The largest come first, so that with what the caller keeps of each part
  memory peaks at little more than all of them.

  Args:
    folder: a workdir; `checksums.verify` is the caller's.
    abstract: the parameter tree, as `torch_format.abstract_var` returns it.
  """
  item = _newest_item(epath.Path(folder).absolute(), weights)
  _check_shapes(item, abstract)
  as_numpy = ocp.RestoreArgs(restore_type=np.ndarray)
  for part in _parts(abstract):
    yield _restore(item, part, dict.fromkeys(part, as_numpy))


def read_code_hits(folder: epath.PathLike) -> np.ndarray | None:
  """Return a tokenizer's moving count of code uses [S, V], if it was kept."""
  folder = tokenizer_folder(folder)
  cfg = Description.read(folder).tokenizer
  item = folder / "checkpoints" / str(_newest_step(folder)) / "training"
  if not item.exists():
    return None
  shape = (len(cfg.scales), cfg.vocab_size)
  wanted = {"code_hits_SV": jax.ShapeDtypeStruct(shape, jnp.float32)}
  with (
    store.readable(item.parent),
    ocp.Checkpointer(_handler()) as checkpointer,
  ):
    restore_args = {"code_hits_SV": ocp.RestoreArgs(restore_type=np.ndarray)}
    found = checkpointer.restore(
      item,
      args=ocp.args.PyTreeRestore(wanted, restore_args, partial_restore=True),
    )
  return found["code_hits_SV"]


def kept(folder: epath.PathLike, weights: str) -> str:
  """Return "ema" or "raw": what asking for `weights` gives."""
  item = _newest_item(epath.Path(folder).absolute(), weights)
  return "ema" if item.name == "ema" else "raw"


def verify(folder: epath.PathLike) -> None:
  """Raise ValueError unless the newest step is what was written."""
  folder = epath.Path(folder)
  step = folder / "checkpoints" / str(_newest_step(folder))
  checksums.verify(step, architecture_digest(folder))


def write_model(
  folder: epath.PathLike,
  description: Description,
  variables: Any,
  code_hits_SV: np.ndarray | None = None,
) -> None:
  """Fill an empty folder with a model that is not in training, as step 0.

  NumPy arrays are written from where they lie: no second copy is made.
  """
  folder = epath.Path(folder).absolute()
  step = folder / "checkpoints" / "0"
  step.mkdir(parents=True)
  items = {"params": variables}
  if code_hits_SV is not None:
    items["training"] = {"code_hits_SV": code_hits_SV}
  with _quiet(), ocp.Checkpointer(_handler()) as checkpointer:
    for name, tree in items.items():
      chunks = ocp.SaveArgs(chunk_byte_size=CHUNK_BYTES)
      save_args = jax.tree.map(lambda _, chunks=chunks: chunks, tree)
      checkpointer.save(
        step / name, args=ocp.args.PyTreeSave(tree, save_args=save_args)
      )
  description.write(folder)
  checksums.write(step, architecture_digest(folder))


def write_tokenizer(
  workdir: epath.PathLike,
  description: Description,
  variables: Any,
  code_hits_SV: np.ndarray | None = None,
) -> None:
  """Put a frozen tokenizer into a transformer's workdir, or nothing."""
  folder = epath.Path(workdir) / "tokenizer"
  # Without the workdir's config.json, what an interrupted start left.
  folder.rmtree(missing_ok=True)
  with files.new_folder(folder) as aside:
    write_model(aside, description, variables, code_hits_SV)


def _read_newest(folder, abstract, weights, sharding, dtype):
  verify(folder)
  item = _newest_item(folder, weights)
  _check_shapes(item, abstract)
  if sharding is None:
    sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
  arrays = {}
  for part in _parts(abstract):
    # A part at a time, or the host would hold all of it beside the devices.
    restore_args = {
      path: ocp.ArrayRestoreArgs(
        sharding=sharding,
        dtype=dtype if _ONLY_MULTIPLIED.fullmatch(path) else leaf.dtype,
        global_shape=leaf.shape,
      )
      for path, leaf in part.items()
    }
    arrays |= _restore(item, part, restore_args)
  return {"params": flax.traverse_util.unflatten_dict(arrays, sep="/")}


def _check_shapes(item: epath.Path, abstract) -> None:
  """Raise ValueError unless the arrays of a checkpoint are the described."""
  with (
    store.readable(item.parent),
    ocp.Checkpointer(_handler()) as checkpointer,
  ):
    tree = checkpointer.metadata(item).item_metadata.tree["params"]
  found, wanted = (
    flax.traverse_util.flatten_dict(tree, sep="/") for tree in (tree, abstract)
  )
  for path in sorted(found.keys() | wanted.keys()):
    there, here = (
      tuple(flat[path].shape) if path in flat else None
      for flat in (found, wanted)
    )
    if there != here:
      raise ValueError(
        f"checkpoint {item.parent} cannot be read: {path} has shape {there}, "
        f"config.json describes {here}; restore config.json from a copy."
      )


def _parts(abstract) -> Iterator[dict[str, jax.ShapeDtypeStruct]]:
  """Yield the leaves by path: the largest alone and first, then several."""
  flat = flax.traverse_util.flatten_dict(abstract, sep="/")
  part, size = {}, 0
  for path in sorted(flat, key=lambda path: -flat[path].size):
    part[path] = flat[path]
    size += flat[path].size * 4
    if size >= PART_BYTES:
      yield part
      part, size = {}, 0
  if part:
    yield part


def _restore(item, leaves: Mapping[str, Any], restore_args: Mapping[str, Any]):
  """Return some parameters by path."""
  tree, args = (
    {"params": flax.traverse_util.unflatten_dict(dict(flat), sep="/")}
    for flat in (leaves, restore_args)
  )
  restore = ocp.args.PyTreeRestore(tree, args, partial_restore=True)
  with (
    store.readable(item.parent),
    ocp.Checkpointer(_handler()) as checkpointer,
  ):
    found = checkpointer.restore(item, args=restore)
  return flax.traverse_util.flatten_dict(found["params"], sep="/")


def _handler() -> ocp.PyTreeCheckpointHandler:
  """Return what reads and writes trees without a second copy of them."""
  handlers = ocp.type_handlers
  return ocp.PyTreeCheckpointHandler(
    use_ocdbt=False,  # it gathers a whole tree before it writes; reads both
    save_concurrent_gb=1,
    type_handler_registry=handlers.create_type_handler_registry(
      (np.ndarray, handlers.NumpyHandler(deepcopy_host_arrays=False)),
      (jax.Array, handlers.ArrayHandler()),
    ),
  )


@contextlib.contextmanager
def _quiet():
  """Keep Orbax from warning that it does not gather what we want apart."""
  verbosity = logging.get_verbosity()
  logging.set_verbosity(logging.ERROR)
  try:
    yield
  finally:
    logging.set_verbosity(verbosity)


def _newest_item(folder: epath.Path, weights: str) -> epath.Path:
  if weights not in ("ema", "raw"):
    raise ValueError(f"weights {weights!r} is not known; use ema or raw.")
  path = folder / "checkpoints" / str(_newest_step(folder))
  has_ema = weights == "ema" and (path / "ema").exists()
  return path / ("ema" if has_ema else "params")


def _newest_step(folder: epath.Path) -> int:
  step = store.latest_step(folder)
  if step is None:
    raise ValueError(
      f"{folder} holds no finished checkpoint; train until the first save."
    )
  return step
