"""Folders of image files: train/<class>/* and val/<class>/*."""

import dataclasses
import os
import pathlib

import numpy as np

from var_jax.data.decoding import decode

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp")


@dataclasses.dataclass(frozen=True)
class FolderSource:
  """Image files, decoded on access."""

  paths: tuple[str, ...]
  labels: np.ndarray
  class_names: tuple[str, ...]

  def __len__(self) -> int:
    return len(self.paths)

  def name_of(self, i: int) -> str:
    return self.paths[i]

  def __getitem__(self, i: int) -> dict:
    path = self.paths[i]
    return {"image": decode(_read(path), path), "label": int(self.labels[i])}


def open_folder(path: pathlib.Path, split: str) -> FolderSource:
  """Open one split, "train" or "val"; the classes are those of train/."""
  # Labels come from train/ in both splits, so that they agree.
  class_names = _class_names(path, "train")
  split_names = _class_names(path, split)
  unknown = sorted(set(split_names) - set(class_names))
  if unknown:
    raise ValueError(
      f"{path / split / unknown[0]} is a class that train/ lacks; "
      "add it there or remove it here."
    )
  paths, labels = [], []
  for name in split_names:
    found = _image_paths(path / split / name)
    paths += found
    labels += [class_names.index(name)] * len(found)
  return FolderSource(tuple(paths), np.array(labels, np.int32), class_names)


def _read(path: str) -> bytes:
  """Return the bytes of a file.

  Raises:
    ValueError: there is no such file, or it may not be read.
    OSError: the storage fails; another time it may not.
  """
  try:
    return pathlib.Path(path).read_bytes()
  except (FileNotFoundError, PermissionError, IsADirectoryError) as error:
    raise ValueError(
      f"{path} cannot be read ({error.strerror}); restore or remove the file."
    ) from error


def _class_names(path: pathlib.Path, split: str) -> tuple[str, ...]:
  if not path.is_dir():
    raise ValueError(
      f"{path} is not a directory; give one that holds train/ and val/."
    )
  if not (path / split).is_dir():
    raise ValueError(
      f"{path} has no {split}/; put the images in {split}/<class>/."
    )
  with os.scandir(path / split) as entries:
    names = [e.name for e in entries if e.is_dir() and e.name[0] != "."]
  if not names:
    raise ValueError(
      f"{path / split} holds no class; put the images in {split}/<class>/."
    )
  if split == "train" and len(names) == 1:
    raise ValueError(
      f"{path / split} holds one class, {names[0]!r}; a class-conditional "
      "model needs two or more."
    )
  return tuple(sorted(names))


def _image_paths(path: pathlib.Path) -> list[str]:
  with os.scandir(path) as entries:
    paths = [
      entry.path
      for entry in entries
      if entry.name.lower().endswith(EXTENSIONS) and entry.name[0] != "."
    ]
  if not paths:
    raise ValueError(
      f"{path} holds no image; add {', '.join(EXTENSIONS)} files or remove it."
    )
  return sorted(paths)
