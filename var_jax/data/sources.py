"""Random-access image sources: source[i] is an image and its label.

A source is named by a string, so that a config can hold it:

  digits         the digits that scikit-learn ships, at 32x32
  npz:/path      one file with arrays `images` and `labels`
  folder:/path   train/<class>/* and val/<class>/*
  tfds:name      name[/config][:version] of TensorFlow Datasets, on disk

All checks happen on opening; only decoding an image can fail later.
"""

import dataclasses
import pathlib
import zipfile
import zlib
from typing import Protocol

import numpy as np

from var_jax import files
from var_jax.data.folder import open_folder
from var_jax.data.tfds_source import open_tfds

# More than that is a mistake in the labels, not a dataset.
MAX_CLASSES = 1_000_000


class Source(Protocol):
  """A finite sequence of {"image": uint8 [H, W, 3], "label": int}."""

  class_names: tuple[str, ...]

  def __len__(self) -> int: ...

  def __getitem__(self, i: int) -> dict: ...

  def name_of(self, i: int) -> str:
    """Return what a user would look for to find sample i."""
    ...


def open_source(spec: str, split: str) -> Source:
  """Open one split, "train" or "val", of the source that `spec` names."""
  if split not in ("train", "val"):
    raise ValueError(f"split {split!r} is unknown; use 'train' or 'val'.")
  kind, _, path = spec.partition(":")
  if spec == "digits":
    return _open_digits(split)
  if kind in ("npz", "folder"):
    files.absolute(path, buckets=())  # no bucket
  if kind == "npz" and path:
    return _open_npz(pathlib.Path(path).expanduser(), split)
  if kind == "folder" and path:
    return open_folder(pathlib.Path(path).expanduser(), split)
  if kind == "tfds" and path:
    return open_tfds(path, split)
  raise ValueError(
    f"data source {spec!r} is unknown; use digits, npz:/path, folder:/path or "
    "tfds:name."
  )


@dataclasses.dataclass(frozen=True)
class ArraySource:
  """Images in memory: uint8 [n, H, W] or [n, H, W, 3], labels [n]."""

  images: np.ndarray
  labels: np.ndarray
  class_names: tuple[str, ...]
  name: str = "sample"

  def __len__(self) -> int:
    return len(self.images)

  @property
  def grey(self) -> bool:
    """Whether images have one channel, which is then repeated."""
    return self.images.ndim == 3

  def name_of(self, i: int) -> str:
    return f"{self.name}[{i}]"

  def __getitem__(self, i: int) -> dict:
    image = self.images[i]
    if image.ndim == 2:
      image = np.repeat(image[:, :, None], 3, axis=2)
    return {"image": image, "label": int(self.labels[i])}


def _open_digits(split: str) -> ArraySource:
  from PIL import Image
  from sklearn.datasets import load_digits
  from sklearn.model_selection import train_test_split

  digits = load_digits()
  train, val = train_test_split(
    np.arange(len(digits.target)),
    test_size=0.3,
    random_state=0,
    stratify=digits.target,
  )
  chosen = train if split == "train" else val
  small = np.round(digits.images[chosen] * (255 / 16)).astype(np.uint8)
  images = [
    np.asarray(
      Image.fromarray(image).resize((32, 32), Image.Resampling.BICUBIC)
    )
    for image in small
  ]
  return ArraySource(
    images=np.stack(images),
    labels=digits.target[chosen],
    class_names=tuple(str(name) for name in digits.target_names),
    name=f"digits {split}",
  )


def _open_npz(path: pathlib.Path, split: str) -> ArraySource:
  if split != "train":
    raise ValueError(
      f"{path} holds one split, which is 'train', not {split!r}; "
      "give the other split as an npz of its own."
    )
  arrays = _read_npz(path)
  for key in ("images", "labels"):
    if key not in arrays:
      raise ValueError(
        f"{path} has no array {key!r} among {sorted(arrays)}; "
        "save `images` and `labels`."
      )
  images, labels = arrays["images"], arrays["labels"]
  if images.dtype != np.uint8 or not (
    images.ndim == 3 or (images.ndim == 4 and images.shape[-1] == 3)
  ):
    raise ValueError(
      f"{path}: images are {images.dtype} {list(images.shape)}; "
      "save uint8 [N, H, W] or [N, H, W, 3]."
    )
  if not np.issubdtype(labels.dtype, np.integer) or labels.ndim != 1:
    raise ValueError(
      f"{path}: labels are {labels.dtype} {list(labels.shape)}; "
      "save integers [N]."
    )
  if len(images) != len(labels):
    raise ValueError(
      f"{path}: {len(images)} images but {len(labels)} labels; save one label "
      "an image."
    )
  if images.size == 0:
    raise ValueError(
      f"{path}: images {list(images.shape)} are empty; save at least one."
    )
  if labels.min() < 0:
    raise ValueError(
      f"{path}: label {labels.min()} is negative; count classes from 0."
    )
  if labels.min() == labels.max():
    raise ValueError(
      f"{path}: all labels are {labels[0]}; a class-conditional model needs "
      "two classes or more."
    )
  num_classes = int(labels.max()) + 1
  if num_classes > MAX_CLASSES:
    raise ValueError(
      f"{path}: label {labels.max()} makes more than {MAX_CLASSES} classes; "
      "number them from 0 without gaps."
    )
  names = arrays.get("class_names", np.arange(num_classes))
  if names.ndim != 1 or len(names) < num_classes:
    raise ValueError(
      f"{path}: class_names {list(names.shape)} do not name label "
      f"{num_classes - 1}; save {num_classes} names or more."
    )
  class_names = tuple(str(name) for name in names)
  return ArraySource(images, labels, class_names, str(path))


def _read_npz(path: pathlib.Path) -> dict[str, np.ndarray]:
  if not path.is_file():
    raise ValueError(f"{path} is not a file; give the path of an npz.")
  if not zipfile.is_zipfile(path):
    raise ValueError(f"{path} is not an npz; write it with numpy.savez.")
  try:
    with np.load(path, allow_pickle=False) as archive:
      return {key: np.asarray(archive[key]) for key in archive.files}
  except (OSError, ValueError, zipfile.BadZipFile, zlib.error) as error:
    raise ValueError(
      f"{path} cannot be read ({error}); write it with numpy.savez."
    ) from error
