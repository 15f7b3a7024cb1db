"""SIGTERM: noticed between two steps, so that the current one can be saved."""

import os
import signal
import threading

import jax
from jax.experimental import multihost_utils


class Preempted(Exception):
  """A run was told to stop; the step it had reached is saved."""

  def __init__(self, step: int, workdir):
    what = f"step {step} is saved" if step else "no step was taken yet"
    super().__init__(
      f"stopped by SIGTERM; {what} in {workdir}: run the same command to go on."
    )
    self.step = step


class Watch:
  """Notices SIGTERM within the `with` block, in place of dying of it."""

  def __init__(self):
    self._asked = False
    self._before = None

  def __enter__(self) -> "Watch":
    # JAX's own handler serves several processes; threads cannot have one.
    main = threading.current_thread() is threading.main_thread()
    if main and jax.process_count() == 1:
      self._before = signal.signal(signal.SIGTERM, self._note)
    return self

  def __exit__(self, *exception) -> None:
    if self._before is not None:
      signal.signal(signal.SIGTERM, self._before)

  def asked(self, step: int) -> bool:
    """Return whether to save `step` and end: all processes say the same."""
    if jax.process_count() > 1:
      return multihost_utils.reached_preemption_sync_point(step)
    return self._asked

  def noticed(self) -> bool:
    """Return whether this process was asked; between steps use `asked`."""
    # Of several processes each would leave on its own.
    return self._asked and jax.process_count() == 1

  def _note(self, number, frame) -> None:
    if not self._asked:
      os.write(2, b"SIGTERM: saving after the step that is under way\n")
    self._asked = True
