"""Official PyTorch checkpoints in, and our models out to where they came from.

In, a model becomes a workdir without training state; out, a state dict that
the official code loads with strict=True: parameters, the buffers that follow
from the architecture, and the code counts that were carried along. Nothing is
rounded on either way, so a model that goes there and back is the same bit for
bit.
"""

import contextlib
import dataclasses
import pathlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

from var_jax import files
from var_jax.checkpoints import (
  architecture,
  checksums,
  model_card,
  tensor_files,
  torch_format,
  weights,
)
from var_jax.checkpoints.architecture import Settings, Tensors
from var_jax.checkpoints.description import Description
from var_jax.models.tokenizer import TokenizerConfig
from var_jax.models.transformer import VARConfig

FORMATS = ("torch", "safetensors", "hf")


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
    said = said.agree(file.settings, str(file.path.parent / "config.json"))
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
    hits_SV = torch_format.code_hits(vae_dict, tokenizer)
    if transformer:
      architecture.check_pair(tokenizer, transformer)
  paths = dict.fromkeys(file.path for file in opened.values())
  licences = {file.licence for file in opened.values()} - {None}
  origin = {
    "made_by": "Converted by `var-jax convert` from the files below.",
    "sources": {path.name: files.sha256(path) for path in paths},
    "licence": ", ".join(sorted(licences)) or None,
  }
  description = Description(tokenizer, transformer, origin=origin)
  names = (vae or var, var)
  return Source(description, vae_dict, var_dict, names, hits_SV)


def export_official(
  checkpoint: str,
  output: str,
  to: str,
  which: str = "ema",
  check: Callable[[pathlib.Path], None] | None = None,
) -> list[str]:
  """Write a workdir's newest model in the official layout.

  Args:
    output: a new folder.
    to: "torch" writes vae.pth and var.pth, "safetensors" the same names, "hf"
      a hub folder of the transformer with the tokenizer's in vae/.
    which: "ema", which falls back to "raw" where none was kept, or "raw".
    check: is given the folder before it gets its name.

  Returns:
    What the official tokenizer class has fixed otherwise, so that it would
    not load the file.

  Raises:
    ValueError: there is no such model, or the format cannot hold it.
  """
  if to not in FORMATS:
    raise ValueError(f"format {to!r} is not known; use one of {FORMATS}.")
  checkpoint = pathlib.Path(checkpoint)
  described = Description.read(checkpoint)
  transformer = described.transformer
  tokenizer_at = weights.tokenizer_folder(checkpoint)
  tokenizer = Description.read(tokenizer_at).tokenizer
  described = dataclasses.replace(described, tokenizer=tokenizer)
  _check_expressible(described)
  for part in dict.fromkeys((checkpoint, tokenizer_at)):
    weights.verify(part)
  with files.new_folder(output) as folder:
    folder = pathlib.Path(folder)
    _write(
      folder,
      "vae",
      described,
      to,
      official_tokenizer(tokenizer_at, described.tokenizer, which),
    )
    if transformer:
      _write(
        folder,
        "var",
        described,
        to,
        official_var(checkpoint, transformer, which),
      )
    card = model_card.render(described.tokenizer, transformer, described.origin)
    (folder / "README.md").write_text(card)
    checksums.write(folder)
    if check:
      check(folder)
  return architecture.official_limits(described.tokenizer)


def official_var(
  folder: pathlib.Path, cfg: VARConfig, which: str
) -> dict[str, np.ndarray]:
  """Return the official state dict of a workdir's transformer."""
  entries = torch_format.var_entries(cfg)
  abstract = torch_format.abstract_var(cfg)
  tensors = dict(_official_parts(folder, abstract, entries, which))
  return tensors | torch_format.var_buffers(cfg)


def official_tokenizer(
  folder: pathlib.Path, cfg: TokenizerConfig, which: str
) -> dict[str, np.ndarray]:
  """Return the official state dict of a workdir's tokenizer."""
  entries = torch_format.tokenizer_entries(cfg)
  abstract = torch_format.abstract_tokenizer(cfg)
  tensors = dict(_official_parts(folder, abstract, entries, which))
  hits_SV = weights.read_code_hits(folder)
  if hits_SV is None:  # what a new official model has
    hits_SV = np.zeros((len(cfg.scales), cfg.vocab_size), np.float32)
  return tensors | {torch_format.CODE_HITS: hits_SV}


def _official_parts(
  folder, abstract, entries, which
) -> Iterator[tuple[str, np.ndarray]]:
  entries = list(entries)
  for part in weights.read_parts(folder, abstract, which):
    ours = [entry for entry in entries if entry.path in part]
    for name, tensor in torch_format.official_tensors(part, ours):
      yield name, _packed(tensor)


def _packed(tensor: np.ndarray) -> np.ndarray:
  """Return a transposed array contiguous, in the memory where it lies.

  So no second copy of a large model exists, only one of a tensor.
  """
  if tensor.flags.c_contiguous:
    return tensor
  block = tensor.transpose(np.argsort(tensor.strides)[::-1])
  assert block.flags.c_contiguous
  flat = block.reshape(-1)
  flat[:] = tensor.copy(order="C").reshape(-1)
  return flat.reshape(tensor.shape)


def _write(folder, kind, described, to, tensors) -> None:
  if to == "torch":
    tensor_files.write_torch(folder / f"{kind}.pth", tensors)
  elif to == "safetensors":
    tensor_files.write_safetensors(folder / f"{kind}.safetensors", tensors)
  else:
    # The transformer is the hub's model; a tokenizer lies within, or alone.
    if kind == "vae" and described.transformer:
      folder = folder / "vae"
      folder.mkdir()
    config = _vae_arguments(described.tokenizer)
    if kind == "var":
      config = _var_arguments(described.transformer, described.tokenizer)
    files.write_json(folder / "config.json", config)
    tensor_files.write_safetensors(folder / "model.safetensors", tensors)


def _vae_arguments(cfg: TokenizerConfig) -> dict[str, Any]:
  """Return the arguments of the official tokenizer class."""
  return dict(
    vocab_size=cfg.vocab_size,
    z_channels=cfg.latent_channels,
    ch=cfg.channels,
    beta=cfg.beta,
    using_znorm=cfg.distance == "cosine",
    quant_resi=cfg.quant_resi,
    share_quant_resi=cfg.num_phis,
    v_patch_nums=cfg.scales,
    test_mode=True,
  )


def _var_arguments(
  cfg: VARConfig, tokenizer: TokenizerConfig
) -> dict[str, Any]:
  """Return the arguments of the official hub class of the transformer."""
  return dict(
    vae_kwargs=_vae_arguments(tokenizer),
    num_classes=cfg.num_classes,
    depth=cfg.depth,
    embed_dim=cfg.width,
    num_heads=cfg.heads,
    mlp_ratio=cfg.mlp_ratio,
    drop_rate=cfg.dropout,
    drop_path_rate=cfg.drop_path,
    norm_eps=cfg.norm_eps,
    shared_aln=cfg.shared_adaln,
    attn_l2_norm=cfg.qk_norm,
    patch_nums=cfg.scales,
  )


def _check_expressible(described: Description) -> None:
  cfg = described.tokenizer
  if cfg.norm_groups != TokenizerConfig.norm_groups:
    raise ValueError(
      f"norm_groups {cfg.norm_groups} has no place in an official file, whose "
      f"reader would use {TokenizerConfig.norm_groups}; train with that."
    )
  if not all(isinstance(size, int) for size in cfg.scales):
    raise ValueError(
      f"scales {cfg.scales} are not all square, which the official code "
      "cannot tell from a file; export a model of square maps."
    )


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
