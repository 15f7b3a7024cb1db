"""Files that grow at their end, on a disk or in a bucket.

A bucket takes whole objects only. A file there is held in memory and uploaded
by `flush`, and by itself every minute or, where uploading takes long, every
twentieth of the time. So a process that is killed loses what came after the
last flush: flush before what is to vouch for it is written.
"""

import fcntl
import io
import os
import pathlib
import time
from collections.abc import Iterable

from etils import epath

from var_jax import files

_UPLOAD_SECONDS = 60.0
_UPLOAD_SHARE = 20


def open_file(
  path: epath.PathLike, locked: bool = False
) -> "FileOnDisk | FileInBucket":
  """Open a file to append to; it and its folder are made if missing.

  Args:
    locked: no other process may have it open like this. A bucket has no locks:
      there the first of two writers that uploads after the other raises.

  Raises:
    ValueError: another process has it locked.
  """
  path = epath.Path(path)
  if files.in_bucket(path):
    return FileInBucket(path)
  return FileOnDisk(path, locked)


class FileOnDisk:
  """What is written is with the kernel, and survives a kill."""

  def __init__(self, path: epath.PathLike, locked: bool = False):
    self._path = os.fspath(path)
    pathlib.Path(self._path).parent.mkdir(parents=True, exist_ok=True)
    self._file = open(self._path, "a+b", buffering=0)
    self._reader = io.BufferedReader(self._file)
    try:
      if locked:
        self._lock()
      self._size = os.fstat(self._file.fileno()).st_size
    except BaseException:
      self._file.close()
      raise

  def lines(self) -> Iterable[bytes]:
    """Return what was there when it was opened, line by line."""
    self._reader.seek(0)
    return self._reader

  def truncate(self, size: int) -> None:
    """Drop what comes after the first `size` bytes."""
    self._file.truncate(size)
    self._size = size

  def write(self, data: bytes) -> None:
    """Append all of `data`, or nothing."""
    rest = memoryview(data)
    try:
      while rest:  # once, unless the disk is nearly full
        rest = rest[self._file.write(rest) :]
    except BaseException:
      self._file.truncate(self._size)
      raise
    self._size += len(data)

  def flush(self) -> None:
    """Wait until all is on the disk."""
    os.fsync(self._file.fileno())

  def close(self) -> None:
    """Flush and close; a second time does nothing."""
    if not self._file.closed:
      self.flush()
      self._file.close()

  def drop(self) -> None:
    """Close without a flush."""
    self._file.close()

  def _lock(self) -> None:
    # lockf, not flock: a forked data worker that outlives a killed run must
    # not hold the lock. The price: reading the file in this process drops it.
    try:
      fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
      raise ValueError(
        f"{self._path} is being written by another process; stop that run, or "
        "use another --workdir."
      ) from None
    except OSError:
      pass  # a file system without locks


class FileInBucket:
  """What is written is in the bucket when it is flushed."""

  def __init__(self, path: epath.Path):
    self._path = path
    self._content = bytearray(path.read_bytes() if path.exists() else b"")
    self._uploaded = len(self._content)  # size of the object
    self._changed = False
    self._flushed, self._pause = time.monotonic(), _UPLOAD_SECONDS

  def lines(self) -> Iterable[bytes]:
    """Return what was there when it was opened, line by line."""
    return io.BytesIO(self._content)

  def truncate(self, size: int) -> None:
    """Drop what comes after the first `size` bytes."""
    self._changed |= size < len(self._content)
    del self._content[size:]

  def write(self, data: bytes) -> None:
    """Append `data`; upload, if that was long ago."""
    self._content += data
    self._changed = True
    if time.monotonic() - self._flushed > self._pause:
      self.flush()

  def flush(self) -> None:
    """Upload, if anything is new.

    Raises:
      ValueError: the object is not of the size that it was left with.
      OSError: the bucket cannot be reached.
    """
    if not self._changed:
      return
    begin = time.monotonic()
    there = self._length()
    if there != self._uploaded:
      raise ValueError(
        f"{self._path} has {there} bytes and was left with {self._uploaded}: "
        "another process writes it; stop that run, or use another --workdir."
      )
    files.write_bytes(self._path, bytes(self._content))
    self._uploaded, self._changed = len(self._content), False
    self._flushed = time.monotonic()
    took = self._flushed - begin
    self._pause = max(_UPLOAD_SECONDS, _UPLOAD_SHARE * took)

  def _length(self) -> int:
    try:
      return self._path.stat().length
    except FileNotFoundError:
      return 0
    except Exception as error:  # of a client's many kinds
      raise OSError(
        f"{self._path} cannot be reached ({files.reason(error)}); look at the "
        "network and your permissions."
      ) from error

  def close(self) -> None:
    """Flush; a second time does nothing."""
    self.flush()

  def drop(self) -> None:
    """Forget what is not uploaded."""
    self._changed = False
