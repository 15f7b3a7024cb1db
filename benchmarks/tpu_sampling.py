"""What the sampler takes of a TPU chip, compiled for one that is not there.

    python benchmarks/tpu_sampling.py --chips v5e v5p v6e --batches 1 8 64

The fused program of a published depth in bfloat16, decoder included: the peak
of a chip's HBM by the compiler's word, and the bytes that an image moves. A
loop's body is counted once, so bytes come from programs of one and of two
unrolled layers: of R layers, b1 + (R - 1) (b2 - b1). Beside them the least that
must move: weights once a part and the cache once a scale. Prints a JSON line
for each program.
"""

import argparse
import dataclasses
import json
import time

import jax
import jax.numpy as jnp

from var_jax import loading
from var_jax.bench import roofline, sampling
from var_jax.generation import sampler
from var_jax.generation.sampler import Models
from var_jax.models.tokenizer import Tokenizer, TokenizerConfig
from var_jax.models.transformer import VARConfig
from var_jax.planning import compiling, topology

ONE_CHIP = {"v5e": "v5e:1x1", "v5p": "v5p:2x2x1", "v6e": "v6e:1x1"}
_GIB = 2.0**30


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--chips", nargs="+", choices=ONE_CHIP, default=ONE_CHIP)
  parser.add_argument("--batches", nargs="+", type=int, default=(1, 8, 64))
  parser.add_argument("--depth", type=int, default=16)
  parser.add_argument(
    "--no-bytes", action="store_true", help="leave the bytes moved out"
  )
  args = parser.parse_args()
  topology.use_no_tpu()
  cfg = VARConfig.official(args.depth, dtype="bfloat16")
  for batch in args.batches:
    for kind in args.chips:
      chip = topology.Topology(ONE_CHIP[kind])
      record = {"chip": kind, "depth": args.depth, "batch": batch}
      record |= memory(cfg, batch, chip)
      if not args.no_bytes:
        record |= moved(cfg, batch, chip)
      print(json.dumps(record), flush=True)


def memory(cfg: VARConfig, batch: int, chip: topology.Topology):
  begin = time.monotonic()
  found = compiling.compiled(lowered(cfg, batch, chip, unroll=1))
  seconds = time.monotonic() - begin
  if isinstance(found, compiling.TooLarge):
    return {"fits": False, "needed": found.needed, "seconds": seconds}
  return {
    "fits": True,
    "peak_gib": found.memory.peak / _GIB,
    "arguments_gib": found.memory.arguments / _GIB,
    "hbm_gib": chip.chip.hbm_bytes / _GIB,
    "seconds": seconds,
  }


def moved(cfg: VARConfig, batch: int, chip: topology.Topology):
  def of_layers(count: int) -> float:
    few = dataclasses.replace(cfg, depth=count)
    program = lowered(few, batch, chip, unroll=count).compile()
    return program.cost_analysis()["bytes accessed"]

  one, two = of_layers(1), of_layers(2)
  has = roofline.Peaks(jnp.inf, 1.0, "bytes")  # seconds are bytes
  least = roofline.of_draw(cfg, TokenizerConfig(), batch, 2, has)
  return {
    "gb_per_image": (one + (cfg.depth - 1) * (two - one)) / batch / 1e9,
    "layer_gb_per_image": (two - one) / batch / 1e9,
    "least_gb_per_image": (least.transformer + least.decoder) / batch / 1e9,
  }


def lowered(cfg: VARConfig, batch: int, chip: topology.Topology, unroll: int):
  tokenizer = TokenizerConfig(dtype=cfg.dtype)
  var = loading.sampling_var(cfg, "tpu").clone(unroll=unroll)
  models = Models(
    Tokenizer(tokenizer), var, decode_rows=loading.decode_rows(tokenizer, "tpu")
  )
  on_chip = jax.sharding.SingleDeviceSharding(chip.devices()[0])

  def placed(tree):
    return jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=on_chip), tree
    )

  params = jax.eval_shape(lambda: sampling.random_params(models))
  keys_B = jax.eval_shape(lambda: sampler.image_keys(jax.random.key(0), batch))
  return sampler.fused_program.lower(
    models,
    placed(params),
    placed(jax.ShapeDtypeStruct((batch,), jnp.int32)),
    placed(keys_B),
    sampler.Options(),
    None,
    guided=True,
    smooth=False,
  )


if __name__ == "__main__":
  main()
