"""A measurement: images in, a receipt out.

images -network-> features, kept part by part -> numbers -> receipt
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath

from var_jax import files
from var_jax.evaluation import (
  adm_reference,
  comparable,
  image_sets,
  inception,
  measure,
  networks,
  receipt,
)
from var_jax.evaluation.image_sets import ImageSet
from var_jax.evaluation.measure import Looks, Reference
from var_jax.evaluation.networks import Network
from var_jax.evaluation.partial import Elsewhere, Part, Partial
from var_jax.evaluation.receipt import Reason

_SAVE_EVERY = 30.0  # seconds

# Takes (images done, of all, those that were done before).
Progress = Callable[[int, int, int], None]


class Looking(NamedTuple):
  """How a network looks at images."""

  network: Network
  mesh: jax.sharding.Mesh
  batch_size: int
  progress: Progress = lambda done, of, began: None


class Against(NamedTuple):
  """What images are compared with, and what a receipt says of it."""

  reference: Reference
  about: Mapping[str, Any]


def look(looking: Looking, images: ImageSet) -> Looks:
  """Return what a network sees in a set.

  Raises:
    ValueError: the images cannot be read.
  """
  return measure.gather([part for _, part in _parts(looking, images, 0)])


def look_and_keep(
  looking: Looking,
  images: ImageSet,
  kept: Partial | Elsewhere,
  *,
  keep_pixels: bool = False,
) -> None:
  """Add what a network sees in a set to what an interrupted look left.

  Args:
    keep_pixels: whether `kept` keeps the images too.

  Raises:
    ValueError: the images cannot be read.
  """
  if kept.count >= images.count:
    return
  saved = time.monotonic()
  try:
    for pixels, part in _parts(looking, images, kept.count):
      kept.add(part | ({"pixels": pixels} if keep_pixels else {}))
      if time.monotonic() - saved > _SAVE_EVERY:
        kept.save()
        saved = time.monotonic()
  except KeyboardInterrupt:
    kept.save()
    raise
  kept.save()


def _parts(
  looking: Looking, images: ImageSet, start: int
) -> Iterator[tuple[np.ndarray, Part]]:
  """Yield images from `start` on, and what is seen in them."""
  done, size = start, min(looking.batch_size, images.count)
  looking.progress(done, images.count, start)
  batches = images.batches(size, start)
  found = networks.extract(looking.network, batches, size, looking.mesh)
  for pixels, features in found:
    yield pixels, features.present()
    done += len(pixels)
    looking.progress(done, images.count, start)


def against_images(
  looking: Looking,
  images: ImageSet,
  split: str,
  shape: tuple[int, int, int],
) -> Against:
  """Return a set as a reference.

  Args:
    split: "train" or "val", or "" where nobody says.
    shape: of the images that are to be compared with it.

  Raises:
    ValueError: its images are of another size, or cannot be read.
  """
  _check_sizes(images.name, images.shape, shape)
  comparable.check_count(images)
  parts = (part for _, part in _parts(looking, images, 0))
  about = {
    "name": images.name,
    "kind": "images",
    "sha256": images.sha256,
    "split": split,
    "count": images.count,
    "transform": getattr(images, "transform", None),
  }
  return Against(measure.as_reference(parts, images.count), about)


def against_statistics(
  looking: Looking, path: str, split: str, shape: tuple[int, int, int]
) -> Against:
  """Return the statistics in an .npz of ADM as a reference.

  Arguments and errors as of `against_images`; they have to be of the network.
  """
  if looking.network.names.distance != "FID":
    raise ValueError(
      f"{path} has statistics of Inception, and the features are a "
      "classifier's; give --inception, or a reference of images."
    )
  pooled, spatial, has_images = adm_reference.read(
    path, inception.POOLED, inception.SPATIAL
  )
  near = None
  if has_images:
    some = image_sets.Archive(epath.Path(path))
    _check_sizes(path, some.shape, shape)
    near = look(looking, some).pooled_ND
  about = {
    "name": path,
    "kind": "statistics",
    "sha256": files.sha256(path),
    "split": split,
    "count": None,  # it does not say
    "neighbours": None if near is None else len(near),
  }
  return Against(Reference(pooled, spatial, near), about)


def check_suits(looking: Looking, images: ImageSet) -> None:
  """Raise ValueError if the network does not take images of that size."""
  suits = looking.network.shape
  if suits and images.shape != suits:
    raise ValueError(
      f"{images.name} has images of {_size(images.shape)}, and the classifier "
      f"is of {_size(suits)}; bring them to that size, or fit another."
    )


def _check_sizes(name: str, here, there) -> None:
  if here != there:
    raise ValueError(
      f"the reference {name} has images of {_size(here)}, and those to measure "
      f"are of {_size(there)}; bring both to one size."
    )


def to_receipt(
  looking: Looking,
  images: ImageSet,
  looks: Looks,
  against: Against,
  *,
  reasons: Sequence[Reason] = (),
  forced: bool = False,
  shuffle: int | None = None,
  more: Mapping[str, float] | None = None,
  **depends: Any,
) -> dict[str, Any]:
  """Return the numbers of a set, and what they depend on.

  Args:
    reasons: what was found before.
    shuffle: the seed of an order for IS, in place of the set's own.
    more: other measures.
    depends: what a receipt also says, as JSON.

  Raises:
    ValueError: IS would be of sorted images, and is not forced.
  """
  network = looking.network
  order = {"rule": _ORDERS.get(images.kind, "as read")}
  if shuffle is not None:
    looks = measure.shuffled(looks, measure.order(images.count, shuffle))
    order["rule"] = f"features shuffled by seed {shuffle}"
  times = measure.sortedness(looks.judged_N)
  order["sortedness"] = round(times, 2)
  known = any(reason.suffix == comparable.CLASS_SORTED for reason in reasons)
  if times > comparable.SORTED and not known:
    is_sorted = comparable.is_sorted(images, network, times)
    if not forced:
      receipt.refuse([is_sorted])
    reasons = [*reasons, is_sorted]
  numbers = measure.compare(looks, against.reference, network.names)
  if images.kind == "reconstructed":
    numbers = {
      comparable.REBUILT.get(name, name): x for name, x in numbers.items()
    }
  return receipt.make(
    receipt.renamed({**numbers, **(more or {})}, reasons),
    forced=reasons,
    warnings=comparable.warnings(
      images, against.about.get("count"), looks, network
    ),
    features=network.about,
    reference=against.about,
    images={
      "kind": images.kind,
      "name": images.name,
      "sha256": images.sha256,
      "count": images.count,
      "shape": list(images.shape),
      "lossy": images.lossy,
      "transform": getattr(images, "transform", None),
    },
    order=order,
    **depends,
  )


_ORDERS = {
  "drawn": "labels shuffled by the seed",
  "dataset": "shuffled by seed 0",
  "reconstructed": "shuffled by seed 0",
}


def _size(shape) -> str:
  return "x".join(map(str, shape))
