"""The ledger: what is written comes back, and what was touched is named."""

import contextlib
import hashlib
import json
import os
import resource
import signal
import subprocess
import sys
import time

import jax.numpy as jnp
import numpy as np
import pytest

from var_jax.ledger import records
from var_jax.ledger.records import Ledger


@pytest.fixture
def path(tmp_path):
  """Return a ledger that holds a record of every kind."""
  path = tmp_path / "ledger.jsonl"
  book = Ledger(path)
  book.append("start", step=0, position=0, provenance={"revision": "abc"})
  book.append("samples", step=1, index=[4, 2], raw_digest="0a" * 16)
  book.append("step", step=1, batch_digest="12", loss=2.5, grad_norm=0.25)
  book.append("changed_sample", step=2, index=2, old="0a" * 8, new="0b" * 8)
  book.append("step", step=2, batch_digest="34", loss=2.5, grad_norm=0.25)
  book.append("rollback", step=2, to_step=1)
  book.append("end", step=2)
  book.close()
  return path


KINDS = [
  "start", "samples", "step", "changed_sample", "step", "rollback", "end",
]  # fmt: skip
EDITS = {
  "start": ("abc", "abd"),
  "samples": ("[4,2]", "[4,3]"),
  "changed_sample": ('"new":"0b', '"new":"0c'),
  "step": ("2.5", "2.6"),
  "rollback": ('"to_step":1', '"to_step":0'),
  "end": ('"step":2', '"step":3'),
}


def reseal(line, **changes):
  """Return a record that was changed by somebody who knows the digest."""
  record = json.loads(line) | changes
  del record["digest"]
  body = json.dumps(record, separators=(",", ":")).encode()
  digest = hashlib.sha256(body).hexdigest()
  return body[:-1] + b',"digest":"' + digest.encode() + b'"}\n'


def test_every_record_is_chained_to_the_one_before(path):
  lines = path.read_bytes().splitlines()
  told = [json.loads(line) for line in lines]
  assert [record["kind"] for record in told] == KINDS
  assert [record["number"] for record in told] == list(range(1, 8))
  previous = "0" * 64
  for line, record in zip(lines, told, strict=True):
    assert record["previous"] == previous
    assert reseal(line) == line + b"\n"
    previous = hashlib.sha256(line).hexdigest()
  assert records.read(path) == told


@pytest.mark.parametrize("number, kind", list(enumerate(KINDS, 1)))
def test_one_edited_record_of_each_kind_is_named(path, number, kind):
  lines = path.read_text().splitlines(keepends=True)
  old, new = EDITS[kind]
  edited = lines[number - 1].replace(old, new)
  assert edited != lines[number - 1]
  lines[number - 1] = edited
  path.write_text("".join(lines))
  message = rf"record {number} \({kind}, step \d\) was edited.*; restore"
  for look in (records.read, Ledger):
    with pytest.raises(ValueError, match=message):
      look(path)


def test_no_bit_of_a_record_can_flip(path):
  lines = path.read_bytes().splitlines(keepends=True)
  for byte in range(len(lines[2]) - 1):
    flipped = bytearray(lines[2])
    flipped[byte] ^= 1 << byte % 8
    path.write_bytes(b"".join([*lines[:2], flipped, *lines[3:]]))
    with pytest.raises(ValueError, match="record 3 .*edited|record 3, after"):
      records.read(path)


def test_a_record_that_was_rewritten_digest_and_all_is_named(path):
  lines = path.read_bytes().splitlines(keepends=True)
  lines[2] = reseal(lines[2], loss=1.0)
  path.write_bytes(b"".join(lines))
  message = r"record 3 \(step, step 1\) was rewritten: record 4 \(changed_samp"
  with pytest.raises(ValueError, match=message):
    records.read(path)


@pytest.mark.parametrize("number", range(1, 7))
def test_a_removed_record_is_named(path, number):
  lines = path.read_bytes().splitlines(keepends=True)
  del lines[number - 1]
  path.write_bytes(b"".join(lines))
  before = f"record {number - 1} " if number > 1 else "the beginning"
  message = f"record {number} is missing or out of place: after {before}.*"
  with pytest.raises(ValueError, match=message + f"record {number + 1} "):
    records.read(path)


def test_swapped_and_doubled_records_are_named(path):
  lines = path.read_bytes().splitlines(keepends=True)
  path.write_bytes(b"".join([*lines[:3], lines[4], lines[3], *lines[5:]]))
  with pytest.raises(ValueError, match="record 4 is missing or out of place"):
    records.read(path)
  path.write_bytes(b"".join([*lines[:3], lines[2], *lines[3:]]))
  message = r"record 4 is missing or .*after record 3 .* comes record 3 \(step"
  with pytest.raises(ValueError, match=message):
    records.read(path)


