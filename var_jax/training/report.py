"""What a run says of itself: metrics.jsonl and a progress bar."""

import json
import math
import time
from collections.abc import Mapping

import jax
import rich.console
import rich.progress
from etils import epath
from flax.traverse_util import flatten_dict

from var_jax import files


class Report:
  """Writes a JSON line per logged step and shows the way still to go.

  Lines of steps after `start` are dropped first: a resumed run takes those
  steps again.

  Args:
    batch_size: samples a step, for the rate.
  """

  def __init__(
    self, workdir: epath.Path, start: int, steps: int, batch_size: int
  ):
    self._path = workdir / "metrics.jsonl"
    self._lines = _lines_up_to(self._path, start)
    self._batch_size = batch_size
    self._since = None  # (time, step): from the first step on, compiled
    console = rich.console.Console(stderr=True)
    self._plain = not console.is_terminal
    self._bar = rich.progress.Progress(
      rich.progress.TextColumn("{task.description}"),
      rich.progress.BarColumn(),
      rich.progress.MofNCompleteColumn(),
      rich.progress.TimeElapsedColumn(),
      rich.progress.TextColumn("eta"),
      rich.progress.TimeRemainingColumn(),
      rich.progress.TextColumn("{task.fields[numbers]}"),
      console=console,
      disable=self._plain,
    )
    self._task = self._bar.add_task(
      workdir.name, total=steps, completed=start, numbers=""
    )
    self._console, self._steps = console, steps
    files.write_bytes(self._path, "".join(self._lines).encode())
    self._bar.start()

  def advance(self, step: int) -> None:
    if self._since is None:
      self._since = (time.monotonic(), step)
    self._bar.update(self._task, completed=step)

  def write(self, step: int, metrics: Mapping[str, jax.Array]) -> None:
    """Log the metrics of `step`, which this waits for."""
    values = {
      k: float(v)
      for k, v in flatten_dict(jax.device_get(metrics), sep="/").items()
    }
    now = time.monotonic()
    if self._since is None:
      self._since = (now, step)
    seconds = (now - self._since[0]) / max(step - self._since[1], 1)
    self._since = (now, step)
    values["images_per_second"] = self._batch_size / max(seconds, 1e-9)
    # JSON has no NaN; a reader must still see that the loss was one.
    record = {k: v if math.isfinite(v) else str(v) for k, v in values.items()}
    with self._path.open("a") as file:
      file.write(json.dumps({"step": step, **record}) + "\n")
    numbers = f"loss {values['loss']:.4f}"
    self._bar.update(self._task, numbers=numbers)
    if self._plain:
      rate = values["images_per_second"]
      left = seconds * (self._steps - step)
      self._console.print(
        f"step {step}/{self._steps}  {numbers}  {rate:.1f} images/s  "
        f"eta {left / 60:.1f} min",
        highlight=False,
      )

  def close(self) -> None:
    self._bar.stop()


def _lines_up_to(path: epath.Path, step: int) -> list[str]:
  if not path.exists():
    return []
  kept = []
  for line in path.read_text().splitlines(keepends=True):
    try:
      if json.loads(line)["step"] <= step:
        kept.append(line)
    except ValueError:  # the line that a kill cut short
      continue
  return kept
