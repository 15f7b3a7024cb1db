"""What looks at images: Inception, by whose features FID is defined, or a
small classifier of the data at hand, whose measures have other names."""

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath

from var_jax import files
from var_jax.checkpoints import network_weights
from var_jax.evaluation import classifier, inception, inception_weights
from var_jax.evaluation.inception import Features
from var_jax.parallel import mesh as mesh_lib
from var_jax.parallel import multihost, rules

# The public file is named by the first digits of its SHA-256.
_OFFICIAL = "6726825d"


class Names(NamedTuple):
  """What the measures of a network's features are called."""

  distance: str
  spatial_distance: str
  score: str
  kernel_distance: str
  precision: str
  recall: str


OF_INCEPTION = Names("FID", "sFID", "IS", "KID", "precision", "recall")
_OF_CLASSIFIER = Names(
  "classifier_distance",
  "",  # its features have no places
  "classifier_score",
  "classifier_kernel_distance",
  "classifier_precision",
  "classifier_recall",
)


class Network(NamedTuple):
  """Args:
  about: what a receipt says of it, as JSON.
  shape: of images that it takes; None takes all.
  official: whether its weights are those of published numbers.
  """

  names: Names
  about: Mapping[str, Any]
  weights: Mapping[str, np.ndarray]
  features: Callable[[Mapping, jax.Array], Features]
  shape: tuple[int, int, int] | None = None
  official: bool = True


def open_inception(folder: epath.PathLike) -> Network:
  """Return the network of a folder that `var-jax convert --inception` wrote.

  Raises:
    ValueError: it did not, or the folder is damaged.
  """
  weights = inception_weights.read(folder)
  told = network_weights.about(folder, "inception")
  about = {
    "network": "inception-2015",
    "sha256": told["sha256"],
    "from": told["from"],
    "resize": f"bilinear of TensorFlow 1, from uint8 to {inception.SIDE}",
  }
  digests = told["from"].values()
  official = all(digest.startswith(_OFFICIAL) for digest in digests)
  return Network(
    OF_INCEPTION, about, weights, inception.features, official=official
  )


def open_classifier(folder: epath.PathLike) -> Network:
  """Return the network of a folder that `classifier.write` wrote.

  Raises:
    ValueError: it did not, or the folder is damaged.
  """
  told, weights = classifier.read(folder)
  return Network(
    _OF_CLASSIFIER,
    {"network": "classifier", "resize": "none", **told},
    weights,
    functools.partial(classifier.features, told["classes"]),
    tuple(told["shape"]),
  )


def open_either(folder: epath.PathLike) -> Network:
  """Return the network of a folder of either kind.

  Raises:
    ValueError: it is of none.
  """
  ways = {"classifier": open_classifier, "inception": open_inception}
  for name, open_one in ways.items():
    if (files.absolute(folder) / f"{name}.safetensors").exists():
      return open_one(folder)
  raise ValueError(
    f"{folder} has neither {' nor '.join(f'{n}.safetensors' for n in ways)}; "
    "give a folder that `var-jax convert --inception` or `var-jax evaluate "
    "--fit-classifier` wrote."
  )


def extract(
  network: Network,
  batches: Iterable[np.ndarray],
  size: int,
  mesh: jax.sharding.Mesh,
) -> Iterator[tuple[np.ndarray, Features]]:
  """Yield batches of uint8 images and their features, as NumPy arrays.

  The next batch is under way while one is yielded. All processes of the mesh
  give the same images and get all features.

  Args:
    size: of a batch; smaller ones are filled up, so that one program serves.
  """
  program = _program(network.features, mesh)
  weights = jax.device_put(network.weights, mesh_lib.replicated(mesh))

  def start(pixels_BHW3):
    missing = size - len(pixels_BHW3)
    filled = np.pad(pixels_BHW3, ((0, missing), *[(0, 0)] * 3), "edge")
    return pixels_BHW3, program(weights, mesh_lib.spread(mesh, filled))

  def finish(pixels_BHW3, features):
    n = len(pixels_BHW3)
    whole = jax.tree.map(lambda x: multihost.gathered(x)[:n], features)
    return pixels_BHW3, whole

  ahead = None
  for pixels_BHW3 in batches:
    current, ahead = ahead, start(pixels_BHW3)
    if current:
      yield finish(*current)
  if ahead:
    yield finish(*ahead)


@functools.lru_cache(maxsize=4)
def _program(features: Callable, mesh: jax.sharding.Mesh) -> rules.Jit:
  """Return what is compiled once for all sets of images."""
  same, split = mesh_lib.replicated(mesh), mesh_lib.by_rows(mesh)
  return rules.Jit(
    mesh, features, in_shardings=(same, split), out_shardings=same
  )
