"""The doctor on this machine, alone and in two processes."""

import os
import pathlib
import socket
import subprocess
import sys
import time

import pytest

from var_jax import cli
from var_jax.doctor import facts
from var_jax.parallel import multihost

ROOT = pathlib.Path(__file__).parents[2]
CONFIG = f"{ROOT}/configs/tokenizer.py:tiny"


def doctor(capsys, *flags):
  """Return the exit code and, by check, if it is well and what is found."""
  code = cli.main(["doctor", *map(str, flags)])
  out, errors = capsys.readouterr()
  assert errors == ""
  return code, *rows_of(out)


def rows_of(table):
  """Return {check: ok} and {check: what was found} of a printed table."""
  well, found, check = {}, {}, None
  for line in table.splitlines():
    if not line.startswith("│"):
      continue
    mark, name, part, _ = (cell.strip() for cell in line.strip("│").split("│"))
    if name:
      check, well[name], found[name] = name, mark == "ok", []
    found[check].append(part)
  return well, {name: " ".join(parts) for name, parts in found.items()}


def test_a_machine_that_is_well_exits_with_0(tmp_path, capsys):
  code, well, rows = doctor(
    capsys, "--config", CONFIG, "--workdir", tmp_path / "new" / "run",
    "--config.data.batch_size=8", "--devices", 1, "--mesh", "data=-1",
  )  # fmt: skip
  assert code == 0, rows
  assert list(well) == [
    "code", "packages", "flags", "config", "devices", "mesh", "workdir",
    "clock", "sum", "data",
  ]  # fmt: skip
  assert all(well.values())
  assert list(tmp_path.iterdir()) == []


def test_nothing_need_be_asked(capsys):
  code, well, _ = doctor(capsys)
  assert code == 0
  assert list(well) == [
    "code", "packages", "flags", "devices", "mesh", "clock", "sum",
  ]  # fmt: skip


def test_what_is_off_is_a_row_and_exits_with_1(tmp_path, capsys):
  (tmp_path / "file").write_text("")
  code, well, rows = doctor(
    capsys, "--config", CONFIG, "--config.data.source=npz:/nothing",
    "--config.data.batch_size=8", "--workdir", tmp_path / "file" / "run",
    "--devices", 8, "--mesh", "fsdp=3",
  )  # fmt: skip
  assert code == 1
  off = [name for name, is_well in well.items() if not is_well]
  assert off == ["devices", "mesh", "workdir", "data"]
  assert (
    "worker 0 (" in rows["data"] and "/nothing is not a file" in rows["data"]
  )


def test_a_config_that_cannot_be_read_is_a_row(capsys):
  code, well, rows = doctor(capsys, "--config", "nothing.py")
  assert code == 1
  assert [name for name, is_well in well.items() if not is_well] == ["config"]
  assert "nothing.py is not" in rows["config"]


@pytest.mark.parametrize(
  "flags, part",
  [
    (["--mesh", "rows=2"], "is not understood at 'rows=2'"),
    (["--devices", "0"], "'0' is not a count"),
    (["--config.data.source=digits"], "needs --config"),
  ],
)
def test_a_command_line_that_makes_no_sense_exits_with_2(capsys, flags, part):
  assert cli.main(["doctor", *flags]) == 2
  out, errors = capsys.readouterr()
  assert (out, errors.count("\n")) == ("", 1)
  assert part in errors


def test_looks_that_fail_or_hang_are_facts(monkeypatch):
  ends = []
  monkeypatch.setattr(
    multihost, "end_without_waiting", lambda: ends.append(True)
  )

  def fail(error):
    raise error

  begin = time.monotonic()
  found = facts.look(
    {
      "well": lambda: 3,
      "known": lambda: fail(OSError("no\nfile")),
      "silent": lambda: fail(ValueError()),
      "bug": lambda: fail(KeyError("x")),
      "hung": lambda: time.sleep(3),
    },
    seconds=0.3,
  )
  assert time.monotonic() - begin < 2
  assert found == {
    "well": {"value": 3},
    "known": {"error": "no file"},
    "silent": {"error": "ValueError: "},
    "bug": {"error": "KeyError: 'x'"},
    "hung": {"error": "no answer in 0.3 s"},
  }
  assert ends == [True]


def test_marks_that_are_not_there_are_unseen(tmp_path, monkeypatch):
  monkeypatch.setattr(facts, "SEEN_SECONDS", 0.0)
  (tmp_path / "a").write_text("")
  assert facts._unseen(tmp_path, ["a", "b", None]) == [1]


def test_two_workers_are_examined_together(tmp_path):
  """The second has no dataset and another folder under the workdir's name."""
  with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    where = f"127.0.0.1:{free.getsockname()[1]}"
  environment = os.environ | {
    "XLA_FLAGS": "--xla_force_host_platform_device_count=1",
    "JAX_PLATFORMS": "cpu",
  }
  workers = []
  for process, source in enumerate(("digits", "npz:/nothing")):
    folder = tmp_path / str(process)
    folder.mkdir()
    command = [sys.executable, "-m", "var_jax.cli", "doctor"]
    command += ["--coordinator", where, "--processes", "2", "--process-id"]
    command += [str(process), "--join-timeout", "60", "--config", CONFIG]
    command += ["--config.data.batch_size=8", f"--config.data.source={source}"]
    workers.append(
      subprocess.Popen(
        [*command, "--workdir", str(folder), "--devices", "2"],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
      )
    )
  (first, errors), (second, _) = (w.communicate(timeout=90) for w in workers)
  assert [worker.returncode for worker in workers] == [1, 1], errors
  assert "│" not in second and "Traceback" not in errors
  well, rows = rows_of(first)
  off = [name for name, is_well in well.items() if not is_well]
  assert off == ["config", "workdir", "data"]
  assert "worker 1 (" in rows["data"] and "worker 0" not in rows["data"]
  for words in ("worker 0 (", "worker 1 ("):
    assert words in rows["workdir"]
