"""What features of two sets of images say of each other.

    FID   |m - m'|^2 + tr(C + C' - 2 (C C')^(1/2))     (1706.08500)
    IS    exp E_x KL(p(y|x) || p(y))                   (1606.03498)
    KID   unbiased MMD^2 of (x y / D + 1)^3            (1801.01401)
    precision, recall: shares within the other set's manifold, k = 3
                                                       (1904.06991)

sFID is FID of spatial features. As in the evaluator of ADM, which published
numbers are of, but for precision and recall, whose distances it rounds to half
precision. All of it is float64 NumPy, whatever comes in.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

_BLOCK = 2048  # rows that are compared with all others at once
_SAME = 1e-10  # of squared lengths: distances below are rounding


class Moments(NamedTuple):
  """Of a set of feature vectors; those of two sets merge into one.

  Args:
    scatter_DD: the sum of outer products of deviations from the mean.
  """

  count: int
  mean_D: np.ndarray
  scatter_DD: np.ndarray

  @classmethod
  def of(cls, features_ND: np.ndarray) -> "Moments":
    features_ND = np.asarray(features_ND, np.float64)
    mean_D = features_ND.mean(axis=0)
    centred_ND = features_ND - mean_D
    return cls(len(features_ND), mean_D, centred_ND.T @ centred_ND)

  def merged(self, other: "Moments") -> "Moments":
    """Return the moments of both sets together (Chan et al., 1979)."""
    count = self.count + other.count
    apart_D = other.mean_D - self.mean_D
    weight = self.count * other.count / count
    return Moments(
      count,
      self.mean_D + apart_D * (other.count / count),
      self.scatter_DD + other.scatter_DD + weight * np.outer(apart_D, apart_D),
    )

  def gaussian(self) -> "Gaussian":
    """Return mean and unbiased covariance.

    Raises:
      ValueError: there are fewer than two vectors.
    """
    if self.count < 2:
      raise ValueError(
        f"{self.count} feature vectors have no covariance; use 2 or more."
      )
    return Gaussian(self.mean_D, self.scatter_DD / (self.count - 1))


class Gaussian(NamedTuple):
  mean_D: np.ndarray
  covariance_DD: np.ndarray


def frechet_distance(a: Gaussian, b: Gaussian) -> float:
  """Return the squared distance of two normal distributions.

  The published evaluators take a general matrix root of C C', which singular
  covariances do not have exactly. Its trace is the sum of the roots of the
  eigenvalues of C^(1/2) C' C^(1/2), which always is one.

  Raises:
    ValueError: the distributions differ in dimensions.
  """
  if a.mean_D.shape != b.mean_D.shape:
    raise ValueError(
      f"features of {len(a.mean_D)} and of {len(b.mean_D)} dimensions cannot "
      "be compared; take both from one network."
    )
  apart_D = a.mean_D - b.mean_D
  values_D, vectors_DD = np.linalg.eigh(a.covariance_DD)
  # What is below zero is rounding.
  half_DD = vectors_DD * np.sqrt(values_D.clip(0.0))
  between_D = np.linalg.eigvalsh(half_DD.T @ b.covariance_DD @ half_DD)
  traces = np.trace(a.covariance_DD) + np.trace(b.covariance_DD)
  root = np.sum(np.sqrt(between_D.clip(0.0)))
  return float(apart_D @ apart_D + traces - 2.0 * root)


def inception_score(probs_NC: np.ndarray, split: int = 5000) -> float:
  """Return the mean score of consecutive parts of `split` images.

  So it depends on their order: a part that has few classes scores low.
  """
  scores = []
  for start in range(0, len(probs_NC), split):
    p_nC = np.asarray(probs_NC[start : start + split], np.float64)
    mean_C = p_nC.mean(axis=0)
    # p log p is 0 where p is.
    ratio_nC = np.divide(p_nC, mean_C, out=np.ones_like(p_nC), where=p_nC > 0)
    divergence_n = np.sum(p_nC * np.log(ratio_nC), axis=1)
    scores.append(np.exp(divergence_n.mean()))
  return float(np.mean(scores))


def kernel_distance(
  x_ND: np.ndarray,
  y_MD: np.ndarray,
  *,
  subsets: int = 100,
  size: int = 1000,
  seed: int = 0,
) -> tuple[float, float]:
  """Return mean and standard deviation of KID over random subsets.

  Args:
    size: of a subset; all of the smaller set if that has less.
  """
  size = min(size, len(x_ND), len(y_MD))
  if size < 2:
    raise ValueError(f"{size} images have no KID; use 2 or more of both.")
  rng = np.random.default_rng(seed)

  def kernel(a_nD, b_mD):
    return (a_nD @ b_mD.T / a_nD.shape[1] + 1.0) ** 3

  def others(kernel_nn):
    """Return the mean over pairs of different images."""
    return (kernel_nn.sum() - np.trace(kernel_nn)) / (size * (size - 1))

  found = []
  for _ in range(subsets):
    x_nD, y_nD = (
      np.asarray(a[rng.choice(len(a), size, replace=False)], np.float64)
      for a in (x_ND, y_MD)
    )
    within = others(kernel(x_nD, x_nD)) + others(kernel(y_nD, y_nD))
    found.append(within - 2.0 * kernel(x_nD, y_nD).mean())
  return float(np.mean(found)), float(np.std(found))


def precision_recall(
  real_ND: np.ndarray, drawn_MD: np.ndarray, k: int = 3
) -> tuple[float, float]:
  """Return the shares of drawn images near real ones, and the reverse.

  An image is near a set if it lies no farther from some member than that
  member's k-th neighbour in the set.

  Raises:
    ValueError: a set has no k-th neighbours.
  """
  if min(len(real_ND), len(drawn_MD)) <= k:
    raise ValueError(
      f"{len(real_ND)} real and {len(drawn_MD)} drawn images are too few for "
      f"{k} neighbours; use more than {k} of both."
    )
  real_ND, drawn_MD = (np.asarray(a, np.float64) for a in (real_ND, drawn_MD))
  return (
    _share_near(drawn_MD, real_ND, _radii(real_ND, k)),
    _share_near(real_ND, drawn_MD, _radii(drawn_MD, k)),
  )


def _radii(features_ND: np.ndarray, k: int) -> np.ndarray:
  """Return the squared distance of each vector to its k-th neighbour, [N]."""
  return np.concatenate(
    [
      # The nearest of all is the vector itself.
      np.partition(distance_nN, k, axis=1)[:, k]
      for distance_nN in _squared_distances(features_ND, features_ND)
    ]
  )


def _share_near(x_MD, members_ND, radius_N) -> float:
  near = [
    (distance_mN <= radius_N).any(axis=1)
    for distance_mN in _squared_distances(x_MD, members_ND)
  ]
  return float(np.concatenate(near).mean())


def _squared_distances(a_ND, b_MD) -> Iterator[np.ndarray]:
  """Yield the squared distances of some of a to all of b, [n, M]."""
  square_M = np.sum(np.square(b_MD), axis=1)
  for start in range(0, len(a_ND), _BLOCK):
    a_nD = a_ND[start : start + _BLOCK]
    squares_nM = np.sum(np.square(a_nD), axis=1)[:, None] + square_M
    distance_nM = squares_nM - 2.0 * (a_nD @ b_MD.T)
    # Of equal vectors rounding would decide which is the nearer.
    yield np.where(distance_nM > _SAME * squares_nM, distance_nM, 0.0)
