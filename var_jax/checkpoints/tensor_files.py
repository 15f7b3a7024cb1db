"""Files of tensors: .pth, .safetensors and hub folders, in and out.

Nothing in them is run: torch files are read with weights_only=True. They are
memory-mapped, so a tensor takes memory only where it is copied. torch files
carry a CRC-32 of each record, which is checked; .safetensors files carry
none, so that only a checksums.json beside them shows a flipped bit.
"""

import contextlib
import os
import pathlib
import re
import zipfile
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from var_jax.checkpoints import checksums, hub
from var_jax.checkpoints.architecture import Settings
from var_jax.checkpoints.hub import ENDINGS, first_line


class TensorFile(NamedTuple):
  """The state dicts of a file or folder, tokenizer and transformer by name."""

  path: pathlib.Path
  state_dicts: dict[str, Mapping[str, np.ndarray]]  # "vae", "var"
  sources: dict[str, pathlib.Path]  # the files they lie in, likewise
  settings: Settings = Settings()  # what a config.json beside it says
  licence: str | None = None


def read(name: str) -> TensorFile:
  """Return what a file, a hub folder or a hub id holds.

  Args:
    name: .pth (a state dict, or a checkpoint of the official trainer),
      .safetensors, a folder with config.json and model.safetensors, or an id
      like org/name or org/name/file.pth, which huggingface_hub fetches.

  Raises:
    ValueError: it is missing, damaged, or holds something else.
  """
  path = hub.find(name)
  if path.is_dir():
    return _read_folder(path)
  if path.suffix not in ENDINGS:
    raise ValueError(
      f"{path} ends in none of {', '.join(ENDINGS)}; give such a file, or a "
      "folder with config.json and model.safetensors."
    )
  if not path.stat().st_size:
    raise ValueError(f"{path} is empty; fetch or copy it again.")
  checksums.verify_file(path)
  safetensors = path.suffix == ".safetensors"
  content = _open_safetensors(path) if safetensors else _open_torch(path)
  state_dicts = _sorted_out(content, path)
  return TensorFile(path, state_dicts, dict.fromkeys(state_dicts, path))


def read_tensors(name: str | epath.Path) -> Mapping[str, np.ndarray]:
  """Return the tensors of a .pth or .safetensors file, whatever they are.

  A .pth may be one of torch before 1.6.

  Raises:
    ValueError: it is missing, damaged, or holds something else.
  """
  path = pathlib.Path(name)
  if not path.is_file():
    raise ValueError(f"{path} is no file; give a .pth or .safetensors.")
  if path.suffix == ".safetensors":
    return _open_safetensors(path)
  return _to_numpy(_open_torch(path, old=not zipfile.is_zipfile(path)), path)


def write_torch(path: pathlib.Path, tensors: Mapping[str, np.ndarray]) -> None:
  """Write a state dict that `torch.load` reads."""
  torch = require_torch(path)
  state_dict = {k: torch.from_numpy(v) for k, v in tensors.items()}
  with _writable(path):
    torch.save(state_dict, path)


def write_safetensors(
  path: pathlib.Path, tensors: Mapping[str, np.ndarray]
) -> None:
  """Write a .safetensors file."""
  import safetensors.numpy

  # "format" is what the readers of the hub look for.
  # It takes the memory as it lies, whatever the strides.
  plain = {name: np.ascontiguousarray(t) for name, t in tensors.items()}
  with _writable(path):
    safetensors.numpy.save_file(plain, path, metadata={"format": "pt"})
  os.chmod(path, 0o644)  # the library writes for the owner alone


def _read_folder(folder: pathlib.Path) -> TensorFile:
  model, tokenizer = (
    within / "model.safetensors" for within in (folder, folder / "vae")
  )
  if (folder / "checkpoints").exists():
    raise ValueError(
      f"{folder} is a workdir already; it goes out by --checkpoint and --to."
    )
  if not model.exists():
    raise ValueError(
      f"{folder} has no model.safetensors; give a hub folder, or a .pth or "
      ".safetensors file."
    )
  if (folder / checksums.NAME).exists():
    checksums.verify(folder)
  else:
    checksums.verify_file(model)
  settings = hub.settings(folder / "config.json")
  state_dicts, sources = {}, {}
  for path in (model, tokenizer):
    if path.exists():
      found = _sorted_out(_open_safetensors(path), path)
      state_dicts |= found
      sources |= dict.fromkeys(found, path)
  return TensorFile(folder, state_dicts, sources, settings, hub.licence(folder))


