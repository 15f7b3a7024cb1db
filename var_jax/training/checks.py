"""What a config must say, and whether a workdir is of the same one."""

import json
from typing import Any

import ml_collections
from etils import epath
from flax.traverse_util import flatten_dict

from var_jax.checkpoints.description import Description

# Settings that change neither the weights nor the order of the data.
FREE_KEYS = ("log_every", "checkpoint_every", "keep_checkpoints")


def to_json(config: ml_collections.ConfigDict) -> dict[str, Any]:
  """Return the config as what JSON gives back, tuples as lists."""
  return json.loads(config.to_json())


_REQUIRED = (
  "kind", "seed", "steps", "ema_decay", "log_every", "checkpoint_every",
  "keep_checkpoints", "init_from", "data", "model", "loss", "optimizer",
)  # fmt: skip


def check_config(config) -> None:
  for name in _REQUIRED:
    if name not in config:
      raise ValueError(
        f"the config has no {name}; compare with the presets in configs/."
      )
  if config.kind not in ("tokenizer", "var"):
    raise ValueError(
      f"kind {config.kind!r} is not known; use tokenizer or var."
    )
  for name in ("steps", "log_every", "checkpoint_every", "keep_checkpoints"):
    if config[name] < 1:
      raise ValueError(f"{name} {config[name]} is below 1; use 1 or more.")
  if config.data.batch_size < 1:
    raise ValueError(
      f"data.batch_size {config.data.batch_size} is below 1; use 1 or more."
    )
  if not 0 <= config.seed < 2**32:
    raise ValueError(f"seed {config.seed} is not in 0..2^32-1; use such a one.")
  if not 0.0 <= config.ema_decay < 1.0:
    raise ValueError(
      f"ema_decay {config.ema_decay} is not in [0, 1); 0 turns it off."
    )


def check_workdir(config, workdir: epath.Path) -> None:
  """Raise ValueError if the workdir belongs to another config."""
  path = workdir / "config.json"
  if not path.exists():
    return
  there = flatten_dict(Description.read(workdir).config, sep=".")
  here = flatten_dict(to_json(config), sep=".")
  names = sorted(
    there.keys() | here.keys(), key=lambda name: (name != "kind", name)
  )
  for name in names:
    if name in FREE_KEYS or there.get(name) == here.get(name):
      continue
    if name not in there and not here[name]:
      continue  # a setting that came later, and is off
    if name == "tokenizer_path" and not here.get(name):
      continue  # the workdir has its own copy
    raise ValueError(
      f"workdir {workdir} holds another config: {name} is {there.get(name)!r} "
      f"there and {here.get(name)!r} here; use a new --workdir."
    )
