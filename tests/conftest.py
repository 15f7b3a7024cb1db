"""Tests run on CPU, and keep compiled programs for all processes of a run.

Many tests train the same small models; compiling them is most of the time.
"""

import gc
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile

import pytest

_RUN = os.environ.get("PYTEST_XDIST_TESTRUNUID", str(os.getpid()))
_PREFIX = "var_jax_tests_"
_MANY_MAPPINGS = 20_000
COMPILED = pathlib.Path(tempfile.gettempdir()) / f"{_PREFIX}{_RUN}"

# Before jax is imported, and for the processes that tests start. The compiler
# for TPU, if it is installed, would look for chips.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(COMPILED))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")


@pytest.fixture(scope="module", autouse=True)
def few_mappings():
  """Drop compiled programs long before there are too many of them.

  Each is some ten mappings of memory. Linux allows a process 65,530: at the end
  of all tests XLA met that, and aborted.
  """
  yield
  mappings = pathlib.Path("/proc/self/maps")
  if mappings.exists() and mappings.read_text().count("\n") > _MANY_MAPPINGS:
    import jax

    jax.clear_caches()
    gc.collect()


@pytest.fixture(scope="session")
def bucket():
  """Return "gs://bucket", which one process serves from memory.

  The clients are the real ones: gcsfs, and the C++ of TensorStore.
  """
  script = pathlib.Path(__file__).with_name("bucket_server.py")
  with subprocess.Popen(
    [sys.executable, "-W", "ignore", script],
    stdin=subprocess.PIPE,
    stdout=subprocess.PIPE,
    text=True,
  ) as server:
    address = f"http://127.0.0.1:{int(server.stdout.readline())}"
    os.environ.update(
      STORAGE_EMULATOR_HOST=address,
      TENSORSTORE_GCS_HTTP_URL=address,
      GOOGLE_AUTH_TOKEN_FOR_TESTING="none",  # else TensorStore looks for one
      GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT="false",  # else gcsfs does
    )
    yield "gs://bucket"
    server.stdin.close()


def pytest_unconfigure(config):
  if hasattr(config, "workerinput"):
    return  # a worker: others may still read
  session = config.pluginmanager.get_plugin("dsession")
  run = session.nodemanager.testrunuid if session else os.getpid()
  shutil.rmtree(COMPILED.with_name(f"{_PREFIX}{run}"), ignore_errors=True)
