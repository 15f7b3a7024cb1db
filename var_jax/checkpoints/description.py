"""config.json of a workdir: what the weights beside it are."""

import dataclasses
import hashlib
import json
from typing import Any

from etils import epath

from var_jax import files
from var_jax.checkpoints import model_card
from var_jax.models.tokenizer import TokenizerConfig
from var_jax.models.transformer import VARConfig

FORMAT_VERSION = 1


@dataclasses.dataclass(frozen=True)
class Description:
  """What config.json says of the weights beside it."""

  tokenizer: TokenizerConfig
  transformer: VARConfig | None = None  # None: a tokenizer alone
  class_names: tuple[str, ...] = ()
  config: dict[str, Any] = dataclasses.field(default_factory=dict)
  origin: dict[str, Any] = dataclasses.field(default_factory=dict)

  def write(self, folder: epath.PathLike) -> None:
    """Write README.md, the model card, and then config.json."""
    card = model_card.render(self.tokenizer, self.transformer, self.origin)
    files.write_bytes(epath.Path(folder) / "README.md", card.encode())
    content = {
      "format_version": FORMAT_VERSION,
      "kind": "var" if self.transformer else "tokenizer",
      **dataclasses.asdict(self),
    }
    files.write_json(epath.Path(folder) / "config.json", content)

  @classmethod
  def read(cls, folder: epath.PathLike) -> "Description":
    """Return the description of a workdir or checkpoint folder.

    Raises:
      ValueError: config.json is missing, broken or of another version.
    """
    path = files.absolute(folder) / "config.json"
    content = files.read_json(path)
    version = content.get("format_version") if _is_dict(content) else None
    if version is None:
      raise ValueError(
        f"{path} has no format_version, so this is no workdir; official "
        "weights and hub folders come in by var-jax convert --vae and --var."
      )
    if version != FORMAT_VERSION:
      raise ValueError(
        f"{path} has format_version {version}, this code reads "
        f"{FORMAT_VERSION}; use the var_jax version that wrote it."
      )
    try:
      transformer = content["transformer"]
      if not _is_dict(content["config"]):
        raise TypeError("config is no table")
      return cls(
        _dataclass(TokenizerConfig, content["tokenizer"]),
        transformer and _dataclass(VARConfig, transformer),
        tuple(content["class_names"]),
        content["config"],
        content.get("origin", {}),
      )
    except (KeyError, TypeError, AttributeError) as error:
      raise ValueError(
        f"{path} does not describe a model ({error}); restore it."
      ) from None


def architecture_digest(folder: epath.PathLike) -> str | None:
  """Return the SHA-256 of what decides how the weights are used.

  As config.json has it: a default that a later version adds changes nothing.
  """
  path = epath.Path(folder) / "config.json"
  if not path.exists():
    return None
  content = files.read_json(path)
  parts = [
    {k: v for k, v in (content.get(kind) or {}).items() if k not in _TRAINING}
    for kind in ("tokenizer", "transformer")
  ]
  return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


# Fields that training alone heeds: a run may go on with others.
_TRAINING = {
  "dropout", "drop_path", "remat", "dtype", "beta",
  "init_head", "init_adaln", "init_adaln_gamma",
}  # fmt: skip


def _is_dict(value) -> bool:
  return isinstance(value, dict)


def _dataclass(cls, fields: dict[str, Any]):
  return cls(
    **{k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()}
  )
