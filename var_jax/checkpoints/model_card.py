"""The README.md of a checkpoint: what it is and where it comes from."""

import math
from collections.abc import Mapping
from typing import Any

import jax

from var_jax.checkpoints import torch_format
from var_jax.models.tokenizer import TokenizerConfig
from var_jax.models.transformer import VARConfig

WORKDIR_USE = (
  "Load with `var_jax.load(this folder)`; `checksums.json` in each step says "
  "what every file was when it was written."
)


def render(
  tokenizer: TokenizerConfig,
  transformer: VARConfig | None,
  origin: Mapping[str, Any],
  use: str = WORKDIR_USE,
) -> str:
  """Return the card as Markdown, with the front matter that hubs read.

  Args:
    origin: "made_by", a sentence, and "notes", more of them; "sources",
      {file: SHA-256}; "licence" of the source weights, where it is known.
    use: what the folder is and how it is used.
  """
  h, w = tokenizer.image_shape
  rows = {
    "image": f"{h} x {w} pixels",
    "scales": ", ".join(str(size) for size in tokenizer.scales),
    "tokenizer": (
      f"{tokenizer.vocab_size} codes of {tokenizer.latent_channels} channels, "
      f"{tokenizer.distance} distance, {tokenizer.channels} channels x "
      f"{tokenizer.channel_mults}, {_phis(tokenizer)}"
    ),
    "tokenizer parameters": _count(torch_format.abstract_tokenizer(tokenizer)),
  }
  if transformer:
    rows |= {
      "transformer": (
        f"depth {transformer.depth}, width {transformer.width}, "
        f"{transformer.heads} heads, {_adaln(transformer)}, QK normalisation "
        f"{'on' if transformer.qk_norm else 'off'}"
      ),
      "classes": f"{transformer.num_classes}, and the unconditional one",
      "transformer parameters": _count(torch_format.abstract_var(transformer)),
    }
  licence = origin.get("licence")
  title = "VAR" if transformer else "Multi-scale residual VQVAE"
  lines = [
    "---",
    *([f"license: {licence}"] if licence else []),
    "tags: [image-generation, next-scale-prediction]",
    "---",
    "",
    f"# {title}, {h} px",
    "",
    "| what | value |",
    "|---|---|",
    *(f"| {name} | {value} |" for name, value in rows.items()),
    "",
    "## How it was made",
    "",
    origin.get("made_by", "Not recorded."),
  ]
  if sources := origin.get("sources"):
    lines += ["", "| source | SHA-256 |", "|---|---|"]
    lines += [f"| {name} | `{digest}` |" for name, digest in sources.items()]
  for note in origin.get("notes", ()):
    lines += ["", note]
  lines += [
    "",
    "## Licence",
    "",
    licence_sentence(origin),
    "",
    use,
    "",
  ]
  return "\n".join(lines)


def licence_sentence(origin: Mapping[str, Any]) -> str:
  if licence := origin.get("licence"):
    return f"Of the weights: {licence}, as the card of their source says."
  if origin.get("sources"):
    return (
      "Of the weights: the files above do not say; whoever published them "
      "does. The authors of VAR published theirs under the MIT licence."
    )
  return "Of the weights: for whoever trained them to say."


def _phis(cfg: TokenizerConfig) -> str:
  if not cfg.phi_count:
    return "no phi"
  return f"{cfg.phi_count} phi with r = {cfg.quant_resi:g}"


def _adaln(cfg: VARConfig) -> str:
  return "one AdaLN for all layers" if cfg.shared_adaln else "AdaLN a layer"


def _count(abstract) -> str:
  total = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(abstract))
  return f"{total:,}"
