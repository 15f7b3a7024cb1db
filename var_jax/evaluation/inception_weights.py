"""The weights of Inception: a public file in, a folder of ours out.

The file is pt_inception-2015-12-05-6726825d.pth, which pytorch-fid and others
made of TensorFlow's graph of 2015, or that graph. torchvision's Inception has
other weights, and so another FID.
"""

from collections.abc import Mapping

import numpy as np
from etils import epath

from var_jax import files
from var_jax.checkpoints import network_weights, tensor_files
from var_jax.evaluation import inception, inception_graph

_EPSILON = 1e-3  # of batch normalisation, as in the graph


def convert(path: str, output: epath.PathLike) -> None:
  """Write the weights of a file to a new folder.

  Args:
    path: the PyTorch file, or the graph, .pb.

  Raises:
    ValueError: the file is missing or damaged, or lacks a weight.
  """
  graph = path.endswith(".pb")
  read = inception_graph.read_tensors if graph else tensor_files.read_tensors
  weights = from_torch(dict(read(path)), path)
  about = {"from": {epath.Path(path).name: files.sha256(path)}}
  network_weights.write(output, "inception", weights, about)


def read(folder: epath.PathLike) -> dict[str, np.ndarray]:
  """Return what `inception.features` takes, float32.

  Raises:
    ValueError: `convert` did not write this folder, or it is damaged.
  """
  return network_weights.read(folder, "inception", inception.shapes())


def from_torch(
  tensors: Mapping[str, np.ndarray], where: str
) -> dict[str, np.ndarray]:
  """Return the weights of a state dict; `where` is what messages call it.

  Raises:
    ValueError: a tensor is missing, or has another shape.
  """

  def tensor(name: str, shape: tuple[int, ...]) -> np.ndarray:
    if name not in tensors or tensors[name].shape != shape:
      has = tensors[name].shape if name in tensors else "none"
      raise ValueError(
        f"{where}: tensor {name} has shape {shape} in the Inception of FID and "
        f"{has} here; give pt_inception-2015-12-05-6726825d.pth."
      )
    return np.asarray(tensors[name], np.float64)

  weights = {}
  for name, shape in inception.shapes().items():
    layer, kind = name.split("/")
    if layer == "logits":
      weights[name] = tensor("fc.weight", shape[::-1]).T
    elif kind == "kernel":
      official = tensor(f"{layer}.conv.weight", (*shape[:1:-1], *shape[:2]))
      weights[name] = official.transpose(2, 3, 1, 0)
    else:
      weight, bias, mean, variance = (
        tensor(f"{layer}.bn.{part}", shape)
        for part in ("weight", "bias", "running_mean", "running_var")
      )
      scale = weight / np.sqrt(variance + _EPSILON)
      weights[name] = scale if kind == "scale" else bias - mean * scale
  return {
    name: np.ascontiguousarray(value, np.float32)
    for name, value in weights.items()
  }
