"""Distances of feature sets against the formulas, written another way."""

import itertools

import numpy as np
import pytest
from scipy import linalg
from scipy.spatial.distance import cdist

from var_jax.evaluation import statistics
from var_jax.evaluation.statistics import Moments

RNG = np.random.default_rng(0)
D = 12


def sets():
  """Return pairs of feature sets, by what is special about them."""
  real, drawn = RNG.normal(size=(60, D)), RNG.normal(0.4, 1.3, size=(70, D))
  flat = RNG.normal(size=(70, 2)) @ RNG.normal(size=(2, D))
  return {
    "random": (real, drawn),
    "float32": (np.float32(real), np.float32(drawn)),
    "rank-deficient": (real, flat),
    "both rank-deficient": (flat[:35], flat[35:] + 1.0),
    "fewer than dimensions": (real[:7], drawn[:9]),
    "duplicated": (np.tile(real[:20], (3, 1)), np.tile(drawn[:30], (2, 1))),
    "the same": (real, real[::-1]),
    "all of one image": (real, np.tile(drawn[:1], (70, 1))),
  }


PAIRS = pytest.mark.parametrize("pair", sets().values(), ids=sets().keys())


def gaussian(features):
  return Moments.of(features).gaussian()


@PAIRS
@pytest.mark.filterwarnings("ignore:Matrix is")  # singular, ill-conditioned
def test_frechet_distance_by_the_root_of_a_matrix(pair):
  """As published, with a little on the diagonals where there is no root."""
  a, b = (np.float64(x) for x in pair)
  cov_a, cov_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
  scale = np.trace(cov_a + cov_b)
  more = 1e-6 * np.eye(D)
  root = linalg.sqrtm((cov_a + more) @ (cov_b + more)).real
  apart = a.mean(0) - b.mean(0)
  expected = apart @ apart + scale - 2 * np.trace(root)
  found = statistics.frechet_distance(*map(gaussian, pair))
  # 1e-6 on the diagonal of a zero is 1e-3 under the root.
  assert found == pytest.approx(expected, rel=1e-3, abs=2e-3)


def test_frechet_distance_of_known_gaussians():
  """Diagonal covariances: sum of (m - m')^2 + (s - s')^2."""
  a, b = RNG.uniform(0.0, 2.0, size=(2, D))
  a[:3] = 0.0
  means = RNG.normal(size=(2, D))
  made = [
    statistics.Gaussian(mean, np.diag(std**2))
    for mean, std in zip(means, (a, b), strict=True)
  ]
  expected = np.sum((means[0] - means[1]) ** 2 + (a - b) ** 2)
  found = statistics.frechet_distance(*made)
  assert found == pytest.approx(expected, rel=1e-9)


@PAIRS
def test_precision_and_recall_by_plain_distances(pair):
  real, drawn = (np.float64(x) for x in pair)

  def near(x, members):
    radii = np.sort(cdist(members, members), axis=1)[:, 3]
    return (cdist(x, members) <= radii * (1 + 1e-12)).any(axis=1).mean()

  found = statistics.precision_recall(*pair)
  assert found == (near(drawn, real), near(real, drawn))


def test_blocks_of_distances_are_one(monkeypatch):
  pair = sets()["random"]
  whole = statistics.precision_recall(*pair)
  monkeypatch.setattr(statistics, "_BLOCK", 7)
  assert statistics.precision_recall(*pair) == whole


