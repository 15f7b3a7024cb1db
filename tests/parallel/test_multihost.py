"""Real processes that start together and end together."""

import os
import pathlib
import signal
import socket
import subprocess
import sys
import time

import pytest

from var_jax import cli

ROOT = pathlib.Path(__file__).parents[2]
NAMES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
SLURM = {
  "SLURM_JOB_ID": "7",
  "SLURM_STEP_NODELIST": "localhost",
  "SLURM_NTASKS": "2",
  "SLURM_PROCID": "1",
  "SLURM_LOCALID": "1",
}


def address():
  with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    return f"127.0.0.1:{free.getsockname()[1]}"


SCRIPT = """
import atexit, os, signal, sys, time
if os.environ.get("SLURM_PROCID") == "0":
  atexit.register(time.sleep, 1.0)  # outlives the other, who is not missed
import numpy as np
from jax.experimental import multihost_utils
from var_jax.parallel import multihost

what, victim = sys.argv[1], int(sys.argv[2])
try:
  with multihost.joined(join_timeout=60, heartbeat_timeout=10):
    import jax
    for step in range(100_000):
      total = multihost_utils.process_allgather(np.ones(3)).sum()
      if step == 3 and what == "end":
        print(total)
        break
      if step == 3 and jax.process_index() == victim:
        if what == "kill":
          os.kill(os.getpid(), signal.SIGKILL)
        raise ValueError("a disk is full")
except (ValueError, OSError) as error:
  print(f"var-jax: {error}", file=sys.stderr)
  sys.exit(1)
"""


def start(command, places, environment=()):
  """Start a command in a process for each place, a dict of variables."""
  base = {
    name: value
    for name, value in os.environ.items()
    if name != "JAX_COMPILATION_CACHE_DIR"
  }
  base |= {"XLA_FLAGS": "--xla_force_host_platform_device_count=1"}
  return [
    subprocess.Popen(
      [sys.executable, *command],
      cwd=ROOT,
      env=base | dict(environment) | {"JAX_PLATFORMS": "cpu"} | place,
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
    )
    for place in places
  ]


def results(started):
  """Return (exit code, output, errors) of each, and kill what hangs."""
  found = []
  try:
    for process in started:
      output, errors = process.communicate(timeout=90)
      found.append((process.returncode, output, errors))
  finally:
    for process in started:
      process.kill()
  return found


def places(processes, those=None):
  where = address()
  return [
    dict(zip(NAMES, (where, str(processes), str(p)), strict=True))
    for p in those or range(processes)
  ]


def lines(errors):
  """Return what is said to the user, without what libraries log."""
  return [line for line in errors.splitlines() if line.startswith("var-jax: ")]


def test_tasks_of_slurm_join_and_end():
  tasks = [
    SLURM | {"SLURM_PROCID": str(p), "SLURM_LOCALID": str(p)} for p in range(2)
  ]
  where = {"JAX_COORDINATOR_PORT": address().rpartition(":")[2]}
  found = results(start(["-c", SCRIPT, "end", "0"], tasks, where))
  assert [code for code, *_ in found] == [0, 0], found
  assert all("6.0" in output for _, output, _ in found)


def test_a_killed_process_ends_the_others_with_a_line():
  started = start(["-c", SCRIPT, "kill", "1"], places(3))
  assert started[1].wait(90) == -signal.SIGKILL
  begin = time.monotonic()
  found = results(started)
  assert time.monotonic() - begin < 5
  for p in (0, 2):
    code, _, errors = found[p]
    assert code == 1
    (line,) = lines(errors)
    assert line.startswith("var-jax: process 1 (")
    assert "is gone without a word" in line


def test_the_death_of_the_first_process_ends_the_others():
  started = start(["-c", SCRIPT, "kill", "0"], places(2))
  assert started[0].wait(90) == -signal.SIGKILL
  begin = time.monotonic()
  code, _, errors = results(started)[1]
  assert time.monotonic() - begin < 5
  # XLA may be the first to notice; it aborts, and says of what.
  assert code in (1, -signal.SIGABRT)
  assert "process 0 (" in errors or "coordination_service" in errors


