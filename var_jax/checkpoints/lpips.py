"""The weights of LPIPS: public PyTorch files in, a folder of ours out.

Two files are public: VGG16 of torchvision (vgg16-397923af.pth), and the heads
of the lpips package (weights/v0.1/vgg.pth). A state dict of its
LPIPS(net="vgg") has both.
"""

import re
from collections.abc import Mapping

import numpy as np
from etils import epath

from var_jax import files
from var_jax.checkpoints import network_weights, tensor_files
from var_jax.models import perceptual

# Places of the convolutions among VGG16's layers.
_CONVS = (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28)


def convert(lpips: str, output: epath.PathLike, vgg: str | None = None) -> None:
  """Write the weights of two files, or of one that has both, to a new folder.

  Raises:
    ValueError: a file is missing or damaged, or lacks a weight.
  """
  tensors = dict(tensor_files.read_tensors(lpips))
  if vgg is not None:
    # What the first file has of VGG16 does not count then.
    tensors = {k: v for k, v in tensors.items() if k.startswith("lin")}
    tensors |= tensor_files.read_tensors(vgg)
  where = lpips if vgg is None else f"{lpips} and {vgg}"
  weights = from_torch(tensors, where)
  names = [lpips] if vgg is None else [lpips, vgg]
  about = {"from": {epath.Path(x).name: files.sha256(x) for x in names}}
  network_weights.write(output, "lpips", weights, about)


def read(folder: epath.PathLike) -> dict[str, np.ndarray]:
  """Return what `models.perceptual.distance` takes, float32.

  Raises:
    ValueError: `convert` did not write this folder, or it is damaged.
  """
  return network_weights.read(folder, "lpips", perceptual.shapes())


def from_torch(tensors: Mapping, where: str) -> dict[str, np.ndarray]:
  """Return the weights of a state dict; `where` is what messages call it.

  Raises:
    ValueError: a weight is missing, or has another shape.
  """
  weights = {}
  for name, shape in perceptual.shapes().items():
    pattern, axes = _official(name)
    there = [key for key in tensors if re.fullmatch(pattern, key)]
    if not there:
      missing, remedy = "the heads", "give lpips's file to --lpips"
      if "conv" in name:
        missing, remedy = "VGG16's convolutions", "give its file to --vgg"
      raise ValueError(
        f"{where}: no tensor {_readable(pattern)}, so {missing} are missing; "
        f"{remedy}."
      )
    tensor = np.asarray(tensors[there[0]], np.float32)
    if tensor.ndim == 4 and axes:
      tensor = tensor.transpose(axes)
    if name.startswith("head"):
      tensor = tensor.reshape(-1)
    if tensor.shape != shape:
      raise ValueError(
        f"{where}: tensor {there[0]} has shape {tensor.shape} here and "
        f"{shape} in VGG16; give the public files."
      )
    weights[name] = tensor
  return weights


def _official(name: str) -> tuple[str, tuple[int, ...]]:
  """Return a pattern of the official name, and the order of dimensions."""
  number = int(re.search(r"\d+", name)[0])
  if name.startswith("head"):
    return rf"lin{number}\.model\.1\.weight", ()
  kind = "weight" if name.endswith("kernel") else "bias"
  # In torchvision's file, or in slices in the package's module.
  layer = rf"(features|net\.slice\d)\.{_CONVS[number]}\.{kind}"
  return layer, (2, 3, 1, 0)


def _readable(pattern: str) -> str:
  plain = pattern.replace(r"(features|net\.slice\d)", "features")
  return plain.replace("\\", "")
