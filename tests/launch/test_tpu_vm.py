"""TPU VMs: renting, installing, running, resuming."""

import pathlib
import time

import pytest

ROOT = pathlib.Path(__file__).parents[2]
TRAIN = "train --config configs/var.py:d16 --workdir /mnt/gcs/runs/d16".split()


def on_workers(words):
  """Return (workers, line) of a gcloud command for the workers' shell."""
  head = "gcloud compute tpus tpu-vm ssh var-d16 --zone=us-west4-a"
  assert words[:7] == head.split()
  worker, command = words[7:]
  return (
    worker.removeprefix("--worker="),
    command.removeprefix("--command="),
  )


CREATE = (
  "gcloud compute tpus queued-resources create var-d16 --node-id=var-d16 "
  "--zone=us-west4-a --accelerator-type=v5litepod-16 "
  "--runtime-version=v2-alpha-tpuv5-lite --spot"
).split()
DESCRIBE = (
  "gcloud compute tpus queued-resources describe var-d16 --zone=us-west4-a "
  "--format=value(state.state)"
).split()
DELETE = (
  "gcloud compute tpus queued-resources delete var-d16 --zone=us-west4-a "
  "--force --quiet"
).split()


@pytest.mark.parametrize(
  "subcommand, expected",
  [
    ("create", CREATE),
    ("wait", DESCRIBE),
    ("state", DESCRIBE),
    ("delete", DELETE),
  ],
)
def test_a_slice_is_rented_and_given_back(subcommand, expected, commands):
  assert commands("queued_resources.sh", subcommand) == [expected]


def test_the_image_follows_from_the_chips_and_spot_is_a_choice(
  environment, launch, commands
):
  environment |= {"ACCELERATOR": "v5p-128", "SPOT": "false"}
  [words] = commands("queued_resources.sh", "create")
  assert words[-2:] == [
    "--accelerator-type=v5p-128",
    "--runtime-version=v2-alpha-tpuv5",
  ]
  environment["ACCELERATOR"] = "h100"
  done = launch("queued_resources.sh", "create")
  assert done.returncode == 2
  assert "h100 is not known; use v5litepod-N" in done.stderr


@pytest.mark.parametrize("last, code", [("ACTIVE", 0), ("SUSPENDED", 1)])
def test_waiting_ends_when_the_slice_is_there_or_cannot_come(
  last, code, tmp_path, launch, write_program
):
  write_program("bin/sleep", "true")
  write_program(
    "bin/gcloud",
    f"""
    echo call >>{tmp_path}/waits
    case $(wc -l <{tmp_path}/waits) in
      1) echo WAITING_FOR_RESOURCES ;;
      2) echo PROVISIONING ;;
      *) echo {last} ;;
    esac""",
  )
  done = launch("queued_resources.sh", "wait")
  assert done.returncode == code
  assert done.stdout.split() == ["WAITING_FOR_RESOURCES", "PROVISIONING", last]


def test_the_code_is_copied_to_all_workers_and_installed(environment, commands):
  environment["TMPDIR"] = "/scratch"
  pack, copy, unpack = commands("tpu_vm.sh", "install")
  archive = "/scratch/var-d16.tar.gz"
  assert pack == (
    f"git -C {ROOT} archive --format=tar.gz --output={archive} HEAD".split()
  )
  assert (
    copy
    == (
      f"gcloud compute tpus tpu-vm scp {archive} var-d16:var_jax.tar.gz "
      "--zone=us-west4-a --worker=all"
    ).split()
  )
  workers, line = on_workers(unpack)
  assert workers == "all"
  assert line.startswith("rm -rf var_jax && mkdir var_jax && tar -xzf ")
  assert line.endswith(" && var_jax/launch/worker.sh install")


def test_a_command_runs_on_all_workers_and_logs_come_from_one(commands):
  [words] = commands("tpu_vm.sh", "run", *TRAIN)
  workers, line = on_workers(words)
  assert workers == "all"
  assert line == (
    "cd var_jax && env TFDS_DATA_DIR=/mnt/gcs/tensorflow_datasets "
    "~/venv/bin/var-jax " + " ".join(TRAIN)
  )
  [words] = commands("tpu_vm.sh", "logs")
  assert on_workers(words) == ("0", "tail -n 100 -F ~/var-jax.log")
  [words] = commands("tpu_vm.sh", "logs", "3")
  assert on_workers(words)[0] == "3"
  [words] = commands("tpu_vm.sh", "mount")
  assert on_workers(words) == (
    "all",
    "var_jax/launch/worker.sh mount my-bucket",
  )


