"""Checkpoints on disk: what a workdir holds, saved and restored by Orbax.

workdir/
  config.json          format_version, kind, architectures, class names
  checkpoints/STEP/    params, ema, training (the rest), data
  tokenizer/           of a transformer: its frozen tokenizer, likewise
"""

import contextlib
import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath

from var_jax import files
from var_jax.checkpoints import torch_format
from var_jax.models.tokenizer import TokenizerConfig
from var_jax.models.transformer import VARConfig

FORMAT_VERSION = 1


@dataclasses.dataclass(frozen=True)
class Description:
  """What config.json says of the weights beside it."""

  tokenizer: TokenizerConfig
  transformer: VARConfig | None = None  # None: a tokenizer alone
  class_names: tuple[str, ...] = ()
  config: dict[str, Any] = dataclasses.field(default_factory=dict)

  def write(self, folder: epath.PathLike) -> None:
    content = {
      "format_version": FORMAT_VERSION,
      "kind": "var" if self.transformer else "tokenizer",
      **dataclasses.asdict(self),
    }
    files.write_json(epath.Path(folder) / "config.json", content)

  @classmethod
  def read(cls, folder: epath.PathLike) -> "Description":
    """Return the description of a workdir or checkpoint folder.

    Raises:
      ValueError: config.json is missing, broken or of another version.
    """
    path = epath.Path(folder) / "config.json"
    content = files.read_json(path)
    version = content.get("format_version") if _is_dict(content) else None
    if version != FORMAT_VERSION:
      raise ValueError(
        f"{path} has format_version {version}, this code reads "
        f"{FORMAT_VERSION}; use the var_jax version that wrote it."
      )
    try:
      transformer = content["transformer"]
      if not _is_dict(content["config"]):
        raise TypeError("config is no table")
      return cls(
        _dataclass(TokenizerConfig, content["tokenizer"]),
        transformer and _dataclass(VARConfig, transformer),
        tuple(content["class_names"]),
        content["config"],
      )
    except (KeyError, TypeError, AttributeError) as error:
      raise ValueError(
        f"{path} does not describe a model ({error}); restore it."
      ) from None


class Store:
  """The checkpoints of a training run.

  Args:
    keep: how many of the newest to keep.
  """

  def __init__(self, workdir: epath.PathLike, keep: int):
    policy = ocp.checkpoint_managers.LatestN(keep)
    self._manager = ocp.CheckpointManager(
      epath.Path(workdir).absolute() / "checkpoints",
      options=ocp.CheckpointManagerOptions(preservation_policy=policy),
    )

  def latest_step(self) -> int | None:
    return self._manager.latest_step()

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
    with _readable(self._manager.directory / str(step)):
      found = self._manager.restore(step, args=ocp.args.Composite(**items))
    trees = {
      name: None if tree is None else found[name] for name, tree in like.items()
    }
    return trees, found["data"]["position"]

  def close(self) -> None:
    """Wait for saves under way."""
    self._manager.wait_until_finished()
    self._manager.close()


def read_models(
  folder: epath.PathLike,
  *,
  weights: str = "ema",
  sharding: jax.sharding.Sharding | None = None,
) -> tuple[Description, Any, Any]:
  """Return (description, tokenizer variables, transformer variables or None).

  Args:
    folder: a workdir; its newest step is read.
    weights: "ema", which falls back to "raw" where none was kept, or "raw".
    sharding: of every parameter; the first device by default.

  Raises:
    ValueError: there is no checkpoint, or it cannot be read.
  """
  if weights not in ("ema", "raw"):
    raise ValueError(f"weights {weights!r} is not known; use ema or raw.")
  folder = epath.Path(folder).absolute()
  description = Description.read(folder)
  transformer = None
  if cfg := description.transformer:
    abstract = {"params": torch_format.abstract_var(cfg)}
    transformer = _read_newest(folder, abstract, weights, sharding)
    folder = folder / "tokenizer"
    if not folder.exists():
      raise ValueError(
        f"{folder} is missing: the frozen tokenizer of this transformer; "
        "restore it from a copy of the workdir."
      )
    # What was trained on is what decodes: the copy's own description counts.
    description = dataclasses.replace(
      description, tokenizer=Description.read(folder).tokenizer
    )
  abstract = {"params": torch_format.abstract_tokenizer(description.tokenizer)}
  tokenizer = _read_newest(folder, abstract, weights, sharding)
  return description, tokenizer, transformer


def write_tokenizer(
  workdir: epath.PathLike, description: Description, variables: Any
) -> None:
  """Put a frozen tokenizer into a transformer's workdir, or nothing.

  One that is there already is replaced.
  """
  folder = epath.Path(workdir).absolute() / "tokenizer"
  aside = folder.with_name(".tokenizer.partial")
  aside.rmtree(missing_ok=True)
  store = Store(aside, keep=1)
  store.save(0, {"params": variables}, position=0)
  store.close()
  description.write(aside)
  folder.rmtree(missing_ok=True)
  aside.rename(folder)


def _read_newest(folder, abstract, weights, sharding):
  step = _newest_step(folder)
  if sharding is None:
    sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
  abstract = jax.tree.map(
    lambda leaf: jax.ShapeDtypeStruct(
      leaf.shape, leaf.dtype, sharding=sharding
    ),
    abstract,
  )
  path = folder / "checkpoints" / str(step)
  item = "ema" if weights == "ema" and (path / "ema").exists() else "params"
  with _readable(path), ocp.StandardCheckpointer() as checkpointer:
    return checkpointer.restore(path / item, abstract)


def _newest_step(folder: epath.Path) -> int:
  steps = []
  if (checkpoints := folder / "checkpoints").exists():
    steps = ocp.utils.checkpoint_steps(checkpoints)
  if not steps:
    raise ValueError(
      f"{folder} holds no finished checkpoint; train until the first save."
    )
  return max(steps)


def _abstract(tree):
  return jax.tree.map(ocp.utils.to_shape_dtype_struct, tree)


@contextlib.contextmanager
def _readable(path: epath.Path):
  """Turn what Orbax raises on damaged files into one line."""
  try:
    yield
  except Exception as error:
    reason = str(error).strip().splitlines() or [type(error).__name__]
    raise ValueError(
      f"checkpoint {path} cannot be read ({reason[0][:200]}); delete it to "
      "fall back to an older step, or restore it from a copy."
    ) from error


def _is_dict(value) -> bool:
  return isinstance(value, dict)


def _dataclass(cls, fields: dict[str, Any]):
  return cls(
    **{k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()}
  )
