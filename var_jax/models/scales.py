"""Scale lists of next-scale prediction (arXiv 2404.02905, section 3.1).

An image is S token maps of growing size; flattened coarse to fine and
concatenated they are one sequence of L tokens. This file knows which tokens
belong to which scale, and nothing else. NumPy only.
"""

import dataclasses
import itertools

import numpy as np

Size = int | tuple[int, int]

# The published lists, by image side in pixels (16 pixels a token).
SCALES = {
  256: (1, 2, 3, 4, 5, 6, 8, 10, 13, 16),
  512: (1, 2, 3, 4, 6, 9, 13, 18, 24, 32),
  1024: (1, 2, 3, 4, 5, 7, 9, 12, 16, 21, 27, 36, 48, 64),
}


@dataclasses.dataclass(frozen=True)
class ScaleSchedule:
  """The token maps of an image, coarse to fine.

  Args:
    sizes: one entry a scale, non-decreasing: the side of a square map, or
      its (h, w). The last one is the latent grid.

  Raises:
    ValueError: the list is empty, decreases, or has a side below 1.
  """

  sizes: tuple[Size, ...]

  def __post_init__(self):
    sizes = tuple(_canonical(size) for size in self.sizes)
    object.__setattr__(self, "sizes", sizes)
    if not sizes:
      raise ValueError("scale list () is empty; give at least one size.")
    shapes = self.shapes
    for previous, current in itertools.pairwise(shapes):
      if current[0] < previous[0] or current[1] < previous[1]:
        raise ValueError(
          f"scale list {sizes} decreases from {previous} to {current}; "
          "list the sizes from coarse to fine."
        )
    if min(min(shape) for shape in shapes) < 1:
      raise ValueError(f"scale list {sizes} has a side below 1; use 1 or more.")

  def __len__(self) -> int:
    return len(self.sizes)

  @property
  def shapes(self) -> tuple[tuple[int, int], ...]:
    return tuple(n if isinstance(n, tuple) else (n, n) for n in self.sizes)

  @property
  def grid(self) -> tuple[int, int]:
    """Return (h, w) of the finest map, which is the latent grid."""
    return self.shapes[-1]

  @property
  def num_tokens(self) -> int:
    """Return L, the tokens of all scales."""
    return self.end(len(self) - 1)

  def start(self, s: int) -> int:
    return sum(h * w for h, w in self.shapes[:s])

  def end(self, s: int) -> int:
    return self.start(s + 1)

  def covered(self, num_tokens: int) -> int:
    """Return how many scales the first `num_tokens` tokens are.

    Raises:
      ValueError: the tokens end inside a scale.
    """
    for s in range(len(self)):
      if self.end(s) == num_tokens:
        return s + 1
    ends = [self.end(s) for s in range(len(self))]
    raise ValueError(
      f"{num_tokens} tokens end inside a scale of {self.sizes}; "
      f"use one of {ends}."
    )

  def ratio(self, s: int) -> float:
    """Return s / (S-1), how far scale s is on the way to the finest."""
    # A list of one scale is its own start and end; the official code divides
    # by zero here.
    return s / max(len(self) - 1, 1)

  def level_ids(self) -> np.ndarray:
    """Return the scale of each token, int32 [L]."""
    counts = [h * w for h, w in self.shapes]
    return np.repeat(np.arange(len(self), dtype=np.int32), counts)

  def block_causal_mask(self) -> np.ndarray:
    """Return bool [L, T=L]: True where query l may see key t.

    A token sees its own scale and all coarser ones (paper section 3.2).
    """
    level_L = self.level_ids()
    return level_L[:, None] >= level_L[None, :]


def _canonical(size: Size) -> Size:
  """Write a square map as its side, so that equal lists compare equal."""
  if isinstance(size, (int, np.integer)):
    return int(size)
  h, w = (int(n) for n in size)
  return h if h == w else (h, w)
