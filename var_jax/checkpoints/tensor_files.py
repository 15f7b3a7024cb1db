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

from var_jax import files
from var_jax.checkpoints import checksums
from var_jax.checkpoints.architecture import Settings

ENDINGS = (".pth", ".pt", ".safetensors")


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
  path = _local(name)
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


def write_torch(path: pathlib.Path, tensors: Mapping[str, np.ndarray]) -> None:
  """Write a state dict that `torch.load` reads."""
  torch = _torch(path)
  state_dict = {k: torch.from_numpy(v) for k, v in tensors.items()}
  torch.save(state_dict, path)


def write_safetensors(
  path: pathlib.Path, tensors: Mapping[str, np.ndarray]
) -> None:
  """Write a .safetensors file."""
  import safetensors.numpy

  # "format" is what the readers of the hub look for.
  # It takes the memory as it lies, whatever the strides.
  plain = {name: np.ascontiguousarray(t) for name, t in tensors.items()}
  safetensors.numpy.save_file(plain, path, metadata={"format": "pt"})
  os.chmod(path, 0o644)  # the library writes for the owner alone


def _local(name: str) -> pathlib.Path:
  """Return the path of a file or folder, fetched where it is a hub id."""
  path = pathlib.Path(name)
  if path.exists():
    return path
  hub_id = re.fullmatch(r"([\w-][\w.-]*/[\w.-]+)(?:/(.+))?", name)
  if not hub_id or (path.suffix in ENDINGS and not hub_id[2]):
    raise ValueError(f"{name} does not exist; check the path.")
  try:
    import huggingface_hub
  except ImportError:
    raise ValueError(
      f"{name} does not exist; if it is a hub id, pip install huggingface_hub."
    ) from None
  repository, file = hub_id.groups()
  try:
    if file:
      return pathlib.Path(huggingface_hub.hf_hub_download(repository, file))
    patterns = ["*.json", "*.safetensors", "README.md"]
    return pathlib.Path(
      huggingface_hub.snapshot_download(repository, allow_patterns=patterns)
    )
  except Exception as error:  # the network's, the hub's, the library's own
    raise ValueError(
      f"{name} is no path here and the hub did not give it "
      f"({_first_line(error)}); check the name."
    ) from None


def _read_folder(folder: pathlib.Path) -> TensorFile:
  model, tokenizer = (
    within / "model.safetensors" for within in (folder, folder / "vae")
  )
  if not model.exists():
    raise ValueError(
      f"{folder} has no model.safetensors; give a hub folder, or a .pth or "
      ".safetensors file."
    )
  if (folder / checksums.NAME).exists():
    checksums.verify(folder)
  settings = _hub_settings(folder / "config.json")
  state_dicts, sources = {}, {}
  for path in (model, tokenizer):
    if path.exists():
      found = _sorted_out(_open_safetensors(path), path)
      state_dicts |= found
      sources |= dict.fromkeys(found, path)
  return TensorFile(folder, state_dicts, sources, settings, _licence(folder))


def _hub_settings(path: pathlib.Path) -> Settings:
  """Return what the arguments of the official classes say, as stored there."""
  config = files.read_json(path)
  if not isinstance(config, dict):
    raise ValueError(f"{path} is no table of settings; restore it.")
  try:
    vae = config.get("vae_kwargs", config)
    scales = config.get("patch_nums") or vae.get("v_patch_nums")
    quant_resi = _maybe(float, vae.get("quant_resi"))
    return Settings(
      heads=_maybe(int, config.get("num_heads")),
      scales=scales and tuple(int(n) for n in scales),
      distance={True: "cosine", False: "euclidean", None: None}[
        vae.get("using_znorm")
      ],
      # VAR: its sign means nothing.
      quant_resi=_maybe(abs, quant_resi),
      norm_eps=_maybe(float, config.get("norm_eps")),
      drop_path=_maybe(float, config.get("drop_path_rate")),
      beta=_maybe(float, vae.get("beta")),
    )
  except (TypeError, ValueError, KeyError, AttributeError) as error:
    raise ValueError(
      f"{path} has settings that make no sense ({error!r}); restore it."
    ) from None


def _maybe(kind, value):
  return None if value is None else kind(value)


def _licence(folder: pathlib.Path) -> str | None:
  """Return the licence in the front matter of a hub folder's card."""
  card = folder / "README.md"
  text = card.read_text(errors="replace") if card.exists() else ""
  front = re.match(r"---\n(.*?)\n---\s", text, re.DOTALL)
  line = front and re.search(r"^license: *(\S.*)$", front[1], re.MULTILINE)
  return line[1].strip(" \"'") if line else None


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
        f"({_first_line(error)}); save it as a dense float32 tensor."
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
        f"{self._path}: tensor {name} cannot be read ({_first_line(error)}); "
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


def _open_torch(path: pathlib.Path) -> Mapping[str, Any]:
  torch = _torch(path)
  with _readable(path):
    with zipfile.ZipFile(path) as archive:
      damaged = archive.testzip()
    if damaged:
      raise ValueError(f"record {damaged} does not have its checksum")
    content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
  if not isinstance(content, dict):
    raise ValueError(
      f"{path} holds {type(content).__name__}, no state dict; give one."
    )
  return content


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
    raise ValueError(
      f"{path} cannot be read ({_first_line(error)}); fetch or copy it again, "
      "a file of an old torch is to be saved anew."
    ) from None


def _first_line(error: Exception) -> str:
  lines = str(error).strip().splitlines() or [type(error).__name__]
  return lines[0][:160]


def _torch(path: pathlib.Path):
  try:
    import torch
  except ImportError:
    raise ValueError(
      f"{path} is a torch file and torch is not installed; pip install torch, "
      "or use .safetensors."
    ) from None
  return torch
