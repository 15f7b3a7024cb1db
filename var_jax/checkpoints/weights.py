"""Weights in a workdir, read for use and written outside of training.

`store.py` shows the layout. Reading goes straight to devices, writing straight
from NumPy arrays: neither makes a second copy of a large model on the host.
"""

import dataclasses
import hashlib
import os
from collections.abc import Callable, Iterator
from typing import Any

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from var_jax import files
from var_jax.checkpoints import checksums, orbax_trees, store, torch_format
from var_jax.checkpoints.description import Description, architecture_digest
from var_jax.models.layers import held_dtype
from var_jax.models.tokenizer import TokenizerConfig

Sharding = (
  jax.sharding.Sharding
  | Callable[[str, tuple[int, ...]], jax.sharding.Sharding]
)


def read_models(folder: epath.PathLike, **how) -> tuple[Description, Any, Any]:
  """Return (description, tokenizer variables, transformer variables or None).

  Arguments and errors as of `read_tokenizer`.
  """
  alone, tokenizer = read_tokenizer(folder, **how)
  if not Description.read(split_step(folder)[0]).transformer:
    return alone, tokenizer, None
  description, transformer = read_transformer(folder, **how)
  # What was trained on is what decodes: the copy's own description counts.
  description = dataclasses.replace(description, tokenizer=alone.tokenizer)
  return description, tokenizer, transformer


def shapes(folder: epath.PathLike) -> list[Any]:
  """Return the shapes of what `read_models` would read; no array is read."""
  description = Description.read(split_step(folder)[0])
  trees = [torch_format.abstract_tokenizer(description.tokenizer)]
  if description.transformer:
    trees.append(torch_format.abstract_var(description.transformer))
  return [{"params": tree} for tree in trees]


def read_tokenizer(
  folder: epath.PathLike,
  *,
  weights: str = "ema",
  sharding: Sharding | None = None,
  dtype: str = "float32",
) -> tuple[Description, Any]:
  """Return (description, variables) of a workdir's tokenizer.

  Arrays go to their devices as they are read: the host never holds all.

  Args:
    folder: a workdir, whose newest step is read, or one of its steps,
      WORKDIR/checkpoints/STEP. Of a transformer's, its frozen tokenizer.
    weights: "ema", which falls back to "raw" where none was kept, or "raw".
    sharding: of every parameter, or a function of its path and shape that
      returns it; the first device by default.
    dtype: what parameters that are only ever multiplied in this dtype are
      held in; the others are float32.

  Raises:
    ValueError: there is no checkpoint, it cannot be read, or it is not what
      was written.
  """
  _check_which(weights)
  workdir, step = split_step(folder)
  folder = tokenizer_folder(workdir)
  description = Description.read(folder)
  abstract = torch_format.abstract_tokenizer(description.tokenizer)
  if step is None or folder != workdir:
    step = newest(folder)
  variables = read_step(step, abstract, weights, sharding, dtype)
  return description, variables


def read_transformer(
  folder: epath.PathLike,
  *,
  weights: str = "ema",
  sharding: Sharding | None = None,
  dtype: str = "float32",
) -> tuple[Description, Any]:
  """Return (description, variables) of a workdir's transformer.

  Arguments and errors as of `read_tokenizer`.
  """
  _check_which(weights)
  folder, step = split_step(folder)
  description = Description.read(folder)
  if not description.transformer:
    raise ValueError(
      f"{folder} holds a tokenizer alone; give a transformer's workdir."
    )
  abstract = torch_format.abstract_var(description.transformer)
  step = step or newest(folder)
  variables = read_step(step, abstract, weights, sharding, dtype)
  return description, variables


def split_step(
  path: epath.PathLike,
) -> tuple[epath.Path, epath.Path | None]:
  """Return (workdir, step folder), the latter if `path` is one.

  Raises:
    ValueError: there is no such step.
  """
  path = files.absolute(path)
  if path.parent.name != "checkpoints" or not path.name.isdigit():
    return path, None
  workdir = path.parent.parent
  steps = store.all_steps(workdir)
  if int(path.name) not in steps:
    kept = ", ".join(map(str, sorted(steps))) or "none"
    raise ValueError(
      f"{path} is no finished checkpoint; {workdir} keeps {kept}."
    )
  return workdir, path


def tokenizer_folder(workdir: epath.PathLike) -> epath.Path:
  """Return where the tokenizer lies: a transformer's is within its workdir."""
  folder = files.absolute(workdir)
  if not Description.read(folder).transformer:
    return folder
  folder = folder / "tokenizer"
  if not folder.exists():
    raise ValueError(
      f"{folder} is missing: the frozen tokenizer of this transformer; "
      "restore it from a copy of the workdir."
    )
  return folder


def newest(folder: epath.PathLike) -> epath.Path:
  """Return the folder of a workdir's newest step.

  A run under way makes newer ones: who reads twice keeps this.
  """
  folder = files.absolute(folder)
  step = store.latest_step(folder)
  if step is None:
    raise ValueError(
      f"{folder} holds no finished checkpoint; train until the first save."
    )
  return folder / "checkpoints" / str(step)


def pinned(path: epath.PathLike) -> str:
  """Return the step that `path` stands for now, WORKDIR/checkpoints/STEP."""
  workdir, step = split_step(path)
  return os.fspath(step or newest(workdir))


