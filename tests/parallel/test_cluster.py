"""Where processes meet: flags, environment, clusters."""

import os

import pytest

from var_jax.parallel import cluster, multihost

NAMES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")


@pytest.fixture
def plain(monkeypatch):
  """An environment that says nothing of other processes."""
  for name in list(os.environ):
    if name.startswith(("JAX_", "SLURM_", "TPU_", "MEGASCALE_", "JOB_")):
      monkeypatch.delenv(name)
  return monkeypatch


def test_a_plain_machine_is_alone(plain):
  assert cluster.said() is None
  assert cluster.detected(1) is None
  multihost.initialize()
  assert multihost.exchange({"a": 1}) == [{"a": 1}]


def test_flags_come_before_the_environment(plain):
  for name, value in zip(NAMES, ("there:1", "4", "3"), strict=True):
    plain.setenv(name, value)
  assert cluster.said() == cluster.Place("there:1", 4, 3)
  place = cluster.said("here:2", process=0)
  assert place == cluster.Place("here:2", 4, 0)


@pytest.mark.parametrize(
  "flags, environment, message",
  [
    (("h:1", 2, 2), {}, "process id 2 is not one of 2 processes; .* 0..1"),
    (("h:1", 2, None), {}, "--process-id is '' and --coordinator is set"),
    (("h:1", None, 0), {}, "--processes is '' and --coordinator is set"),
    (("h", 2, 0), {}, "'h' is not HOST:PORT; give one like"),
    (("h:0", 2, 0), {}, "'h:0' is not HOST:PORT"),
    (("h:99999", 2, 0), {}, "'h:99999' is not HOST:PORT"),
    ((None, 2, 0), {}, "--processes is set and no coordinator is"),
    ((None, None, 1), {}, "--process-id is set and no coordinator is"),
    ((), {NAMES[1]: "2"}, "JAX_NUM_PROCESSES is set and no coordinator is"),
    ((), {NAMES[0]: "h:1"}, "JAX_NUM_PROCESSES is '' and JAX_COORD.* is set"),
    (
      ("h:1",),
      {NAMES[1]: "2", NAMES[2]: "x"},
      "JAX_PROCESS_ID is 'x' and --coordinator is set",
    ),
  ],
)
def test_a_contradiction_is_one_line(plain, flags, environment, message):
  for name, value in environment.items():
    plain.setenv(name, value)
  with pytest.raises(ValueError, match=message) as error:
    multihost.initialize(*flags)
  assert "\n" not in str(error.value)


SLURM = {
  "SLURM_JOB_ID": "7",
  "SLURM_STEP_NODELIST": "localhost",
  "SLURM_NTASKS": "2",
  "SLURM_PROCID": "1",
  "SLURM_LOCALID": "1",
}


def test_slurm_says_it(plain):
  for name, value in SLURM.items():
    plain.setenv(name, value)
  place = cluster.detected(1)
  assert (place.processes, place.process) == (2, 1)
  assert place.address.startswith("localhost:")
  plain.setenv("SLURM_NTASKS", "1")
  assert cluster.detected(1) is None


def test_the_hosts_of_a_tpu_slice_say_it(plain):
  from jax._src.clusters import cloud_tpu_cluster

  plain.setattr(cloud_tpu_cluster, "running_in_cloud_tpu_vm", True)
  on_gke = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost,other",
    "TPU_WORKER_ID": "1",
    "MEGASCALE_COORDINATOR_ADDRESS": "localhost",
    "MEGASCALE_NUM_SLICES": "2",
    "MEGASCALE_SLICE_ID": "1",
  }
  for name, value in on_gke.items():
    plain.setenv(name, value)
  assert cluster.detected(1) == cluster.Place("localhost:8482", 4, 3)
  plain.setenv("JAX_PLATFORMS", "cpu")
  assert cluster.detected(1) is None


def test_a_tpu_vm_asks_its_metadata_server(plain):
  from jax._src import cloud_tpu_init
  from jax._src.clusters import ClusterEnv

  def refused(*_):
    raise RuntimeError("no metadata")

  plain.setattr(cloud_tpu_init, "running_in_cloud_tpu_vm", True)
  plain.setattr(ClusterEnv, "auto_detect_unset_distributed_params", refused)
  with pytest.raises(OSError, match="no metadata.; give --coordinator"):
    cluster.detected(1)
