"""Reference statistics as ADM publishes them.

An .npz with `mu`, `sigma` of pool_3, `mu_s`, `sigma_s` of the spatial features,
and `arr_0`, 10,000 of its images, which precision and recall look for
neighbours among. They are of the official Inception.
"""

import pathlib
import zipfile

import numpy as np

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
  try:
    with np.load(path, allow_pickle=False) as arrays:
      pooled = _pair(arrays, names, ("mu", "sigma"), dimensions, path)
      spatial = None
      if names & {"mu_s", "sigma_s"}:
        keys = ("mu_s", "sigma_s")
        spatial = _pair(arrays, names, keys, spatial_dimensions, path)
  except (OSError, zipfile.BadZipFile) as error:
    raise ValueError(
      f"{path} cannot be read ({error}); fetch it again."
    ) from None
  return pooled, spatial, "arr_0" in names


def _pair(arrays, names, keys, dimensions: int, path: str) -> Gaussian:
  for key, shape in zip(
    keys, ((dimensions,), (dimensions, dimensions)), strict=True
  ):
    if key not in names:
      raise ValueError(
        f"{pathlib.Path(path).name} has arrays {', '.join(sorted(names))} and "
        f"no {key}; a reference of ADM has mu, sigma and arr_0."
      )
    if arrays[key].shape != shape or not np.isfinite(arrays[key]).all():
      raise ValueError(
        f"{path}: {key} has shape {arrays[key].shape}, not finite numbers of "
        f"shape {shape}; give statistics of the Inception of FID."
      )
  mean, covariance = (np.asarray(arrays[key], np.float64) for key in keys)
  return Gaussian(mean, covariance)
