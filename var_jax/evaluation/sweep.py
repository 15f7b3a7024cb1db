"""Receipts of one model under many settings, and which of them are best."""

import io
import json
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
from etils import epath

from var_jax import files
from var_jax.evaluation import receipt

Receipts = Mapping[str, Mapping[str, Any]]


# What a sweep leaves in its folder.
_OURS = re.compile(r"\.?(guidance=.*\.json|sweep\.(json|png))(\.partial)?")


def check_folder(path: epath.PathLike) -> None:
  """Raise ValueError unless a sweep can be written, or go on, there."""
  path = files.absolute(path)
  if not path.exists():
    files.check_new_file(path)
    return
  if not path.is_dir():
    raise ValueError(f"{path} is a file; name a folder for a sweep.")
  others = [p.name for p in path.iterdir() if not _OURS.fullmatch(p.name)]
  if others:
    raise ValueError(
      f"{path} has {others[0]}, which is no sweep's; name a new folder."
    )


def again(path: epath.PathLike, asked: Mapping[str, Any]) -> dict[str, Any]:
  """Return a receipt that an earlier call wrote.

  Args:
    asked: what the call asks for, as it is in the receipt.

  Raises:
    ValueError: it is of something else.
  """
  found = receipt.read(path)
  there = found.get("asked") or {}
  # As JSON has them, tuples are lists.
  for name, value in json.loads(json.dumps(asked)).items():
    if there.get(name) != value:
      raise ValueError(
        f"{path} is of another {name}; name a new folder for this sweep."
      )
  return found


def best(points_N2: np.ndarray) -> np.ndarray:
  """Return the rows that no other beats at both, in order of the first.

  The first column is better the lower, the second the higher.
  """
  order = np.lexsort((-points_N2[:, 1], points_N2[:, 0]))
  kept, highest = [], -np.inf
  for i in order:
    if points_N2[i, 1] > highest:
      kept.append(i)
      highest = points_N2[i, 1]
  return np.asarray(kept)


def write(
  folder: epath.PathLike, receipts: Receipts, distance: str, score: str
) -> None:
  """Write sweep.json and sweep.png, the score over the distance."""
  folder = files.absolute(folder)
  names = list(receipts)
  distance, score = (
    _named(receipts[names[0]], measure) for measure in (distance, score)
  )
  points_N2 = np.array(
    [
      [receipts[name]["numbers"][measure] for measure in (distance, score)]
      for name in names
    ]
  )
  kept = best(points_N2)
  content = {
    "measures": [distance, score],
    "points": dict(zip(names, points_N2.tolist(), strict=True)),
    "best": [names[i] for i in kept],
  }
  files.write_json(folder / "sweep.json", content)
  files.write_bytes(
    folder / "sweep.png", _plot(names, points_N2, kept, distance, score)
  )


def _named(found: Mapping[str, Any], measure: str) -> str:
  """Return what a measure is called there, where it may be forced."""
  for name in found["numbers"]:
    if name == measure or name.startswith(f"{measure}_"):
      return name
  raise ValueError(f"a receipt has no {measure}; measure anew.")


def _plot(names, points_N2, kept, distance: str, score: str) -> bytes:
  import matplotlib

  matplotlib.use("agg")
  import matplotlib.pyplot as plt

  figure, axes = plt.subplots(figsize=(7, 5))
  axes.plot(*points_N2[kept].T, "-", color="#277f8e")
  axes.plot(*points_N2.T, "o", color="#440154")
  settings = [name.split(",") for name in names]
  alike = set(settings[0]).intersection(*settings)
  for own, point in zip(settings, points_N2, strict=True):
    name = ", ".join(setting for setting in own if setting not in alike)
    how = dict(xytext=(5, -9), textcoords="offset points", fontsize=7)
    axes.annotate(name, point, **how)
  axes.set_title(", ".join(sorted(alike)), fontsize=9)
  axes.margins(x=0.15)
  axes.set(xlabel=f"{distance} (lower is better)", ylabel=f"{score} (higher)")
  data = io.BytesIO()
  figure.tight_layout()
  figure.savefig(data, format="png", dpi=120)
  plt.close(figure)
  return data.getvalue()
