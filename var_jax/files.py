"""Files that are there whole or not at all, on a disk or in a bucket.

On a disk they are written aside, then renamed. A bucket renames nothing, and
an object appears there at once, when all of it was uploaded.
"""

import contextlib
import hashlib
import importlib.util
import json
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

from etils import epath

# What epath reaches a bucket with, by the beginning of a path: the package, and
# the name that fsspec has for it.
_CLIENTS = {"gs": ("gcsfs", "gcs"), "s3": ("s3fs", "s3")}


def in_bucket(path: epath.PathLike) -> bool:
  """Return whether a path is no file system's."""
  return "://" in os.fspath(path)


def absolute(
  path: epath.PathLike, buckets: tuple[str, ...] = ("gs",)
) -> epath.Path:
  """Return a path that means the same in every working folder.

  Args:
    buckets: that will do. Orbax writes checkpoints to gs:// alone.

  Raises:
    ValueError: it is in another one, or a package is missing.
  """
  path = os.fspath(path)
  if not in_bucket(path):
    return epath.Path(path).absolute()
  kind = path.partition("://")[0]
  if kind not in buckets:
    places = " or ".join(["a folder", *(f"{kind}://.." for kind in buckets)])
    raise ValueError(
      f"{path!r} is no place that can be used here; give {places}, or mount "
      "the bucket and give its folder."
    )
  package, protocol = _CLIENTS[kind]
  if importlib.util.find_spec(package) is None:
    raise ValueError(
      f"{path!r} needs the package {package}, which is not here; pip install "
      f"{package}."
    )
  # Else epath imports TensorFlow where there is one.
  os.environ.setdefault("EPATH_USE_TF", "false")
  import fsspec

  logging.getLogger(package).setLevel(logging.CRITICAL)  # what it raises, too
  # Orbax and other hosts write what a remembered listing does not have.
  settings = fsspec.config.conf.setdefault(protocol, {})
  settings["use_listings_cache"] = False
  return epath.Path(path)


def write_bytes(path: epath.PathLike, data: bytes) -> None:
  """Write a file; whoever looks sees the old content or all of the new."""
  path = epath.Path(path)
  if in_bucket(path):
    _upload(path, data)
    return
  aside = path.with_name(f".{path.name}.partial")
  path.parent.mkdir(parents=True, exist_ok=True)
  try:
    aside.write_bytes(data)
    aside.replace(path)
  except BaseException:
    aside.unlink(missing_ok=True)
    raise


def _upload(path: epath.Path, data: bytes) -> None:
  try:
    path.write_bytes(data)
  except Exception as error:  # of a client's many kinds
    raise OSError(
      f"{path} cannot be written ({reason(error)}); look at the bucket's name "
      "and your permissions."
    ) from error


def reason(error: Exception) -> str:
  """Return what an error says, in one short line."""
  said = getattr(error, "strerror", None) or str(error)
  return " ".join(said.split())[:200] or type(error).__name__


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
def new_folder(
  path: epath.PathLike, buckets: tuple[str, ...] = ()
) -> Iterator[epath.Path]:
  """Give a folder to fill; it gets its name when all went well, or is gone.

  In a bucket it has its name from the beginning: write last what makes it
  count, or a kill leaves a folder that looks whole.

  Args:
    buckets: as of `absolute`.

  Raises:
    ValueError: there is something of that name already, or it is elsewhere.
  """
  path = absolute(path, buckets)
  check_new(path)
  if in_bucket(path):
    aside, made = path, []
  else:
    aside = path.with_name(f".{path.name}.partial")
    made = [parent for parent in path.parents if not parent.exists()]
  aside.rmtree(missing_ok=True)  # what a killed process left
  _unfinished[aside] = made
  try:
    aside.mkdir(parents=True, exist_ok=True)
    yield aside
    if aside != path:
      aside.rename(path)
  except BaseException:
    _remove(aside)
    raise
  finally:
    del _unfinished[aside]


def check_new(path: epath.PathLike) -> None:
  """Raise ValueError if there is something of that name already."""
  # A link to nowhere is no existing path, but nothing can take its name.
  if epath.Path(path).exists() or os.path.lexists(path):
    raise ValueError(f"{str(path)!r} exists already; give a new folder.")


def check_new_file(path: epath.PathLike) -> None:
  """Raise ValueError if the name is taken, or its folder is missing."""
  path = absolute(path)
  if path.exists() or os.path.lexists(path):
    raise ValueError(f"{str(path)!r} exists already; give a new name.")
  if not path.parent.is_dir():
    raise ValueError(f"{str(path.parent)!r} is no folder; make it first.")


@contextlib.contextmanager
def removed_on_signals() -> Iterator[None]:
  """End the process on Ctrl-C and the like, without what is unfinished.

  An exception would have to find its way through threads of libraries, which
  swallow it, print it, or write on.
  """

  def end(number, frame):
    for aside in list(_unfinished):
      _remove(aside)
    print("var-jax: interrupted", file=sys.stderr, flush=True)
    os._exit(1)

  if threading.current_thread() is not threading.main_thread():
    yield  # signals are the main thread's
    return
  numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
  before = {number: signal.signal(number, end) for number in numbers}
  try:
    yield
  finally:
    for number, handler in before.items():
      signal.signal(number, handler)


# Folders being filled, and the parents that were made for them, innermost
# first.
_unfinished: dict[epath.Path, list[epath.Path]] = {}


def _remove(aside: epath.Path, tries: int = 50) -> None:
  """Remove an unfinished folder; other threads may still write into it."""
  for left in reversed(range(tries)):
    try:
      aside.rmtree(missing_ok=True)
      break
    except OSError:
      if not left:
        raise
      time.sleep(0.1)
  for parent in _unfinished[aside]:
    if parent.exists():
      parent.rmdir()


def sha256(path: epath.PathLike) -> str:
  """Return the SHA-256 of a file's content, in hexadecimal."""
  with epath.Path(path).open("rb") as file:
    return hashlib.file_digest(file, "sha256").hexdigest()
