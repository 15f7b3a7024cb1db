"""What drawing takes of TPU chips, compiled for ones that are not there.

    python benchmarks/tpu_sampling.py memory --chips v5e v5p v6e
    python benchmarks/tpu_sampling.py bytes --chips v5e

A published depth in bfloat16 with guidance, one program a scale. `memory` is
the peak of a chip's HBM by the compiler's word, the larger of the finest scale
and the decoder, with what lies beside each. `bytes` are those that an image
moves in all scales and the decoder, by the compiler's count. It counts the body
of a loop once: so a program of one layer is compiled, and a layer by itself for
the others; the loops that search for top-k and top-p stay counted once. Beside
them the least that must move: weights once a part, the cache once a scale.
Prints a JSON line for each chip and batch.
"""

import argparse
import dataclasses
import json
import time

import jax
import jax.numpy as jnp

from var_jax import loading
from var_jax.bench import roofline, sampling
from var_jax.generation import sampler, step
from var_jax.generation.sampler import Models
from var_jax.models.blocks import Block, Past, VARConfig
from var_jax.models.tokenizer import Tokenizer, TokenizerConfig
from var_jax.planning import compiling, topology

ONE_CHIP = {"v5e": "v5e:1x1", "v5p": "v5p:2x2x1", "v6e": "v6e:1x1"}
_GIB = 2.0**30


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("what", choices=("memory", "bytes"))
  parser.add_argument("--chips", nargs="+", choices=ONE_CHIP, default=ONE_CHIP)
  parser.add_argument("--batches", nargs="+", type=int, default=(1, 8, 64))
  parser.add_argument("--depth", type=int, default=16)
  args = parser.parse_args()
  topology.use_no_tpu()
  cfg = VARConfig.official(args.depth, dtype="bfloat16")
  measure = {"memory": memory, "bytes": moved}[args.what]
  for batch in args.batches:
    for kind in args.chips:
      begin = time.monotonic()
      programs = Programs(cfg, batch, topology.Topology(ONE_CHIP[kind]))
      record = {"chip": kind, "depth": args.depth, "batch": batch}
      record |= measure(programs)
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

  def layer(self, s: int) -> jax.stages.Lowered:
    """Return one layer of scale s by itself."""
    scales, rows = self.cfg.schedule, 2 * self.batch
    start, l = scales.start(s), scales.end(s) - scales.start(s)
    block = Block(self.cfg, self.models.var.attend)

    def apply(params, x_BlD, modulation_B6D, k_BLD, v_BLD):
      past = Past(k_BLD, v_BLD, start)
      return block.apply(params, x_BlD, modulation_B6D, past, None)

    def first(tree):
      return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), tree
      )

    args = (
      {"params": first(self.params.var["params"]["blocks"])},
      jax.ShapeDtypeStruct((rows, l, self.cfg.width), jnp.float32),
      *first((self.modulation.blocks_RB6D, *self.state.cache)),
    )
    return jax.jit(apply).lower(*self._placed(args))

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
  cfg, batch = programs.cfg, programs.batch
  one = Programs(dataclasses.replace(cfg, depth=1), batch, programs.chip)
  scales = range(len(cfg.schedule))
  layers = sum(_bytes(one.layer(s)) for s in scales)
  rest = sum(_bytes(one.scale(s)) for s in scales) - layers
  decoder = _bytes(programs.decoder())
  as_bytes = roofline.Peaks(jnp.inf, 1.0, "")  # seconds are bytes
  least = roofline.of_draw(cfg, TokenizerConfig(), batch, 2, as_bytes)
  gb_an_image = {
    "transformer": cfg.depth * layers + rest,
    "of layers": cfg.depth * layers,
    "decoder": decoder,
    "least, transformer": least.transformer,
  }
  return {name: x / batch / 1e9 for name, x in gb_an_image.items()}


def _bytes(lowered: jax.stages.Lowered) -> float:
  return lowered.compile().cost_analysis()["bytes accessed"]


if __name__ == "__main__":
  main()
