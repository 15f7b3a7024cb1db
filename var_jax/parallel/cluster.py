"""Where processes meet and which of them this is.

Flags say it, or else the environment, or else what runs the processes: TPU VMs,
GKE, Slurm and indexed jobs of Kubernetes are asked; a plain machine is alone.
"""

import dataclasses
import importlib.util
import os
from collections.abc import Mapping, Sequence

from var_jax.parallel import rendezvous

_ADDRESS = "JAX_COORDINATOR_ADDRESS"
_NUMBERS = {
  "--processes": "JAX_NUM_PROCESSES",
  "--process-id": "JAX_PROCESS_ID",
}


@dataclasses.dataclass(frozen=True)
class Place:
  """Of one process among the others."""

  address: str  # HOST:PORT of process 0
  processes: int
  process: int
  local_devices: Sequence[int] | None = None  # all, unless Slurm says


def said(
  coordinator: str | None = None,
  processes: int | None = None,
  process: int | None = None,
) -> Place | None:
  """Return what flags or the environment say, None if they say nothing.

  Raises:
    ValueError: it makes no sense.
  """
  address = coordinator or os.environ.get(_ADDRESS)
  given = dict(zip(_NUMBERS, (processes, process), strict=True))
  if not address:
    _check_nothing_said(given)
    return None
  rendezvous.split(address)
  numbers = [
    _number(flag, given[flag], "--coordinator" if coordinator else _ADDRESS)
    for flag in _NUMBERS
  ]
  count, number = numbers
  if not 0 <= number < count:
    raise ValueError(
      f"process id {number} is not one of {count} processes; their ids are "
      f"0..{count - 1}, each once."
    )
  return Place(address, count, number)


def _check_nothing_said(given: Mapping[str, int | None]) -> None:
  for flag, variable in _NUMBERS.items():
    if given[flag] is not None or os.environ.get(variable):
      name = flag if given[flag] is not None else variable
      raise ValueError(
        f"{name} is set and no coordinator is; give --coordinator HOST:PORT of "
        "process 0 to all."
      )


def _number(flag: str, given: int | None, where: str) -> int:
  if given is not None:
    return given
  variable = _NUMBERS[flag]
  text = os.environ.get(variable, "")
  if not text.isdigit():
    name = flag if where == "--coordinator" and not text else variable
    raise ValueError(
      f"{name} is {text!r} and {where} is set; give a number to each process, "
      "ids from 0."
    )
  return int(text)


def detected(seconds: int) -> Place | None:
  """Return what JAX knows of the cluster that this runs in, None without one.

  Args:
    seconds: to wait for the name of process 0 to be known.

  Raises:
    OSError: the cluster did not say.
  """
  if not _may_be_one_of_several(os.environ):
    return None
  # What jax.distributed.initialize() finds too, and keeps to itself.
  from jax._src.clusters import ClusterEnv

  try:
    address, count, number, devices = (
      ClusterEnv.auto_detect_unset_distributed_params(
        None, None, None, None, None, seconds
      )
    )
  except Exception as error:  # of metadata servers and cluster APIs
    raise OSError(
      f"the cluster did not say where its processes meet ({error}); give "
      "--coordinator, --processes and --process-id."
    ) from error
  if address is None or count is None or number is None:
    return None
  return Place(address, count, number, devices)


def _may_be_one_of_several(environment: Mapping[str, str]) -> bool:
  """Return whether to ask: that queries servers, in vain on a plain machine."""

  def number(name: str) -> int:
    text = environment.get(name, "")
    return int(text) if text.isdigit() else 1

  platforms = environment.get("JAX_PLATFORMS", "")
  if not platforms or "tpu" in platforms:
    # GKE names the hosts, a TPU VM's metadata server knows them.
    names = ("TPU_PROCESS_ADDRESSES", "TPU_WORKER_HOSTNAMES")
    hosts = [environment[name] for name in names if environment.get(name)]
    if "," in "".join(hosts[:1]) or number("MEGASCALE_NUM_SLICES") > 1:
      return True
    if not hosts and _on_tpu_vm():
      return True
  if number("SLURM_NTASKS") > 1 and "SLURM_STEP_NODELIST" in environment:
    return True
  indexed = "JOB_COMPLETION_INDEX" in environment
  return indexed and importlib.util.find_spec("kubernetes") is not None


def _on_tpu_vm() -> bool:
  from jax._src import cloud_tpu_init

  return cloud_tpu_init.running_in_cloud_tpu_vm
