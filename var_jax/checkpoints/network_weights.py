"""Folders with the weights of a network that losses or measures use."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from etils import epath

from var_jax import files
from var_jax.checkpoints import checksums, tensor_files

Shapes = Mapping[str, tuple[int, ...]]

_MAKERS = {
  "lpips": "`var-jax convert --lpips` wrote (docs/tokenizer.md)",
  "inception": "`var-jax convert --inception` wrote of pytorch-fid's release "
  "pt_inception-2015-12-05-6726825d.pth (docs/evaluation.md)",
  "classifier": "`var-jax evaluate --fit-classifier` wrote",
}


def write(
  output: epath.PathLike,
  network: str,
  weights: Mapping[str, np.ndarray],
  about: Mapping[str, Any],
) -> None:
  """Write NETWORK.safetensors, NETWORK.json and checksums to a new folder.

  Args:
    about: where the weights are from, as JSON.
  """
  with files.new_folder(output) as folder:
    tensor_files.write_safetensors(folder / _name(network), weights)
    files.write_json(folder / f"{network}.json", about)
    checksums.write(folder)


def read(
  folder: epath.PathLike, network: str, shapes: Shapes
) -> dict[str, np.ndarray]:
  """Return what `write` was given.

  Raises:
    ValueError: it did not write this folder, or the folder is damaged.
  """
  path = check(folder, network)
  checksums.verify(path.parent)
  found = dict(tensor_files.read_tensors(path))
  for name, shape in shapes.items():
    if name not in found or found[name].shape != shape:
      raise ValueError(f"{path} has no {name} of shape {shape}; make it again.")
  return found


def check(folder: epath.PathLike, network: str) -> epath.Path:
  """Return the weights' file.

  Raises:
    ValueError: there is none.
  """
  path = files.absolute(folder) / _name(network)
  if not path.exists():
    raise ValueError(
      f"{path.parent} has no {path.name}; give a folder that "
      f"{_MAKERS[network]}."
    )
  return path


def about(folder: epath.PathLike, network: str) -> dict[str, Any]:
  """Return what `write` was told, and the SHA-256 of the weights' file."""
  path = files.absolute(folder) / _name(network)
  told = files.read_json(path.with_suffix(".json"))
  return {**told, "sha256": files.sha256(path)}


def _name(network: str) -> str:
  return f"{network}.safetensors"
