"""What drawing images takes: whole, by parts, and beside raster order.

Weights are random: a time does not depend on them. A batch is timed as the
fused program, as one program a scale, without the decoder, and in parts:
transformer, draw and quantiser of each scale, and decoder. Parts are programs
of their own, so that their sum is not the whole: each writes what the next one
reads.
"""

import dataclasses
import functools
import statistics
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from var_jax.bench import raster, roofline, timing
from var_jax.bench.timing import Program
from var_jax.generation import logits as logits_lib
from var_jax.generation import sampler, step
from var_jax.generation.sampler import ModelParams, Models, Options
from var_jax.models import cpu, layers
from var_jax.models.transformer import VAR, KVCache, VARConfig
from var_jax.parallel import rules
from var_jax.training import flops, tokenizer_step, var_step


class Settings(NamedTuple):
  """How to measure.

  Args:
    seconds: for each program, about.
    parts: also time the parts.
    stream: also time one program a scale.
    raster: also time the raster sampler, "cached" and "free" of a cache.
  """

  seconds: float = 5.0
  repeats: int = 50
  parts: bool = True
  stream: bool = True
  raster: tuple[str, ...] = ("cached",)


def random_params(models: Models) -> ModelParams:
  """Return random weights, held in the dtypes that `load` holds them in.

  They repeat after a million: initialisers take longer than all else here.
  """
  cfg = models.var.cfg
  like = jax.eval_shape(
    lambda key: ModelParams(
      tokenizer_step.init_params(models.tokenizer, key),
      var_step.init_params(VAR(cfg), key),
    ),
    jax.random.key(0),
  )
  few = 0.02 * jax.random.normal(jax.random.key(0), (2**20,))

  def filled(path, x):
    dtype = layers.held_dtype(rules.name_of(path), x.dtype, cfg.dtype)
    return jnp.resize(few.astype(dtype), x.shape)

  return jax.tree.map_with_path(filled, like)


def of_batches(
  models: Models, params: ModelParams, batches: Sequence[int], how: Settings
) -> list[dict[str, Any]]:
  """Return what is known of drawing so many images at once, for each number.

  All programs are compiled before the first is timed.
  """
  programs = {
    (batch, name): program
    for batch in batches
    for name, program in _programs(models, params, batch, how)
  }
  found = timing.measure(programs, how.seconds, how.repeats)
  has = roofline.peaks(models.var.cfg.dtype)

  def record(batch: int) -> dict[str, Any]:
    measured = {n: value for (b, n), value in found.items() if b == batch}
    stream = None
    if how.stream:
      times = timing.time_calls(
        lambda: _stream(models, params, batch), how.seconds, how.repeats
      )
      stream = statistics.median(times)
    return _record(models, batch, measured, has) | {"stream_median_s": stream}

  return [record(batch) for batch in batches]


def _programs(models, params, batch, how) -> Iterator[tuple[str, Program]]:
  yield from whole(models, params, batch)
  if how.parts:
    yield from _parts(models, params, batch)
  for kind in how.raster:
    program = raster_program(_flat(models.var.cfg), batch, kind == "cached")
    yield f"raster {kind}", program


def _stream(models, params, batch):
  """Run the very programs of a stream, one after the other."""
  drawn = sampler.draw_scales(models, params, *_asked(batch))
  return [scale.tokens_Bl for scale in drawn]


def _record(models, batch, found, has: roofline.Peaks) -> dict[str, Any]:
  cfg, tokenizer = models.var.cfg, models.tokenizer.cfg
  flat = _flat(cfg)
  bound = roofline.of_draw(cfg, tokenizer, batch, rows=2, has=has)
  least = {
    "fused": bound.transformer + bound.decoder,
    "transformer": bound.transformer,
    "decoder": bound.decoder,
  }
  return {
    "batch": batch,
    "images_per_second": batch / found["fused"].median_s,
    "programs": {name: value._asdict() for name, value in found.items()},
    "steps": {"var": len(cfg.schedule), "raster": flat.schedule.num_tokens},
    "flops_per_image": {
      "var": flops.var_sample(cfg, rows=2),
      "decoder": flops.tokenizer_forward(tokenizer).decoder,
      "raster cached": raster.sample_flops(flat, 2, cached=True),
      "raster free": raster.sample_flops(flat, 2, cached=False),
    },
    "peaks": has._asdict(),
    "bound_s": least,
    "share_of_bound": {
      name: seconds / found[name].median_s for name, seconds in least.items()
    },
    "scales_bound_s": list(bound.scales),
  }


def _flat(cfg: VARConfig) -> VARConfig:
  """Return the transformer of the same size over the finest grid alone."""
  return dataclasses.replace(cfg, scales=(cfg.schedule.sizes[-1],))


