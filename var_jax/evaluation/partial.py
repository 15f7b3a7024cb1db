"""Features that a measurement has so far, so that a killed one goes on.

    FOLDER/settings.json    what they are of
    FOLDER/00000000.npz ..  features of images from that number on

A part is written aside and gets its name when it is whole.
"""

import io
import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from etils import epath

from var_jax import files
from var_jax.evaluation import archives

Part = Mapping[str, np.ndarray]

_OURS = re.compile(r"\d{8}\.npz|settings\.json|\..*\.partial")


class Partial:
  def __init__(self, folder: epath.PathLike, settings: Mapping[str, Any]):
    """Begin, or go on where the same settings have been left.

    Raises:
      ValueError: the folder has features of other settings.
    """
    self.folder = files.absolute(folder)
    self._check()
    # As JSON gives it back.
    self._settings = json.loads(json.dumps(settings))
    path = self.folder / "settings.json"
    if path.exists() and _json(path) != self._settings:
      raise ValueError(
        f"{self.folder} has what a measurement with other settings left; remove"
        " it, or give those."
      )
    self._waiting, self._waiting_count = [], 0
    self._saved = self._whole_parts()

  def _check(self) -> None:
    """Raise ValueError if the folder has anything but what `save` writes."""
    if not self.folder.exists():
      return
    remedy = "remove it, or name another --output."
    if not self.folder.is_dir():
      raise ValueError(f"{self.folder} is a file; {remedy}")
    names = {path.name for path in self.folder.iterdir()}
    others = sorted(name for name in names if not _OURS.fullmatch(name))
    if others:
      raise ValueError(f"{self.folder} has {others[0]}, not ours; {remedy}")
    if names and "settings.json" not in names:
      raise ValueError(f"{self.folder} has no settings.json; {remedy}")

  @property
  def count(self) -> int:
    """Images that are kept on disk, the first ones."""
    return self._saved

  def add(self, part: Part) -> None:
    """Take the features of the next images; `save` keeps them."""
    self._waiting.append(part)
    self._waiting_count += len(part["pooled_BD"])

  def save(self) -> None:
    if not self._waiting:
      return
    names = self._waiting[0]
    merged = {
      name: np.concatenate([part[name] for part in self._waiting])
      for name in names
    }
    data = io.BytesIO()
    np.savez(data, **merged)
    # Not before there is something: a mistake leaves no folder.
    self.folder.mkdir(parents=True, exist_ok=True)
    files.write_json(self.folder / "settings.json", self._settings)
    files.write_bytes(self.folder / _name(self._saved), data.getvalue())
    self._saved += self._waiting_count
    self._waiting, self._waiting_count = [], 0

  def parts(self) -> Iterator[Part]:
    """Yield what was saved, in order."""
    for _, part in self.numbered():
      yield part

  def numbered(self) -> Iterator[tuple[int, Part]]:
    """Yield them with the number of the first image of each."""
    at = 0
    while (path := self.folder / _name(at)).exists():
      part = _read(path)
      yield at, part
      at += len(part["pooled_BD"])

  def remove(self) -> None:
    self.folder.rmtree(missing_ok=True)

  def _whole_parts(self) -> int:
    return sum(len(part["pooled_BD"]) for part in self.parts())


class Elsewhere:
  """In place of `Partial` where another process keeps the features."""

  def __init__(self, count: int):
    self.count = count  # that it has

  def add(self, part: Part) -> None:
    pass

  def save(self) -> None:
    pass


def _name(start: int) -> str:
  return f"{start:08d}.npz"


def _json(path: epath.Path) -> Any:
  try:
    return json.loads(path.read_text())
  except ValueError:
    return None  # cut short, so of no settings


def _read(path: epath.Path) -> dict[str, np.ndarray]:
  try:
    with np.load(io.BytesIO(path.read_bytes())) as arrays:
      part = dict(arrays)
      part["pooled_BD"]  # every part has them
      return part
  except archives.DAMAGE as error:
    raise ValueError(
      f"{path} cannot be read ({error}); remove {path.parent} and begin anew."
    ) from None
