"""Trees of large arrays through Orbax, without a second copy of them."""

import contextlib
import logging as std_logging
from collections.abc import Iterator, Mapping
from typing import Any

import flax.traverse_util
import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from etils import epath

from var_jax.checkpoints import store

CHUNK_BYTES = 64 * 2**20  # of a file; who wants a slice reads no more
PART_BYTES = 256 * 2**20  # small parameters are read together


def check_shapes(item: epath.Path, abstract) -> None:
  """Raise ValueError unless the arrays of a checkpoint are the described."""
  # Of the handler: a Checkpointer warns of metadata that an item has not.
  with store.readable(item.parent), contextlib.closing(handler()) as reader:
    tree = reader.metadata(item).tree["params"]
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
        f"the config describes {here}; restore config.json from a copy, or "
        "train with the config that it is of."
      )


def check_fields(item: epath.Path, wanted: Mapping[str, Any]) -> None:
  """Raise ValueError unless a training state has the fields that are wanted."""
  with store.readable(item.parent), contextlib.closing(handler()) as reader:
    tree = reader.metadata(item).tree
  there, wanted = (
    {name for name, value in fields.items() if value is not None}
    for fields in (tree, wanted)
  )
  for names, what in ((wanted - there, "has no"), (there - wanted, "has")):
    if names:
      raise ValueError(
        f"checkpoint {item.parent} {what} {', '.join(sorted(names))}: it is of "
        "an earlier version, or of a run with other players, and cannot be "
        "resumed; start a new run with config.init_from."
      )


def parts(abstract) -> Iterator[dict[str, jax.ShapeDtypeStruct]]:
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


def restore(item, leaves: Mapping[str, Any], restore_args: Mapping[str, Any]):
  """Return some parameters by path."""
  tree, args = (
    {"params": flax.traverse_util.unflatten_dict(dict(flat), sep="/")}
    for flat in (leaves, restore_args)
  )
  restore = ocp.args.PyTreeRestore(tree, args, partial_restore=True)
  with (
    store.readable(item.parent),
    ocp.Checkpointer(handler()) as checkpointer,
  ):
    found = checkpointer.restore(item, args=restore)
  return flax.traverse_util.flatten_dict(found["params"], sep="/")


def handler() -> ocp.PyTreeCheckpointHandler:
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


def alone() -> ocp.Checkpointer:
  """Return a checkpointer of this process, whatever the others do."""
  this = jax.process_index()
  several = jax.process_count() > 1
  return ocp.Checkpointer(
    handler(),
    multiprocessing_options=ocp.options.MultiprocessingOptions(
      primary_host=this,
      active_processes={this} if several else None,
      barrier_sync_key_prefix="alone" if several else None,
    ),
  )


@contextlib.contextmanager
def writing(step: epath.Path):
  """Turn what Orbax raises into one line, and keep it from logging.

  It warns that it does not gather what we want apart, and logs a failure in
  each of its threads.
  """
  verbosity, tasks = logging.get_verbosity(), std_logging.getLogger("asyncio")
  level = tasks.level
  logging.set_verbosity(logging.FATAL)
  tasks.setLevel(std_logging.CRITICAL)
  try:
    yield
  except Exception as error:
    reason = str(error).strip().splitlines() or [type(error).__name__]
    raise ValueError(
      f"{step} cannot be written ({reason[0][:200]}); look for space and "
      "permissions."
    ) from None
  finally:
    logging.set_verbosity(verbosity)
    tasks.setLevel(level)
