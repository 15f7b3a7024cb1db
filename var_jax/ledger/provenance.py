"""What the numbers of a run follow from: code, config, environment.

Nothing here names the machine or its user; of paths only those that the config
holds are kept.
"""

import hashlib
import importlib.metadata
import json
import os
import pathlib
import platform
import re
import subprocess
from collections.abc import Iterator, Mapping
from typing import Any

import jax
from flax.traverse_util import flatten_dict
from jax.extend import backend

from var_jax import files
from var_jax.ledger.records import plain

PACKAGE = pathlib.Path(__file__).parents[1]

_PACKAGES = (
  "array-record", "clu", "etils", "flax", "grain", "jax", "jaxlib",
  "libtpu", "ml-collections", "ml-dtypes", "numpy", "optax",
  "orbax-checkpoint", "pillow", "scikit-learn", "scipy", "tensorflow-datasets",
)  # fmt: skip
# Accelerators bring their compilers and kernels as packages of many names.
_PLUGINS = re.compile(r"(jax|nvidia)-.+")
_JAX_FLAGS = (
  "jax_default_matmul_precision", "jax_default_prng_impl", "jax_disable_jit",
  "jax_enable_x64", "jax_numpy_dtype_promotion", "jax_random_seed_offset",
  "jax_softmax_custom_jvp", "jax_threefry_partitionable",
)  # fmt: skip
_VARIABLES = ("LIBTPU_INIT_ARGS", "NVIDIA_TF32_OVERRIDE", "XLA_FLAGS")


def describe(
  config: Mapping[str, Any], mesh: jax.sharding.Mesh | None = None
) -> dict[str, Any]:
  """Return what a run follows from, as what JSON gives back.

  Args:
    config: as JSON.
    mesh: that the run is on; None for a single device.
  """
  config = plain(config)
  canonical = json.dumps(config, sort_keys=True, separators=(",", ":"))
  return {
    "code": _code(PACKAGE),
    "config": config,
    "config_sha256": hashlib.sha256(canonical.encode()).hexdigest(),
    "packages": _packages(),
    "devices": _devices(mesh),
    "flags": _flags(),
  }


def differences(
  recorded: Mapping[str, Any], here: Mapping[str, Any]
) -> list[str]:
  """Return what differs, a line each: code, then config, then environment.

  Args:
    recorded, here: as `describe` returns it.
  """
  code = [flatten_dict(p.get("code", {}), sep=":") for p in (recorded, here)]
  lines = [_code_line(*change) for change in _changes(*code)]
  for group in ("config", "packages", "devices", "flags"):
    title = "config: " if group == "config" else f"environment: {group}."
    pair = [flatten_dict(p.get(group, {}), sep=".") for p in (recorded, here)]
    lines += [
      f"{title}{name} was {json.dumps(old)}, is {json.dumps(new)}"
      for name, old, new in _changes(*pair)
    ]
  return lines


def _changes(old: Mapping, new: Mapping) -> Iterator[tuple[str, Any, Any]]:
  """Yield (name, value there, value here) by name; None if it is absent."""
  for name in sorted(old.keys() | new.keys()):
    if old.get(name) != new.get(name):
      yield name, old.get(name), new.get(name)


def _code_line(name: str, old: str | None, new: str | None) -> str:
  if name.startswith("files:"):
    how = "is new" if old is None else "is gone" if new is None else "changed"
    return f"code: {PACKAGE.name}/{name.removeprefix('files:')} {how}"
  if name == "revision":
    return f"code: the git revision was {old}, is {new}"
  was, is_now = (digest and digest[:12] for digest in (old, new))
  return f"code: the uncommitted changes were {was}, are {is_now}"


def _code(package: pathlib.Path) -> dict[str, Any]:
  """Return revision, digest of uncommitted changes, digest of each file."""
  revision, uncommitted = _checkout(package)
  paths = sorted(package.rglob("*.py"))
  return {
    "revision": revision,
    "uncommitted": uncommitted,
    "files": {
      path.relative_to(package).as_posix(): files.sha256(path) for path in paths
    },
  }


def _checkout(package: pathlib.Path) -> tuple[str | None, str | None]:
  """Return (revision, digest of uncommitted changes), None where there is none.

  The digest is of names and contents of the files that differ from the
  revision, not of a diff's text, which follows from the user's git settings.
  """
  try:
    # A package that is installed beneath somebody's checkout is not of it.
    _git(package, "ls-files", "--error-unmatch", "__init__.py")
    revision = _git(package, "rev-parse", "HEAD").strip()
    root = package / _git(package, "rev-parse", "--show-cdup").strip()
    names = _git(
      root, "diff", "HEAD", "--name-only", "--no-renames", "--no-ext-diff", "-z"
    ).split("\0")
    untracked = _git(root, "ls-files", "--others", "--exclude-standard", "-z")
    names += [name for name in untracked.split("\0") if name.endswith(".py")]
  except (OSError, subprocess.SubprocessError):
    return None, None
  changed = {
    name: files.sha256(root / name) if (root / name).is_file() else None
    for name in names
    if name
  }
  text = json.dumps(changed, sort_keys=True)
  digest = hashlib.sha256(text.encode()).hexdigest()
  return revision, digest if changed else None


def _git(folder: pathlib.Path, *arguments: str) -> str:
  return subprocess.run(
    ("git", "-C", os.fspath(folder), *arguments),
    check=True,
    capture_output=True,
    encoding="utf-8",
    errors="surrogateescape",
    timeout=60,
    # Looking takes no lock: a commit at the same time goes through.
    env={**os.environ, "GIT_OPTIONAL_LOCKS": "0"},
  ).stdout


def _packages() -> dict[str, str]:
  """Return versions by name, and Python's."""
  versions = {"python": platform.python_version()}
  for distribution in importlib.metadata.distributions():
    name = (distribution.metadata["Name"] or "").lower().replace("_", "-")
    if name in _PACKAGES or _PLUGINS.fullmatch(name):
      versions.setdefault(name, distribution.version)  # as an import finds it
  return dict(sorted(versions.items()))


def _devices(mesh: jax.sharding.Mesh | None) -> dict[str, Any]:
  devices = jax.devices() if mesh is None else list(mesh.devices.flat)
  platform_name = devices[0].platform
  description = {
    "platform": platform_name,
    "platform_version": backend.get_backend().platform_version,
    "kind": sorted({device.device_kind for device in devices}),
    "count": 1 if mesh is None else len(devices),
    "processes": jax.process_count(),
    "mesh": dict(mesh.shape) if mesh is not None else None,
  }
  if platform_name == "cpu":  # code and partition follow from it
    description["cpu"] = _cpu_model()
    description["cpu_count"] = os.cpu_count()
  return description


def _cpu_model() -> str:
  try:
    text = pathlib.Path("/proc/cpuinfo").read_text()
  except OSError:
    text = ""
  model = re.search(r"^model name\s*: (.+)$", text, re.MULTILINE)
  return model[1] if model else platform.machine()


def _flags() -> dict[str, Any]:
  """Return the settings of JAX and XLA that numbers may follow from."""
  flags = {name: getattr(jax.config, name, None) for name in _JAX_FLAGS}
  for name in _VARIABLES:
    words = sorted(os.environ.get(name, "").split())
    # A path says where the compiler dumps, and how this machine is laid out.
    flags[name] = [re.sub(r"=[^,]*/.*", "=PATH", word) for word in words]
  return plain(flags)
