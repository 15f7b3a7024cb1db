"""The PyTorch sampler that ours is timed beside draws what is recorded."""

import importlib.util
import pathlib

import golden_files
import numpy as np
import pytest

torch = pytest.importorskip("torch")

PATH = pathlib.Path(__file__).parents[2] / "benchmarks" / "torch_sampler.py"


def test_greedy_images_equal_the_recorded_ones():
  spec = importlib.util.spec_from_file_location("torch_sampler", PATH)
  torch_sampler = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(torch_sampler)
  cfg, _ = golden_files.tokenizer(4, False)
  ours = torch_sampler.Sampler(
    cfg, golden_files.VARIANTS["A"], "cpu", "float32"
  )
  weights = {
    ours.tokenizer: golden_files.tokenizer_tensors(4),
    ours.var: golden_files.state_dict(golden_files.VAR_FILES["A"]),
  }
  for model, arrays in weights.items():
    tensors = {name: torch.tensor(array) for name, array in arrays.items()}
    model.load_state_dict(tensors, strict=True)
  image_B3HW = ours.sample(
    torch.tensor([3, 7]), guidance=4.0, top_k=1, top_p=0.0
  )
  recorded = golden_files.arrays("var_A_ar.npz")["cfg4.0_image"]
  np.testing.assert_allclose(image_B3HW / 2 + 0.5, recorded, rtol=0, atol=1e-4)
