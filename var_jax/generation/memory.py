"""What drawing takes of a device's memory, by estimate."""

import math
import os

import jax
import jax.numpy as jnp

from var_jax.generation.step import ModelParams, Models


def of_parameters(params: ModelParams) -> int:
  """Return the bytes of both models on a device."""
  return sum(
    math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
    for x in jax.tree.leaves(params)
    if isinstance(x, jax.Array)
  )


def of_image(models: Models) -> int:
  """Return the bytes that each image of a batch adds, with guidance.

  Cache and modulation stay; beside them are either the arrays of the finest
  scale or the image. What the decoder holds of a part does not grow.
  """
  cfg, tokenizer = models.var.cfg, models.tokenizer.cfg
  L, D, V = cfg.schedule.num_tokens, cfg.width, cfg.vocab_size
  l = L - cfg.schedule.start(len(cfg.schedule) - 1)
  width = jnp.dtype(cfg.dtype).itemsize
  # Twice: a donated cache and what replaces it, at worst.
  cache = 2 * 2 * 2 * cfg.depth * L * D * width
  modulation = 2 * 6 * cfg.depth * D * 4
  logits = 4 * l * V * 4  # both halves, filtered, noise
  image = 2 * 3 * 4 * math.prod(tokenizer.image_shape)
  return cache + modulation + max(logits, image)


def of_device() -> int | None:
  """Return the bytes that programs may use of a device; None: not known."""
  device = jax.local_devices()[0]
  limit = (device.memory_stats() or {}).get("bytes_limit")
  if limit is None and device.platform == "cpu":
    limit = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limit //= jax.local_device_count()
  return limit
