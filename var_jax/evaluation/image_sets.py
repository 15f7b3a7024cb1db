"""Sets of images to measure: a folder, or an archive in ADM's layout.

Both are read a batch at a time, whatever they hold. Images are uint8: what is
measured is what would be written, rounded once.
"""

import functools
import hashlib
import pathlib
import zipfile
from collections.abc import Iterable, Iterator
from typing import Protocol

import numpy as np

from var_jax import files
from var_jax.evaluation import archives

_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
_ARRAYS = ("arr_0", "images")  # ADM's name, and that of our own data
_LABELS = ("arr_1", "labels")  # likewise


class ImageSet(Protocol):
  """Args:
  kind: where the images are from.
  lossy: named by a format that changes pixels, which shows in FID.

  Sets that know classes have `labels`, int [N], too.
  """

  kind: str
  name: str
  count: int
  shape: tuple[int, int, int]
  lossy: bool

  def batches(self, size: int, start: int = 0) -> Iterator[np.ndarray]:
    """Yield uint8 [b, H, W, 3] from image `start` on, in the set's order.

    The last may be short.
    """
    ...

  @property
  def sha256(self) -> str:
    """A digest of the images, or of what decides them."""
    ...


def open_set(path: str) -> ImageSet:
  """Return the images of a folder or of an .npz.

  Raises:
    ValueError: there is none, or they are no uint8 RGB images of one size.
  """
  place = pathlib.Path(path).expanduser()
  if place.is_dir():
    return Folder(place)
  if not place.exists():
    raise ValueError(f"{place} does not exist; give a folder or an .npz.")
  return Archive(place)


class Folder:
  """Image files under a folder, in the order of their names."""

  kind = "folder"

  def __init__(self, folder: pathlib.Path):
    self.files = sorted(
      path for path in folder.rglob("*") if path.suffix.lower() in _SUFFIXES
    )
    if not self.files:
      raise ValueError(
        f"{folder} has no images; give one with {', '.join(_SUFFIXES)} files."
      )
    self._folder = folder
    self.name, self.count = str(folder), len(self.files)
    self.lossy = any(
      path.suffix.lower() not in (".png", ".bmp") for path in self.files
    )
    self.shape = _read(self.files[0]).shape

  def batches(self, size: int, start: int = 0) -> Iterator[np.ndarray]:
    for first in range(start, self.count, size):
      pixels = []
      for path in self.files[first : first + size]:
        image_HW3 = _read(path)
        if image_HW3.shape != self.shape:
          raise ValueError(
            f"{path} has shape {image_HW3.shape}, others {self.shape}; bring "
            "all images to one size."
          )
        pixels.append(image_HW3)
      yield np.stack(pixels)

  @functools.cached_property
  def labels(self) -> np.ndarray | None:
    """The number of the folder that each image is in, if there are several."""
    folders = [path.relative_to(self._folder).parts[0] for path in self.files]
    names, labels_N = np.unique(folders, return_inverse=True)
    return labels_N if len(names) < self.count else None

  @functools.cached_property
  def sha256(self) -> str:
    digest = hashlib.sha256()
    for path in self.files:
      digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


