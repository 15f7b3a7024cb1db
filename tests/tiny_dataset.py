"""Small TensorFlow Datasets builders of our own; importing registers them."""

import io

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

CLASSES = ("cat", "dog", "eel")
SPLITS = {"train": 7, "val": 2, "test": 3}


def pixels(split: str, i: int) -> np.ndarray:
  """Return what the example `i` was encoded from, uint8 [H, W, 3]."""
  rng = np.random.default_rng((len(split), i))
  return rng.integers(0, 256, (10 + i, 12, 3), np.uint8)


def encode(array: np.ndarray) -> io.BytesIO:
  file = io.BytesIO()
  Image.fromarray(array).save(file, "PNG")
  file.seek(0)
  return file


class TinyPets(tfds.core.GeneratorBasedBuilder):
  """Noise; example i has class i % 3. Shards keep the order of shuffling."""

  VERSION = tfds.core.Version("1.0.0")

  def _info(self):
    return tfds.core.DatasetInfo(
      builder=self,
      features=tfds.features.FeaturesDict(
        {
          "image": tfds.features.Image(encoding_format="png"),
          "thumbnail": tfds.features.Image(encoding_format="png"),
          "kind": tfds.features.ClassLabel(names=CLASSES),
          "number": np.int64,
        }
      ),
    )

  def _split_generators(self, manager):
    return {name: self._generate_examples(name) for name in SPLITS}

  def _generate_examples(self, split):
    for i in range(SPLITS[split]):
      yield (
        i,
        {
          "image": encode(pixels(split, i)),
          "thumbnail": encode(pixels(split, 0)),
          "kind": i % 3,
          "number": i,
        },
      )


class TinySounds(tfds.core.GeneratorBasedBuilder):
  """Has neither image nor class."""

  VERSION = tfds.core.Version("1.0.0")

  def _info(self):
    return tfds.core.DatasetInfo(
      builder=self, features=tfds.features.FeaturesDict({"number": np.int64})
    )

  def _split_generators(self, manager):
    return {"other": self._generate_examples()}

  def _generate_examples(self):
    yield 0, {"number": 0}


class TinyUnlabelled(TinyPets):
  """Has one class."""

  def _info(self):
    return tfds.core.DatasetInfo(
      builder=self,
      features=tfds.features.FeaturesDict(
        {
          "image": tfds.features.Image(encoding_format="png"),
          "label": tfds.features.ClassLabel(names=["thing"]),
        }
      ),
    )

  def _generate_examples(self, split):
    yield 0, {"image": encode(pixels(split, 0)), "label": 0}
