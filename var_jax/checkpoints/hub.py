"""Hub folders and ids: where they are, and what is said beside the weights."""

import pathlib
import re

from var_jax import files
from var_jax.checkpoints.architecture import Settings

ENDINGS = (".pth", ".pt", ".safetensors")


def find(name: str) -> pathlib.Path:
  """Return the path of a file or folder, fetched where it is a hub id."""
  files.absolute(name, buckets=())  # no bucket: it is memory-mapped
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
      f"({first_line(error)}); check the name."
    ) from None


def settings(path: pathlib.Path) -> Settings:
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


def licence(folder: pathlib.Path) -> str | None:
  """Return the licence in the front matter of a hub folder's card."""
  card = folder / "README.md"
  text = card.read_text(errors="replace") if card.exists() else ""
  front = re.match(r"---\n(.*?)\n---\s", text, re.DOTALL)
  line = front and re.search(r"^license: *(\S.*)$", front[1], re.MULTILINE)
  return line[1].strip(" \"'") if line else None


def first_line(error: Exception) -> str:
  lines = str(error).strip().splitlines() or [type(error).__name__]
  return lines[0][:160]
