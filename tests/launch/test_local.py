"""`launch/local.sh`: numbers, environment, exit codes, and nothing left."""

import os
import pathlib
import re
import signal
import subprocess
import sys
import time

import pytest

SCRIPT = pathlib.Path(__file__).parents[2] / "launch" / "local.sh"
TRAIN = "train --config configs/var.py:d16 --workdir /mnt/gcs/runs/d16".split()

# What runs the tests in the background may ignore it, and bash then does too.
WITH_SIGINT = """
import os, signal, sys
signal.signal(signal.SIGINT, signal.SIG_DFL)
os.execv(sys.argv[1], sys.argv[1:])
"""


@pytest.fixture
def local(environment, write_program, tmp_path):
  """A function that starts local.sh on a program of that body."""
  started = []

  def start(count, body, grace=30):
    program = write_program(
      "program", f'echo $$ >"{tmp_path}/id$JAX_PROCESS_ID"; {body}'
    )
    process = subprocess.Popen(
      [sys.executable, "-c", WITH_SIGINT, SCRIPT, str(count), *TRAIN],
      env=environment | {"VAR_JAX": str(program), "GRACE": str(grace)},
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
    )
    started.append(process)
    return process

  yield start
  # Nothing is left, unless the test fails.
  for process in started:
    with process:  # closes its pipes
      process.kill()
  for id_ in left(tmp_path):
    os.kill(id_, signal.SIGKILL)


def left(folder):
  """Return those of the processes of a test that are still there."""
  ids = ",".join(path.read_text().strip() for path in folder.glob("id*"))
  assert ids
  lines = subprocess.run(
    ["ps", "-ww", "-o", "pid=,args=", "-p", ids], capture_output=True, text=True
  ).stdout.splitlines()
  # An id may be somebody else's by now: ours have the folder in their command.
  return [int(line.split()[0]) for line in lines if str(folder) in line]


def test_local_processes_know_each_other_and_are_told_apart(
  environment, tmp_path, local
):
  names = "COORDINATOR_ADDRESS NUM_PROCESSES CPU_COLLECTIVES_IMPLEMENTATION"
  body = "; ".join(f"echo ${{JAX_{name}}}" for name in names.split())
  body += '; echo "$@"; echo "flags $XLA_FLAGS" >&2; printf "no newline"'
  environment |= {"DEVICES": "4", "XLA_FLAGS": "--xla_given=1"}
  process = local(3, body)
  output, errors = process.communicate(timeout=60)
  assert (process.returncode, errors) == (0, "")
  lines = {number: [] for number in range(3)}
  for line in output.splitlines():
    number, text = re.fullmatch(r"\[(\d)\] (.*)", line).groups()
    lines[int(number)].append(text)
  address = lines[0][0]
  assert re.fullmatch(r"127\.0\.0\.1:2\d{4}", address)
  for told in lines.values():
    assert told == [
      address,
      "3",
      "gloo",
      " ".join(TRAIN),
      "flags --xla_given=1 --xla_force_host_platform_device_count=4",
      "no newline",
    ]
  assert {path.name for path in tmp_path.glob("id*")} == {"id0", "id1", "id2"}
  assert left(tmp_path) == []


def test_local_prints_what_it_would_start(commands):
  commands = commands("local.sh", "2", *TRAIN)
  for number, words in enumerate(commands):
    assert words[0] == "env"
    assert re.fullmatch(r"JAX_COORDINATOR_ADDRESS=127.0.0.1:\d+", words[1])
    assert words[2:] == [
      "JAX_NUM_PROCESSES=2",
      "JAX_CPU_COLLECTIVES_IMPLEMENTATION=gloo",
      f"JAX_PROCESS_ID={number}",
      "var-jax",
      *TRAIN,
    ]
  assert len(commands) == 2


def test_local_ends_as_the_first_that_failed(tmp_path, local):
  """And the others get the time to find out by themselves."""
  body = (
    "case $JAX_PROCESS_ID in 0) sleep 1; echo told; exit 9 ;; 1) exit 7 ;; esac"
  )
  process = local(3, body)
  output, errors = process.communicate(timeout=60)
  assert process.returncode == 7
  assert "[0] told\n" in output
  assert errors == "local.sh: process 1 ended with 7\n"
  assert left(tmp_path) == []


def test_local_ends_those_that_do_not_notice(tmp_path, local):
  """A deaf one and its child too, in about twice the time of grace."""
  wait = "while true; do sleep 0.1; done"
  body = (
    f'case $JAX_PROCESS_ID in 0) exit 3 ;; 1) {wait} ;; esac; trap "" TERM; '
    f"(exec -a {tmp_path} sleep 600) & echo $! >{tmp_path}/id_child; {wait}"
  )
  began = time.monotonic()
  process = local(3, body, grace=1)
  _, errors = process.communicate(timeout=60)
  assert time.monotonic() - began < 15
  assert process.returncode == 3
  assert errors.startswith("local.sh: process 0 ended with 3\n")
  assert (tmp_path / "id_child").exists()
  assert left(tmp_path) == []


@pytest.mark.parametrize("sent, answer", [("TERM", 143), ("INT", 130)])
def test_local_passes_signals_on_and_lets_the_processes_answer(
  sent, answer, tmp_path, local
):
  body = (
    f'trap "echo saved; exit {answer}" {sent}; echo ready; '
    "while true; do sleep 0.05; done"
  )
  process = local(2, body)
  ready = {process.stdout.readline() for _ in range(2)}
  assert ready == {"[0] ready\n", "[1] ready\n"}
  process.send_signal(getattr(signal, f"SIG{sent}"))
  output, _ = process.communicate(timeout=60)
  assert process.returncode == answer
  assert sorted(output.splitlines()) == ["[0] saved", "[1] saved"]
  assert left(tmp_path) == []


def test_local_does_not_wait_for_ever_for_an_answer(tmp_path, local):
  body = 'trap "" TERM; echo ready; while true; do sleep 0.1; done'
  process = local(2, body, grace=1)
  for _ in range(2):
    process.stdout.readline()
  process.terminate()
  process.communicate(timeout=15)
  assert process.returncode == 128 + signal.SIGKILL
  assert left(tmp_path) == []
