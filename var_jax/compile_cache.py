"""Compiled programs on the disk, so that only the first start compiles."""

import os
import pathlib

import jax


def enable() -> None:
  """Keep programs in ~/.cache/var_jax, unless JAX was told of another folder.

  JAX_COMPILATION_CACHE_DIR names another, JAX_ENABLE_COMPILATION_CACHE=false
  turns it off. What cannot be written is compiled again, with a warning.
  """
  if jax.config.jax_compilation_cache_dir is not None:
    return
  home = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
  folder = pathlib.Path(home) / "var_jax"
  jax.config.update("jax_compilation_cache_dir", os.fspath(folder))
  # A program a scale: by default JAX leaves the quick ones out.
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
