"""What a run says of itself: metrics.jsonl, TensorBoard, a bar or lines.

Every step's numbers come in, their means between two logs go out. All of it
is NumPy on the host: nothing here makes a device work or waits for one.
"""

import contextlib
import datetime
import json
import math
import resource
import sys
import time
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
import rich.console
import rich.progress
from clu import parameter_overview
from etils import epath
from flax.traverse_util import flatten_dict

from var_jax import appended, files
from var_jax.training import flops
from var_jax.training.interval import Clock, Means
from var_jax.training.tensorboard import EventFile

# What a line says of speed and memory; all else in it is the same whenever
# the run is made again.
TIMING_KEYS = (
  "images_per_second",
  "tokens_per_second",
  "mfu",
  "step_seconds",
  "data_wait_share",
  "memory_gib",
  "host_memory_gib",
  "eta_seconds",
)


class Report:
  """Gathers the numbers of steps; the first of several processes shows them.

  Lines of steps after `start` are dropped first: a resumed run takes those
  steps again.

  Args:
    start: the step that is reached already.
    batch_size: images a step, of all processes.
    tokens_per_image: may be set anew when the program of the steps changes.
    flops_per_step: model FLOPs of all devices; may be set anew likewise.
    devices: how many, of all processes.
    console: where the bar or the lines go; standard error if None.
  """

  def __init__(
    self,
    *,
    workdir: epath.Path,
    start: int,
    steps: int,
    batch_size: int,
    tokens_per_image: int,
    flops_per_step: float,
    devices: int,
    device_kind: str,
    console: rich.console.Console | None = None,
  ):
    self.tokens_per_image = tokens_per_image
    self.flops_per_step = flops_per_step
    self._workdir, self._steps, self._batch_size = workdir, steps, batch_size
    peak = flops.peak(device_kind)
    self._peak = peak * devices if peak else None
    self._means, self._clock = Means(), Clock()
    self._writes = jax.process_index() == 0
    if self._writes:
      path = workdir / "metrics.jsonl"
      files.write_bytes(path, "".join(_lines_up_to(path, start)).encode())
      self._file = appended.open_file(path)
      self._events = EventFile(workdir / "tensorboard", start)
      self._console = console or rich.console.Console(stderr=True)
    else:
      self._console = rich.console.Console(quiet=True)
    self._bar = None
    if self._console.is_terminal and self._writes:
      self._bar = _bar(self._console)
      self._task = self._bar.add_task(
        workdir.name, total=steps, completed=start, numbers=""
      )
      self._bar.start()

  def overview(self, params: Mapping[str, Any]) -> None:
    """Show names, shapes and sizes of parameters; write parameters.txt."""
    table = parameter_overview.get_parameter_overview(
      params, include_stats=False
    )
    self.message(table)
    if self._writes:
      path = self._workdir / "parameters.txt"
      files.write_bytes(path, f"{table}\n".encode())

  def advance(self, step: int) -> None:
    """Move the bar."""
    if self._bar:
      self._bar.update(self._task, completed=step)

  def step(self, step: int, values: Mapping[str, Any]) -> None:
    """Take in the numbers of a step: a nested dict of scalars on the host.

    Where "skipped" is not 0 the step is counted, and is part of no mean.
    """
    self._clock.tick(
      tokens=self._batch_size * self.tokens_per_image,
      flops=self.flops_per_step,
    )
    self._means.add(_flat(values))

  def waited(self, seconds: float) -> None:
    """Count seconds in which the devices had no data."""
    self._clock.waited += seconds

  @contextlib.contextmanager
  def pause(self) -> Iterator[None]:
    """Keep what happens within out of all rates."""
    since = time.monotonic()
    try:
      yield
    finally:
      self._clock.paused += time.monotonic() - since

  def log(self, step: int) -> None:
    """Write the means since the last log, and begin anew."""
    values, rates = self._means.compute(), self._rates(step)
    self._means, self._clock = Means(), self._clock.next()
    self._write(step, values | rates | _memory())
    numbers = _numbers(values, rates)
    if self._bar:
      self._bar.update(self._task, numbers=numbers)
    else:
      self.message(f"step {step}/{self._steps}  {numbers}")

  def evaluation(self, step: int, values: Mapping[str, Any]) -> None:
    """Write what was measured on held-out samples at `step`."""
    flat = {f"eval/{name}": value for name, value in _flat(values).items()}
    self._write(step, flat)
    shown = [
      f"{name} {value:.4f}"
      for name, value in flat.items()
      if name.count("/") == 1  # not of each scale
    ]
    self.message(f"step {step}/{self._steps}  {'  '.join(shown)}")

  def images(self, step: int, name: str, pixels_HW3: np.ndarray) -> None:
    """Show a uint8 picture."""
    if self._writes:
      self._events.image(step, name, pixels_HW3)

  def message(self, text: str) -> None:
    """Print lines above the bar, or into the log."""
    # Lines of a log are as long as they are, and a path may look like markup.
    self._console.print(text, markup=False, highlight=False, soft_wrap=True)

  def flush(self) -> None:
    """Put where it stays what was written so far."""
    if self._writes:
      self._file.flush()
      self._events.flush()

  def close(self) -> None:
    if self._bar:
      self._bar.stop()
    if self._writes:
      self._file.close()
      self._events.close()

  def _write(self, step: int, values: Mapping[str, float]) -> None:
    if not self._writes:
      return
    # JSON has no NaN; a reader must still see that the loss was one.
    record = {k: v if math.isfinite(v) else str(v) for k, v in values.items()}
    self._file.write((json.dumps({"step": step, **record}) + "\n").encode())
    self._events.scalars(step, values)

  def _rates(self, step: int) -> dict[str, float]:
    """Return speeds since the last log; none from the first step alone."""
    clock = self._clock
    if not clock.steps:
      return {}
    seconds = max(clock.seconds, 1e-9)
    rates = {
      "images_per_second": clock.steps * self._batch_size / seconds,
      "tokens_per_second": clock.tokens / seconds,
      "step_seconds": seconds / clock.steps,
      "data_wait_share": clock.waited / seconds,
      "eta_seconds": seconds / clock.steps * (self._steps - step),
    }
    if self._peak:
      rates["mfu"] = clock.flops / seconds / self._peak
    return rates