@pytest.mark.parametrize("line", [b"\n", b'{"kind":\n', b"5\n", b"\xff\n"])
def test_a_line_that_is_no_record_is_named(path, line):
  lines = path.read_bytes().splitlines(keepends=True)
  path.write_bytes(b"".join([*lines[:4], line, *lines[5:]]))
  message = r"record 5, after record 4 \(changed_sample, step 2\), is not a JSO"
  with pytest.raises(ValueError, match=message):
    records.read(path)


def test_an_absent_ledger_is_an_error_to_read(tmp_path):
  with pytest.raises(ValueError, match="does not exist; check the workdir"):
    records.read(tmp_path / "ledger.jsonl")


def test_what_a_kill_cut_short_is_no_record(path):
  whole = path.read_bytes()
  with path.open("ab") as file:
    file.write(whole.splitlines()[-1][:40])
  assert len(records.read(path)) == 7
  Ledger(path).close()
  assert path.read_bytes() == whole


def test_appending_after_a_resume_rewrites_nothing(path):
  before = path.read_bytes()
  book = Ledger(path)
  book.append("start", step=1)
  book.append("step", step=2)
  book.close()
  assert path.read_bytes().startswith(before)
  added = [(r["kind"], r["number"]) for r in records.read(path)[7:]]
  assert added == [("start", 8), ("step", 9)]


def test_numbers_come_back_bit_by_bit(tmp_path):
  path = tmp_path / "ledger.jsonl"
  values_n = np.random.default_rng(0).integers(0, 2**32, 500, np.uint32)
  values_n = values_n.view(np.float32)
  values_n = values_n[np.isfinite(values_n)]
  book = Ledger(path)
  book.append("step", step=np.int64(1), floats=list(values_n))
  book.append(
    "step",
    step=2,
    nan=np.float32("nan"),
    inf=float("inf"),
    nested={"low": (-np.inf, jnp.float32(-0.0))},
    flag=np.bool_(True),
    nothing=None,
  )
  book.close()
  first, second = records.read(path)
  assert first["step"] == 1
  back_n = np.asarray(first["floats"]).astype(np.float32)
  np.testing.assert_array_equal(
    back_n.view(np.uint32), values_n.view(np.uint32)
  )
  assert (second["nan"], second["inf"]) == ("nan", "inf")
  assert second["nested"]["low"][0] == "-inf"
  assert str(second["nested"]["low"][1]) == "-0.0"
  assert second["flag"] is True and second["nothing"] is None


@contextlib.contextmanager
def largest_file(size):
  soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
  try:
    yield
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_leaves_no_half_record(path):
  before = path.read_bytes()
  book = Ledger(path)
  with largest_file(len(before) + 50), pytest.raises(OSError):
    book.append("step", step=3, text="x" * 200)
  assert path.read_bytes() == before
  book.append("step", step=3)
  book.close()
  assert len(records.read(path)) == 8


def test_a_second_process_cannot_write_the_same_ledger(path):
  book = Ledger(path)
  code = f"from var_jax.ledger.records import Ledger; Ledger({str(path)!r})"
  command = [sys.executable, "-c", code]
  held = subprocess.run(command, capture_output=True, text=True)
  assert "is being written by another process; stop that run" in held.stderr
  book.close()
  subprocess.run(command, check=True)


# Large records, so that half of the kills cut one short. Forks the writers, so
# that JAX is imported once; says who each is, and its end.
WRITERS = """
import os, sys
from var_jax.ledger.records import Ledger
for line in sys.stdin:
  writer = os.fork()
  if not writer:
    book = Ledger(sys.argv[1])
    for step in range(10**9):
      book.append("step", step=step, text="x" * 16_000_000)
  print(writer, flush=True)
  print(os.waitpid(writer, 0)[1], flush=True)
"""


def test_a_kill_at_any_moment_leaves_a_readable_ledger(tmp_path):
  path = tmp_path / "ledger.jsonl"
  rng = np.random.default_rng(0)
  count = 0
  with subprocess.Popen(
    [sys.executable, "-c", WRITERS, str(path)],
    stdin=subprocess.PIPE,
    stdout=subprocess.PIPE,
    text=True,
  ) as writers:
    for _ in range(4):
      writers.stdin.write("go\n")
      writers.stdin.flush()
      writer = int(writers.stdout.readline())
      size = path.stat().st_size if path.exists() else 0
      while not path.exists() or path.stat().st_size <= size:
        time.sleep(0.001)
      time.sleep(rng.uniform(0.0, 0.01))
      os.kill(writer, signal.SIGKILL)
      assert int(writers.stdout.readline()) == signal.SIGKILL
      before, count = count, len(records.read(path))
      assert count >= before
    writers.stdin.close()
  book = Ledger(path)
  book.append("end", step=0)
  book.close()
  assert len(records.read(path)) == count + 1
