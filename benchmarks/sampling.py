"""Time to sample images with random weights, compile time apart.

    python benchmarks/sampling.py --depth 16 --batch 1

Prints one JSON line: seconds of the first call (which compiles) and of the
median later one, those of the decoder alone, and the peak host memory.
"""

import argparse
import json
import resource
import statistics
import time

import jax
import jax.numpy as jnp

from var_jax import VAR, Tokenizer, TokenizerConfig, VARConfig
from var_jax.generation import sampler
from var_jax.models.layers import resolve_dtype
from var_jax.training import tokenizer_step, var_step


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--depth", type=int, default=16)
  parser.add_argument("--batch", type=int, default=1)
  parser.add_argument("--repeats", type=int, default=5)
  parser.add_argument("--dtype", default="auto")
  args = parser.parse_args()

  dtype = resolve_dtype(args.dtype)
  tokenizer = Tokenizer(TokenizerConfig(dtype=dtype))
  var = VAR(VARConfig.official(args.depth, dtype=dtype))
  key = jax.random.key(0)
  init_key = jax.random.key(0, impl="rbg")  # quick to compile
  params = sampler.ModelParams(
    tokenizer_step.init_params(tokenizer, init_key),
    var_step.init_params(var, init_key),
  )
  models = sampler.Models(tokenizer, var)
  labels_B = jnp.arange(args.batch) % 1000
  keys_B = sampler.image_keys(key, args.batch)
  options = sampler.Options(jnp.float32(1.5), jnp.int32(900), jnp.float32(0.96))

  def sample():
    return sampler.generate(models, params, labels_B, keys_B, options)

  first, _ = timed(sample)
  runs = [timed(sample)[0] for _ in range(args.repeats)]
  cfg = tokenizer.cfg
  f_hat_BhwZ = jnp.zeros((args.batch, *cfg.schedule.grid, cfg.latent_channels))
  decodes = [
    timed(lambda: sampler.decode(models, params, f_hat_BhwZ))[0]
    for _ in range(args.repeats)
  ]
  run = statistics.median(runs)
  peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
  record = {
    "device": jax.devices()[0].device_kind,
    "depth": args.depth,
    "batch": args.batch,
    "dtype": dtype,
    "first_call_s": round(first, 2),
    "compile_s": round(first - run, 2),
    "run_s": round(run, 3),
    "run_s_all": [round(x, 3) for x in runs],
    "decode_s": round(statistics.median(decodes), 3),
    "images_per_s": round(args.batch / run, 3),
    "peak_host_memory_gib": round(peak, 2),
  }
  print(json.dumps(record))


def timed(call):
  start = time.perf_counter()
  result = jax.block_until_ready(call())
  return time.perf_counter() - start, result


if __name__ == "__main__":
  main()
