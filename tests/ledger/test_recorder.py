"""The recorder: what a run's steps leave in the ledger."""

import hashlib

import numpy as np
import pytest

from var_jax.ledger import records
from var_jax.ledger.records import Recorder


def batch(index, raw=None, label=3):
  """Return what a Recorder takes; raw digests follow from the index."""
  index_B = np.asarray(index, np.int64)
  raw_B2 = np.stack([index_B * 7 + 1, index_B * 1000], 1).astype(np.uint32)
  for row, value in (raw or {}).items():
    raw_B2[row] = value
  return {
    "index": index_B,
    "position": np.arange(len(index_B), dtype=np.int64),
    "label": np.full(len(index_B), label, np.int32),
    "raw_digest": raw_B2,
    "digest": raw_B2 + np.uint32(5),
  }


VALUES = {"loss": 2.5, "grad_norm": 0.25, "skipped": False}


@pytest.fixture
def path(tmp_path):
  """Return the ledger of a run of two steps."""
  path = tmp_path / "ledger.jsonl"
  recorder = Recorder(path, 0, {"code": {"revision": "abc"}}, position=0)
  recorder.step(1, batch([4, 2]), VALUES)
  recorder.step(2, batch([2, 4], raw={0: (1, 1)}), VALUES)
  recorder.rollback(2, 1)
  recorder.end(2)
  recorder.close()
  return path


def test_samples_are_recorded_once(path):
  told = records.read(path)
  samples = [record for record in told if record["kind"] == "samples"]
  assert [record["index"] for record in samples] == [[4, 2]]
  raw_4, raw_2 = (4 * 7 + 1, 4000), (2 * 7 + 1, 2000)
  digits = "".join(f"{number:08x}" for number in (*raw_4, *raw_2))
  assert samples[0]["raw_digest"] == digits


def test_a_sample_that_changed_is_returned_and_recorded(path):
  recorder = Recorder(path, 2, {}, position=4)  # knows what was before
  assert recorder.step(3, batch([4, 5]), VALUES) == []
  changes = recorder.step(4, batch([5, 4], raw={1: (1, 2)}), VALUES)
  assert changes == [(4, f"{29:08x}{4000:08x}", "0000000100000002")]
  assert str(changes[0]).startswith("sample 4 of the source is not what it was")
  # Sample 2 changed before the resume; once told, it is what it is.
  assert recorder.step(5, batch([2], raw={0: (1, 1)}), VALUES) == []
  recorder.close()
  record = records.read(path)[-3]
  assert (record["kind"], record["step"]) == ("changed_sample", 4)
  assert (record["index"], record["old"], record["new"]) == tuple(changes[0])


def test_a_sample_that_stands_twice_in_a_batch_is_one(tmp_path):
  path = tmp_path / "ledger.jsonl"
  recorder = Recorder(path, 0, {}, position=0)
  assert recorder.step(1, batch([3, 1, 3]), VALUES) == []
  recorder.close()
  assert records.read(path)[1]["index"] == [3, 1]


def test_a_step_record_holds_batch_digest_and_values(path):
  record = records.read(path)[2]
  expected = hashlib.sha256()
  for name, dtype in {
    "position": np.int64, "index": np.int64, "label": np.int32,
    "digest": np.uint32,
  }.items():  # fmt: skip
    assert batch([4, 2])[name].dtype == dtype
    expected.update(batch([4, 2])[name].tobytes())
  assert record["batch_digest"] == expected.hexdigest()
  assert {name: record[name] for name in VALUES} == VALUES


def test_a_run_leaves_its_records_in_order(path):
  assert [record["kind"] for record in records.read(path)] == [
    "start", "samples", "step", "changed_sample", "step", "rollback", "end",
  ]  # fmt: skip