def _sorted_out(content: Any, path: pathlib.Path) -> dict[str, Mapping]:
  """Return the state dicts by name: a file may hold one or both."""
  trainer = content.get("trainer")
  if isinstance(trainer, dict):  # a checkpoint of the official trainer
    names = {"vae": "vae_local", "var": "var_wo_ddp"}
    found = {
      kind: trainer[name]
      for kind, name in names.items()
      if isinstance(trainer.get(name), dict)
    }
    if not found:
      raise ValueError(
        f"{path} is a trainer's checkpoint without var_wo_ddp and vae_local; "
        "give one of the official trainer."
      )
    return {kind: _to_numpy(state, path) for kind, state in found.items()}
  kinds = {
    "vae": "quantize.embedding.weight",
    "var": "word_embed.weight",
  }
  for kind, name in kinds.items():
    if name in content:
      return {kind: _to_numpy(content, path)}
  raise ValueError(
    f"{path} is no state dict of VAR: neither tensor "
    f"{' nor '.join(kinds.values())} is there; give an official one."
  )


def _to_numpy(state_dict: Mapping, path: pathlib.Path) -> Mapping:
  if isinstance(state_dict, _Safetensors):
    return state_dict
  arrays = {}
  for name, tensor in state_dict.items():
    if not isinstance(name, str) or not hasattr(tensor, "numpy"):
      raise ValueError(
        f"{path}: {name} is no tensor but {type(tensor).__name__}; give a "
        "plain state dict."
      )
    try:
      arrays[name] = tensor.detach().numpy()
    except (TypeError, RuntimeError) as error:  # bfloat16, sparse, quantised
      raise ValueError(
        f"{path}: tensor {name} is {tensor.dtype} and cannot be read "
        f"({first_line(error)}); save it as a dense float32 tensor."
      ) from None
  return arrays


class _Safetensors(Mapping):
  """The tensors of a .safetensors file, each read when it is asked for."""

  def __init__(self, file, path: pathlib.Path):
    self._file, self._names, self._path = file, dict.fromkeys(file.keys()), path

  def __getitem__(self, name: str) -> np.ndarray:
    if name not in self._names:
      raise KeyError(name)
    try:
      return self._file.get_tensor(name)
    except Exception as error:  # bfloat16 is no NumPy type, for one
      raise ValueError(
        f"{self._path}: tensor {name} cannot be read ({first_line(error)}); "
        "save it as float32."
      ) from None

  def __iter__(self) -> Iterator[str]:
    return iter(self._names)

  def __len__(self) -> int:
    return len(self._names)


def _open_safetensors(path: pathlib.Path) -> Mapping[str, np.ndarray]:
  import safetensors

  with _readable(path):
    return _Safetensors(safetensors.safe_open(path, framework="np"), path)


def _open_torch(path: pathlib.Path, old: bool = False) -> Mapping[str, Any]:
  """Return a state dict; `old`: of torch before 1.6, which is read whole."""
  torch = require_torch(path)
  with _readable(path):
    if not old:
      with zipfile.ZipFile(path) as archive:
        damaged = archive.testzip()
      if damaged:
        raise ValueError(f"record {damaged} does not have its checksum")
    content = torch.load(
      path, map_location="cpu", weights_only=True, mmap=not old
    )
  if not isinstance(content, dict):
    raise ValueError(
      f"{path} holds {type(content).__name__}, no state dict; give one."
    )
  return content


@contextlib.contextmanager
def _writable(path: pathlib.Path):
  """Turn what the libraries raise on a full disk into one line."""
  try:
    yield
  except Exception as error:
    raise ValueError(
      f"{path} cannot be written ({first_line(error)}); look for space and "
      "permissions."
    ) from None


@contextlib.contextmanager
def _readable(path: pathlib.Path):
  """Turn what the libraries raise on damaged files into one line."""
  try:
    yield
  except Exception as error:
    # The unpickler names what it was asked to import.
    if asked := re.search(r"GLOBAL (\S+)", str(error)):
      raise ValueError(
        f"{path} holds more than tensors: it asks for {asked[1]}, which is not "
        "run; give a plain state dict."
      ) from None
    remedy = "fetch or copy it again"
    if "mmap" in str(error):  # a file of torch before 1.6
      remedy = "save it anew with a torch of today"
    raise ValueError(
      f"{path} cannot be read ({first_line(error)}); {remedy}."
    ) from None


def require_torch(path: epath.PathLike):
  """Return torch.

  Raises:
    ValueError: it is not installed; `path` is what asked for it.
  """
  try:
    import torch
  except ImportError:
    raise ValueError(
      f"{path} is a torch file and torch is not installed; pip install torch, "
      "or use .safetensors."
    ) from None
  return torch
