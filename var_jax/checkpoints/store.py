"""The checkpoints of a training run: saved and restored by Orbax.

workdir/
  config.json          format_version, kind, architectures, class names, origin
  README.md            the model card
  checkpoints/STEP/    params, ema, training (the rest), data, checksums.json
  tokenizer/           of a transformer: its frozen tokenizer, likewise
"""

import contextlib
from collections.abc import Mapping
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath

from var_jax.checkpoints import checksums
from var_jax.checkpoints.description import architecture_digest


class Store:
  """The checkpoints of a training run.

  Args:
    keep: how many of the newest to keep.
  """

  def __init__(self, workdir: epath.PathLike, keep: int):
    self._workdir = epath.Path(workdir).absolute()
    self._saving: int | None = None  # the step under way
    # Called when all is written and before the step gets its name.
    asynchronous = ocp.AsyncOptions(post_finalization_callback=self._seal)
    self._manager = ocp.CheckpointManager(
      self._workdir / "checkpoints",
      options=ocp.CheckpointManagerOptions(
        preservation_policy=ocp.checkpoint_managers.LatestN(keep),
        async_options=asynchronous,
      ),
    )

  def save(self, step: int, trees: Mapping[str, Any], position: int) -> None:
    """Start saving; the trees may be overwritten when this returns.

    Args:
      trees: by name, "params" among them; None is left out.
      position: the next sample position, all there is to the data's state.
    """
    items = {
      name: ocp.args.StandardSave(tree)
      for name, tree in trees.items()
      if tree is not None
    }
    items["data"] = ocp.args.JsonSave({"position": position})
    self.wait()  # `_seal` needs to know the step
    self._saving = step
    self._manager.save(step, args=ocp.args.Composite(**items))

  def restore(
    self, step: int, like: Mapping[str, Any]
  ) -> tuple[dict[str, Any], int]:
    """Return the trees and the next sample position.

    Args:
      like: trees of the same structure, whose shapes and shardings it takes.
    """
    items = {
      name: ocp.args.StandardRestore(_abstract(tree))
      for name, tree in like.items()
      if tree is not None
    }
    items["data"] = ocp.args.JsonRestore()
    checksums.verify(
      self._manager.directory / str(step), architecture_digest(self._workdir)
    )
    with readable(self._manager.directory / str(step)):
      found = self._manager.restore(step, args=ocp.args.Composite(**items))
    trees = {
      name: None if tree is None else found[name] for name, tree in like.items()
    }
    return trees, found["data"]["position"]

  def wait(self) -> None:
    """Wait for saves under way."""
    self._manager.wait_until_finished()

  def close(self) -> None:
    """Wait for saves under way and end."""
    self.wait()
    self._manager.close()

  def _seal(self) -> None:
    folders = list(
      self._manager.directory.glob(f"{self._saving}.orbax-checkpoint-tmp*")
    )
    # A file system without renames has no temporary name.
    folder, *rest = folders or [self._manager.directory / str(self._saving)]
    assert not rest
    checksums.write(folder, architecture_digest(self._workdir))


def latest_step(workdir: epath.PathLike) -> int | None:
  """Return the newest finished step of a workdir, None where there is none."""
  folder = epath.Path(workdir) / "checkpoints"
  steps = ocp.utils.checkpoint_steps(folder) if folder.exists() else []
  return max(steps, default=None)


def _abstract(tree):
  return jax.tree.map(ocp.utils.to_shape_dtype_struct, tree)


@contextlib.contextmanager
def readable(path: epath.Path):
  """Turn what Orbax raises on damaged files into one line."""
  try:
    yield
  except Exception as error:
    reason = str(error).strip().splitlines() or [type(error).__name__]
    raise ValueError(
      f"checkpoint {path} cannot be read ({reason[0][:200]}); delete it to "
      "fall back to an older step, or restore it from a copy."
    ) from error
