"""The script of docs/reproduce.md, on small files of the released layout."""

import pathlib
import runpy
import sys

import golden_files
import jax
import numpy as np
import pytest

import var_jax

SCRIPT = pathlib.Path(__file__).parents[1] / "benchmarks" / "reproduce.py"


def run(folder, output, *flags):
  arguments = ["--files", folder, "--output", output, *flags]
  sys.argv = [str(SCRIPT), *map(str, arguments)]
  runpy.run_path(str(SCRIPT), run_name="__main__")


def test_the_script_draws_every_class_in_turn_and_resumes(
  tmp_path, monkeypatch, capsys
):
  pytest.importorskip("torch")
  monkeypatch.setattr(sys, "argv", sys.argv)
  golden_files.write_torch_files(tmp_path)
  (tmp_path / "vae.pth").rename(tmp_path / "vae_ch160v4096z32.pth")
  (tmp_path / "A.pth").rename(tmp_path / "var_d16.pth")
  output = tmp_path / "out"
  flags = ["--per-class", 2, "--batch", 8]
  run(tmp_path, output, *flags)
  with np.load(output / "samples.npz") as file:
    images = file["arr_0"]
  assert images.shape == (20, 64, 64, 3) and images.dtype == np.uint8

  # Image 13 is a 3, whatever batch it was drawn in.
  model = var_jax.load(output / "model")
  alone = model.sample([3], jax.random.fold_in(jax.random.key(0), 13)[None])
  difference = images[13].astype(int) - var_jax.to_uint8(alone.images_BHW3)[0]
  assert np.abs(difference).max() <= 1

  capsys.readouterr()
  (output / "parts" / "000008.npy").unlink()
  run(tmp_path, output, *flags)
  assert "16 of 20" in capsys.readouterr().out  # that part alone
  with np.load(output / "samples.npz") as file:
    np.testing.assert_array_equal(file["arr_0"], images)

  for changed in (["--per-class", 1], ["--depth", 20], ["--seed", 7]):
    with pytest.raises(SystemExit, match="is of another run: .*there and"):
      run(tmp_path, output, *flags, *changed)
