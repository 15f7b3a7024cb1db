"""Of what one worker finds, which one and what is named."""

import copy

import pytest

from var_jax.doctor import verdicts


def worker(number):
  """The facts of a worker that is well."""
  provenance = {
    "code": {
      "revision": "a" * 40,
      "uncommitted": None,
      "files": {"cli.py": "1" * 64, "api.py": "2" * 64},
    },
    "config": {"kind": "var", "data": {"source": "digits"}},
    "packages": {"jax": "0.10.2", "jaxlib": "0.10.2", "numpy": "2.4.6"},
    "flags": {"XLA_FLAGS": []},
  }
  values = {
    "host": f"host{number}",
    "provenance": provenance,
    "config": None,
    "devices": {"local": 4, "total": 12, "kind": "TPU v5e"},
    "mesh": "slice=1,data=12,fsdp=1,model=1",
    "workdir": ".doctor_0",
    "unseen": [],
    "time": 1000.0 + number / 100,
    "sum": {"got": 78.0, "expected": 78.0},
    "data": {"source": "digits", "samples": 1257, "first sample": "f00d"},
  }
  return {name: {"value": value} for name, value in values.items()}


def judged(*changes, devices=None):
  """The verdicts on three workers; the last has changes (path, new)."""
  workers = [copy.deepcopy(worker(number)) for number in range(3)]
  for path, new in changes:
    *to, last = path.split("/")
    at = workers[2]
    for part in to:
      at = at[part]
    at[last] = new
  return {v.check: v for v in verdicts.judge(workers, devices)}


def test_workers_that_agree_are_well():
  found = judged(devices=12)
  assert [v.check for v in found.values() if v.remedy] == []
  assert {name: v.found for name, v in found.items()} == {
    "code": "aaaaaaaaaaaa",
    "packages": "jax 0.10.2, jaxlib 0.10.2 and 1 more",
    "flags": "1 of JAX and XLA",
    "config": "2 settings",
    "devices": "12 x TPU v5e, 4 a worker",
    "mesh": "slice=1,data=12,fsdp=1,model=1",
    "workdir": "written to and seen by 3",
    "clock": "0.020 s apart at most",
    "sum": "78, as it should be",
    "data": "digits: 1257 samples, first read",
  }


CODE = "provenance/value/code"


@pytest.mark.parametrize(
  "path, new, check, what",
  [
    (f"{CODE}/revision", "b", "code", f"revision is b, not {'a' * 40}"),
    (f"{CODE}/uncommitted", "c" * 64, "code",
     "uncommitted is cccccccccccc, not None"),
    (f"{CODE}/files", {"cli.py": "3" * 64}, "code",
     "api.py is None, not 222222222222, cli.py is 333333333333, not "
     "111111111111"),
    ("provenance/value/packages/jax", "0.12.0", "packages",
     "jax is 0.12.0, not 0.10.2"),
    ("provenance/value/flags/XLA_FLAGS", ["--a"], "flags",
     "XLA_FLAGS is ['--a'], not []"),
    ("provenance/value/config/data/source", "npz:a", "config",
     "data.source is npz:a, not digits"),
    ("config", {"error": "no file"}, "config", "no file"),
    ("devices/value/local", 3, "devices", "local is 3, not 4"),
    ("devices/value/kind", "cpu", "devices", "kind is cpu, not TPU v5e"),
    ("mesh", {"error": "does not multiply"}, "mesh", "does not multiply"),
    ("workdir", {"error": "/w cannot be written to"}, "workdir",
     "/w cannot be written to"),
    ("unseen/value", [0, 1], "workdir", "does not see what 0, 1 wrote"),
    ("time/value", 1003.5, "clock", "3.5 s ahead"),
    ("time/value", 998.0, "clock", "2.0 s behind"),
    ("sum/value/got", 77.0, "sum", "77, not 78"),
    ("sum", {"error": "no answer in 40 s"}, "sum", "no answer in 40 s"),
    ("data", {"error": "/a is not a file"}, "data", "/a is not a file"),
    ("data/value/samples", 3, "data", "samples is 3, not 1257"),
  ],
)  # fmt: skip
def test_the_worker_that_is_off_is_named(path, new, check, what):
  found = judged((path, new))
  assert [v.check for v in found.values() if v.remedy] == [check]
  assert found[check].found == f"worker 2 (host2): {what}"


def test_a_clock_that_is_off_by_less_than_the_bound_is_well():
  assert not judged(("time/value", 1000.9))["clock"].remedy


def test_a_missing_device_is_counted():
  found = judged(devices=16)
  assert found["devices"].found == (
    "workers 0 (host0), 1 (host1), 2 (host2): has 4 of 12 devices in all, and "
    "16 are wanted"
  )


def test_many_differences_are_counted():
  files = {f"{name}.py": "0" * 64 for name in "abcde"}
  line = judged((f"{CODE}/files", files))["code"].found
  assert line.endswith("b.py is 000000000000, not None, 4 more")


def test_what_was_not_asked_of_has_no_row():
  facts = {
    name: fact
    for name, fact in worker(0).items()
    if name not in ("workdir", "unseen", "data", "config")
  }
  found = [v.check for v in verdicts.judge([facts])]
  assert not {"workdir", "data", "config"} & set(found)
  one_sided = verdicts.judge([worker(0), facts])
  named = {v.check: v.found for v in one_sided if v.remedy}
  assert named.keys() == {"workdir", "data", "config"}
  assert named["data"] == "worker 1 (host0): was not asked as the others were"
