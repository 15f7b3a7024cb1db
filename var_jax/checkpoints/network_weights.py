"""Folders with the weights of a public network, that measures or losses use."""

from collections.abc import Mapping

import numpy as np
from etils import epath

from var_jax import files
from var_jax.checkpoints import checksums, tensor_files

Shapes = Mapping[str, tuple[int, ...]]


def write(
  output: epath.PathLike, network: str, weights: Mapping[str, np.ndarray]
) -> None:
  """Write NETWORK.safetensors with its checksum to a new folder."""
  with files.new_folder(output) as folder:
    tensor_files.write_safetensors(folder / _name(network), weights)
    checksums.write(folder)


def read(
  folder: epath.PathLike, network: str, shapes: Shapes
) -> dict[str, np.ndarray]:
  """Return what `write` was given.

  Raises:
    ValueError: it did not write this folder, or the folder is damaged.
  """
  folder = files.absolute(folder)
  path = folder / _name(network)
  if not path.exists():
    raise ValueError(
      f"{folder} has no {path.name}; give a folder that `var-jax convert "
      f"--{network}` wrote."
    )
  checksums.verify(folder)
  found = dict(tensor_files.read_tensors(path))
  for name, shape in shapes.items():
    if name not in found or found[name].shape != shape:
      raise ValueError(f"{path} has no {name} of shape {shape}; convert again.")
  return found


def _name(network: str) -> str:
  return f"{network}.safetensors"
