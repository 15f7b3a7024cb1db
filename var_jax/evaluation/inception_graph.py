"""TensorFlow's graph of 2015, classify_image_graph_def.pb, as a state dict.

Its weights are constants of the graph. TensorFlow is not needed to read them.
"""

import pathlib
import re

import numpy as np

from var_jax.evaluation import inception

_FLOAT = 1  # DT_FLOAT
_BLOCKS = "5b 5c 5d 6a 6b 6c 6d 6e 7a 7b 7c".split()  # mixed, mixed_1, ..
_CONVS = "1a 2a 2b 3b 4a".split()  # conv, conv_1, ..
# Parts of the graph that branches of the PyTorch port are, by block.
_TOWERS = {
  "5": {"branch5x5": "tower", "branch3x3dbl": "tower_1"},
  "6a": {"branch3x3dbl": "tower"},
  "6": {"branch7x7": "tower", "branch7x7dbl": "tower_1"},
  "7a": {"branch3x3": "tower", "branch7x7x3": "tower_1"},
  "7": {"branch3x3": "tower", "branch3x3dbl": "tower_1"},
}


def read_tensors(path: str) -> dict[str, np.ndarray]:
  """Return the tensors of the graph by the names of the PyTorch port.

  Raises:
    ValueError: the file is missing or no graph, or lacks a constant.
  """
  constants = _constants(pathlib.Path(path))

  def constant(name: str, dimensions: int = 1) -> np.ndarray:
    if name not in constants or constants[name].ndim != dimensions:
      raise ValueError(
        f"{path} has no constant {name} of {dimensions} dimensions; give the "
        "classify_image_graph_def.pb of inception-2015-12-05.tgz."
      )
    return constants[name]

  tensors = {"fc.weight": constant("softmax/weights", 2).T}
  layers = {name.split("/")[0] for name in inception.shapes()} - {"logits"}
  for layer in layers:
    place = _place(layer)
    kernel_ijZF = constant(f"{place}/conv2d_params", 4)
    norm = f"{place}/batchnorm"
    tensors |= {
      f"{layer}.conv.weight": kernel_ijZF.transpose(3, 2, 0, 1),
      f"{layer}.bn.weight": constant(f"{norm}/gamma"),
      f"{layer}.bn.bias": constant(f"{norm}/beta"),
      f"{layer}.bn.running_mean": constant(f"{norm}/moving_mean"),
      f"{layer}.bn.running_var": constant(f"{norm}/moving_variance"),
    }
  return tensors


def _place(layer: str) -> str:
  """Return where a layer of the PyTorch port is in the graph."""
  if layer.startswith("Conv2d_"):
    return _counted("conv", _CONVS.index(layer.split("_")[1]))
  block, branch = layer.removeprefix("Mixed_").split(".")
  mixed = _counted("mixed", _BLOCKS.index(block))
  if branch == "branch_pool":
    return f"{mixed}/tower_2/conv"
  # Two convolutions that share an input, a and b, are in a part of their own.
  name, number, side = re.fullmatch(r"(\w+?)(?:_(\d)([ab]?))?", branch).groups()
  if number is None:
    return f"{mixed}/conv"
  towers = _TOWERS.get(block) or _TOWERS[block[0]]
  tower = f"{mixed}/{towers[name]}"
  if side:
    return f"{tower}/mixed/{_counted('conv', 'ab'.index(side))}"
  return f"{tower}/{_counted('conv', int(number) - 1)}"


def _counted(name: str, index: int) -> str:
  return f"{name}_{index}" if index else name


def _constants(path: pathlib.Path) -> dict[str, np.ndarray]:
  from google.protobuf.message import DecodeError
  from tensorboardX.proto.graph_pb2 import GraphDef

  if not path.is_file():
    raise ValueError(f"{path} is no file; give classify_image_graph_def.pb.")
  try:
    graph = GraphDef.FromString(path.read_bytes())
  except DecodeError as error:
    raise ValueError(
      f"{path} is no graph of TensorFlow ({error}); fetch it again."
    ) from None
  found = {}
  for node in graph.node:
    tensor = node.attr["value"].tensor
    if node.op != "Const" or tensor.dtype != _FLOAT:
      continue
    shape = tuple(dim.size for dim in tensor.tensor_shape.dim)
    if tensor.tensor_content:
      if len(tensor.tensor_content) != 4 * np.prod(shape):
        raise ValueError(f"{path}: {node.name} is cut short; fetch it again.")
      values = np.frombuffer(tensor.tensor_content, "<f4")
    else:  # one value may stand for all
      values = np.asarray(tensor.float_val, np.float32)
      values = values if len(values) > 1 else np.repeat(values, np.prod(shape))
    if len(values) != np.prod(shape):
      raise ValueError(f"{path}: {node.name} is cut short; fetch it again.")
    found[node.name] = values.reshape(shape)
  return found
