"""Sets of images that a model makes, or that a dataset has.

None of them goes through a file: pixels are rounded once, on their way to the
network. Each is the same whenever it is asked, from any image on.
"""

import functools
import hashlib
from collections.abc import Iterator

import jax
import numpy as np

from var_jax import checks, images
from var_jax.data import sources, transforms
from var_jax.evaluation import archives
from var_jax.generation import sampler
from var_jax.parallel import multihost


class Drawn:
  """What a model draws, classes in equal numbers and shuffled.

  Image i has label i of the shuffled ones and the key fold_in(key(seed), i).
  """

  lossy, kind = False, "drawn"

  def __init__(self, model, count: int, seed: int, **how):
    """Draw nothing yet.

    Args:
      how: options, as `Model.sample` has them.

    Raises:
      ValueError: the classes do not go into the count, or an option makes no
        sense.
    """
    check_options(model.config, **how)
    C = model.config.transformer.num_classes
    check_count(count, C)
    rng = np.random.default_rng(seed)
    self.labels = rng.permutation(np.repeat(np.arange(C), count // C))
    self._model, self._seed, self._how = model, seed, how
    self.name, self.count = "drawn", count
    self.shape = (*model.config.tokenizer.image_shape, 3)

  def batches(self, size: int, start: int = 0) -> Iterator[np.ndarray]:
    keys_N = sampler.image_keys(jax.random.key(self._seed), self.count)
    rest = self._model.sample_all(
      self.labels[start:], keys_N[start:], size, **self._how
    )
    for drawn in rest:
      yield images.to_uint8(multihost.gathered(drawn.images_BHW3))

  @functools.cached_property
  def sha256(self) -> str:
    """Return that of what decides the images besides the weights."""
    return _digest(self.labels, self._seed, sorted(self._how.items()))


def check_count(count: int, classes: int) -> None:
  """Raise ValueError unless as many images of each class make the count."""
  if count % classes:
    raise ValueError(
      f"{count} images are no equal number of each of {classes} classes; use a "
      f"multiple, like {-(-count // classes) * classes}."
    )


def check_options(
  config, guidance, top_k, top_p, temperature=1.0, guided_scales=None, **_
) -> None:
  """Raise ValueError if `Model.sample` would refuse the options.

  Args:
    config: of the tokenizer and of the transformer.
  """
  checks.options(guidance, top_k, top_p, temperature, config.tokenizer)
  checks.guided_scales(guided_scales, config.transformer)


class Decoded:
  """What a tokenizer makes of tokens in an .npz, `tokens` [N, L]."""

  lossy, kind = False, "decoded"

  def __init__(self, model, path: str):
    schedule = model.config.tokenizer.schedule
    tokens_NL = archives.read(path, "tokens", "give an .npz with `tokens`")
    if (
      tokens_NL.ndim != 2
      or tokens_NL.shape[1] != schedule.num_tokens
      or not len(tokens_NL)
      or not np.issubdtype(tokens_NL.dtype, np.integer)
    ):
      raise ValueError(
        f"{path}: tokens are {tokens_NL.dtype} {tokens_NL.shape}; give integers"
        f" [N, {schedule.num_tokens}]."
      )
    checks.tokens(tokens_NL, schedule, model.config.tokenizer)
    self._model, self._tokens_NL = model, tokens_NL
    self.name, self.count = path, len(tokens_NL)
    self.shape = (*model.config.tokenizer.image_shape, 3)

  def batches(self, size: int, start: int = 0) -> Iterator[np.ndarray]:
    for first in range(start, self.count, size):
      image_BHW3 = self._model.decode(self._tokens_NL[first : first + size])
      yield images.to_uint8(multihost.gathered(image_BHW3))

  @functools.cached_property
  def sha256(self) -> str:
    return _digest(self._tokens_NL)


class OfDataset:
  """A split of a dataset, cropped or resampled to `shape` without chance.

  In an order drawn once: folders are sorted by class, which IS must not be of.
  """

  lossy, kind = False, "dataset"

  def __init__(
    self, spec: str, split: str, shape: tuple[int, int] | None, transform: str
  ):
    """Open a source.

    Args:
      shape: that of the first image if None.
    """
    # A file has one split, whatever its user takes it for.
    opened = "train" if spec.startswith("npz:") else split
    self._source = sources.open_source(spec, opened)
    shape = shape or self._source[0]["image"].shape[:2]
    self._transform = transforms.make_transform(
      transform, shape, train=False, flip=False
    )
    self.name, self.count = spec, len(self._source)
    self._order = np.random.default_rng(0).permutation(self.count)
    self.shape, self.transform = (*shape, 3), transform

  def batches(self, size: int, start: int = 0) -> Iterator[np.ndarray]:
    for first in range(start, self.count, size):
      rows = range(first, min(first + size, self.count))
      yield np.stack([self._transform(self._image(i), None) for i in rows])

  def labelled(self) -> tuple[np.ndarray, np.ndarray]:
    """Return all images, uint8 [N, H, W, 3], and their labels."""
    samples = (self._source[int(i)] for i in self._order)
    pairs = [(self._transform(s["image"], None), s["label"]) for s in samples]
    pixels, labels = zip(*pairs, strict=True)
    return np.stack(pixels), np.asarray(labels)

  @functools.cached_property
  def sha256(self) -> str:
    digest = hashlib.sha256()
    for pixels in self.batches(1):
      digest.update(np.ascontiguousarray(pixels).data)
    return digest.hexdigest()

  def _image(self, i: int) -> np.ndarray:
    return self._source[int(self._order[i])]["image"]


class Reconstructed:
  """What a tokenizer makes of another set."""

  lossy, kind = False, "reconstructed"

  def __init__(self, model, originals):
    self._model, self.originals = model, originals
    self.name, self.count = originals.name, originals.count
    self.shape, self.transform = originals.shape, originals.transform

  def batches(self, size: int, start: int = 0) -> Iterator[np.ndarray]:
    for pixels_BHW3 in self.originals.batches(size, start):
      tokens_BL = self._model.encode(images.to_float(pixels_BHW3))
      again_BHW3 = self._model.decode(tokens_BL)
      yield images.to_uint8(multihost.gathered(again_BHW3))

  @functools.cached_property
  def sha256(self) -> str:
    return self.originals.sha256


def _digest(*values) -> str:
  digest = hashlib.sha256()
  for value in values:
    digest.update(
      np.ascontiguousarray(value).data
      if isinstance(value, np.ndarray)
      else repr(value).encode()
    )
  return digest.hexdigest()
