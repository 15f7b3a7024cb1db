"""Launch scripts run with stand-ins for the programs of a cloud."""

import os
import pathlib
import shlex
import subprocess

import pytest

ROOT = pathlib.Path(__file__).parents[2]
SETTINGS = {
  "NAME": "var-d16",
  "ZONE": "us-west4-a",
  "ACCELERATOR": "v5litepod-16",
  "BUCKET": "my-bucket",
  "IMAGE": "example.org/var-jax",
}
STAND_INS = "gcloud kubectl git curl sudo gcsfuse sky var-jax".split()
UNSET = "DEVICES DRY_RUN GRACE SPOT TFDS_DATA_DIR VAR_JAX XLA_FLAGS".split()


@pytest.fixture
def write_program(tmp_path):
  """A function that writes a bash program under `tmp_path`."""

  def write(name, body):
    path = tmp_path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/usr/bin/env bash\n{body}\n")
    path.chmod(0o755)
    return path

  return write


@pytest.fixture
def environment(tmp_path, write_program):
  """Settings, and programs on the PATH that note a call and fail."""
  for name in STAND_INS:
    write_program(f"bin/{name}", f'echo "$0 $@" >>{tmp_path}/calls; exit 99')
  (tmp_path / "home").mkdir()
  kept = {name: v for name, v in os.environ.items() if name not in UNSET}
  return kept | {
    **SETTINGS,
    "PATH": f"{tmp_path}/bin:{os.environ['PATH']}",
    "HOME": f"{tmp_path}/home",
  }


@pytest.fixture
def launch(environment):
  """A function that runs a script of launch/ to its end."""

  def run(script, *arguments):
    return subprocess.run(
      [ROOT / "launch" / script, *arguments],
      env=environment,
      capture_output=True,
      text=True,
      timeout=60,
    )

  return run


@pytest.fixture
def dry_run(launch, tmp_path):
  """A function that returns what --dry-run prints, having run nothing."""

  def run(script, *arguments):
    done = launch(script, "--dry-run", *arguments)
    assert (done.returncode, done.stderr) == (0, "")
    calls = tmp_path / "calls"
    assert not calls.exists(), calls.read_text()
    return done.stdout

  return run


@pytest.fixture
def commands(dry_run):
  """A function that returns the commands of a dry run, as lists of words."""
  return lambda *words: [shlex.split(x) for x in dry_run(*words).splitlines()]
