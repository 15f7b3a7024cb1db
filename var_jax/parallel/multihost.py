"""Several processes: they start together, end together, and one writes."""

import atexit
import contextlib
import os
import sys
import uuid
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils

from var_jax import files
from var_jax.parallel import cluster, rendezvous
from var_jax.parallel.lifeline import Lifeline

JOIN_SECONDS = 300
HEARTBEAT_SECONDS = 100

_lifeline: Lifeline | None = None


def initialize(
  coordinator: str | None = None,
  processes: int | None = None,
  process_id: int | None = None,
  *,
  join_timeout: int = JOIN_SECONDS,
  heartbeat_timeout: int = HEARTBEAT_SECONDS,
) -> None:
  """Join the other processes, if there are any.

  Args:
    coordinator: HOST:PORT of process 0; what is None comes from
      JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID, or from
      the cluster (`cluster.py`).
    join_timeout: seconds to wait for all of them, at the start and at the end.
    heartbeat_timeout: seconds after which a silent one is given up.

  Raises:
    ValueError: what is said makes no sense.
    OSError: not all are here in time; the message says who is not.
  """
  global _lifeline
  place = cluster.said(coordinator, processes, process_id)
  place = place or cluster.detected(join_timeout)
  if place is None or place.processes == 1:
    return
  address, process = place.address, place.process
  links, names = rendezvous.meet(
    address, place.processes, process, join_timeout, heartbeat_timeout
  )
  _lifeline = Lifeline(process, links, names)
  # Before JAX's own end, which waits for the others: last in, first out.
  atexit.register(_lifeline.leave)
  try:
    jax.distributed.initialize(
      address,
      place.processes,
      process,
      place.local_devices,
      initialization_timeout=join_timeout,
      heartbeat_timeout_seconds=heartbeat_timeout,
      shutdown_timeout_seconds=join_timeout,
    )
  except RuntimeError as error:
    raise OSError(
      f"process {process} met the others at {address} and JAX did not join "
      f"them: {error}"
    ) from error


@contextlib.contextmanager
def joined(**flags) -> Iterator[None]:
  """Join as `initialize` does; what ends one process then ends them all.

  One that raises tells the others why, and does not wait for them. One that is
  lost ends the others with a line on stderr and exit code 1.
  """
  try:
    initialize(**flags)
    yield
  except BaseException as error:
    if _lifeline:
      _lifeline.fail(" ".join(str(error).split()) or type(error).__name__)
      end_without_waiting()
    raise


def end_without_waiting() -> None:
  """Let this process end with 1 when it ends, whatever is under way.

  JAX would wait for the others, and for programs that may never end.
  """
  atexit.register(_end_at_once)


def _end_at_once() -> None:
  if _lifeline:
    _lifeline.leave()
  sys.stdout.flush()
  sys.stderr.flush()
  os._exit(1)


def exchange(value: Any, seconds: float = JOIN_SECONDS) -> list[Any]:
  """Return what all processes give, by process, without their devices.

  Args:
    value: as JSON.

  Raises:
    OSError: one gave nothing within `seconds`; the message says which.
  """
  return _lifeline.exchange(value, seconds) if _lifeline else [value]


def enable_compile_cache(folder: epath.PathLike) -> None:
  """Keep compiled programs in a folder, and look for them there.

  Of several processes JAX lets the first write and all read. That is right for
  a folder that they share, and leaves nothing to read where each host has a
  disk of its own: there every process writes. On CPU the first process alone
  finds programs in a shared folder, since JAX names them after the process.

  Call it before anything is compiled.

  Raises:
    ValueError: the folder cannot be written to.
  """
  folder = files.absolute(folder)
  mark = folder / f".{uuid.uuid4().hex}"
  try:
    folder.mkdir(parents=True, exist_ok=True)
    mark.write_text("")
  except Exception as error:  # a bucket's client has many kinds
    raise ValueError(
      f"compile cache {folder} cannot be written to ({files.reason(error)}); "
      "give another folder."
    ) from None
  first, *_ = exchange(mark.name)
  shared = (folder / first).exists()
  exchange(shared)  # all have looked
  mark.unlink()
  jax.config.update("jax_compilation_cache_dir", os.fspath(folder))
  if not shared:
    _write_from_this_process()


def _write_from_this_process() -> None:
  from jax._src import compilation_cache, compiler

  def write(key, seconds, name, backend, executable, host_callbacks=()):
    least = jax.config.jax_persistent_cache_min_compile_time_secs
    if host_callbacks or seconds < least:
      return
    try:
      compilation_cache.put_executable_and_time(
        key, name, executable, backend, int(seconds)
      )
    except Exception as error:  # as JAX does: a run goes on without
      warnings.warn(
        f"{name} is not in the compile cache: {error}", stacklevel=2
      )

  # JAX 0.10 to 0.12 have no setting for it; 0.11 dropped `host_callbacks`.
  compiler._cache_write = write


def first_writes(write: Callable[[], None]) -> None:
  """Let the first process write while the others wait for it.

  It begins when all are here: none can have seen what is only now written.
  """
  multihost_utils.sync_global_devices("the first process may write")
  if jax.process_index() == 0:
    write()
  multihost_utils.sync_global_devices("the first process has written")


def gathered(array: jax.Array) -> np.ndarray:
  """Return the whole of an array that lies on devices of all processes.

  Each of them calls it, in the same order as the others.
  """
  if array.is_fully_addressable or array.is_fully_replicated:
    return np.asarray(array)
  return np.asarray(multihost_utils.process_allgather(array, tiled=True))
