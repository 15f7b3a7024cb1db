"""Files that are there whole or not at all: written aside, then renamed."""

import contextlib
import hashlib
import json
from collections.abc import Iterator
from typing import Any

from etils import epath


def write_bytes(path: epath.PathLike, data: bytes) -> None:
  """Write a file; whoever looks sees the old content or all of the new."""
  path = epath.Path(path)
  aside = path.with_name(f".{path.name}.partial")
  path.parent.mkdir(parents=True, exist_ok=True)
  try:
    aside.write_bytes(data)
    aside.replace(path)
  except BaseException:
    aside.unlink(missing_ok=True)
    raise


def write_json(path: epath.PathLike, content: Any) -> None:
  """Write `content` as indented JSON."""
  write_bytes(path, (json.dumps(content, indent=2) + "\n").encode())


def read_json(path: epath.PathLike) -> Any:
  """Return the content of a JSON file.

  Raises:
    ValueError: it is missing or no JSON.
  """
  path = epath.Path(path)
  try:
    return json.loads(path.read_text())
  except (FileNotFoundError, NotADirectoryError):
    raise ValueError(f"{path} does not exist; check the path.") from None
  except ValueError as error:
    raise ValueError(
      f"{path} is not valid JSON ({error}); restore it from a copy."
    ) from None


@contextlib.contextmanager
def new_folder(path: epath.PathLike) -> Iterator[epath.Path]:
  """Give a folder to fill; it gets its name when all went well, or is gone.

  Raises:
    ValueError: there is something of that name already.
  """
  path = epath.Path(path).absolute()
  check_new(path)
  made = [parent for parent in path.parents if not parent.exists()]
  aside = path.with_name(f".{path.name}.partial")
  aside.rmtree(missing_ok=True)  # what a killed process left
  try:
    aside.mkdir(parents=True)
    yield aside
    aside.rename(path)
  except BaseException:
    aside.rmtree(missing_ok=True)
    for parent in made:  # the innermost first
      if parent.exists():
        parent.rmdir()
    raise


def check_new(path: epath.PathLike) -> None:
  """Raise ValueError if there is something of that name already."""
  if epath.Path(path).exists():
    raise ValueError(f"{path} exists already; give a new folder.")


def sha256(path: epath.PathLike) -> str:
  """Return the SHA-256 of a file's content, in hexadecimal."""
  with epath.Path(path).open("rb") as file:
    return hashlib.file_digest(file, "sha256").hexdigest()
