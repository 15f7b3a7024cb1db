"""Time of a training step with and without cached tokens, compile time apart.

    python benchmarks/token_cache.py --depths 8,16 --batch 4

Random weights, the released tokenizer's size, synthetic batches. The two kinds
of step take turns. Prints a JSON line for each depth: seconds of the median
step and of all of them, seconds saved, and the ratio.
"""

import argparse
import json
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np

from var_jax import VAR, Tokenizer, TokenizerConfig, VARConfig
from var_jax.models import cpu
from var_jax.models.layers import resolve_dtype
from var_jax.training import optim, tokenizer_step, var_step
from var_jax.training.state import TrainState


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--depths", default="8,16")
  parser.add_argument("--batch", type=int, default=4)
  parser.add_argument("--repeats", type=int, default=3)
  parser.add_argument("--dtype", default="auto")
  args = parser.parse_args()
  dtype = resolve_dtype(args.dtype)
  tokenizer = Tokenizer(TokenizerConfig(dtype=dtype))
  key = jax.random.key(0, impl="rbg")  # quick to compile
  tokenizer_params = tokenizer_step.init_params(tokenizer, key)
  for depth in map(int, args.depths.split(",")):
    var = VAR(VARConfig.official(depth, dtype=dtype))
    times = measure(var, tokenizer, tokenizer_params, args.batch, args.repeats)
    image, cached = (statistics.median(times[name]) for name in times)
    record = {
      "device": jax.devices()[0].device_kind,
      "depth": depth,
      "batch": args.batch,
      "dtype": dtype,
      "from_images_s": round(image, 4),
      "from_tokens_s": round(cached, 4),
      "saved_s": round(image - cached, 4),
      "ratio": round(image / cached, 3),
      "all_s": {k: [round(x, 4) for x in v] for k, v in times.items()},
    }
    print(json.dumps(record), flush=True)


def measure(
  var: VAR,
  tokenizer: Tokenizer,
  tokenizer_params,
  batch_size: int,
  repeats: int,
) -> dict[str, list[float]]:
  """Return the seconds of the steps from images and from tokens."""
  optimizer = optim.make_optimizer(
    optim.OptimizerConfig(), steps=1000, batch_size=batch_size
  )
  step = var_step.make_step(
    var, tokenizer, optimizer, var_step.VARLossConfig(), ema_decay=0.0, seed=0
  )
  step = cpu.Jit(step, donate_argnums=0)

  params = var_step.init_params(var, jax.random.key(0, impl="rbg"))
  state = TrainState.create(params, optimizer, use_ema=False)
  batches = synthetic(batch_size, tokenizer.cfg)
  times = {name: [] for name in batches}
  for repeat in range(repeats + 1):
    for name, batch in batches.items():
      start = time.perf_counter()
      state, _ = jax.block_until_ready(step(state, tokenizer_params, batch))
      if repeat:  # The first one compiles.
        times[name].append(time.perf_counter() - start)
  return times


def synthetic(B: int, cfg: TokenizerConfig) -> dict[str, dict[str, jax.Array]]:
  rng = np.random.default_rng(0)
  shape = (B, *cfg.image_shape, 3)
  tokens_BL = rng.integers(0, cfg.vocab_size, (B, cfg.schedule.num_tokens))
  common = {
    "label": jnp.asarray(rng.integers(0, 1000, B), jnp.int32),
    "position": jnp.arange(B, dtype=jnp.uint32),
  }
  return {
    "images": common
    | {"image": jnp.asarray(rng.integers(0, 256, shape), jnp.uint8)},
    "tokens": common | {"tokens": jnp.asarray(tokens_BL, jnp.uint16)},
  }


if __name__ == "__main__":
  main()
