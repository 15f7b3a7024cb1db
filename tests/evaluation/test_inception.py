"""Features of Inception against PyTorch, with the same random weights."""

import jax
import numpy as np
import pytest

from var_jax import cli
from var_jax.evaluation import (
  inception,
  inception_graph,
  inception_weights,
  networks,
)

QUICK = {"xla_backend_optimization_level": 0}


def reference():
  pytest.importorskip("torch")
  import torch_inception

  return torch_inception.seeded()


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


# Where some layers are in the graph, by hand from a listing of it.
PLACES = {
  "Conv2d_1a_3x3": "conv",
  "Conv2d_4a_3x3": "conv_4",
  "Mixed_5b.branch1x1": "mixed/conv",
  "Mixed_5b.branch5x5_2": "mixed/tower/conv_1",
  "Mixed_5d.branch3x3dbl_3": "mixed_2/tower_1/conv_2",
  "Mixed_5d.branch_pool": "mixed_2/tower_2/conv",
  "Mixed_6a.branch3x3": "mixed_3/conv",
  "Mixed_6a.branch3x3dbl_1": "mixed_3/tower/conv",
  "Mixed_6c.branch7x7_3": "mixed_5/tower/conv_2",
  "Mixed_6e.branch7x7dbl_5": "mixed_7/tower_1/conv_4",
  "Mixed_7a.branch3x3_2": "mixed_8/tower/conv_1",
  "Mixed_7a.branch7x7x3_4": "mixed_8/tower_1/conv_3",
  "Mixed_7b.branch3x3_1": "mixed_9/tower/conv",
  "Mixed_7b.branch3x3_2b": "mixed_9/tower/mixed/conv_1",
  "Mixed_7c.branch3x3dbl_2": "mixed_10/tower_1/conv_1",
  "Mixed_7c.branch3x3dbl_3a": "mixed_10/tower_1/mixed/conv",
}


def test_layers_are_found_in_the_graph():
  for layer, place in PLACES.items():
    assert inception_graph._place(layer) == place


def graph_of(tensors):
  """Return TensorFlow's graph of a state dict, as its bytes."""
  from tensorboardX.proto.graph_pb2 import GraphDef

  graph = GraphDef()
  graph.node.add(name="pool_3", op="AvgPool")

  def add(name, value):
    tensor = graph.node.add(name=name, op="Const").attr["value"].tensor
    tensor.dtype = 1
    for side in value.shape:
      tensor.tensor_shape.dim.add(size=side)
    if (value == value.flat[0]).all():
      tensor.float_val.append(value.flat[0])
    else:
      tensor.tensor_content = value.tobytes()

  parts = {
    "conv.weight": "conv2d_params",
    "bn.weight": "batchnorm/gamma",
    "bn.bias": "batchnorm/beta",
    "bn.running_mean": "batchnorm/moving_mean",
    "bn.running_var": "batchnorm/moving_variance",
  }
  for name, value in tensors.items():
    layer, _, part = name.rpartition(".")
    layer, _, kind = layer.rpartition(".")
    if f"{kind}.{part}" in parts:
      if value.ndim == 4:
        value = value.transpose(2, 3, 1, 0)
      place = inception_graph._place(layer)
      add(f"{place}/{parts[f'{kind}.{part}']}", value)
  add("softmax/weights", tensors["fc.weight"].T)
  add("softmax/biases", tensors["fc.bias"])
  return graph


def test_the_graph_gives_the_weights_of_the_pytorch_file(tmp_path):
  there = tensors()
  there["Conv2d_1a_3x3.bn.weight"] = np.ones(32, "f4")  # kept as one value
  (tmp_path / "graph.pb").write_bytes(graph_of(there).SerializeToString())
  flags = ["--inception", tmp_path / "graph.pb"]
  assert convert(*flags, "--output", tmp_path / "folder") == 0
  found = inception_weights.read(tmp_path / "folder")
  for name, value in inception_weights.from_torch(there, "here").items():
    np.testing.assert_array_equal(found[name], value)
  # Nobody has published a checksum of the graph.
  assert not networks.open_inception(tmp_path / "folder").official


def test_other_graphs_are_refused(tmp_path, capsys):
  graph = graph_of(tensors())
  whole = graph.SerializeToString()
  (last,) = (n for n in graph.node if n.name == "mixed_10/conv/conv2d_params")
  last.attr["value"].tensor.tensor_content = b"1234"
  cut = graph.SerializeToString()
  graph.node.remove(last)
  for content, message in (
    (whole[:-7], "is no graph of TensorFlow"),
    (cut, "mixed_10/conv/conv2d_params is cut short"),
    (graph.SerializeToString(), "no constant mixed_10/conv/conv2d_params"),
    (b"", "has no constant softmax/weights"),
  ):
    (tmp_path / "graph.pb").write_bytes(content)
    flags = ["--inception", tmp_path / "graph.pb"]
    assert convert(*flags, "--output", tmp_path / "folder") == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
    assert not (tmp_path / "folder").exists()


@pytest.mark.parametrize(
  "flags, code, message",
  [
    (["--inception", "none.pb"], 1, "none.pb is no file; give classify_image"),
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
