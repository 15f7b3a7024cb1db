"""Features of Inception against PyTorch, with the same random weights."""

import functools

import jax
import numpy as np
import pytest

from var_jax import cli
from var_jax.evaluation import inception, inception_weights

QUICK = {"xla_backend_optimization_level": 0}


@functools.cache
def reference():
  """Return a PyTorch network whose batch normalisation does something."""
  torch = pytest.importorskip("torch")
  import torch_inception

  torch.manual_seed(0)
  network = torch_inception.Inception().eval()
  for name, x in network.state_dict().items():
    if "bn.running_var" in name:
      x.uniform_(0.5, 2.0)
    elif ".bn." in name and x.ndim:
      x.normal_(1.0 if name.endswith("weight") else 0.0, 0.1)
    elif name.endswith("conv.weight"):
      x.normal_(0.0, (2 / x[0].numel()) ** 0.5)
  return network


def tensors():
  return {name: x.numpy() for name, x in reference().state_dict().items()}


def images(side):
  rng = np.random.default_rng(side)
  return rng.integers(0, 256, (2, side, side, 3), np.uint8)


def resized(pixels_BHWZ, side):
  """Return the first bilinear rule of TensorFlow, a pixel at a time."""
  B, H, W, Z = pixels_BHWZ.shape
  out = np.zeros((B, side, side, Z))
  for i in range(side):
    for j in range(side):
      y, x = (
        np.float32(i) * np.float32(H / side),
        np.float32(j) * np.float32(W / side),
      )
      top, left = int(y), int(x)
      below, right = min(top + 1, H - 1), min(left + 1, W - 1)
      dy, dx = y - top, x - left
      upper = (1 - dx) * pixels_BHWZ[:, top, left] + dx * pixels_BHWZ[
        :, top, right
      ]
      lower = (1 - dx) * pixels_BHWZ[:, below, left] + dx * pixels_BHWZ[
        :, below, right
      ]
      out[:, i, j] = (1 - dy) * upper + dy * lower
  return out


@pytest.mark.parametrize("shape", [(7, 5), (13, 13), (40, 30)])
def test_images_are_resampled_as_by_tensorflow_one(shape):
  pixels = np.random.default_rng(0).uniform(0, 255, (2, *shape, 3))
  found = inception.resize(np.float32(pixels), 13)
  np.testing.assert_allclose(found, resized(pixels, 13), atol=2e-4)


@pytest.mark.parametrize("side", [32, 299])
def test_features_are_those_of_pytorch(side):
  torch = pytest.importorskip("torch")
  pixels = images(side)
  x = np.array(inception.resize(np.float32(pixels), 299))
  with torch.no_grad():
    network_input = torch.tensor((x - 128) / 128).permute(0, 3, 1, 2)
    expected = reference()(network_input)
  weights = inception_weights.from_torch(tensors(), "here")
  program = jax.jit(inception.features, compiler_options=QUICK)
  for name, here, there in zip(
    inception.Features._fields, program(weights, pixels), expected, strict=True
  ):
    there = there.numpy()
    assert here.shape == there.shape
    scale = np.abs(there).max()
    np.testing.assert_allclose(here, there, atol=1e-4 * scale, err_msg=name)


def test_probabilities_leave_the_bias_out():
  torch = pytest.importorskip("torch")
  changed = tensors() | {"fc.bias": torch.ones(1008).numpy()}
  one, other = (
    inception_weights.from_torch(x, "here") for x in (tensors(), changed)
  )
  for name in one:
    np.testing.assert_array_equal(one[name], other[name])


@pytest.mark.parametrize(
  "name, change, message",
  [
    ("fc.weight", None, "tensor fc.weight has shape .* and none here"),
    (
      "Mixed_6d.branch1x1.bn.bias",
      np.zeros(3, "f4"),
      r"bn.bias has shape \(192,\) in the Inception of FID and \(3,\) here",
    ),
  ],
)
def test_other_files_are_refused(name, change, message):
  changed = tensors()
  del changed[name]
  if change is not None:
    changed[name] = change
  with pytest.raises(ValueError, match=message):
    inception_weights.from_torch(changed, "here")


def convert(*flags):
  return cli.main(["convert", *map(str, flags)])


def test_a_folder_is_read_as_it_was_written(tmp_path, capsys):
  torch = pytest.importorskip("torch")
  torch.save(reference().state_dict(), tmp_path / "inception.pth")
  flags = ["--inception", tmp_path / "inception.pth"]
  assert convert(*flags, "--output", tmp_path / "folder") == 0
  assert str(tmp_path / "folder") in capsys.readouterr().out
  expected = inception_weights.from_torch(tensors(), "here")
  found = inception_weights.read(tmp_path / "folder")
  assert found.keys() == expected.keys()
  for name, value in expected.items():
    np.testing.assert_array_equal(found[name], value)
  with pytest.raises(ValueError, match="has no inception.safetensors; give a"):
    inception_weights.read(tmp_path)


@pytest.mark.parametrize(
  "flags, code, message",
  [
    (["--inception", "none.pth"], 1, "none.pth is no file"),
    (["--inception", "a.pth", "--lpips", "b.pth"], 2, "--lpips does not go"),
    (["--inception", "a.pth", "--verify"], 2, "--verify does not go with"),
  ],
)
def test_bad_commands_write_nothing(flags, code, message, tmp_path, capsys):
  assert convert(*flags, "--output", tmp_path / "out") == code
  (line,) = capsys.readouterr().err.splitlines()
  assert message in line
  assert not list(tmp_path.iterdir())
