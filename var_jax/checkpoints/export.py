"""Our models out, as state dicts that the official code loads strictly.

They hold the parameters, the buffers that follow from the architecture, and the
code counts that were carried along. A model is read a part at a time and
transposed where it lies, so that it is in memory once.
"""

import dataclasses
import pathlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from var_jax import files
from var_jax.checkpoints import (
  architecture,
  checksums,
  model_card,
  tensor_files,
  torch_format,
  weights,
)
from var_jax.checkpoints.description import Description
from var_jax.models.tokenizer import TokenizerConfig
from var_jax.models.transformer import VARConfig

FORMATS = ("torch", "safetensors", "hf")


class Steps(NamedTuple):
  """The folders of the steps that a model is read from."""

  vae: epath.Path
  var: epath.Path | None


def export_official(
  checkpoint: str,
  output: str,
  to: str,
  which: str = "ema",
  check: Callable[[pathlib.Path, Steps], None] | None = None,
) -> list[str]:
  """Write a workdir's newest model in the official layout.

  Args:
    output: a new folder.
    to: "torch" writes vae.pth and var.pth, "safetensors" the same names, "hf"
      a hub folder of the transformer with the tokenizer's in vae/.
    which: "ema", which falls back to "raw" where none was kept, or "raw".
    check: is given the folder before it gets its name, and the steps that
      were exported.

  Returns:
    What the official tokenizer class has fixed otherwise, so that it would
    not load the file.

  Raises:
    ValueError: there is no such model, or the format cannot hold it.
  """
  if to not in FORMATS:
    raise ValueError(f"format {to!r} is not known; use one of {FORMATS}.")
  if to == "torch":
    tensor_files.require_torch(output)
  described = Description.read(checkpoint)
  transformer = described.transformer
  tokenizer_at = weights.tokenizer_folder(checkpoint)
  tokenizer = Description.read(tokenizer_at).tokenizer
  described = dataclasses.replace(described, tokenizer=tokenizer)
  _check_expressible(described)
  # A run under way makes newer steps: these are the ones that are exported.
  steps = Steps(
    weights.newest(tokenizer_at),
    weights.newest(checkpoint) if transformer else None,
  )
  used = weights.kept(steps.var or steps.vae, which)
  for step in filter(None, steps):
    weights.verify(step)
  with files.new_folder(output) as folder:
    folder = pathlib.Path(folder)
    tensors = official_tokenizer(steps.vae, tokenizer, which)
    _write(folder, "vae", described, to, tensors)
    if transformer:
      del tensors  # before the next are made
      tensors = official_var(steps.var, transformer, which)
      _write(folder, "var", described, to, tensors)
    use = (
      f"Written by `var-jax convert --to {to}`, the {used} weights; the "
      "official PyTorch code loads the tensors with strict=True, "
      "`var-jax convert` brings them back. `checksums.json` says what every "
      "file was when it was written."
    )
    card = model_card.render(
      described.tokenizer, transformer, described.origin, use
    )
    (folder / "README.md").write_text(card)
    checksums.write(folder)
    if check:
      del tensors  # the check wants the memory
      check(folder, steps)
  return architecture.official_limits(described.tokenizer)


def official_var(
  step: epath.Path, cfg: VARConfig, which: str
) -> dict[str, np.ndarray]:
  """Return the official state dict of a transformer's step."""
  entries = torch_format.var_entries(cfg)
  abstract = torch_format.abstract_var(cfg)
  tensors = dict(_official_parts(step, abstract, entries, which))
  return tensors | torch_format.var_buffers(cfg)


def official_tokenizer(
  step: epath.Path, cfg: TokenizerConfig, which: str
) -> dict[str, np.ndarray]:
  """Return the official state dict of a tokenizer's step."""
  entries = torch_format.tokenizer_entries(cfg)
  abstract = torch_format.abstract_tokenizer(cfg)
  tensors = dict(_official_parts(step, abstract, entries, which))
  hits_SV = weights.read_code_hits(step, cfg)
  if hits_SV is None:  # what a new official model has
    hits_SV = np.zeros((len(cfg.scales), cfg.vocab_size), np.float32)
  return tensors | {torch_format.CODE_HITS: hits_SV}


def _official_parts(
  step, abstract, entries, which
) -> Iterator[tuple[str, np.ndarray]]:
  entries = list(entries)
  for part in weights.read_parts(step, abstract, which):
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
