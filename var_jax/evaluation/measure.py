"""From features of two sets to numbers by name."""

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from var_jax.evaluation import statistics
from var_jax.evaluation.networks import Names
from var_jax.evaluation.partial import Part
from var_jax.evaluation.statistics import Gaussian, Moments

# As many as the reference batch of published precision and recall has.
NEIGHBOURS = 10_000
SPLIT = 5000  # images, of IS
SUBSET = 1000  # images, of KID


class Looks(NamedTuple):
  """What is kept of a set's features. D of pool_3, E of places, C classes."""

  pooled: Moments
  spatial: Moments | None
  pooled_ND: np.ndarray  # float32
  probs_NC: np.ndarray
  judged_N: np.ndarray  # the likeliest class


class Reference(NamedTuple):
  """Of the set that is compared with; None where it has none."""

  pooled: Gaussian
  spatial: Gaussian | None
  pooled_MD: np.ndarray | None  # of some of its images


def gather(parts: Iterable[Part]) -> Looks:
  """Return what a set's features, part by part, come to."""
  pooled = spatial = None
  pooled_ND, probs_NC = [], []
  for part in parts:
    pooled = _merged(pooled, part["pooled_BD"])
    if "spatial_BE" in part:
      spatial = _merged(spatial, part["spatial_BE"])
    pooled_ND.append(part["pooled_BD"])
    probs_NC.append(part["probs_BC"])
  probs_NC = np.concatenate(probs_NC)
  return Looks(
    pooled,
    spatial,
    np.concatenate(pooled_ND),
    probs_NC,
    probs_NC.argmax(axis=1),
  )


def order(count: int, seed: int) -> np.ndarray:
  """Return an order of images, drawn by a seed."""
  return np.random.default_rng(seed).permutation(count)


def shuffled(looks: Looks, order_N: np.ndarray) -> Looks:
  """Return the same with images in another order, that IS takes parts of."""
  return looks._replace(
    probs_NC=looks.probs_NC[order_N], judged_N=looks.judged_N[order_N]
  )


def as_reference(parts: Iterable[Part], count: int, seed: int = 0) -> Reference:
  """Return a set as one to compare with; of its images few are kept.

  Args:
    count: of all images; 0 keeps none to look for neighbours among.
    seed: of which are kept, if there are many.
  """
  kept_N = np.sort(order(count, seed)[:NEIGHBOURS])
  pooled = spatial = None
  at, pooled_MD = 0, []
  for part in parts:
    pooled = _merged(pooled, part["pooled_BD"])
    if "spatial_BE" in part:
      spatial = _merged(spatial, part["spatial_BE"])
    end = at + len(part["pooled_BD"])
    here_n = kept_N[(kept_N >= at) & (kept_N < end)] - at
    pooled_MD.append(part["pooled_BD"][here_n])
    at = end
  return Reference(
    pooled.gaussian(),
    spatial and spatial.gaussian(),
    np.concatenate(pooled_MD) if count else None,
  )


def compare(looks: Looks, reference: Reference, names: Names) -> dict:
  """Return the measures by name; those that have no answer are left out."""
  numbers = {
    names.distance: statistics.frechet_distance(
      looks.pooled.gaussian(), reference.pooled
    )
  }
  if names.spatial_distance and looks.spatial and reference.spatial:
    numbers[names.spatial_distance] = statistics.frechet_distance(
      looks.spatial.gaussian(), reference.spatial
    )
  numbers[names.score] = statistics.inception_score(looks.probs_NC, SPLIT)
  if reference.pooled_MD is not None:
    mean, deviation = statistics.kernel_distance(
      looks.pooled_ND, reference.pooled_MD, size=SUBSET
    )
    precision, recall = statistics.precision_recall(
      reference.pooled_MD, looks.pooled_ND
    )
    numbers[names.kernel_distance] = mean
    if min(len(looks.pooled_ND), len(reference.pooled_MD)) > SUBSET:
      # Else all subsets are the same images.
      numbers[f"{names.kernel_distance}_deviation"] = deviation
    numbers |= {names.precision: precision, names.recall: recall}
  return numbers


def psnr_and_ssim(pairs) -> dict[str, float]:
  """Return means over pairs of uint8 images, (originals, reconstructions).

  Args:
    pairs: of batches [B, H, W, 3].
  """
  import dm_pix
  import jax

  ssim = jax.jit(
    jax.vmap(lambda a, b: dm_pix.ssim(a, b, filter_size=min(11, *a.shape[:2])))
  )
  psnr_N, ssim_N = [], []
  for pixels_BHW3, again_BHW3 in pairs:
    a, b = (np.float64(x) for x in (pixels_BHW3, again_BHW3))
    error_B = np.mean(np.square(a - b), axis=(1, 2, 3))
    # Of equal images, what an error of a tenth of a step would give.
    psnr_N.append(10 * np.log10(255.0**2 / error_B.clip(min=0.01)))
    ssim_N.append(ssim(np.float32(a / 255), np.float32(b / 255)))
  return {
    "PSNR": float(np.concatenate(psnr_N).mean()),
    "SSIM": float(np.concatenate(ssim_N).mean()),
  }


def half_distance(looks: Looks) -> float:
  """Return the distance of two halves of a set, drawn at random.

  They are of one distribution, so this is what a distance of half as many
  images has too much.
  """
  order = np.random.default_rng(0).permutation(looks.pooled.count)
  halves = np.array_split(order, 2)
  a, b = (Moments.of(looks.pooled_ND[half]).gaussian() for half in halves)
  return statistics.frechet_distance(a, b)


def sortedness(judged_N: np.ndarray) -> float:
  """Return how far from a random order of the same classes images are.

  About 1 if they are shuffled; else the larger of two ratios to chance: the
  length of runs of one class, which tells where there are few classes, and the
  share of neighbours of one class, which tells where there are many.
  """
  N = len(judged_N)
  if N < 2:
    return 1.0
  equal = np.count_nonzero(judged_N[1:] == judged_N[:-1])
  chance = np.sum(np.square(np.bincount(judged_N) / N)) * (N - 1)
  lengths = (N - chance) / (N - equal)
  # A few pairs say nothing where hardly any is expected.
  pairs = max(equal - 10, 0) / chance
  return float(max(lengths, pairs))


def _merged(moments: Moments | None, features_BD: np.ndarray) -> Moments:
  new = Moments.of(features_BD)
  return moments.merged(new) if moments else new