def _asked(batch: int):
  """Return labels, keys and options."""
  labels_B = jnp.arange(batch, dtype=jnp.int32)
  keys_B = sampler.image_keys(jax.random.key(0), batch)
  options = Options(
    jnp.float32(1.5), jnp.int32(900), jnp.float32(0.96), jnp.float32(1.0)
  )
  return labels_B, keys_B, options


def whole(models, params, batch) -> Iterator[tuple[str, Program]]:
  """Yield the fused program, it without the decoder, and the decoder."""

  def fused(params, labels_B, keys_B, options):
    return sampler.fused_program(
      models, params, labels_B, keys_B, options, None, guided=True, smooth=False
    )

  def without_decoder(params, labels_B, keys_B, options):
    drawn = sampler.draw_scales(models, params, labels_B, keys_B, options)
    return list(drawn)[-1].f_hat_BhwZ

  def make():
    return params, *_asked(batch)

  yield "fused", Program(fused, make)
  yield "transformer", Program(without_decoder, make)
  yield (
    "decoder",
    Program(
      functools.partial(step.to_images, models),
      lambda: (params, _normal(_f_hat_shape(models, batch))),
      compiler_options=cpu.compiler_options(jax.default_backend()),
    ),
  )


def _parts(models, params, batch) -> Iterator[tuple[str, Program]]:
  """Yield the parts of each scale, as programs of their own."""
  cfg = models.var.cfg

  def with_guidance():
    labels_B, _, _ = _asked(batch)
    _, modulation = step.start(models, params, labels_B, True)
    return modulation

  modulation = jax.jit(with_guidance)()
  cache = (cfg.depth, 2 * batch, cfg.schedule.num_tokens, cfg.width)
  for s in range(len(cfg.schedule)):
    l = cfg.schedule.end(s) - cfg.schedule.start(s)

    def transformer(cache, params, inputs_BlZ, modulation, s=s):
      logits_BlV, cache = models.var.apply(
        params.var, s, inputs_BlZ, modulation, cache, method="step"
      )
      return cache, logits_BlV

    def draw(logits_BlV, keys_B, options):
      conditional, unconditional = jnp.split(logits_BlV, 2)
      logits_BlV = logits_lib.guide(
        conditional, unconditional, options.guidance
      )
      logits_BlV = logits_lib.keep_top_k(logits_BlV, options.top_k)
      logits_BlV = logits_lib.keep_top_p(logits_BlV, options.top_p)
      noise_BlV = jax.vmap(
        lambda key: jax.random.gumbel(key, logits_BlV.shape[1:])
      )(keys_B)
      return logits_lib.draw(logits_BlV, noise_BlV)

    def quantizer(f_hat_BhwZ, params, tokens_Bl, s=s):
      tokenizer = functools.partial(models.tokenizer.apply, params.tokenizer)
      h_BlZ = tokenizer(tokens_Bl, method="lookup")
      f_hat_BhwZ = tokenizer(f_hat_BhwZ, h_BlZ, s, method="add_scale")
      following = min(s + 1, len(cfg.schedule) - 1)
      return f_hat_BhwZ, tokenizer(f_hat_BhwZ, following, method="next_input")

    yield (
      f"transformer {s}",
      Program(
        transformer,
        lambda l=l: (
          KVCache(*(_normal(cache, cfg.dtype) for _ in "kv")),
          params,
          _normal((2 * batch, l, cfg.latent_channels)),
          modulation,
        ),
        carries=True,
      ),
    )
    yield (
      f"draw {s}",
      Program(
        draw,
        lambda l=l: (
          _normal((2 * batch, l, cfg.vocab_size)),
          *_asked(batch)[1:],
        ),
      ),
    )
    yield (
      f"quantizer {s}",
      Program(
        quantizer,
        lambda l=l: (
          _normal(_f_hat_shape(models, batch)),
          params,
          jnp.zeros((batch, l), jnp.int32) + jnp.arange(l) % cfg.vocab_size,
        ),
        carries=True,
      ),
    )


def raster_program(cfg: VARConfig, batch: int, cached: bool) -> Program:
  """Return the raster sampler of random weights."""
  model = raster.Raster(cfg)
  params = jax.jit(functools.partial(raster.init_params, model))(
    jax.random.key(0, impl="rbg")
  )
  return Program(
    functools.partial(raster.generate, model, cached=cached),
    lambda: (params, *_asked(batch)),
  )


def _f_hat_shape(models: Models, batch: int) -> tuple[int, ...]:
  cfg = models.tokenizer.cfg
  return batch, *cfg.schedule.grid, cfg.latent_channels


def _normal(shape: tuple[int, ...], dtype=jnp.float32) -> jax.Array:
  # Not zeros: on some devices products of zeros are faster.
  return jax.random.normal(jax.random.key(2), shape, dtype)
