"""Worker processes: the same batches, and nothing that outlives its use."""

import itertools
import multiprocessing
import os
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from var_jax.data.pipeline import training_batches
from var_jax.data.sources import ArraySource
from var_jax.data.transforms import make_transform


def _source(size=20):
  rng = np.random.default_rng(0)
  images = rng.integers(0, 256, (size, 40, 40, 3), np.uint8)
  return ArraySource(images, np.arange(size) % 5, tuple("abcde"))


def _crop():
  return make_transform("crop", (32, 32), train=True, flip=True)


def _open(transform=None, **options):
  options = {"batch_size": 24, "seed": 3, "start_step": 2} | options
  return training_batches(_source(), transform or _crop(), **options)


def _take(count, **options):
  iterator = _open(**options)
  batches = list(itertools.islice(iterator, count))
  workers = multiprocessing.active_children()
  assert len(workers) == options.get("workers", 0)
  iterator.close()
  assert not any(worker.is_alive() for worker in workers)
  return batches


def _run(code):
  """Return a started process whose standard output is piped."""
  return subprocess.Popen(
    [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True
  )


SCRIPT = """
import multiprocessing, time
import numpy as np
from var_jax.data.pipeline import training_batches
from var_jax.data.sources import ArraySource

def keep(image, rng):
  return image

source = ArraySource(
  np.zeros((9, 211, 197, 3), np.uint8), np.arange(9), ("a",) * 9
)
batches = training_batches(source, keep, batch_size=2, seed=0, workers=2)
next(batches), next(batches)  # One from each worker.
pids = [child.pid for child in multiprocessing.active_children()]
print(*pids, flush=True)
"""


def _shared_files():
  """Return the names of shared memory that holds a batch of SCRIPT."""
  found = set()
  for entry in os.scandir("/dev/shm"):
    try:
      if entry.stat().st_size == 2 * 211 * 197 * 3:
        found.add(entry.name)
    except FileNotFoundError:
      pass
  return found


def _becomes(holds, seconds=20):
  deadline = time.monotonic() + seconds
  while not holds() and time.monotonic() < deadline:
    time.sleep(0.05)
  return holds()


def _settles(value, seconds=0.5):
  """Return a value once it has not changed for a while."""
  last, now = None, value()
  while now != last:
    time.sleep(seconds)
    last, now = now, value()
  return now


def _has_ended(pid):
  try:
    with open(f"/proc/{pid}/stat") as file:
      return file.read().rsplit(")", 1)[1].split()[0] == "Z"
  except FileNotFoundError:
    return True


@pytest.fixture(autouse=True)
def no_process_is_left():
  yield
  assert multiprocessing.active_children() == []


def test_workers_change_nothing():
  whole = _take(5)
  # 24 images of 32x32 go through shared memory, the rest through a pipe.
  for options in ({"workers": 1}, {"workers": 2, "threads": 2, "prefetch": 4}):
    for made, expected in zip(_take(5, **options), whole, strict=True):
      assert made.keys() == expected.keys()
      for key in made:
        assert made[key].dtype == expected[key].dtype
        np.testing.assert_array_equal(made[key], expected[key])


def test_a_batch_of_a_worker_outlives_it_on_the_device():
  batches = _take(6, workers=1)
  on_device = [jax.device_put(batch["image"]) for batch in batches]
  del batches
  expected = _take(6)
  for image, batch in zip(on_device, expected, strict=True):
    np.testing.assert_array_equal(image, batch["image"])


def test_an_error_in_a_worker_is_the_one_line_that_it_is_without():
  def fail(image, rng):
    raise ValueError("x.png cannot be decoded")

  for workers in (0, 1):
    iterator = _open(fail, workers=workers)
    with pytest.raises(ValueError) as caught:
      next(iterator)
    iterator.close()
    assert str(caught.value) == "x.png cannot be decoded"


def test_a_worker_that_dies_is_reported_in_one_line():
  def die(image, rng):
    os._exit(3)

  iterator = _open(die, workers=1)
  with pytest.raises(
    OSError, match=r"exit code 3.*use fewer workers"
  ) as caught:
    next(iterator)
  iterator.close()
  assert "\n" not in str(caught.value)


def test_a_worker_opens_no_device_and_leaves_signals_to_the_main_process():
  def look(image, rng):
    from jax._src import xla_bridge

    ignored = [
      signal.getsignal(s) == signal.SIG_IGN
      for s in (signal.SIGINT, signal.SIGTERM)
    ]
    return np.array(
      [
        xla_bridge.backends_are_initialized(),
        jax.config.jax_platforms == "cpu",
        "tensorflow" in sys.modules,
        *ignored,
      ]
    )

  (batch,) = _take(1, transform=look, workers=1)
  expected = [False, True, False, True, True]
  assert batch["image"].tolist() == [expected] * 24


def test_an_iterator_that_was_never_used_has_no_workers():
  _open(workers=2).close()


def test_an_abandoned_iterator_does_not_hang_the_process():
  process = _run(SCRIPT)
  output, _ = process.communicate(timeout=60)
  assert process.returncode == 0
  assert len(output.split()) == 2
  assert all(_has_ended(pid) for pid in output.split())


def test_workers_and_their_memory_end_when_the_main_process_is_killed():
  others = _shared_files()
  process = _run(SCRIPT + "time.sleep(60)")
  pids = process.stdout.readline().split()
  assert len(pids) == 2
  # Workers that have made all they may: one that is killed while it creates
  # a shared file, before it can tell anyone, leaves that file behind.
  assert _settles(lambda: _shared_files() - others)
  process.kill()
  process.communicate(timeout=60)
  assert _becomes(lambda: all(_has_ended(pid) for pid in pids))
  assert _becomes(lambda: _shared_files() <= others)
