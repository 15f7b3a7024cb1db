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

from var_jax import files
from var_jax.checkpoints import checksums
from var_jax.checkpoints.description import architecture_digest


class Store:
  """The checkpoints of a training run.

  A step is removed when a later one is finished and nothing asks to keep it.

  Args:
    keep: how many of the newest to keep.
    keep_best: how many of the lowest held-out loss to keep beside them.
    keep_every: keep all multiples of it; 0 is off.
    every: regular steps are multiples of it. `keep` counts those; any other
      that is the newest is kept beside them.
    read_only: restore alone; nothing is made or tidied up.
  """

  def __init__(
    self,
    workdir: epath.PathLike,
    keep: int,
    *,
    keep_best: int = 0,
    keep_every: int = 0,
    every: int = 1,
    read_only: bool = False,
  ):
    self._workdir = files.absolute(workdir)
    self._saving: int | None = None  # the step under way
    managers = ocp.checkpoint_managers
    policies = [
      managers.LatestN(1),
      managers.EveryNSteps(every, max_to_keep=keep),
    ]
    if keep_best:
      policies.append(
        managers.BestN(
          get_metric_fn=_loss,
          reverse=True,  # the last ones are kept
          n=keep_best,
          keep_checkpoints_without_metrics=False,
        )
      )
    if keep_every:
      policies.append(managers.EveryNSteps(keep_every))
    # Called when all is written and before the step gets its name.
    asynchronous = ocp.AsyncOptions(post_finalization_callback=self._seal)
    self._manager = ocp.CheckpointManager(
      self._workdir / "checkpoints",
      options=ocp.CheckpointManagerOptions(
        preservation_policy=managers.AnyPreservationPolicy(policies),
        async_options=asynchronous,
        best_fn=_loss if keep_best else None,  # else nothing is ranked
        best_mode="min",
        cleanup_tmp_directories=not read_only,  # what a killed save left
        create=not read_only,
        read_only=read_only,
      ),
    )

  def save(
    self,
    step: int,
    trees: Mapping[str, Any],
    position: int,
    loss: float | None = None,
  ) -> None:
    """Start saving; the trees may be overwritten when this returns.

    Args:
      trees: by name, "params" among them; None is left out.
      position: the next sample position, all there is to the data's state.
      loss: on held-out samples, if that is known of this very step.

    Raises:
      OSError: this save or the one before could not be written. What was
        finished before is still there.
    """
    items = {
      name: ocp.args.StandardSave(tree)
      for name, tree in trees.items()
      if tree is not None
    }
    items["data"] = ocp.args.JsonSave({"position": position})
    self.wait()  # `_seal` needs to know the step
    self._saving = step
    metrics = None if loss is None else {"loss": loss}
    with _written(step):
      self._manager.save(
        step, args=ocp.args.Composite(**items), metrics=metrics
      )

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
    checksums.verify(self.folder(step), architecture_digest(self._workdir))
    with readable(self.folder(step)):
      found = self._manager.restore(step, args=ocp.args.Composite(**items))
    trees = {
      name: None if tree is None else found[name] for name, tree in like.items()
    }
    return trees, found["data"]["position"]

  def folder(self, step: int) -> epath.Path:
    """Return where a step lies."""
    return self._manager.directory / str(step)

  def wait(self) -> None:
    """Wait for saves under way; errors as of `save`."""
    with _written(self._saving):
      self._manager.wait_until_finished()

  def best_step(self) -> int | None:
    """Return the step of the lowest held-out loss among those kept."""
    return self._manager.best_step()

  def close(self) -> None:
    """Wait for saves under way and end."""
    self.wait()
    self._manager.close()

  def _seal(self) -> None:
    folders = list(
      self._manager.directory.glob(f"{self._saving}.orbax-checkpoint-tmp*")
    )
    # A bucket renames nothing: commit_success.txt, which comes next, is what
    # makes a step there count.
    folder, *rest = folders or [self._manager.directory / str(self._saving)]
    assert not rest
    checksums.write(folder, architecture_digest(self._workdir))


def _loss(metrics: Mapping[str, float]) -> float:
  return metrics["loss"]


def commit(step: epath.Path) -> None:
  """Make a step that is whole count, as Orbax does; only buckets need it."""
  (step / ocp.path.atomicity.COMMIT_SUCCESS_FILE).write_text("whole\n")


def latest_step(workdir: epath.PathLike) -> int | None:
  """Return the newest finished step of a workdir, None where there is none."""
  return max(all_steps(workdir), default=None)


def all_steps(workdir: epath.PathLike) -> list[int]:
  """Return the finished steps of a workdir that are kept."""
  folder = epath.Path(workdir) / "checkpoints"
  return ocp.utils.checkpoint_steps(folder) if folder.exists() else []


@contextlib.contextmanager
def _written(step: int | None):
  """Turn what a full disk raises in the depths of Orbax into one line."""
  try:
    yield
  except Exception as error:
    reason = str(error).strip().splitlines() or [type(error).__name__]
    raise OSError(
      f"checkpoint {step} could not be saved ({reason[0][:200]}); the one "
      "before is still there: make room and start again."
    ) from error


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
