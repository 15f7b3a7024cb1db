"""An xprof trace of a few steps: `tensorboard --logdir WORKDIR/profile`."""

import contextlib
from typing import Any

import jax
from etils import epath


class Profiler:
  """Traces the steps first..last, each under its number.

  Only process 0 writes: of a program that all run, one host's trace shows it.

  Args:
    folder: of the traces, made when the first step comes.
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
        jax.profiler.start_trace(self._folder)
        self._tracing = True
      else:
        self.close()
    if within:
      return jax.profiler.StepTraceAnnotation("train", step_num=step)
    return contextlib.nullcontext()

  def close(self) -> None:
    """End the trace, if the run ends before its last step is passed."""
    if self._tracing:
      self._tracing = False
      jax.profiler.stop_trace()