def test_resume_replaces_the_slice_and_starts_what_it_is_told(commands):
  printed = commands("tpu_vm.sh", "resume", *TRAIN)
  assert printed[:4] == [DESCRIBE, DELETE, CREATE, DESCRIBE]
  install = commands("tpu_vm.sh", "install")
  mount = commands("tpu_vm.sh", "mount")
  start = commands("tpu_vm.sh", "start", *TRAIN)
  assert printed[4:] == install + mount + start
  assert " ".join(TRAIN) in on_workers(printed[-1])[1]


def test_resume_leaves_a_slice_that_is_there_alone(
  tmp_path, launch, write_program
):
  calls = tmp_path / "calls"
  write_program("bin/gcloud", f'echo "$@" >>{calls}; echo ACTIVE')
  done = launch("tpu_vm.sh", "resume", *TRAIN)
  assert done.returncode == 2
  assert "var-d16 is ACTIVE, there is nothing to replace; use start." in (
    done.stderr
  )
  assert [line.split()[3] for line in calls.read_text().splitlines()] == [
    "describe"
  ]


def test_what_a_worker_is_told_works_in_its_shell(
  tmp_path, launch, write_program
):
  """Quotes survive, a second training is refused, stop lets the first save."""
  home = tmp_path / "home"
  (home / "var_jax").mkdir()
  write_program(
    "bin/gcloud",
    'cd; for word; do case $word in --command=*) exec bash -c "${word#*=}";; '
    "esac; done",
  )
  write_program(
    "home/venv/bin/var-jax",
    'trap "echo saved; exit 143" TERM; printf "<%s>" "$@"; echo; pwd; '
    "echo $TFDS_DATA_DIR; while true; do sleep 0.05; done",
  )
  odd = ["train", "--config.note=it's $HOME & co", "two  words"]
  done = launch("tpu_vm.sh", "start", *odd)
  assert (done.returncode, done.stderr) == (0, "")
  try:
    log = home / "var-jax.log"
    end = time.monotonic() + 20
    while log.read_text().count("\n") < 3 and time.monotonic() < end:
      time.sleep(0.02)
    again = launch("tpu_vm.sh", "start", *odd)
    assert again.returncode == 1
    assert again.stderr == "var-jax runs already, stop it first.\n"
  finally:
    stopped = launch("tpu_vm.sh", "stop")
  assert (stopped.returncode, stopped.stdout) == (0, "saved\n")
  assert log.read_text().splitlines() == [
    "".join(f"<{word}>" for word in odd),
    str(home / "var_jax"),
    "/mnt/gcs/tensorflow_datasets",
    "saved",
  ]


def test_a_worker_gets_its_own_python_and_an_uncached_mount(
  environment, commands
):
  home = environment["HOME"]
  fetch, venv, install = commands("worker.sh", "install")
  assert "https://astral.sh/uv/install.sh" in fetch[-1]
  assert venv[0] == f"{home}/.local/bin/uv"
  assert venv[-1] == f"{home}/venv"
  assert install[-2:] == ["-e", f"{ROOT}[tpu]"]
  *_, folder, owner, mount = commands("worker.sh", "mount", "my-bucket")
  assert folder == ["sudo", "mkdir", "-p", "/mnt/gcs"]
  assert owner[:2] == ["sudo", "chown"]
  assert (
    mount
    == (
      "gcsfuse --implicit-dirs --metadata-cache-ttl-secs=0 "
      "--metadata-cache-negative-ttl-secs=0 my-bucket /mnt/gcs"
    ).split()
  )


def test_a_worker_without_gcsfuse_gets_it(commands, tmp_path):
  (tmp_path / "bin" / "gcsfuse").unlink()
  key, source, update, install, *_ = commands("worker.sh", "mount", "b")
  assert key[-1] == "https://packages.cloud.google.com/apt/doc/apt-key.gpg"
  assert key[-2] in source[-1]  # signs what is installed
  assert update == ["sudo", "apt-get", "update"]
  assert install == ["sudo", "apt-get", "install", "-y", "gcsfuse"]
