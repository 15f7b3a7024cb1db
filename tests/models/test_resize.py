"""Resampling equals PyTorch's interpolate."""

import re

import golden_files
import numpy as np
import pytest

from var_jax.models import resize

RECORDED = golden_files.arrays("interpolate.npz")
BICUBIC = [n for n in RECORDED if n.startswith("bicubic")]
AREA = [n for n in RECORDED if n.startswith("area")]


def numbers(name):
  return [int(n) for n in re.findall(r"\d+", name)]


@pytest.mark.parametrize("name", BICUBIC)
def test_bicubic_equals_torch(name):
  n_in, n_out = numbers(name)
  small = RECORDED[f"in_{n_in}" if n_out == 16 else f"in32_{n_in}"]
  ours = resize.bicubic(golden_files.nhwc(small), (n_out, n_out))
  golden_files.assert_close(ours, golden_files.nhwc(RECORDED[name]), 1e-6)


@pytest.mark.parametrize("name", AREA)
def test_area_equals_torch(name):
  n_in, n_out = numbers(name)
  full = golden_files.nhwc(RECORDED[f"full{n_in}"])
  ours = resize.area(full, (n_out, n_out))
  golden_files.assert_close(ours, golden_files.nhwc(RECORDED[name]), 1e-6)


@pytest.mark.parametrize("name", [n for n in RECORDED if n.startswith("M_")])
def test_matrices_equal_the_float64_operators(name):
  n_in, n_out = numbers(name)
  matrix = resize.bicubic_matrix if "bicubic" in name else resize.area_matrix
  # torch computes the cubic weights in another order of operations.
  np.testing.assert_allclose(
    matrix(n_out, n_in), RECORDED[name], rtol=0, atol=1e-12
  )


@pytest.mark.parametrize("n_out, n_in", [(3, 7), (5, 2), (16, 10), (4, 4)])
def test_rows_of_every_matrix_sum_to_one(n_out, n_in):
  for matrix in (
    resize.area_matrix,
    resize.bicubic_matrix,
    resize.bilinear_matrix,
  ):
    np.testing.assert_allclose(matrix(n_out, n_in).sum(axis=1), 1.0)


def test_height_and_width_are_resampled_by_their_own_matrices():
  image = np.arange(12.0, dtype=np.float32).reshape(1, 2, 6, 1)
  ours = resize.area(image, (2, 3))
  np.testing.assert_allclose(
    np.asarray(ours)[0, :, :, 0], [[0.5, 2.5, 4.5], [6.5, 8.5, 10.5]]
  )