def test_a_process_that_fails_tells_the_others_and_waits_for_none():
  begin = time.monotonic()
  found = results(start(["-c", SCRIPT, "raise", "1"], places(2)))
  assert time.monotonic() - begin < 30
  assert [code for code, *_ in found] == [1, 1]
  assert lines(found[1][2]) == ["var-jax: a disk is full"]
  (line,) = lines(found[0][2])
  assert line.startswith("var-jax: process 1 (")
  assert line.endswith(" stopped: a disk is full")


COMMANDS = {
  "train": ["--config", "configs/tokenizer.py:tiny", "--workdir", "{}/new"],
  "cache": ["--config", "configs/var.py:tiny", "--output", "{}/new"],
  "replay": ["--workdir", "{}/new", "--from", "1", "--to", "2"],
  "doctor": [],
}


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_that_joins_names_who_is_missing(tmp_path, command):
  where = address()
  flags = [flag.format(tmp_path) for flag in COMMANDS[command]]
  flags += ["--coordinator", where, "--processes", "2", "--join-timeout", "1"]
  flags += ["--heartbeat-timeout", "10", "--process-id"]
  begin = time.monotonic()
  begun = [
    start(["-m", "var_jax.cli", command, *flags, "0"], [{}])[0],
  ]
  ((code, output, errors),) = results(begun)
  assert time.monotonic() - begin < 30
  assert (code, output) == (1, "")
  assert errors == (
    f"var-jax: 1 of 2 processes joined {where} in 1 s; 1 is missing: start it, "
    "or look at its log.\n"
  )
  assert not (tmp_path / "new").exists()


KEPT = """
import os, sys
import jax, numpy as np
from jax import monitoring
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from var_jax.parallel import multihost

hits = []
monitoring.register_event_listener(
  lambda event, **_: event.endswith("/cache_hits") and hits.append(event))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
with multihost.joined(join_timeout=60):
  folder = sys.argv[1].format(process=os.environ.get("JAX_PROCESS_ID"))
  multihost.enable_compile_cache(folder)
  mesh = jax.make_mesh(
    (jax.device_count(),), ("data",), axis_types=(AxisType.Auto,))
  split = NamedSharding(mesh, PartitionSpec("data"))
  x = jax.make_array_from_callback(
    (jax.device_count(),), split, lambda index: np.ones(1, np.float32))
  jax.jit(lambda x: jax.numpy.sin(x).sum())(x).block_until_ready()
print("kept", len([name for name in os.listdir(folder) if "-cache" in name]))
print("hits", len(hits))
"""


def kept(folder, environments):
  """Return (entries kept, found) of each process of a run."""
  found = results(start(["-c", KEPT, str(folder)], environments))
  assert [code for code, *_ in found] == [0] * len(found), found
  words = [output.split() for _, output, _ in found]
  return [
    (int(w[w.index("kept") + 1]), int(w[w.index("hits") + 1])) for w in words
  ]


def test_a_second_run_finds_its_programs(tmp_path):
  assert kept(tmp_path / "new", [{}]) == [(1, 0)]
  assert kept(tmp_path / "new", [{}]) == [(1, 1)]
  assert len(list((tmp_path / "new").glob(".*"))) == 0


def test_hosts_with_folders_of_their_own_find_their_programs(tmp_path):
  folder = tmp_path / "of{process}"
  assert kept(folder, places(2)) == [(1, 0), (1, 0)]
  assert kept(folder, places(2)) == [(1, 1), (1, 1)]


def test_into_a_shared_folder_the_first_process_alone_writes(tmp_path):
  (_, first), (_, second) = kept(tmp_path, places(2))
  assert (first, second) == (0, 0)
  # On CPU the name of a program says whose it is.
  (number, first), (_, second) = kept(tmp_path, places(2))
  assert (number, first, second) == (1, 1, 0)


def test_a_compile_cache_that_cannot_be_written_is_one_line(tmp_path, capsys):
  (tmp_path / "file").write_text("")
  code = cli.main(
    [
      *("train", "--config", f"{ROOT}/configs/tokenizer.py:tiny"),
      *("--workdir", str(tmp_path / "new")),
      *("--compile-cache", str(tmp_path / "file" / "cache")),
    ]
  )
  assert code == 1
  out, errors = capsys.readouterr()
  assert (out, errors.count("\n")) == ("", 1)
  assert "file/cache cannot be written to (Not a directory); give" in errors