def _flat(values: Mapping[str, Any]) -> dict[str, float]:
  return {k: float(v) for k, v in flatten_dict(values, sep="/").items()}


def _memory() -> dict[str, float]:
  """Return the most that a device, or else the process, ever held, GiB."""
  peaks = [
    stats["peak_bytes_in_use"]
    for device in jax.local_devices()
    if (stats := device.memory_stats()) and "peak_bytes_in_use" in stats
  ]
  if peaks:
    return {"memory_gib": max(peaks) / 2**30}
  # Kilobytes, but bytes on macOS.
  unit = 1 if sys.platform == "darwin" else 1024
  most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  return {"host_memory_gib": most * unit / 2**30}


def _numbers(values: Mapping[str, float], rates: Mapping[str, float]) -> str:
  """Return what a reader wants to see at a glance, in one line."""
  parts = []
  for name, label in (("loss", "loss"), ("accuracy_mean", "accuracy")):
    if name in values:
      parts.append(f"{label} {values[name]:.4f}")
  if values["skipped_steps"]:
    parts.append(f"skipped {values['skipped_steps']}")
  if rates:
    parts.append(f"{rates['images_per_second']:.1f} images/s")
  if "mfu" in rates:
    parts.append(f"MFU {rates['mfu']:.1%}")
  if rates:
    left = datetime.timedelta(seconds=round(rates["eta_seconds"]))
    parts.append(f"eta {left}")
  return "  ".join(parts)


def _bar(console: rich.console.Console) -> rich.progress.Progress:
  progress = rich.progress
  return progress.Progress(
    progress.TextColumn("{task.description}", markup=False),
    progress.BarColumn(),
    progress.MofNCompleteColumn(),
    progress.TimeElapsedColumn(),
    progress.TextColumn("{task.fields[numbers]}", markup=False),
    console=console,
  )


def _lines_up_to(path: epath.Path, step: int) -> list[str]:
  """Return the lines of a log that are whole and of `step` or before."""
  if not path.exists():
    return []
  kept = []
  for line in path.read_text().splitlines():
    try:
      if json.loads(line)["step"] <= step:
        kept.append(f"{line}\n")
    except ValueError:  # the line that a kill cut short
      continue
  return kept
