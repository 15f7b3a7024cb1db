"""What a config must say, and whether a workdir is of the same one."""

import json
import tempfile
import uuid
from collections.abc import Mapping
from typing import Any

import ml_collections
from etils import epath
from flax.traverse_util import flatten_dict

from var_jax import files
from var_jax.checkpoints.description import Description
from var_jax.training.config import run_config

# Settings that change neither the order of the data nor, but for rounding, the
# weights.
FREE_KEYS = (
  "log_every", "ledger_every", "eval_every", "eval_samples", "pictures",
  "checkpoint_every", "keep_checkpoints", "keep_best", "keep_every",
  "data.eval_source", "data.workers", "data.image_size",
  "mesh.slices", "mesh.data", "mesh.fsdp", "mesh.model", "attention",
  "inception_path", "draws.count", "draws.network", "draws.guidance",
  "draws.top_k", "draws.top_p",
)  # fmt: skip


def to_json(config: ml_collections.ConfigDict) -> dict[str, Any]:
  """Return the config as what JSON gives back, tuples as lists."""
  return json.loads(config.to_json())


def completed(config: Mapping[str, Any]) -> ml_collections.ConfigDict:
  """Return a recorded config with the settings that came later, all off."""
  now = run_config(config.get("kind", ""))
  made = ml_collections.ConfigDict(config)
  for name, value in now.items():
    # A section that came later is off by its defaults.
    if name not in made and (not value or hasattr(value, "items")):
      made[name] = value
  return made


def check_config(config) -> None:
  """Raise ValueError unless the config has what every run needs."""
  shared = run_config(config.get("kind", ""))
  needed = [*flatten_dict(to_json(shared), sep="."), *_SECTIONS]
  here = flatten_dict(to_json(config), sep=".", keep_empty_nodes=True)
  for name in needed:
    if name not in here and name not in config:
      raise ValueError(
        f"the config has no {name}; compare with the presets in configs/."
      )
  if config.kind not in ("tokenizer", "var"):
    raise ValueError(
      f"kind {config.kind!r} is not known; use tokenizer or var."
    )
  for name in _COUNTS:
    if here[name] < 1:
      raise ValueError(f"{name} {here[name]} is below 1; use 1 or more.")
  for name in _OFF_AT_0:
    if here[name] < 0:
      raise ValueError(f"{name} {here[name]} is negative; use 0 or more.")
  if not 0 <= config.seed < 2**32:
    raise ValueError(f"seed {config.seed} is not in 0..2^32-1; use such a one.")
  if not 0.0 <= config.ema_decay < 1.0:
    raise ValueError(
      f"ema_decay {config.ema_decay} is not in [0, 1); 0 turns it off."
    )
  if config.data.on_broken not in ("fail", "skip"):
    raise ValueError(
      f"data.on_broken {config.data.on_broken!r} is not known; use fail or "
      "skip."
    )
  if config.data.batch_size % config.accumulate:
    raise ValueError(
      f"data.batch_size {config.data.batch_size} is not divisible into "
      f"accumulate {config.accumulate} parts; use a multiple of it."
    )
  if config.keep_every % config.checkpoint_every:
    raise ValueError(
      f"keep_every {config.keep_every} is no multiple of checkpoint_every "
      f"{config.checkpoint_every}: no other step is saved; use one."
    )
  every = config.eval_every
  if config.keep_best and (not every or config.checkpoint_every % every):
    raise ValueError(
      f"keep_best {config.keep_best} needs an evaluation at every checkpoint; "
      f"set eval_every to a divisor of {config.checkpoint_every}."
    )


_SECTIONS = ("model", "loss", "optimizer")
_COUNTS = (
  "steps", "log_every", "ledger_every", "checkpoint_every", "keep_checkpoints",
  "accumulate", "data.batch_size",
)  # fmt: skip
_OFF_AT_0 = (
  "eval_every", "eval_samples", "pictures", "keep_best", "keep_every",
  "data.workers",
)  # fmt: skip


def check_workdir(config, workdir: epath.Path, allow_change: bool) -> bool:
  """Return whether the workdir belongs to another config.

  Raises:
    ValueError: it does, and that is not allowed.
  """
  if not (workdir / "config.json").exists():
    return False
  changes = config_changes(Description.read(workdir).config, to_json(config))
  if changes and not allow_change:
    raise ValueError(
      f"workdir {workdir} holds another config: {'; '.join(changes)}; use a "
      "new --workdir, or --allow-config-change to go on with this one."
    )
  return bool(changes)


def config_changes(there: dict, here: dict) -> list[str]:
  """Return a line on each setting that matters and differs."""
  there, here = (flatten_dict(config, sep=".") for config in (there, here))
  free = set(FREE_KEYS)
  if here.get("guard.policy") == "rollback":
    free.remove("checkpoint_every")  # what it goes back to
  changes = []
  for name in sorted(
    there.keys() | here.keys(), key=lambda name: (name != "kind", name)
  ):
    if name in free or there.get(name) == here.get(name):
      continue
    if name not in there and not here[name]:
      continue  # a setting that came later, and is off
    if name == "tokenizer_path" and not here.get(name):
      continue  # the workdir has its own copy
    changes.append(
      f"{name} is {there.get(name)!r} there and {here.get(name)!r} here"
    )
  return changes


def folder(path: epath.PathLike) -> epath.Path:
  """Return the path of a workdir, absolute.

  Raises:
    ValueError: it is empty, somewhere that cannot hold one, or out of reach.
  """
  if not str(path):
    raise ValueError("workdir '' is no folder; give one.")
  path = files.absolute(path)
  if files.in_bucket(path):
    try:
      path.exists()
    except Exception as error:  # of a client's many kinds
      raise ValueError(
        f"workdir {path} cannot be reached ({files.reason(error)}); look at "
        "the bucket's name, the network and your credentials."
      ) from None
  return path


def check_writable(workdir: epath.Path) -> None:
  """Raise ValueError if a run would write nothing, or over somebody's files."""
  if files.in_bucket(workdir):
    _check_bucket(workdir)
  else:
    _check_disk(workdir)
  if any((workdir / name).exists() for name in ("config.json", "ledger.jsonl")):
    return  # a run's, perhaps one that a kill met early
  for name in _WRITTEN:
    if (workdir / name).exists():
      raise ValueError(
        f"workdir {workdir} has a {name} and is no run's; give a new folder."
      )


def _check_disk(workdir: epath.Path) -> None:
  there = next(path for path in (workdir, *workdir.parents) if path.exists())
  try:
    with tempfile.TemporaryDirectory(dir=there):
      pass
  except OSError as error:
    raise ValueError(
      f"workdir {workdir} cannot be made: {there} cannot be written to "
      f"({error.strerror}); use another one."
    ) from None


def _check_bucket(workdir: epath.Path) -> None:
  mark = workdir / f".{uuid.uuid4().hex}"
  try:
    files.write_bytes(mark, b"")
    mark.unlink()
  except Exception as error:  # of a client's many kinds
    raise ValueError(f"workdir {workdir}: {files.reason(error)}") from None


_WRITTEN = (
  "README.md", "metrics.jsonl", "parameters.txt", "report.html", "checkpoints",
)  # fmt: skip
