"""What a training step takes, and how much of the device's peak that is."""

import statistics
import time
from typing import Any

import jax
import numpy as np

from var_jax.bench import roofline, timing
from var_jax.models.tokenizer import TokenizerConfig
from var_jax.parallel import mesh as mesh_lib
from var_jax.planning import compiling
from var_jax.training import programs, tokenizer_step
from var_jax.training.var_training import VARTraining


def of_step(
  config, tokenizer: TokenizerConfig, seconds: float, repeats: int
) -> dict[str, Any]:
  """Return time and memory of a transformer's step, on random images.

  Args:
    config: of a run. With data.token_cache set, whatever it names, the batch
      has tokens in place of images.

  Raises:
    ValueError: the config makes no sense, or does not fit the devices.
  """
  mesh = mesh_lib.make_mesh(programs.build(mesh_lib.MeshConfig, config, "mesh"))
  mesh_lib.check_batch(mesh, config.data.batch_size, config.accumulate)
  training = VARTraining.of(config, mesh, tokenizer, num_classes=1000)
  frozen = jax.jit(
    lambda: tokenizer_step.init_params(training.tokenizer, jax.random.key(0)),
    out_shardings=mesh_lib.replicated(mesh),
  )()
  state = training.placed(training.fresh)
  batch = _batch(training)
  step = training.step(None)
  begin = time.perf_counter()
  compiled = step.lower(state, frozen, batch).compile()
  compile_s = time.perf_counter() - begin
  held = [state]

  def take():
    held[0], metrics = compiled(held[0], frozen, batch)
    return metrics

  times = timing.time_calls(take, seconds, repeats)
  median = statistics.median(times)
  has = roofline.peaks(training.cfg.dtype)
  flops = training.work(None).flops_per_step
  return {
    "batch": config.data.batch_size,
    "devices": mesh.size,
    "cached_tokens": bool(config.data.token_cache),
    "dtype": training.cfg.dtype,
    "remat": training.cfg.remat,
    "median_s": median,
    "low_s": min(times),
    "high_s": max(times),
    "compile_s": compile_s,
    "images_per_second": config.data.batch_size / median,
    "peak_bytes": timing.peak(compiled),
    "flops": flops,
    "mfu": flops / (median * mesh.size * has.flops),
    "peaks": has._asdict(),
  }


def _batch(training: VARTraining) -> dict[str, jax.Array]:
  """Return a batch of random images or tokens, with all that `Feed` adds."""
  limits = {"image": 256, "tokens": training.cfg.vocab_size, "label": 1000}
  rng = np.random.default_rng(0)

  def filled(name, like):
    values = rng.integers(limits.get(name, 1), size=like.shape)
    return jax.device_put(values.astype(like.dtype), like.sharding)

  shapes = compiling.batch_like(training)
  return {name: filled(name, like) for name, like in shapes.items()}
