"""Official PyTorch checkpoints in: a model becomes a workdir.

Everything is read and checked before anything is written, and nothing is
rounded: what `export.py` writes from the workdir is the same bit for bit.
"""

import contextlib
import dataclasses
import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from var_jax import files
from var_jax.checkpoints import (
  architecture,
  tensor_files,
  torch_format,
  weights,
)
from var_jax.checkpoints.architecture import Settings, Tensors
from var_jax.checkpoints.description import Description


class Source(NamedTuple):
  """Official state dicts and what they are."""

  description: Description
  vae: Tensors
  var: Tensors | None
  names: tuple[str, str | None]  # of their files
  code_hits_SV: np.ndarray | None


def import_official(
  vae: str | None,
  var: str | None,
  output: str,
  said: Settings,
  check: Callable[[pathlib.Path, Source], None] | None = None,
) -> Description:
  """Write official weights as a workdir that `load` reads.

  Args:
    vae, var: what `tensor_files.read` reads; `vae` may be left out where
      `var` holds both.
    output: a new folder.
    said: what no file says.
    check: is given the folder before it gets its name, and what it was made
      from; what it raises leaves no folder.

  Raises:
    ValueError: a file cannot be read, its tensors are no official model, or
      something has to be said.
  """
  files.check_new(output)
  source = open_official(vae, var, said)
  tokenizer = dataclasses.replace(source.description, transformer=None)
  tokenizer_params, var_params = _params(source)
  with files.new_folder(output) as folder:
    if var_params is None:
      weights.write_model(
        folder, tokenizer, tokenizer_params, source.code_hits_SV
      )
    else:
      weights.write_tokenizer(
        folder, tokenizer, tokenizer_params, source.code_hits_SV
      )
      weights.write_model(folder, source.description, var_params)
    del tokenizer_params, var_params  # the check wants the memory
    if check:
      check(folder, source)
  return source.description


def open_official(vae: str | None, var: str | None, said: Settings) -> Source:
  """Return the state dicts and architectures of official files, unread."""
  opened = {
    name: tensor_files.read(name) for name in dict.fromkeys((var, vae)) if name
  }
  for file in opened.values():
    said = said.agree(file.settings, str(file.path / "config.json"))
  var_dict = vae_dict = None
  if var:
    var_dict = _pick(opened[var], "var", "--vae")
  if vae or "vae" in opened[var].state_dicts:
    vae_dict = _pick(opened[vae or var], "vae", "--var")
  if vae_dict is None:
    raise ValueError(
      f"{var} is a transformer alone; give its tokenizer as --vae."
    )
  transformer = None
  if var_dict is not None:
    with _named(var):
      transformer = architecture.infer_var(var_dict, said)
      torch_format.check_var_buffers(var_dict, transformer)
    said = dataclasses.replace(said, scales=transformer.scales)
  with _named(vae or var):
    tokenizer = architecture.infer_tokenizer(vae_dict, said)
    count = architecture.counted_scales(vae_dict)
    if transformer is None and count not in (None, len(tokenizer.scales)):
      raise ValueError(
        f"scale list {tokenizer.scales} has {len(tokenizer.scales)} scales, "
        f"but tensor {torch_format.CODE_HITS} counts {count}; give as many."
      )
    hits_SV = torch_format.code_hits(vae_dict, tokenizer)
    if transformer:
      architecture.check_pair(tokenizer, transformer)
  sources = [opened[vae or var].sources["vae"]]
  if var:
    sources.append(opened[var].sources["var"])
  licences = {file.licence for file in opened.values()} - {None}
  origin = {
    "made_by": "Converted by `var-jax convert` from the files below.",
    "sources": _digests(sources),
    "licence": ", ".join(sorted(licences)) or None,
    "notes": [],
  }
  if count and hits_SV is None:
    origin["notes"].append(
      f"The tokenizer's code counts are of {count} scales, the transformer has "
      f"{len(tokenizer.scales)}: they were left out."
    )
  description = Description(tokenizer, transformer, origin=origin)
  names = (vae or var, var)
  return Source(description, vae_dict, var_dict, names, hits_SV)


def _digests(paths: list[pathlib.Path]) -> dict[str, str]:
  """Return the SHA-256 of files by name, with the folder's if names clash."""
  paths = list(dict.fromkeys(paths))
  names = [path.name for path in paths]
  if len(set(names)) < len(names):
    names = [f"{path.parent.name}/{path.name}" for path in paths]
  return dict(zip(names, map(files.sha256, paths), strict=True))


def _pick(file: tensor_files.TensorFile, kind: str, other_flag: str):
  if kind not in file.state_dicts:
    raise ValueError(
      f"{file.path} holds the other of the two models; give it as {other_flag}."
    )
  return file.state_dicts[kind]


def _params(source: Source) -> tuple[dict[str, Any], dict[str, Any] | None]:
  """Return the parameters of both models, read and checked."""
  description = source.description
  with _named(source.names[0]):
    entries = torch_format.tokenizer_entries(description.tokenizer)
    tokenizer = torch_format.from_official(source.vae, entries)
  if source.var is None:
    return {"params": tokenizer}, None
  with _named(source.names[1]):
    entries = torch_format.var_entries(description.transformer)
    var = torch_format.from_official(source.var, entries)
  return {"params": tokenizer}, {"params": var}


@contextlib.contextmanager
def _named(file: str):
  """Put a file's name before what is wrong with its tensors."""
  try:
    yield
  except ValueError as error:
    raise ValueError(f"{file}: {error}") from None
