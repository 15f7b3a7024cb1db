"""Files that grow, on a disk and in a bucket."""

import types

import pytest
from etils import epath

from var_jax import appended, files
from var_jax.ledger import records


@pytest.fixture(params=["disk", "bucket"])
def folder(request, tmp_path):
  if request.param == "disk":
    return epath.Path(tmp_path)
  root = files.absolute(request.getfixturevalue("bucket"))
  return root / tmp_path.name


@pytest.fixture
def clock(monkeypatch):
  fake = types.SimpleNamespace(now=0.0)
  monkeypatch.setattr(
    appended, "time", types.SimpleNamespace(monotonic=lambda: fake.now)
  )
  return fake


def test_what_was_there_stays_and_more_comes_after_it(folder):
  path = folder / "sub" / "log"
  for line in (b"one\n", b"two\n"):
    file = appended.open_file(path)
    file.write(line)
    file.close()
    file.close()
  assert path.read_bytes() == b"one\ntwo\n"
  file = appended.open_file(path)
  assert list(file.lines()) == [b"one\n", b"two\n"]
  for line in file.lines():
    assert line == b"one\n"
    break
  file.truncate(4)
  file.write(b"2\n")
  file.close()
  assert path.read_bytes() == b"one\n2\n"


def test_a_bucket_has_what_was_flushed(bucket, tmp_path, clock):
  path = files.absolute(bucket) / tmp_path.name / "log"
  file = appended.open_file(path)
  file.write(b"a")
  assert not path.exists()
  file.flush()
  file.write(b"b")
  assert path.read_bytes() == b"a"
  file.drop()
  file.close()
  assert path.read_bytes() == b"a"


def test_an_upload_comes_by_itself_after_a_while(bucket, tmp_path, clock):
  path = files.absolute(bucket) / tmp_path.name / "log"
  file = appended.open_file(path)
  file.write(b"a")
  clock.now = 61.0
  file.write(b"b")
  assert path.read_bytes() == b"ab"
  clock.now = 120.0
  file.write(b"c")
  assert path.read_bytes() == b"ab"
  clock.now = 122.0
  file.write(b"d")
  assert path.read_bytes() == b"abcd"


def test_long_uploads_are_rare(bucket, tmp_path, clock, monkeypatch):
  path = files.absolute(bucket) / tmp_path.name / "log"
  file, uploads = appended.open_file(path), []

  def slow(path, data):
    uploads.append(clock.now)
    clock.now += 30.0
    path.write_bytes(data)

  monkeypatch.setattr(files, "write_bytes", slow)
  for clock.now in range(0, 2000, 10):
    file.write(b"a")
  assert uploads == [70, 710, 1350, 1990]  # 30 s, then 20 times as long not


def test_nothing_new_is_not_uploaded(bucket, tmp_path):
  path = files.absolute(bucket) / tmp_path.name / "log"
  file = appended.open_file(path)
  file.flush()
  assert not path.exists()


def test_of_two_runs_in_a_bucket_one_ends(bucket, tmp_path):
  path = files.absolute(bucket) / tmp_path.name / "ledger.jsonl"
  first, second = records.Ledger(path), records.Ledger(path)
  first.append("step", step=1)
  first.flush()
  second.append("step", step=1)
  with pytest.raises(ValueError, match="another process writes it; stop that"):
    second.flush()
  first.append("step", step=2)
  first.close()
  assert [record["step"] for record in records.read(path)] == [1, 2]


def test_a_bucket_that_is_out_of_reach_is_no_other_writer(
  bucket, tmp_path, monkeypatch
):
  file = appended.open_file(files.absolute(bucket) / tmp_path.name / "log")
  file.write(b"a")

  def stat(path):
    raise RuntimeError("no route")

  monkeypatch.setattr(type(epath.Path("gs://x")), "stat", stat)
  with pytest.raises(OSError, match=r"log cannot be reached \(no route\)"):
    file.flush()
