"""Several processes: how they find each other, and who writes."""

import os
from collections.abc import Callable

import jax
import numpy as np
from jax.experimental import multihost_utils

_ADDRESS = "JAX_COORDINATOR_ADDRESS"
_COUNTS = ("JAX_NUM_PROCESSES", "JAX_PROCESS_ID")


def initialize() -> None:
  """Join the other processes, if the environment names a coordinator.

  Raises:
    ValueError: it does not say how many there are, or which this is.
  """
  if _ADDRESS not in os.environ:
    return
  numbers = []
  for name in _COUNTS:
    text = os.environ.get(name, "")
    if not text.isdigit():
      raise ValueError(
        f"{name} is {text!r} and {_ADDRESS} is set; give a number to each "
        "process, ids from 0."
      )
    numbers.append(int(text))
  jax.distributed.initialize(os.environ[_ADDRESS], *numbers)


def first_writes(write: Callable[[], None]) -> None:
  """Let the first process write while the others wait for it.

  It begins when all are here: none can have seen what is only now written.
  """
  multihost_utils.sync_global_devices("the first process may write")
  if jax.process_index() == 0:
    write()
  multihost_utils.sync_global_devices("the first process has written")


def gathered(array: jax.Array) -> np.ndarray:
  """Return the whole of an array that lies on devices of all processes."""
  if array.is_fully_addressable:
    return np.asarray(array)
  return np.asarray(multihost_utils.process_allgather(array, tiled=True))
