"""What pytorch-fid and torch-fidelity give, where they are installed."""

import jax
import numpy as np
import pytest

from var_jax.evaluation import inception, inception_weights, statistics

torch = pytest.importorskip("torch")
import torch_inception  # noqa: E402

QUICK = {"xla_backend_optimization_level": 0}


def ours(pixels_BHW3):
  state = torch_inception.seeded().state_dict()
  weights = inception_weights.from_torch(
    {name: x.numpy() for name, x in state.items()}, "here"
  )
  program = jax.jit(inception.features, compiler_options=QUICK)
  return program(weights, pixels_BHW3)


def assert_close(here, there):
  there = there.numpy()
  scale = np.abs(there).max()
  np.testing.assert_allclose(here, there, atol=1e-4 * scale)


def pixels(side):
  shape = (2, side, side, 3)
  return np.random.default_rng(side).integers(0, 256, shape, np.uint8)


def test_pytorch_fid_sees_the_same_features(monkeypatch):
  package = pytest.importorskip("pytorch_fid.inception")
  state = torch_inception.seeded().state_dict()
  monkeypatch.setattr(
    package, "load_state_dict_from_url", lambda *_, **__: state
  )
  network = package.InceptionV3([3], resize_input=False).eval()
  pixels_BHW3 = pixels(299)
  # The package takes [0, 1] and makes it [-1, 1]; the graph takes this.
  x = torch.tensor((np.float32(pixels_BHW3) / 128).transpose(0, 3, 1, 2) / 2)
  with torch.no_grad():
    (there,) = network(x)
  assert_close(ours(pixels_BHW3).pooled_BD, there[:, :, 0, 0])


def test_torch_fidelity_sees_the_same_features(tmp_path):
  package = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3")
  path = tmp_path / "inception.pth"
  torch.save(torch_inception.seeded().state_dict(), path)
  network = package.FeatureExtractorInceptionV3(
    "inception", ["2048", "logits_unbiased"], str(path)
  )
  pixels_BHW3 = pixels(40)  # resampled within
  with torch.no_grad():
    pooled, logits = network(torch.tensor(pixels_BHW3.transpose(0, 3, 1, 2)))
  found = ours(pixels_BHW3)
  assert_close(found.pooled_BD, pooled)
  assert_close(found.probs_BC, logits.softmax(dim=1))


def test_torch_fidelity_finds_the_same_distances():
  pytest.importorskip("torch_fidelity")
  from torch_fidelity import metric_fid, metric_isc, metric_kid, metric_prc

  rng = np.random.default_rng(0)
  real, drawn = rng.standard_normal((2, 400, 24))
  drawn = 0.7 * drawn + 0.3
  tensors = [torch.tensor(x) for x in (drawn, real)]

  gaussians = [statistics.Moments.of(x).gaussian() for x in (drawn, real)]
  there = metric_fid.fid_statistics_to_metric(
    *map(metric_fid.fid_features_to_statistics, tensors), verbose=False
  )
  (value,) = there.values()
  here = statistics.frechet_distance(*gaussians)
  assert here == pytest.approx(value, rel=1e-6)

  there = metric_isc.isc_features_to_metric(tensors[0], 4, shuffle=False)
  probs = tensors[0].softmax(dim=1).numpy()
  here = statistics.inception_score(probs, split=100)
  assert here == pytest.approx(there["inception_score_mean"], rel=1e-6)

  # A subset of all images is the same whatever the seed.
  there = metric_kid.kid_features_to_metric(
    *tensors, kid_subsets=1, kid_subset_size=400, verbose=False
  )
  here, _ = statistics.kernel_distance(drawn, real, subsets=1, size=400)
  assert here == pytest.approx(
    there["kernel_inception_distance_mean"], rel=1e-6
  )

  there = metric_prc.prc_features_to_metric(*tensors, verbose=False)
  here = statistics.precision_recall(real, drawn)
  assert here == pytest.approx((there["precision"], there["recall"]), rel=1e-6)
