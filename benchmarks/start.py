"""Seconds from the start of a process to its first image, weights apart.

    python benchmarks/start.py --cache FOLDER     # twice: cold, then warm

Imports, tracing, compiling or reading compiled programs, and drawing count;
making random weights does not. Prints a JSON line.
"""

import time

BEGIN = time.perf_counter()

import argparse  # noqa: E402
import json  # noqa: E402
import pathlib  # noqa: E402

import jax  # noqa: E402
import numpy as np  # noqa: E402

from var_jax import (  # noqa: E402  # noqa: E402
  Model,
  Tokenizer,
  TokenizerConfig,
  VARConfig,
  compile_cache,
  loading,
)
from var_jax.bench import sampling  # noqa: E402
from var_jax.generation.sampler import Models  # noqa: E402
from var_jax.models.layers import resolve_dtype  # noqa: E402


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--cache", type=pathlib.Path, required=True)
  parser.add_argument("--depth", type=int, default=16)
  args = parser.parse_args()
  warm = args.cache.exists()
  jax.config.update("jax_compilation_cache_dir", str(args.cache))
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
  compile_cache.enable()  # what a command calls; the folder above stays
  dtype = resolve_dtype(None)
  cfg = TokenizerConfig(dtype=dtype)
  models = Models(
    Tokenizer(cfg),
    loading.sampling_var(VARConfig.official(args.depth, dtype=dtype)),
    decode_rows=loading.decode_rows(cfg),
  )
  apart = time.perf_counter()
  params = jax.block_until_ready(sampling.random_params(models))
  apart = time.perf_counter() - apart
  model = Model(models, params)
  image = np.asarray(model.sample([3], jax.random.key(0)).images_BHW3)
  seconds = time.perf_counter() - BEGIN - apart
  assert np.isfinite(image).all()
  record = {"warm": warm, "depth": args.depth, "seconds": round(seconds, 2)}
  print(json.dumps(record | {"device": jax.devices()[0].device_kind}))


if __name__ == "__main__":
  main()
