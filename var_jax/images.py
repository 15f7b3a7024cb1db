"""Pictures in and out: float32 [-1, 1] inside, uint8 in files."""

import io
import pathlib
from collections.abc import Iterable, Sequence

import jax
import numpy as np
from etils import epath

from var_jax import files


def to_uint8(images_BHW3: jax.Array) -> np.ndarray:
  """Return uint8 from [-1, 1]: clipped, then rounded."""
  pixels = (np.asarray(images_BHW3, np.float32) + 1.0) * 127.5
  return np.clip(np.round(pixels), 0, 255).astype(np.uint8)


def to_float(pixels_BHW3: np.ndarray) -> np.ndarray:
  """Return float32 in [-1, 1] from uint8."""
  return np.asarray(pixels_BHW3, np.float32) / 127.5 - 1.0


def grid(
  rows: Sequence[Sequence[np.ndarray]],
  labels: Sequence[str] = (),
  gap: int = 2,
) -> np.ndarray:
  """Return one uint8 picture [H, W, 3] of rows of uint8 images.

  Args:
    labels: written at the left of each row.
  """
  from PIL import Image, ImageDraw

  H = max(image.shape[0] for row in rows for image in row)
  W = max(image.shape[1] for row in rows for image in row)
  columns = max(len(row) for row in rows)
  margin = 8 + 7 * max((len(label) for label in labels), default=-1)
  left = margin if labels else gap
  size = (left + columns * (W + gap), gap + len(rows) * (H + gap))
  sheet = Image.new("RGB", size, (255, 255, 255))
  for y, row in enumerate(rows):
    for x, image in enumerate(row):
      corner = (left + x * (W + gap), gap + y * (H + gap))
      sheet.paste(Image.fromarray(image), corner)
  for y, label in enumerate(labels):
    middle = gap + y * (H + gap) + H // 2 - 6
    ImageDraw.Draw(sheet).text((4, middle), label, fill=(0, 0, 0))
  return np.asarray(sheet)


def enlarge(image_HW3: np.ndarray, factor: int) -> np.ndarray:
  """Return the image with each pixel repeated, to look at small ones."""
  return image_HW3.repeat(factor, axis=0).repeat(factor, axis=1)


def read_image(path: epath.PathLike) -> np.ndarray:
  """Return an image file as float32 [H, W, 3] in [-1, 1].

  Raises:
    ValueError: the file is missing or no image.
  """
  from PIL import Image

  try:
    with Image.open(io.BytesIO(epath.Path(path).read_bytes())) as image:
      return to_float(np.asarray(image.convert("RGB")))
  except Exception as error:  # Pillow's errors share no base class
    raise ValueError(
      f"image {path} cannot be read ({type(error).__name__}); give a PNG or "
      "JPEG file."
    ) from None


def check_output(path: epath.PathLike) -> None:
  """Raise ValueError unless a picture can be written to `path`."""
  suffix = pathlib.PurePath(path).suffix.lower()
  if suffix not in (".png", ".jpg", ".jpeg", ".webp"):
    raise ValueError(
      f"output {path} is not named as a picture; end it in .png."
    )
  if files.in_bucket(files.absolute(path, buckets=("gs", "s3"))):
    return  # what is written there finds out
  folder = epath.Path(path).parent
  if epath.Path(path).is_dir() or (folder.exists() and not folder.is_dir()):
    raise ValueError(
      f"output {path} cannot be a file there; name one inside a folder."
    )


def write_image(path: epath.PathLike, image_HW3: np.ndarray) -> None:
  """Write a uint8 image; the format follows from the name."""
  check_output(path)
  suffix = pathlib.PurePath(path).suffix[1:].lower()
  format = {"jpg": "jpeg"}.get(suffix, suffix)
  files.write_bytes(path, encoded(image_HW3, format))


def encoded(image_HW3: np.ndarray, format: str = "png") -> bytes:
  """Return a uint8 image as a file has it."""
  from PIL import Image

  buffer = io.BytesIO()
  Image.fromarray(image_HW3).save(buffer, format=format.upper())
  return buffer.getvalue()


def check_folder(path: epath.PathLike) -> None:
  """Raise ValueError unless pictures can be written into folder `path`."""
  folder = files.absolute(path, buckets=("gs", "s3"))
  if files.in_bucket(folder):
    return
  if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
    raise ValueError(
      f"output {path} is there and no empty folder; name another."
    )


def write_numbered(
  folder: epath.PathLike, batches: Iterable[np.ndarray], total: int
) -> None:
  """Write 000000.png and so on: each batch as it comes.

  Args:
    batches: uint8 [B, H, W, 3].
    total: images of all batches; the names sort as the numbers do.
  """
  digits, i = max(6, len(str(total - 1))), 0
  for batch_BHW3 in batches:
    for image_HW3 in batch_BHW3:
      write_image(epath.Path(folder) / f"{i:0{digits}}.png", image_HW3)
      i += 1
