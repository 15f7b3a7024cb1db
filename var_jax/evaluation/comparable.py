"""What makes a number incomparable with others of its name, or worse than it
seems."""

from var_jax.evaluation import measure
from var_jax.evaluation.image_sets import ImageSet
from var_jax.evaluation.measure import Looks
from var_jax.evaluation.networks import Network
from var_jax.evaluation.receipt import Reason

# Runs of one class that are so many times longer than chance are no accident.
SORTED = 3.0
CLASS_SORTED = "class_sorted"
# Of reconstructions, as the field calls it.
REBUILT = {"FID": "rFID", "sFID": "rsFID"}
_LEAST = 4  # images: three neighbours, and oneself


def reasons_before(
  network: Network,
  images: ImageSet,
  split: str,
  stated: int,
  in_order: bool = True,
) -> list[Reason]:
  """Return why measures would not be what they are called, whatever is seen.

  Args:
    split: of the reference, "" where nobody says.
    stated: how many images there should be.
    in_order: IS takes images as they come.

  Raises:
    ValueError: there are more.
  """
  names, found = network.names, other_weights(network)
  check_count(images)
  if images.count > stated:
    raise ValueError(
      f"{images.name} has {images.count} images, more than the {stated} that "
      f"are stated; give --count {images.count}."
    )
  if images.count < stated:
    found.append(
      Reason(
        "few_images",
        (),
        f"{images.name} has {images.count} images and {stated} are stated; "
        f"give more, or --count {images.count}",
      )
    )
  labels_N = getattr(images, "labels", None) if in_order else None
  times = 0.0 if labels_N is None else measure.sortedness(labels_N)
  if times > SORTED:
    found.append(is_sorted(images, network, times))
  if images.kind == "reconstructed" and split != "val":
    found.append(
      Reason(
        "other_statistics",
        tuple(REBUILT.get(n, n) for n in (names.distance, "sFID")),
        "reconstructions of held-out images are compared with "
        f"{split or 'images of an unnamed split'}; leave --reference out, or "
        "say --reference-split val",
      )
    )
  return found


def other_weights(network: Network) -> list[Reason]:
  if network.official:
    return []
  return [
    Reason(
      "other_weights",
      (),
      "the weights of Inception are not those of published numbers, "
      "pt_inception-2015-12-05-6726825d.pth",
    )
  ]


def check_count(images: ImageSet) -> None:
  """Raise ValueError if a set is too small to be measured."""
  if images.count < _LEAST:
    raise ValueError(
      f"{images.name} has {images.count} images, and measures need {_LEAST}; "
      "give more."
    )


def is_sorted(images: ImageSet, network: Network, times: float) -> Reason:
  score = network.names.score
  return Reason(
    CLASS_SORTED,
    (score,),
    f"{images.name} is sorted by class ({times:.0f} times as much as by "
    f"chance), and {score} is of parts of {measure.SPLIT}; give --shuffle",
  )


def warnings(
  images: ImageSet, reference_count: int | None, looks: Looks, network: Network
) -> list[str]:
  """Return a line on each thing that makes numbers worse than they seem.

  Args:
    reference_count: images of the reference, None if it does not say.
  """
  lines, dimensions = [], looks.pooled_ND.shape[1]
  name = network.names.distance
  if images.count < dimensions:
    lines.append(
      f"{images.count} images are fewer than the {dimensions} dimensions of "
      f"the features, so {name} is biased upwards: two halves of them, of one "
      f"distribution, are {measure.half_distance(looks):.3g} apart"
    )
  if reference_count is not None and reference_count < dimensions:
    lines.append(
      f"the reference's {reference_count} images are fewer than the "
      f"{dimensions} dimensions of the features, so {name} is biased upwards"
    )
  if images.lossy:
    lines.append(
      f"{images.name} has JPEG or the like, which changes pixels and so {name};"
      " use PNG"
    )
  return lines