def verify(step: epath.Path) -> None:
  """Raise ValueError unless a step is what was written."""
  checksums.verify(step, architecture_digest(step.parent.parent))


def identity(path: epath.PathLike, weights: str) -> dict[str, Any]:
  """Return what tells these weights from others, as JSON.

  The checksum is of the checksums of all files of the step, and of those of
  the tokenizer's, where that is another.
  """
  workdir, step = split_step(path)
  step = step or newest(workdir)
  steps = dict.fromkeys((step, newest(tokenizer_folder(workdir))))
  listed = [folder / checksums.NAME for folder in steps]
  digests = [files.sha256(name) for name in listed if name.exists()]
  return {
    "name": workdir.name,
    "step": int(step.name),
    "weights": kept(step, weights),
    "sha256": hashlib.sha256("".join(digests).encode()).hexdigest(),
  }


def kept(step: epath.Path, weights: str) -> str:
  """Return "ema" or "raw": what asking a step for `weights` gives."""
  return "ema" if _item(step, weights).name == "ema" else "raw"


def read_step(
  step: epath.Path,
  abstract: Any,
  weights: str,
  sharding: Sharding | None = None,
  dtype: str = "float32",
) -> Any:
  """Return the variables of a step; arguments as of `read_tokenizer`.

  Args:
    abstract: the parameter tree, as `torch_format.abstract_var` returns it.
  """
  verify(step)
  item = _item(step, weights)
  orbax_trees.check_shapes(item, abstract)
  if sharding is None:
    sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
  arrays = {}
  for part in orbax_trees.parts(abstract):
    # A part at a time, or the host would hold all of it beside the devices.
    restore_args = {
      path: ocp.ArrayRestoreArgs(
        sharding=sharding(path, leaf.shape) if callable(sharding) else sharding,
        dtype=held_dtype(path, leaf.dtype, dtype),
        global_shape=leaf.shape,
      )
      for path, leaf in part.items()
    }
    arrays |= orbax_trees.restore(item, part, restore_args)
  return {"params": flax.traverse_util.unflatten_dict(arrays, sep="/")}


def read_parts(
  step: epath.Path, abstract: Any, weights: str
) -> Iterator[dict[str, np.ndarray]]:
  """Yield all parameters of a step by path, a part at a time.

  The largest come first, so that with what the caller keeps of each part
  memory peaks at little more than all of them. To `verify` is the caller's.

  Args:
    abstract: the parameter tree, as `torch_format.abstract_var` returns it.
  """
  item = _item(step, weights)
  orbax_trees.check_shapes(item, abstract)
  as_numpy = ocp.RestoreArgs(restore_type=np.ndarray)
  for part in orbax_trees.parts(abstract):
    yield orbax_trees.restore(item, part, dict.fromkeys(part, as_numpy))


def read_code_hits(step: epath.Path, cfg: TokenizerConfig) -> np.ndarray | None:
  """Return a tokenizer's moving count of code uses [S, V], if it was kept."""
  item = step / "training"
  if not item.exists():
    return None
  shape = (len(cfg.scales), cfg.vocab_size)
  wanted = {"code_hits_SV": jax.ShapeDtypeStruct(shape, jnp.float32)}
  with store.readable(step), orbax_trees.alone() as checkpointer:
    restore_args = {"code_hits_SV": ocp.RestoreArgs(restore_type=np.ndarray)}
    found = checkpointer.restore(
      item,
      args=ocp.args.PyTreeRestore(wanted, restore_args, partial_restore=True),
    )
  return found["code_hits_SV"]


def write_model(
  folder: epath.PathLike,
  description: Description,
  variables: Any,
  code_hits_SV: np.ndarray | None = None,
) -> None:
  """Fill an empty folder with a model that is not in training, as step 0.

  NumPy arrays are written from where they lie: no second copy is made.
  """
  folder = files.absolute(folder)
  step = folder / "checkpoints" / "0"
  step.mkdir(parents=True, exist_ok=True)
  items = {"params": variables}
  if code_hits_SV is not None:
    items["training"] = {"code_hits_SV": code_hits_SV}
  with orbax_trees.writing(step), orbax_trees.alone() as checkpointer:
    for name, tree in items.items():
      chunks = ocp.SaveArgs(chunk_byte_size=orbax_trees.CHUNK_BYTES)
      save_args = jax.tree.map(lambda _, chunks=chunks: chunks, tree)
      checkpointer.save(
        step / name, args=ocp.args.PyTreeSave(tree, save_args=save_args)
      )
  description.write(folder)
  checksums.write(step, architecture_digest(folder))
  store.commit(step)


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
  # Of what lies on several processes Orbax would write this one's share.
  variables = jax.device_get(variables)
  with files.new_folder(folder, buckets=("gs",)) as aside:
    write_model(aside, description, variables, code_hits_SV)


def _check_which(weights: str) -> None:
  if weights not in ("ema", "raw"):
    raise ValueError(f"weights {weights!r} is not known; use ema or raw.")


def _item(step: epath.Path, weights: str) -> epath.Path:
  _check_which(weights)
  has_ema = weights == "ema" and (step / "ema").exists()
  return step / ("ema" if has_ema else "params")
