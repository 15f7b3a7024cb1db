"""All launch scripts: shellcheck, help, errors, the README's commands."""

import os
import pathlib
import re
import shutil
import subprocess
import sys

import pytest

LAUNCH = pathlib.Path(__file__).parents[2] / "launch"
SCRIPTS = sorted(LAUNCH.glob("*.sh"))
COMMANDS = [path for path in SCRIPTS if path.name != "common.sh"]


def test_shellcheck_has_nothing_to_say():
  beside = pathlib.Path(sys.executable).with_name("shellcheck")
  program = beside if beside.exists() else shutil.which("shellcheck")
  if not program:
    pytest.skip("no shellcheck here")
  done = subprocess.run(
    [program, "-x", *SCRIPTS], capture_output=True, text=True
  )
  assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("script", COMMANDS, ids=lambda path: path.name)
def test_a_script_explains_itself_and_stops_at_the_first_error(script, launch):
  text = script.read_text()
  assert text.startswith("#!/usr/bin/env bash\n")
  assert "\nset -euo pipefail\n" in text
  assert os.access(script, os.X_OK)
  done = launch(script.name, "--help")
  assert (done.returncode, done.stderr) == (0, "")
  head = text.split("\n\n")[0].splitlines()[1:]
  assert done.stdout.splitlines() == [line[2:] for line in head]
  assert f"launch/{script.name} [--dry-run] " in done.stdout


@pytest.mark.parametrize(
  "words, unset, complaint",
  [
    ("queued_resources.sh", "", "'' is no subcommand; use create"),
    ("queued_resources.sh rent", "", "'rent' is no subcommand"),
    ("queued_resources.sh create", "NAME", "NAME is not set; give it"),
    ("queued_resources.sh create", "ACCELERATOR", "ACCELERATOR is not set"),
    ("tpu_vm.sh", "", "'' is no subcommand; see tpu_vm.sh --help"),
    ("tpu_vm.sh run", "", "run needs a var-jax command, for example run doc"),
    ("tpu_vm.sh mount", "BUCKET", "BUCKET is not set; give it"),
    ("tpu_vm.sh resume train", "BUCKET", "BUCKET is not set; give it"),
    ("tpu_vm.sh --verbose stop", "", "--verbose is no option that goes here"),
    ("worker.sh mount", "", "mount needs the name of a bucket; give one"),
    ("gke_jobset.sh v5e train", "", "topology 'v5e' is not known; use one"),
    ("gke_jobset.sh v5e:1x2 train", "", "v5e:1x2 has 2 chips, not a multiple"),
    ("gke_jobset.sh v5e:4x4", "", "no var-jax command is given; add one"),
    ("gke_jobset.sh v5e:4x4 train", "IMAGE", "IMAGE is not set; give it"),
    ("local.sh", "", "'' is no number of processes; use local.sh 2 train"),
    ("local.sh two train", "", "'two' is no number of processes"),
    ("local.sh 2", "", "no var-jax command is given; add one"),
  ],
)
def test_a_bad_command_line_is_one_line_with_the_remedy(
  words, unset, complaint, environment, launch, tmp_path
):
  environment.pop(unset, None)
  script, *arguments = words.split()
  done = launch(script, *arguments)
  assert (done.returncode, done.stdout) == (2, "")
  assert done.stderr.startswith(f"{script}: {complaint}")
  assert done.stderr.count("\n") == 1
  assert not (tmp_path / "calls").exists()


@pytest.mark.parametrize(
  "name, value, complaint",
  [
    ("GRACE", "soon", "GRACE 'soon' is no number of seconds; use one like"),
    ("DEVICES", "0", "DEVICES '0' is no number of devices; use one like"),
    ("VAR_JAX", "/none", "/none is no command here; give its path"),
  ],
)
def test_local_names_a_bad_variable(
  name, value, complaint, environment, launch
):
  environment[name] = value
  done = launch("local.sh", "2", "train")
  assert done.returncode == 2
  assert done.stderr.startswith(f"local.sh: {complaint}")


def readme_commands():
  """Return the lines of the README that call our scripts."""
  text = (LAUNCH / "README.md").read_text().replace("\\\n", " ")
  lines = re.findall(r"^    (?:\w+=\w+ )*(launch/\w+\.sh.*)", text, re.M)
  return [line.partition("#")[0].split() for line in lines]


@pytest.mark.parametrize("words", readme_commands(), ids=" ".join)
def test_a_command_of_the_readme_is_understood(words, dry_run):
  script, *arguments = words
  printed = dry_run(pathlib.Path(script).name, *arguments)
  for word in arguments[1:]:
    assert word in printed
