"""How far a token cache is: a bar on a terminal, a line a shard in a log."""

import time

import rich.console
import rich.progress


class Report:
  """Shows the way still to go, within its `with` block.

  Args:
    samples: that this process has to encode.
    shards: that these make.
  """

  def __init__(self, samples: int, shards: int):
    self._samples, self._shards = samples, shards
    self._done = self._written = 0
    self._since = None  # (time, samples): from the first batch on, compiled
    self._console = rich.console.Console(stderr=True)
    self._bar = rich.progress.Progress(
      rich.progress.TextColumn("{task.description}"),
      rich.progress.BarColumn(),
      rich.progress.MofNCompleteColumn(),
      rich.progress.TextColumn("samples, eta"),
      rich.progress.TimeRemainingColumn(),
      console=self._console,
      disable=not self._console.is_terminal,
    )
    self._task = self._bar.add_task("token cache", total=samples)

  def __enter__(self) -> "Report":
    self._bar.start()
    return self

  def __exit__(self, *exception) -> None:
    self._bar.stop()

  def advance(self, samples: int) -> None:
    self._done += samples
    self._since = self._since or (time.monotonic(), self._done)
    self._bar.advance(self._task, samples)

  def shard_is_written(self) -> None:
    self._written += 1
    if self._console.is_terminal:
      return
    start, before = self._since
    rate = (self._done - before) / max(time.monotonic() - start, 1e-9)
    eta = (self._samples - self._done) / rate / 60 if rate else float("nan")
    self._console.print(
      f"shard {self._written}/{self._shards}  {self._done}/{self._samples} "
      f"samples  {rate:.1f} samples/s  eta {eta:.1f} min",
      highlight=False,
    )
