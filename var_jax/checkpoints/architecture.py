"""What a state dict says of its architecture, and the few things it does not.

Depth, width, codebook, phi mode and so on follow from names and shapes. The
scale list is in the transformer's `lvl_1L`; of a tokenizer's file only its
length is known. Heads show where QK normalisation is on. The distance, r of
phi and the norms' epsilon are nowhere: `Settings` carries what the caller or a
config.json beside the weights says of them.
"""

import dataclasses
import math
import re
from collections.abc import Iterable, Mapping

import numpy as np

from var_jax.checkpoints import torch_format
from var_jax.models.scales import Size
from var_jax.models.tokenizer import TokenizerConfig
from var_jax.models.transformer import VARConfig

Tensors = Mapping[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Settings:
  """What no tensor says; None where nobody said it."""

  heads: int | None = None
  scales: tuple[Size, ...] | None = None
  distance: str | None = None
  quant_resi: float | None = None
  norm_eps: float | None = None
  drop_path: float | None = None
  beta: float | None = None

  def agree(self, other: "Settings", source: str) -> "Settings":
    """Return both together.

    Args:
      other: what `source`, a file, says.

    Raises:
      ValueError: they contradict each other.
    """
    merged = dataclasses.asdict(other)
    for name, value in dataclasses.asdict(self).items():
      if value is None:
        continue
      if merged[name] is not None and merged[name] != value:
        raise ValueError(
          f"{name} is {value} by the command line or another file, but "
          f"{source} says {merged[name]}; leave the wrong one out."
        )
      merged[name] = value
    return Settings(**merged)


def infer_var(tensors: Tensors, said: Settings) -> VARConfig:
  """Return the architecture of a transformer's state dict.

  Raises:
    ValueError: a tensor that tells is missing or odd, or heads or scales
      have to be said.
  """
  width, latent_channels = _shape(tensors, "word_embed.weight", 2)
  depth = _count(tensors, r"blocks\.(\d+)\.attn\.proj\.weight", "blocks")
  scale_mul = "blocks.0.attn.scale_mul_1H11"
  qk_norm = scale_mul in tensors
  heads = said.heads
  if qk_norm:
    found = _shape(tensors, scale_mul, 4)[1]
    if heads not in (None, found):
      raise ValueError(
        f"heads {heads} by the command line or a config.json, but tensor "
        f"{scale_mul} says {found}; leave the wrong one out."
      )
    heads = found
  elif heads is None:
    raise ValueError(
      "QK normalisation is off, so no tensor tells the number of heads; give "
      "--heads."
    )
  hidden = _shape(tensors, "blocks.0.ffn.fc1.weight", 2)[0]
  drop_path = 0.1 * depth / 24 if said.drop_path is None else said.drop_path
  return VARConfig(
    depth=depth,
    width=width,
    heads=heads,
    mlp_ratio=hidden / width,
    num_classes=_shape(tensors, "class_emb.weight", 2)[0] - 1,
    vocab_size=_shape(tensors, "head.weight", 2)[0],
    latent_channels=latent_channels,
    scales=_scales(tensors, said),
    shared_adaln="shared_ada_lin.1.weight" in tensors,
    qk_norm=qk_norm,
    drop_path=drop_path,
    norm_eps=1e-6 if said.norm_eps is None else said.norm_eps,
  )


def infer_tokenizer(tensors: Tensors, said: Settings) -> TokenizerConfig:
  """Return the architecture of a tokenizer's state dict.

  Raises:
    ValueError: a tensor that tells is missing or odd, or scales have to be
      said.
  """
  channels = _shape(tensors, "encoder.conv_in.weight", 4)[0]
  levels = _count(tensors, r"encoder\.down\.(\d+)\.block\.0\..*", "levels")
  mults = []
  for level in range(levels):
    name = f"encoder.down.{level}.block.0.conv2.weight"
    features = _shape(tensors, name, 4)[0]
    if features % channels:
      raise ValueError(
        f"tensor {name} has {features} features, no multiple of the "
        f"{channels} of encoder.conv_in; give an official tokenizer."
      )
    mults.append(features // channels)
  vocab_size, latent_channels = _shape(tensors, "quantize.embedding.weight", 2)
  if said.scales is None:
    count = counted_scales(tensors)
    tells = f"only that there are {count}" if count else "not even how many"
    raise ValueError(
      f"a tokenizer's file does not hold its scale list, {tells}; give "
      "--scales, like --scales 1,2,3,4,5,6,8,10,13,16."
    )
  num_phis, quant_resi = _phis(tensors, said)
  distance, beta = said.distance, said.beta
  return TokenizerConfig(
    vocab_size=vocab_size,
    latent_channels=latent_channels,
    channels=channels,
    channel_mults=tuple(mults),
    encoder_blocks=_count(
      tensors, r"encoder\.down\.0\.block\.(\d+)\.conv1\.weight", "blocks"
    ),
    decoder_blocks=_count(
      tensors, r"decoder\.up\.0\.block\.(\d+)\.conv1\.weight", "blocks"
    ),
    scales=said.scales,
    num_phis=num_phis,
    quant_resi=quant_resi,
    distance=TokenizerConfig.distance if distance is None else distance,
    beta=TokenizerConfig.beta if beta is None else beta,
  )


def counted_scales(tensors: Tensors) -> int | None:
  """Return how many scales a tokenizer's code counts are of, if it has any."""
  if torch_format.CODE_HITS not in tensors:
    return None
  return _shape(tensors, torch_format.CODE_HITS, 2)[0]


def check_pair(tokenizer: TokenizerConfig, var: VARConfig) -> None:
  """Raise ValueError unless the two were made for each other."""
  for name in ("vocab_size", "latent_channels", "scales"):
    ours, theirs = getattr(tokenizer, name), getattr(var, name)
    if ours != theirs:
      raise ValueError(
        f"{name} is {ours} in the tokenizer and {theirs} in the transformer; "
        "give the tokenizer that the transformer was trained on."
      )


def official_limits(tokenizer: TokenizerConfig) -> list[str]:
  """Return what the official tokenizer class has fixed otherwise.

  Its state dict has the official names all the same; only a class with these
  settings loads it.
  """
  fixed = dict(
    channel_mults=(1, 1, 2, 2, 4), encoder_blocks=2, decoder_blocks=3
  )
  return [
    f"{name} {getattr(tokenizer, name)} (there {value})"
    for name, value in fixed.items()
    if getattr(tokenizer, name) != value
  ]


def _shape(tensors: Tensors, name: str, ndim: int) -> tuple[int, ...]:
  if name not in tensors:
    raise ValueError(
      f"tensor {name} is missing; give the complete state dict of an official "
      "tokenizer as --vae, of a transformer as --var."
    )
  shape = tensors[name].shape
  if len(shape) != ndim or not all(shape):
    raise ValueError(
      f"tensor {name} has shape {shape}, not {ndim} dimensions of 1 or more; "
      "give an official state dict."
    )
  return shape


def _count(tensors: Iterable[str], pattern: str, what: str) -> int:
  """Return how many numbers, 0 and on, the names have in `pattern`."""
  matches = (re.fullmatch(pattern, name) for name in tensors)
  numbers = {int(match[1]) for match in matches if match}
  if numbers != set(range(len(numbers))) or not numbers:
    gap = next(n for n in range(len(numbers) + 1) if n not in numbers)
    example = pattern.replace(r"(\d+)", str(gap)).replace("\\", "")
    raise ValueError(
      f"tensor {example.replace('.*', '')} is missing among the {what}; give "
      "the complete state dict."
    )
  return len(numbers)


def _scales(tensors: Tensors, said: Settings) -> tuple[Size, ...]:
  if "lvl_1L" not in tensors:
    if said.scales is None:
      raise ValueError(
        "tensor lvl_1L is missing, which tells the scale list; give --scales."
      )
    return said.scales
  level_L = np.asarray(tensors["lvl_1L"]).ravel()
  levels, counts = np.unique(level_L, return_counts=True)
  sizes = tuple(math.isqrt(count) for count in counts.tolist())
  square = [n * n for n in sizes] == counts.tolist()
  sound = levels.tolist() == list(range(len(levels))) and len(levels)
  if not square or not sound or np.any(np.diff(level_L) < 0):
    raise ValueError(
      "tensor lvl_1L does not count the levels of square token maps; give an "
      "official state dict."
    )
  if said.scales not in (None, sizes):
    raise ValueError(
      f"scales {said.scales} by the command line or a config.json, but tensor "
      f"lvl_1L says {sizes}; leave the wrong one out."
    )
  return sizes


def _phis(tensors: Iterable[str], said: Settings) -> tuple[int, float]:
  """Return num_phis, how they are shared, and r."""
  prefix = r"quantize\.quant_resi\."
  names = [name for name in tensors if re.match(prefix, name)]
  r = said.quant_resi
  if r is None:
    r = TokenizerConfig.quant_resi if names else 0.0
  if bool(r) != bool(names):
    there = "are" if names else "are no"
    raise ValueError(
      f"quant_resi {r} does not fit: there {there} tensors "
      "quantize.quant_resi.*; 0 means none, another value needs them."
    )
  if any(re.match(prefix + r"qresi\.", name) for name in names):
    return 1, r
  if any(re.match(prefix + r"qresi_ls\.", name) for name in names):
    return _count(names, prefix + r"qresi_ls\.(\d+)\.weight", "phis"), r
  return (0 if names else TokenizerConfig.num_phis), r