class Archive:
  """One array of an .npz, read from the zip as it is needed."""

  lossy, kind = False, "npz"

  def __init__(self, path: pathlib.Path):
    self.path, self.name = path, str(path)
    try:
      with zipfile.ZipFile(path) as archive:
        there = [n[:-4] for n in archive.namelist() if n.endswith(".npy")]
    except (zipfile.BadZipFile, OSError) as error:
      raise ValueError(
        f"{path} cannot be read ({error}); give a folder or an .npz."
      ) from None
    found = [name for name in _ARRAYS if name in there]
    if not found:
      raise ValueError(
        f"{path} has arrays {', '.join(there) or 'none'}; images are to be in "
        f"{' or '.join(_ARRAYS)}."
      )
    self._member = f"{found[0]}.npy"
    with self._open() as (_, shape, dtype):
      # [H, W, 3] is a picture, not H grey ones.
      grey = len(shape) == 3 and shape[2] != 3
      if dtype != np.uint8 or not (grey or (len(shape) == 4 and shape[3] == 3)):
        raise ValueError(
          f"{path}: {found[0]} is {dtype} {shape}; give uint8 [N, H, W, 3], "
          "0 to 255, rounded."
        )
    if not np.prod(shape):
      raise ValueError(f"{path}: {found[0]} is {shape}; give some images.")
    self.count, self.shape = shape[0], (*shape[1:3], 3)
    self._one = shape[1:]

  def batches(self, size: int, start: int = 0) -> Iterator[np.ndarray]:
    bytes_each = int(np.prod(self._one))
    with self._open() as (file, _, _):
      for _ in range(start):  # what is compressed cannot be passed over
        self._bytes(file, bytes_each)
      for first in range(start, self.count, size):
        b = min(size, self.count - first)
        data = self._bytes(file, b * bytes_each)
        if len(data) < b * bytes_each:
          raise ValueError(
            f"{self.path} ends within image {first + len(data) // bytes_each} "
            f"of {self.count}; restore it from a copy."
          )
        pixels = np.frombuffer(data, np.uint8).reshape(b, *self._one)
        yield np.broadcast_to(
          pixels.reshape(b, *self.shape[:2], -1), (b, *self.shape)
        )

  @functools.cached_property
  def labels(self) -> np.ndarray | None:
    """Those that are beside the images, if they are numbers."""
    for name in _LABELS:
      try:
        labels_N = archives.read(self.path, name, "")
      except ValueError:
        continue  # there are none, or they are something else
      if labels_N.shape == (self.count,) and labels_N.dtype.kind in "iu":
        return labels_N
    return None

  @functools.cached_property
  def sha256(self) -> str:
    return files.sha256(self.path)

  def _bytes(self, file, count: int) -> bytes:
    try:
      return file.read(count)
    except archives.DAMAGE as error:
      raise _damaged(self.path, error) from None

  def _open(self) -> "_Member":
    return _Member(self.path, self._member)


class _Member:
  """An array's bytes within a zip: (file, shape, dtype), in C order."""

  def __init__(self, path: pathlib.Path, member: str):
    self._path, self._member = path, member

  def __enter__(self):
    try:
      self._archive = zipfile.ZipFile(self._path)
      self._file = self._archive.open(self._member)
    except archives.DAMAGE as error:
      raise _damaged(self._path, error) from None
    read = {
      (1, 0): np.lib.format.read_array_header_1_0,
      (2, 0): np.lib.format.read_array_header_2_0,
    }
    try:
      version = np.lib.format.read_magic(self._file)
      shape, fortran, dtype = read[version](self._file)
    except archives.DAMAGE:
      self.__exit__()
      raise ValueError(
        f"{self._path}: {self._member} is no array; restore it from a copy."
      ) from None
    if fortran:
      self.__exit__()
      raise ValueError(
        f"{self._path}: {self._member} is in Fortran's order; write it with "
        "np.ascontiguousarray."
      )
    return self._file, shape, dtype

  def __exit__(self, *exception) -> None:
    self._file.close()
    self._archive.close()


def _damaged(path: pathlib.Path, error: Exception) -> ValueError:
  return ValueError(f"{path} cannot be read ({error}); restore it from a copy.")


def write_archive(
  path: str,
  batches: Iterable[np.ndarray],
  images: ImageSet,
  labels: np.ndarray | None = None,
) -> None:
  """Write uint8 images in ADM's layout, a batch at a time, aside and then here.

  Args:
    batches: of all of `images`, in order.
    labels: written as `arr_1` if there are any.
  """
  target = files.absolute(path)
  aside = target.with_name(f".{target.name}.partial")
  header = {"descr": "|u1", "fortran_order": False}
  header["shape"] = (images.count, *images.shape)
  try:
    with zipfile.ZipFile(aside, "w") as archive:
      with archive.open(f"{_ARRAYS[0]}.npy", "w", force_zip64=True) as file:
        np.lib.format.write_array_header_1_0(file, header)
        for pixels_BHW3 in batches:
          file.write(np.ascontiguousarray(pixels_BHW3).data)
      if labels is not None:
        with archive.open("arr_1.npy", "w") as file:
          np.lib.format.write_array(file, labels)
    aside.rename(target)
  finally:
    aside.unlink(missing_ok=True)


def _read(path: pathlib.Path) -> np.ndarray:
  """Return uint8 [H, W, 3]."""
  from PIL import Image

  try:
    with Image.open(path) as image:
      deep = image.mode.startswith(("I", "F"))
      pixels = None if deep else np.asarray(image.convert("RGB"))
  except Exception as error:  # Pillow's errors share no base class
    raise ValueError(
      f"image {path} cannot be read ({type(error).__name__}); restore it or "
      "take it away."
    ) from None
  if pixels is None:
    raise ValueError(
      f"image {path} has more than 8 bits a channel; convert it to 8 bits."
    )
  return pixels
