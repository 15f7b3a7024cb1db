"""An xprof trace of a few steps: `tensorboard --logdir WORKDIR/profile`."""

import contextlib
import pathlib
import shutil
import tempfile
from typing import Any

import jax
from etils import epath

from var_jax import files


class Profiler:
  """Traces the steps first..last, each under its number.

  Only process 0 writes: of a program that all run, one host's trace shows it.

  Args:
    folder: of the traces, made when the first step comes. One in a bucket gets
      them when the trace ends.
    steps: (first, last), both traced; None traces nothing.
  """

  def __init__(self, folder: epath.PathLike, steps: tuple[int, int] | None):
    self._folder = epath.Path(folder)
    self._first, self._last = steps or (0, -1)
    self._tracing = False

  def step(self, step: int, state: Any) -> contextlib.AbstractContextManager:
    """Return what step `step` is to be taken within.

    Args:
      state: that the step begins with. It is waited for where the trace begins
        and ends, so that neither cuts through a step.
    """
    within = self._first <= step <= self._last and jax.process_index() == 0
    if within != self._tracing:
      jax.block_until_ready(state)
      if within:
        self._start()
      else:
        self.close()
    if within:
      return jax.profiler.StepTraceAnnotation("train", step_num=step)
    return contextlib.nullcontext()

  def close(self) -> None:
    """End the trace, if the run ends before its last step is passed."""
    if not self._tracing:
      return
    self._tracing = False
    jax.profiler.stop_trace()
    if self._written_to != self._folder:
      _move(pathlib.Path(self._written_to), self._folder)

  def _start(self) -> None:
    self._written_to = self._folder
    if files.in_bucket(self._folder):  # the profiler knows files alone
      self._written_to = tempfile.mkdtemp()
    jax.profiler.start_trace(self._written_to)
    self._tracing = True


def _move(folder: pathlib.Path, to: epath.Path) -> None:
  for path in folder.rglob("*"):
    if path.is_file():
      files.write_bytes(to / path.relative_to(folder), path.read_bytes())
  shutil.rmtree(folder)
