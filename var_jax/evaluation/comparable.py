"""What makes a number incomparable with others of its name, or worse than it
seems."""

from var_jax.evaluation import measure
from var_jax.evaluation.image_sets import ImageSet
from var_jax.evaluation.measure import Looks
from var_jax.evaluation.networks import Network
from var_jax.evaluation.receipt import Reason

# Runs of one class that are so many times longer than chance are no accident.
SORTED = 3.0
# Of reconstructions, as the field calls it.
REBUILT = {"FID": "rFID", "sFID": "rsFID"}
_LEAST = 4  # images: three neighbours, and oneself


def reasons_before(
  network: Network, images: ImageSet, split: str, stated: int
) -> list[Reason]:
  """Return why measures would not be what they are called, whatever is seen.

  Args:
    split: of the reference, "" where nobody says.
    stated: how many images there should be.

  Raises:
    ValueError: there are more.
  """
  names, found = network.names, []
  if images.count < _LEAST:
    raise ValueError(
      f"{images.name} has {images.count} images, and measures need {_LEAST}; "
      "give more."
    )
  if images.count > stated:
    raise ValueError(
      f"{images.name} has {images.count} images, more than the {stated} that "
      f"are stated; give --count {images.count}."
    )
  if not network.official:
    found.append(
      Reason(
        "other_weights",
        (),
        "the weights of Inception are not those of published numbers, "
        "pt_inception-2015-12-05-6726825d.pth",
      )
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


def is_sorted(images: ImageSet, network: Network, times: float) -> Reason:
  score = network.names.score
  return Reason(
    "class_sorted",
    (score,),
    f"{images.name} is sorted by class ({times:.0f} times as much as by "
    f"chance), and {score} is of parts of {measure.SPLIT}; give --shuffle",
  )


def warnings(images: ImageSet, looks: Looks, network: Network) -> list[str]:
  """Return a line on each thing that makes numbers worse than they seem."""
  lines, dimensions = [], looks.pooled_ND.shape[1]
  name = network.names.distance
  if images.count < dimensions:
    lines.append(
      f"{images.count} images are fewer than the {dimensions} dimensions of "
      f"the features, so {name} is biased upwards: two halves of them, of one "
      f"distribution, are {measure.half_distance(looks):.3g} apart"
    )
  if images.lossy:
    lines.append(
      f"{images.name} has JPEG or the like, which changes pixels and so {name};"
      " use PNG"
    )
  return lines
