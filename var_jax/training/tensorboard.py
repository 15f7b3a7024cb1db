"""Event files for TensorBoard, written without TensorFlow.

tensorboardX encodes them. Its `SummaryWriter` is passed over: it writes in a
thread that a full disk ends in silence, and then blocks whoever logs. In a
bucket, `appended.open_file` is what it writes to.
"""

import time
from collections.abc import Mapping

import numpy as np
from etils import epath

from var_jax import appended, files

# Between syncs with a disk; a kill costs at most this.
_FLUSH_SECONDS = 5.0


class EventFile:
  """One process's events, in a file of its own.

  TensorBoard is told to forget the steps after `start` that files before this
  one have: a resumed run takes them again.

  Args:
    folder: created if missing.
  """

  def __init__(self, folder: epath.Path, start: int):
    # tensorboardX imports torch where there is one, which takes seconds.
    from tensorboardX.event_file_writer import EventsWriter
    from tensorboardX.proto.event_pb2 import SessionLog
    from tensorboardX.record_writer import register_writer_factory

    self._in_bucket = files.in_bucket(folder)
    if self._in_bucket:
      register_writer_factory("gs", _Bucket)
    folder.mkdir(parents=True, exist_ok=True)
    # The name has the second; a run can be resumed within it.
    self._writer = EventsWriter(str(folder / "events"), f".{start:09d}")
    self._flushed = time.monotonic()
    self._write(
      start + 1, session_log=SessionLog(status=SessionLog.SessionStatus.START)
    )

  def scalars(self, step: int, values: Mapping[str, float]) -> None:
    from tensorboardX.proto.summary_pb2 import Summary

    named = [
      Summary.Value(tag=name, simple_value=value)
      for name, value in values.items()
    ]
    self._write(step, summary=Summary(value=named))

  def image(self, step: int, name: str, pixels_HW3: np.ndarray) -> None:
    from tensorboardX import summary

    picture = summary.image(name, pixels_HW3, dataformats="HWC")
    self._write(step, summary=picture)

  def flush(self) -> None:
    self._writer.flush()
    self._flushed = time.monotonic()

  def close(self) -> None:
    self._writer.close()

  def _write(self, step: int, **content) -> None:
    from tensorboardX.proto.event_pb2 import Event

    self._writer.write_event(Event(wall_time=time.time(), step=step, **content))
    if self._in_bucket:
      return  # it uploads by itself
    if time.monotonic() - self._flushed > _FLUSH_SECONDS:
      self.flush()


class _Bucket:
  """What tensorboardX asks for a file; its own needs a client of its own."""

  @staticmethod
  def open(path: str) -> appended.FileInBucket:
    return appended.FileInBucket(epath.Path(path))
