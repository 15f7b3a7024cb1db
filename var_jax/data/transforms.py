"""Augmentation and resizing of one image, uint8 [H, W, 3] -> uint8 [h, w, 3].

Random functions take their generator as an argument and draw from nothing
else, so that an augmented image is a function of (seed, position).
"""

import dataclasses
import math
from collections.abc import Callable

import numpy as np

NAMES = ("crop", "jitter", "resize")

# Also of tokens, uint16 [crops, L] -> uint16 [L].
Transform = Callable[[np.ndarray, np.random.Generator | None], np.ndarray]


@dataclasses.dataclass(frozen=True)
class ImageTransform:
  """A transform to `shape` by name, without chance if not `train`."""

  name: str
  shape: tuple[int, int]
  train: bool
  flip: bool

  def __post_init__(self):
    if self.name not in NAMES:
      raise ValueError(
        f"transform {self.name!r} is unknown; use one of {', '.join(NAMES)}."
      )

  def __call__(
    self, image: np.ndarray, rng: np.random.Generator | None
  ) -> np.ndarray:
    if not self.train:
      plain = center_crop if self.name == "crop" else resize
      return plain(image, self.shape)
    if self.name == "resize":
      return resize(_mirror(image, rng, self.flip), self.shape)
    augment = random_crop if self.name == "crop" else jitter
    return augment(image, self.shape, rng, flip=self.flip)

  def refusal(self, image: np.ndarray) -> str | None:
    """Return why the image cannot be used, or None if it can."""
    height, width = image.shape[:2]
    h, w = self.shape
    # VAR: it would be enlarged in silence.
    if self.name == "crop" and (height < h or width < w):
      return (
        f"the image of {height}x{width} pixels is smaller than the crop of "
        f"{h}x{w}; use the transform resize, or remove it."
      )
    return None


def make_transform(
  name: str, shape: tuple[int, int], *, train: bool, flip: bool
) -> ImageTransform:
  """Return the transform `name` to `shape`, without chance if not `train`."""
  return ImageTransform(name, tuple(shape), train, flip)


def pick_crop(
  tokens_CL: np.ndarray, rng: np.random.Generator | None
) -> np.ndarray:
  """Return one of the C crops of an image, the first without a generator."""
  return tokens_CL[0 if rng is None else rng.integers(len(tokens_CL))]


def random_crop(
  image: np.ndarray,
  shape: tuple[int, int],
  rng: np.random.Generator,
  *,
  resize: float = 1.125,
  flip: bool = False,
) -> np.ndarray:
  """Cut `shape` at random out of the image at `resize` times that size."""
  # VAR: a random place in an image of 1.125 times the size is all the
  # augmentation there is; mirroring is off by default, and comes first.
  image = _cover(_mirror(image, rng, flip), shape, resize)
  y = rng.integers(image.shape[0] - shape[0] + 1)
  x = rng.integers(image.shape[1] - shape[1] + 1)
  return image[y : y + shape[0], x : x + shape[1]]


def center_crop(
  image: np.ndarray, shape: tuple[int, int], *, resize: float = 1.125
) -> np.ndarray:
  """Cut `shape` out of the middle of the image at `resize` times that size."""
  image = _cover(image, shape, resize)
  # round() goes to even, as in the torchvision that VAR was evaluated with.
  y, x = (
    round((n - m) / 2) for n, m in zip(image.shape[:2], shape, strict=True)
  )
  return image[y : y + shape[0], x : x + shape[1]]


def jitter(
  image: np.ndarray,
  shape: tuple[int, int],
  rng: np.random.Generator,
  *,
  degrees: float = 5.0,
  scale: float = 0.05,
  shift: float = 1.0,
  flip: bool = False,
) -> np.ndarray:
  """Turn, zoom and move the image a little; for images that fill no crop.

  Angle, zoom - 1 and both shifts (in pixels) are uniform in plus or minus the
  limits. Border pixels continue outwards, so that a stroke that leaves the
  image still does.
  """
  from PIL import Image

  image = _mirror(image, rng, flip)
  if image.shape[:2] != tuple(shape):
    image = resize(image, shape)
  angle, zoom, dy, dx = rng.uniform(-1, 1, 4) * (degrees, scale, shift, shift)
  margin = max(shape) // 2  # More than a small turn brings into view.
  padded = np.pad(image, ((margin, margin), (margin, margin), (0, 0)), "edge")
  # Pillow asks where an output point comes from: p -> A (p - t - c) + c, where
  # A turns back and zooms back, t is the shift and c the centre.
  cos = math.cos(math.radians(angle)) / (1 + zoom)
  sin = math.sin(math.radians(angle)) / (1 + zoom)
  y, x = shape[0] / 2, shape[1] / 2
  affine = (
    *(cos, -sin, margin + x - cos * (x + dx) + sin * (y + dy)),
    *(sin, cos, margin + y - sin * (x + dx) - cos * (y + dy)),
  )
  return np.asarray(
    Image.fromarray(padded).transform(
      (shape[1], shape[0]),
      Image.Transform.AFFINE,
      affine,
      resample=Image.Resampling.BICUBIC,
    )
  )


def resize(image: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
  """Resample the whole image to `shape`, whatever its aspect."""
  from PIL import Image

  resized = Image.fromarray(image).resize(
    (shape[1], shape[0]), Image.Resampling.BICUBIC
  )
  return np.asarray(resized)


def _mirror(
  image: np.ndarray, rng: np.random.Generator, flip: bool
) -> np.ndarray:
  """Return the image, or with probability 1/2 its mirror image if `flip`."""
  return image[:, ::-1] if flip and rng.random() < 0.5 else image


def _cover(
  image: np.ndarray, shape: tuple[int, int], factor: float
) -> np.ndarray:
  """Resample, aspect kept, to the smallest image that covers factor * shape."""
  from PIL import Image

  height, width = image.shape[:2]
  # VAR: Lanczos, and the short side exactly round(1.125 * side).
  h, w = (round(factor * side) for side in shape)
  if h * width >= w * height:
    w = h * width // height
  else:
    h = w * height // width
  resized = Image.fromarray(image).resize((w, h), Image.Resampling.LANCZOS)
  return np.asarray(resized)
