"""What drawing takes of TPU chips, compiled for ones that are not there.

    python benchmarks/tpu_sampling.py --chips v5e v5p v6e --batches 1 8

A published depth in bfloat16 with guidance, one program a scale: the peak of a
chip's HBM by the compiler's word, of the finest scale and of the decoder, with
what lies beside each. --bytes adds what an image moves through HBM, beside the
least that it has to. Prints a JSON line for each chip and batch.
"""

import argparse
import dataclasses
import functools
import json
import time
from unittest import mock

import flax.linen as nn
import jax
import jax.numpy as jnp

from var_jax import loading
from var_jax.bench import roofline, sampling
from var_jax.generation import sampler, step
from var_jax.generation.sampler import Models
from var_jax.models.blocks import VARConfig
from var_jax.models.tokenizer import Tokenizer, TokenizerConfig
from var_jax.planning import compiling, topology

ONE_CHIP = {"v5e": "v5e:1x1", "v5p": "v5p:2x2x1", "v6e": "v6e:1x1"}
_GIB = 2.0**30


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--chips", nargs="+", choices=ONE_CHIP, default=ONE_CHIP)
  parser.add_argument("--batches", nargs="+", type=int, default=(1, 8, 64))
  parser.add_argument("--depth", type=int, default=16)
  parser.add_argument("--bytes", action="store_true")
  args = parser.parse_args()
  topology.use_no_tpu()
  cfg = VARConfig.official(args.depth, dtype="bfloat16")
  for batch in args.batches:
    for kind in args.chips:
      begin = time.monotonic()
      programs = Programs(cfg, batch, topology.Topology(ONE_CHIP[kind]))
      record = {"chip": kind, "depth": args.depth, "batch": batch}
      record |= memory(programs)
      if args.bytes:
        record |= moved(programs)
      record["seconds"] = round(time.monotonic() - begin)
      print(json.dumps(record), flush=True)


class Programs:
  """The sampler's programs for one chip, lowered."""

  def __init__(self, cfg: VARConfig, batch: int, chip: topology.Topology):
    self.cfg, self.batch, self.chip = cfg, batch, chip
    self.where = jax.sharding.SingleDeviceSharding(chip.devices()[0])
    tokenizer = TokenizerConfig(dtype=cfg.dtype)
    self.models = Models(
      Tokenizer(tokenizer),
      loading.sampling_var(cfg, "tpu"),
      decode_rows=loading.decode_rows(tokenizer, "tpu"),
    )
    self.params = self._placed(
      jax.eval_shape(lambda: sampling.random_params(self.models))
    )
    labels_B = jax.ShapeDtypeStruct((batch,), jnp.int32)
    start = jax.eval_shape(
      lambda params, labels_B: step.start(self.models, params, labels_B, True),
      self.params,
      labels_B,
    )
    self.state, self.modulation = self._placed(start)

  def scale(self, s: int) -> jax.stages.Lowered:
    keys_B = jax.eval_shape(
      lambda: sampler.image_keys(jax.random.key(0), self.batch)
    )
    return sampler.scale_program.lower(
      self.models,
      s,
      True,
      False,
      self.params,
      self.state,
      self.modulation,
      self._placed(keys_B),
      sampler.Options(),
      None,
    )

  def decoder(self) -> jax.stages.Lowered:
    return sampler.decode_program.lower(
      self.models, self.params, self.state.f_hat_BhwZ, platform="tpu"
    )

  def _placed(self, tree):
    return jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=self.where),
      tree,
    )


def memory(programs: Programs) -> dict[str, float | bool]:
  params, state = programs.params, programs.state
  finest = len(programs.cfg.schedule) - 1
  beside = {
    "finest scale": params.tokenizer["params"]["decoder"],
    "decoder": (params.var, state.cache),
  }
  peaks = {}
  for name, lowered in (
    ("finest scale", programs.scale(finest)),
    ("decoder", programs.decoder()),
  ):
    found = compiling.compiled(lowered)
    if isinstance(found, compiling.TooLarge):
      return {"fits": False, "in": name, "needed": found.needed}
    rest = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(beside[name]))
    peaks[name] = (found.memory.peak + rest) / _GIB
  hbm = programs.chip.chip.hbm_bytes / _GIB
  return {"fits": max(peaks.values()) < hbm, "peak_gib": peaks, "hbm_gib": hbm}


def moved(programs: Programs) -> dict[str, float]:
  """Return GiB an image, of the transformer's scales and of the decoder.

  The compiler counts the body of a loop once, however often it runs. So layers
  are counted in programs without a loop, of one layer and of two: what the
  second adds, all others do.
  """
  cfg, batch = programs.cfg, programs.batch

  def scales_of(depth: int) -> float:
    # The model's own loop is not unrolled anywhere.
    unrolled = functools.partial(nn.scan, unroll=depth)
    with mock.patch.object(nn, "scan", unrolled):
      shallow = Programs(
        dataclasses.replace(cfg, depth=depth), batch, programs.chip
      )
      return sum(_accessed(shallow.scale(s)) for s in range(len(cfg.schedule)))

  one, two = scales_of(1), scales_of(2)
  # Peaks of no FLOPs and one byte a second: seconds are bytes.
  slow = roofline.Peaks(float("inf"), 1.0, "")
  tokenizer = programs.models.tokenizer.cfg
  least = roofline.of_draw(cfg, tokenizer, batch, 2, slow)
  each = batch * _GIB
  return {
    "scales_gib": (one + (cfg.depth - 1) * (two - one)) / each,
    "least_gib": sum(least.scales) / each,
    "decoder_gib": _accessed(programs.decoder()) / each,
  }


def _accessed(lowered: jax.stages.Lowered) -> float:
  return lowered.compile().cost_analysis()["bytes accessed"]


if __name__ == "__main__":
  main()
