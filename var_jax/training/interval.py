"""What happens between two logs: means of numbers, and where time went.

NumPy on the host alone: a device neither works for it nor is waited for.
"""

import dataclasses
import math
import time

import numpy as np
from clu import metrics


class Means:
  """What the numbers of steps were on average."""

  def __init__(self):
    self._averages: dict[str, metrics.Average] = {}
    self._skipped = 0

  def add(self, values: dict[str, float]) -> None:
    taken = not values.pop("skipped", 0.0)
    self._skipped += not taken
    for name, value in values.items():
      # Of NumPy: what the class makes itself are arrays on a device.
      total = np.float64(value if taken else 0.0)
      average = metrics.Average(total=total, count=np.int64(taken))
      before = self._averages.get(name)
      self._averages[name] = before.merge(average) if before else average

  def compute(self) -> dict[str, float]:
    """Return the means, NaN where all steps were skipped, and their count."""
    means = {
      name: float(average.compute()) if average.count else math.nan
      for name, average in self._averages.items()
    }
    return means | {"skipped_steps": self._skipped}


@dataclasses.dataclass
class Clock:
  """The time that steps took, and what was done in it.

  It runs from the end of the first step on, which compiles the program.
  """

  last: float | None = None  # when the latest step ended
  paused: float = 0.0  # seconds since then that do not count
  seconds: float = 0.0
  steps: int = 0
  tokens: int = 0
  flops: float = 0.0
  waited: float = 0.0

  def tick(self, tokens: int, flops: float) -> None:
    """Note the end of a step."""
    now = time.monotonic()
    if self.last is None:
      self.waited = 0.0
    else:
      self.seconds += now - self.last - self.paused
      self.steps += 1
      self.tokens += tokens
      self.flops += flops
    self.last, self.paused = now, 0.0

  def next(self) -> "Clock":
    """Return the clock of the steps that follow."""
    return Clock(self.last, self.paused)
