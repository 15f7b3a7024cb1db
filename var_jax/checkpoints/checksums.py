"""checksums.json: what every file of a folder was when it was written.

It is written last, before the folder gets its name, so a folder that is there
has it. A disk that rots or a copy that was cut short is found before the
weights are used.
"""

import concurrent.futures
import logging
from collections.abc import Iterator

import jax
from etils import epath

from var_jax import files

NAME = "checksums.json"

# Orbax touches these after the rest is finished.
_TOUCHED_LATER = ("_CHECKPOINT_METADATA", "commit_success.txt")


def write(folder: epath.PathLike, architecture: str | None = None) -> None:
  """Write the SHA-256 of all files beneath `folder` into checksums.json.

  Args:
    architecture: digest of the description that the weights belong to.
  """
  folder = epath.Path(folder)
  names = sorted(_names(folder))
  content = {
    "architecture": architecture,
    "sha256": dict(zip(names, _digests(folder, names), strict=True)),
  }
  files.write_json(folder / NAME, content)


def verify(folder: epath.PathLike, architecture: str | None = None) -> None:
  """Check `folder` against its checksums.json.

  Each of several processes reads its share of the files.

  Raises:
    ValueError: a file is missing or is not what it was, or the weights belong
      to another architecture.
  """
  folder = epath.Path(folder)
  if not (folder / NAME).exists():
    logging.getLogger(__name__).warning(
      "%s has no %s: what is loaded from it is not verified.", folder, NAME
    )
    return
  sha256, belongs_to = _recorded(folder / NAME)
  if architecture and belongs_to and architecture != belongs_to:
    raise ValueError(
      f"{folder} was written for another architecture than its config.json "
      "describes; restore config.json from a copy."
    )
  names = sorted(sha256)[jax.process_index() :: jax.process_count()]
  for name, digest in zip(names, _digests(folder, names), strict=True):
    if digest != sha256[name]:
      state = "is missing" if digest is None else "is not what was written"
      raise ValueError(
        f"{folder / name} {state} ({NAME} says {sha256[name][:12]}..); "
        f"restore it from a copy{_or_older(folder)}."
      )


def verify_file(path: epath.PathLike) -> None:
  """Check a file that a checksums.json beside it, or one above, names.

  Raises:
    ValueError: it is not what it was.
  """
  path = files.absolute(path)
  for folder in (path.parent, path.parent.parent):
    if not (folder / NAME).exists():
      continue
    sha256, _ = _recorded(folder / NAME)
    wanted = sha256.get(path.relative_to(folder).as_posix())
    if wanted and wanted != files.sha256(path):
      raise ValueError(
        f"{path} is not what was written ({NAME} says {wanted[:12]}..); "
        "restore it from a copy."
      )


def _recorded(path: epath.Path) -> tuple[dict[str, str], str | None]:
  """Return the checksums by file, and the digest of the architecture."""
  content = files.read_json(path)
  sha256 = content.get("sha256") if isinstance(content, dict) else None
  plain = isinstance(sha256, dict) and sha256
  if not plain or not all(isinstance(v, str) for v in sha256.values()):
    raise ValueError(f"{path} lists no checksums; restore it from a copy.")
  return sha256, content.get("architecture")


def _or_older(folder: epath.Path) -> str:
  is_step = folder.parent.name == "checkpoints"
  return ", or delete this step to use an older one" if is_step else ""


def _names(folder: epath.Path, prefix: str = "") -> Iterator[str]:
  for path in folder.iterdir():
    if path.is_dir():
      yield from _names(path, f"{prefix}{path.name}/")
    elif path.name not in (NAME, *_TOUCHED_LATER):
      yield prefix + path.name


def _digests(folder: epath.Path, names: list[str]) -> list[str | None]:
  def digest(name: str) -> str | None:
    path = folder / name
    return files.sha256(path) if path.is_file() else None

  # Hashing lets go of the interpreter's lock.
  with concurrent.futures.ThreadPoolExecutor() as pool:
    return list(pool.map(digest, names))