@PAIRS
def test_kernel_distance_by_pairs(pair):
  size = min(map(len, pair))
  mean, std = statistics.kernel_distance(*pair, subsets=3, size=1000)
  x, y = pair[0][:size], pair[1][:size]
  if len(pair[0]) != len(pair[1]):  # all of one, a part of the other
    means = [
      statistics.kernel_distance(*pair, subsets=1, size=4, seed=seed)[0]
      for seed in range(2000)
    ]
    # An average over subsets is that of all, to a few standard errors.
    x, y = pair
    mean, error = np.mean(means), 4 * np.std(means) / np.sqrt(2000)
  else:
    error = 1e-9 * (1 + abs(mean))
    assert std < 1e-9 * (1 + abs(mean))  # a subset is all there is

  def k(a, b):
    return (float(np.float64(a) @ np.float64(b)) / D + 1) ** 3

  def within(z):
    return np.mean([k(a, b) for a, b in itertools.permutations(z, 2)])

  across = np.mean([k(a, b) for a in x for b in y])
  expected = within(x) + within(y) - 2 * across
  assert mean == pytest.approx(expected, abs=error)


def probs(count, classes=10, sharpness=4.0):
  logits = sharpness * RNG.normal(size=(count, classes))
  exp = np.exp(logits)
  return exp / exp.sum(axis=1, keepdims=True)


def test_inception_score_by_entropies():
  """A part's score is exp of H(mean) less the mean of H."""
  p = np.float32(probs(250))
  p[0] = np.eye(10)[3]  # zeros have no logarithm

  def entropy(p):
    logs = np.log(np.float64(p), where=p > 0, out=np.zeros(p.shape))
    return -np.sum(p * logs, axis=-1)

  parts = [p[:100], p[100:200], p[200:]]
  expected = np.mean(
    [np.exp(entropy(x.mean(0)) - entropy(x).mean()) for x in parts]
  )
  found = statistics.inception_score(p, split=100)
  assert found == pytest.approx(expected, rel=1e-6)


def test_inception_score_of_one_class_is_one():
  score = statistics.inception_score(np.tile(probs(1), (50, 1)))
  assert score == pytest.approx(1.0, rel=1e-12)


def test_sorted_classes_score_as_if_there_were_few():
  """The mistake that scores of 60 come from where 340 is right."""
  labels = np.repeat(np.arange(1000), 20)
  logits = 10.0 * np.eye(1000)[labels] + RNG.normal(size=(20_000, 1000))
  p = np.exp(logits)
  p /= p.sum(axis=1, keepdims=True)
  # A part has 100 classes, as one of 5,000 images with 50 a class.
  in_order = statistics.inception_score(p, split=2000)
  shuffled = statistics.inception_score(p[RNG.permutation(len(p))], split=2000)
  assert in_order == pytest.approx(60, abs=8)
  assert shuffled == pytest.approx(340, abs=34)


@pytest.mark.parametrize("parts", [1, 2, 8, 61])
def test_moments_of_parts_merge_into_those_of_all(parts):
  features = RNG.normal(100.0, 1.0, size=(500, D))
  whole = Moments.of(features)
  merged = None
  for part in np.array_split(features, parts):
    new = Moments.of(part)
    merged = merged.merged(new) if merged else new
  assert merged.count == whole.count
  np.testing.assert_allclose(merged.mean_D, whole.mean_D, rtol=1e-13)
  scale = np.abs(whole.scatter_DD).max()
  np.testing.assert_allclose(
    merged.scatter_DD, whole.scatter_DD, atol=1e-10 * scale
  )
  np.testing.assert_allclose(
    merged.gaussian().covariance_DD,
    np.cov(features, rowvar=False),
    atol=1e-10,
  )


@pytest.mark.parametrize(
  "call, message",
  [
    (lambda: gaussian(np.ones((1, D))), "1 feature vectors have no covarian"),
    (
      lambda: statistics.frechet_distance(
        gaussian(np.ones((4, 3))), gaussian(np.ones((4, 5)))
      ),
      "features of 3 and of 5 dimensions cannot",
    ),
    (
      lambda: statistics.precision_recall(np.ones((3, D)), np.ones((9, D))),
      "3 real and 9 drawn images are too few for 3 neighbours",
    ),
    (
      lambda: statistics.kernel_distance(np.ones((1, D)), np.ones((9, D))),
      "1 images have no KID",
    ),
  ],
)
def test_what_has_no_answer_is_refused(call, message):
  with pytest.raises(ValueError, match=message):
    call()
