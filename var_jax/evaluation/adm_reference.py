"""Reference statistics as ADM publishes them.

An .npz with `mu`, `sigma` of pool_3, `mu_s`, `sigma_s` of the spatial features,
and `arr_0`, 10,000 of its images, which precision and recall look for
neighbours among. They are of the official Inception.
"""

import pathlib
import zipfile

import numpy as np

from var_jax.evaluation import archives
from var_jax.evaluation.statistics import Gaussian


def is_one(path: str) -> bool:
  """Return whether an .npz has statistics, whole or in part."""
  try:
    with zipfile.ZipFile(path) as archive:
      names = {name.removesuffix(".npy") for name in archive.namelist()}
  except (OSError, zipfile.BadZipFile):
    return False
  return bool(names & {"mu", "sigma", "mu_s", "sigma_s"})


def read(
  path: str, dimensions: int, spatial_dimensions: int
) -> tuple[Gaussian, Gaussian | None, bool]:
  """Return the statistics, the spatial ones, and whether there are images.

  Raises:
    ValueError: an array is missing, damaged or of another shape.
  """
  with zipfile.ZipFile(path) as archive:
    names = {name.removesuffix(".npy") for name in archive.namelist()}
  pooled = _pair(names, ("mu", "sigma"), dimensions, path)
  spatial = None
  if names & {"mu_s", "sigma_s"}:
    spatial = _pair(names, ("mu_s", "sigma_s"), spatial_dimensions, path)
  return pooled, spatial, "arr_0" in names


def _pair(names, keys, dimensions: int, path: str) -> Gaussian:
  found = []
  for key, shape in zip(
    keys, ((dimensions,), (dimensions, dimensions)), strict=True
  ):
    if key not in names:
      raise ValueError(
        f"{pathlib.Path(path).name} has arrays {', '.join(sorted(names))} and "
        f"no {key}; a reference of ADM has mu, sigma, mu_s, sigma_s and arr_0."
      )
    value = np.asarray(archives.read(path, key, "fetch it again"), np.float64)
    if value.shape != shape or not np.isfinite(value).all():
      raise ValueError(
        f"{path}: {key} has shape {value.shape}, not finite numbers of "
        f"shape {shape}; give statistics of the Inception of FID."
      )
    found.append(value)
  mean_D, covariance_DD = found
  scale = np.abs(covariance_DD).max()
  if (
    not np.allclose(covariance_DD, covariance_DD.T, rtol=0, atol=1e-4 * scale)
    or np.diagonal(covariance_DD).min() < -1e-6 * scale
  ):
    raise ValueError(
      f"{path}: {keys[1]} is no covariance, which is symmetric with variances "
      "from 0; fetch it again."
    )
  return Gaussian(mean_D, covariance_DD)
