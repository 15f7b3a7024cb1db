"""Tests run on CPU, and keep compiled programs for all processes of a run.

Many tests train the same small models; compiling them is most of the time.
"""

import os
import pathlib
import shutil
import tempfile

_RUN = os.environ.get("PYTEST_XDIST_TESTRUNUID", str(os.getpid()))
_PREFIX = "var_jax_tests_"
COMPILED = pathlib.Path(tempfile.gettempdir()) / f"{_PREFIX}{_RUN}"

# Before jax is imported, and for the processes that tests start. The compiler
# for TPU, if it is installed, would look for chips.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(COMPILED))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")


def pytest_unconfigure(config):
  if hasattr(config, "workerinput"):
    return  # a worker: others may still read
  session = config.pluginmanager.get_plugin("dsession")
  run = session.nodemanager.testrunuid if session else os.getpid()
  shutil.rmtree(COMPILED.with_name(f"{_PREFIX}{run}"), ignore_errors=True)
