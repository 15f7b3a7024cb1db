"""manifest.json of a token cache: what the shards beside it are."""

import dataclasses

import numpy as np
from etils import epath

from var_jax import files

FORMAT_VERSION = 1
MAX_VOCAB = 2**16  # ids are uint16

# A shard is what a resumed writer makes again, and takes 64 KiB at least.
SHARD_SAMPLES, MAX_SHARDS = 1024, 1024


@dataclasses.dataclass(frozen=True)
class Settings:
  """What a cache is of. The same settings make the same cache."""

  tokenizer: str  # checksum
  source: str
  samples: int
  class_names: tuple[str, ...]
  transform: str
  flip: bool
  image_shape: tuple[int, int]
  seed: int
  crops: int  # a sample
  length: int  # L
  vocab_size: int
  num_shards: int

  def __post_init__(self):
    object.__setattr__(self, "class_names", tuple(self.class_names))
    object.__setattr__(self, "image_shape", tuple(self.image_shape))
    if self.vocab_size > MAX_VOCAB:
      raise ValueError(
        f"vocab_size {self.vocab_size} does not fit into uint16; a token cache "
        f"takes tokenizers of at most {MAX_VOCAB} codes."
      )
    if self.crops < 1:
      raise ValueError(f"crops {self.crops} is below 1; use 1 or more.")
    if not 1 <= self.num_shards <= self.samples:
      raise ValueError(
        f"{self.samples} samples do not fill {self.num_shards} shards; use "
        f"1..{self.samples}."
      )

  @classmethod
  def read(cls, path: epath.Path) -> "Settings":
    """Return the settings of a cache that is not finished."""
    try:
      return cls(**files.read_json(path))
    except TypeError as error:
      raise ValueError(
        f"{path} does not describe a token cache ({error}); give a new folder."
      ) from None

  def shard_name(self, s: int) -> str:
    return f"tokens-{s:05}-of-{self.num_shards:05}.array_record"

  def samples_of(self, s: int) -> range:
    """Return the samples that shard s holds."""
    n, S = self.samples, self.num_shards
    return range(n * s // S, n * (s + 1) // S)

  @property
  def record(self) -> np.dtype:
    tokens = ("tokens", "<u2", (self.crops, self.length))
    return np.dtype([("label", "<i4"), ("index", "<i8"), tokens])


@dataclasses.dataclass(frozen=True)
class Shard:
  """A finished shard."""

  name: str
  samples: int
  bytes: int
  sha256: str
  broken: tuple[str, ...]  # names of samples that others took the place of

  def __post_init__(self):
    object.__setattr__(self, "broken", tuple(self.broken))


@dataclasses.dataclass(frozen=True)
class Manifest:
  """What manifest.json says."""

  settings: Settings
  shards: tuple[Shard, ...]

  def write(self, folder: epath.Path) -> None:
    content = {
      "format_version": FORMAT_VERSION,
      **dataclasses.asdict(self.settings),
      "shards": [dataclasses.asdict(shard) for shard in self.shards],
    }
    files.write_json(folder / "manifest.json", content)

  @classmethod
  def read(cls, folder: epath.PathLike) -> "Manifest":
    """Return the manifest of a finished cache.

    Raises:
      ValueError: there is none, or it is broken or of another version.
    """
    folder = epath.Path(folder)
    path = folder / "manifest.json"
    if not path.exists():
      raise ValueError(
        f"{folder} is not a finished token cache: it has no manifest.json; "
        "write or finish it with var-jax cache."
      )
    content = files.read_json(path)
    version = content.get("format_version") if _is_dict(content) else None
    if version != FORMAT_VERSION:
      raise ValueError(
        f"{path} has format_version {version}, this code reads "
        f"{FORMAT_VERSION}; write the cache again with var-jax cache."
      )
    del content["format_version"]
    try:
      shards = tuple(Shard(**shard) for shard in content.pop("shards"))
      settings = Settings(**content)
      counts = [len(settings.samples_of(s)) for s in range(settings.num_shards)]
    except (KeyError, TypeError) as error:
      raise ValueError(
        f"{path} does not describe a token cache ({error}); restore it."
      ) from None
    if [shard.samples for shard in shards] != counts:
      raise ValueError(
        f"{path} does not list {settings.samples} samples in "
        f"{settings.num_shards} shards; restore it from a copy."
      )
    return cls(settings, shards)


def default_shards(samples: int) -> int:
  """Return how many shards that many samples are written to."""
  return min(MAX_SHARDS, -(-samples // SHARD_SAMPLES))


def _is_dict(value) -> bool:
  return isinstance(value, dict)
