"""Arrays of .npz files that may be damaged, or something else."""

import zipfile
import zlib

import numpy as np

# All that NumPy and zipfile raise for what is no archive of arrays.
DAMAGE = (
  ValueError, OSError, EOFError, KeyError, TypeError, AttributeError,
  RuntimeError, zipfile.BadZipFile, zlib.error,
)  # fmt: skip


def read(path: str, name: str, remedy: str) -> np.ndarray:
  """Return an array of numbers.

  Raises:
    ValueError: it cannot be read, with the remedy.
  """
  try:
    with np.load(path, allow_pickle=False) as arrays:
      found = arrays[name]
      if not isinstance(found, np.ndarray) or found.dtype.kind not in "biuf":
        raise TypeError("no array of real numbers")
      return found
  except DAMAGE as error:
    # Not its text: NumPy's advises to unpickle what it cannot read.
    raise ValueError(
      f"{path}: {name} cannot be read ({type(error).__name__}); {remedy}."
    ) from None
