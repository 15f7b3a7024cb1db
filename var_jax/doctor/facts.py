"""What one worker of a run finds, as JSON.

Each fact is {"value": ..}, or {"error": a line} where looking failed or took
too long: a worker always has something to say, and nothing waits for it.
"""

import contextlib
import dataclasses
import hashlib
import json
import socket
import threading
import time
import uuid
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from var_jax import files
from var_jax.data import broken, sources, token_cache
from var_jax.ledger import provenance
from var_jax.parallel import mesh as mesh_lib
from var_jax.parallel import multihost

Fact = dict[str, Any]
Facts = dict[str, Fact]  # of a worker, by name

FACT_SECONDS = 40  # for a file system or a device that hangs
SEEN_SECONDS = 5  # for a file to be seen from everywhere


@dataclasses.dataclass(frozen=True)
class Asked:
  """What a run is to be; what is None is not asked of.

  Args:
    config: returns the training config.
    mesh: in place of the config's.
  """

  workdir: str | None = None
  config: Callable[[], Any] | None = None
  mesh: mesh_lib.MeshConfig | None = None


def gather(asked: Asked) -> list[Facts]:
  """Return the facts of all workers, by process.

  Every process takes part in every exchange, whatever it finds.
  """
  told = look({"config": asked.config}) if asked.config else {}
  config = told.get("config", {}).get("value")
  looks = {
    "provenance": lambda: _provenance(config),
    "devices": _devices,
    "mesh": lambda: _mesh(asked.mesh, config),
    "sum": _sum,
  }
  if config is not None:
    told = {"config": {"value": None}}  # what it says is in the provenance
    looks["data"] = lambda: _data(config)
  mark = None
  if asked.workdir is not None:
    mark = _mark(asked.workdir)
    looks["workdir"] = lambda: _leave(mark)
  first = {"host": {"value": socket.gethostname()}} | told | look(looks)
  everyone = multihost.exchange(first, 2 * FACT_SECONDS)
  # All leave an exchange at the same moment, but for the network.
  then = {"time": {"value": time.time()}}
  if mark:
    marks = [facts.get("workdir", {}).get("value") for facts in everyone]
    then |= look({"unseen": lambda: _unseen(mark.parent, marks)})
  later = multihost.exchange(then, 2 * FACT_SECONDS)
  if mark:
    with contextlib.suppress(OSError):
      mark.unlink(missing_ok=True)
  return [facts | more for facts, more in zip(everyone, later, strict=True)]


def look(
  looks: Mapping[str, Callable[[], Any]], seconds: float | None = None
) -> Facts:
  """Return what they return, or the lines that say why they did not.

  Args:
    seconds: that all together have, FACT_SECONDS unless said.
  """
  seconds = FACT_SECONDS if seconds is None else seconds
  facts, threads = {}, []

  def run(name, find):
    try:
      facts[name] = {"value": find()}
    except Exception as error:
      line = " ".join(str(error).split())
      if not line or not isinstance(error, ValueError | OSError):
        line = f"{type(error).__name__}: {line}"
      facts[name] = {"error": line}

  for name, find in looks.items():
    # A daemon: one that hangs does not keep the process.
    thread = threading.Thread(target=run, args=(name, find), daemon=True)
    thread.start()
    threads.append(thread)
  end = time.monotonic() + seconds
  for thread in threads:
    thread.join(max(end - time.monotonic(), 0.0))
  if any(thread.is_alive() for thread in threads):
    multihost.end_without_waiting()
  hung = {"error": f"no answer in {seconds} s"}
  return {name: facts.get(name, hung) for name in looks}


def _provenance(config) -> dict[str, Any]:
  here = {} if config is None else json.loads(config.to_json())
  found = provenance.describe(here)
  return {k: found[k] for k in ("code", "config", "packages", "flags")}


def _devices() -> dict[str, Any]:
  devices = jax.local_devices()
  return {
    "local": len(devices),
    "total": jax.device_count(),
    "kind": ", ".join(sorted({device.device_kind for device in devices})),
  }


def _mesh(cfg: mesh_lib.MeshConfig | None, config) -> str:
  if cfg is None:
    cfg = mesh_lib.MeshConfig(**(config.mesh if config is not None else {}))
  mesh = mesh_lib.make_mesh(cfg)
  if config is not None:
    mesh_lib.check_batch(mesh, config.data.batch_size, config.accumulate)
  return ",".join(f"{name}={size}" for name, size in mesh.shape.items())


def _sum() -> dict[str, float]:
  """Add up a number of each device, over all of them."""
  mesh = mesh_lib.make_mesh()
  count = mesh.size
  numbers = np.arange(1, count + 1, dtype=np.float32)
  array = jax.make_array_from_callback(
    (count,), mesh_lib.by_rows(mesh), lambda index: numbers[index]
  )
  add = jax.jit(jnp.sum, out_shardings=mesh_lib.replicated(mesh))
  return {"got": float(add(array)), "expected": float(numbers.sum())}


def _data(config) -> dict[str, Any]:
  """Open the training source and read its first sample."""
  if config.kind == "var" and config.data.token_cache:
    name = config.data.token_cache
    source = token_cache.TokenSource(name)
  else:
    name = config.data.source
    source = sources.open_source(name, "train")
  sample = broken.Tolerant(source, config.data.on_broken)[0]
  digest = hashlib.sha256()
  for key in sorted(sample):
    digest.update(np.ascontiguousarray(sample[key]))
  return {
    "source": name,
    "samples": len(source),
    "first sample": digest.hexdigest()[:12],
  }


def _mark(workdir: str) -> epath.Path:
  """Return the path of a new file in a workdir, or where that would be made."""
  path = there = files.absolute(workdir)
  if not files.in_bucket(path):
    there = next(p for p in (path, *path.parents) if p.exists())
  return there / f".doctor_{uuid.uuid4().hex}"


def _leave(mark: epath.Path) -> str:
  try:
    mark.write_text("")
  except Exception as error:  # a bucket's client has many kinds
    raise OSError(
      f"{mark.parent} cannot be written to ({files.reason(error)})"
    ) from None
  return mark.name


def _unseen(folder: epath.Path, marks: list[str | None]) -> list[int]:
  """Return the workers whose marks are not in this worker's folder."""
  end = time.monotonic() + SEEN_SECONDS
  while True:
    unseen = [
      worker
      for worker, mark in enumerate(marks)
      if mark and not (folder / mark).exists()
    ]
    if not unseen or time.monotonic() > end:
      return unseen
    time.sleep(0.2)
