"""Broken samples: refused by name, or counted and passed over.

A sample is broken when its source raises ValueError, or when the transform
cannot use it. A file that cannot be read at this moment raises OSError and
stops the run under either policy: what a position yields must follow from the
data, not from the weather.
"""

import dataclasses
from collections.abc import Callable, Mapping

import numpy as np

from var_jax.data.sources import Source

POLICIES = ("fail", "skip")

# More in a row is a mistake in the data or its mount, not a few bad files.
MAX_SKIPPED = 100


@dataclasses.dataclass(frozen=True)
class Tolerant:
  """A source whose samples say where they come from.

  Sample i gets "index", the one that was really used, and "skipped", how many
  were passed over to find it: i, i + 1, ... modulo the length. So it remains a
  function of i and the data.

  Args:
    on_broken: "fail" raises ValueError; "skip" takes the next sample.
    refusal: says of an image why it cannot be used, or returns None.
  """

  source: Source
  on_broken: str = "fail"
  refusal: Callable[[np.ndarray], str | None] | None = None

  def __post_init__(self):
    if self.on_broken not in POLICIES:
      raise ValueError(
        f"policy {self.on_broken!r} for broken images is unknown; use one of "
        f"{', '.join(POLICIES)}."
      )

  @property
  def class_names(self) -> tuple[str, ...]:
    return self.source.class_names

  def name_of(self, i: int) -> str:
    return self.source.name_of(i)

  def __len__(self) -> int:
    return len(self.source)

  def __getitem__(self, i: int) -> dict:
    first = None
    tries = min(len(self), MAX_SKIPPED + 1)
    for skipped in range(tries):
      index = (i + skipped) % len(self)
      try:
        sample = self._usable(index)
      except ValueError as error:
        if self.on_broken == "fail":
          raise
        first = first or error
      else:
        return sample | {"index": index, "skipped": skipped}
    raise ValueError(
      f"{tries} samples in a row are broken, from {self.name_of(i)} on; the "
      f"first: {first}"
    )

  def _usable(self, index: int) -> dict:
    sample = self.source[index]
    if self.refusal and "image" in sample:
      reason = self.refusal(sample["image"])
      if reason:
        raise ValueError(f"{self.name_of(index)}: {reason}")
    return sample


def broken_names(
  source: Source, batch: Mapping[str, np.ndarray]
) -> tuple[str, ...]:
  """Return the names of the samples that a batch passed over, each once."""
  names = {}  # Keeps the order.
  rows = zip(batch["index"], batch["skipped"], strict=True)
  for index, skipped in rows:
    for back in range(int(skipped), 0, -1):
      names[source.name_of((int(index) - back) % len(source))] = None
  return tuple(names)
