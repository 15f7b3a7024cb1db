"""A run's own programs, compiled for devices that are not there."""

import contextlib
import dataclasses
import functools
import math
import re
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from var_jax.generation import sampler, step
from var_jax.models import layers
from var_jax.models.tokenizer import Tokenizer
from var_jax.models.transformer import VAR, Modulation
from var_jax.parallel import mesh as mesh_lib
from var_jax.parallel import rules
from var_jax.training import tokenizer_step
from var_jax.training.tokenizer_training import TokenizerTraining
from var_jax.training.var_training import VARTraining


class Memory(NamedTuple):
  """What a program holds on one chip, in bytes.

  The peak can be below the sum: temporaries take the place of arguments that
  are donated and read no more.
  """

  arguments: int
  temporaries: int
  code: int
  peak: int


class TooLarge(NamedTuple):
  """The compiler found no way to keep within a chip's memory.

  Args:
    needed: bytes, where the compiler says.
    part: that it says them of: all, or temporaries alone.
  """

  needed: float | None
  part: str


class Compiled(NamedTuple):
  memory: Memory
  seconds: float  # to compile, on this machine


def train_step(training: VARTraining | TokenizerTraining):
  """Return the lowered step of the last stage."""
  config, mesh = training.config, training.mesh
  batch = batch_like(training)
  last = training.stage_of(config.steps - 1)
  if isinstance(training, TokenizerTraining):
    frozen = training.frozen_like
  else:
    frozen = _tokenizer_like(training.tokenizer, mesh)
  return training.step(last).lower(training.like, frozen, batch)


def batch_like(training: VARTraining | TokenizerTraining):
  """Return shapes, dtypes and shardings of a batch, as `Feed` has them."""
  B, mesh = training.config.data.batch_size, training.mesh
  by_rows = mesh_lib.by_rows(mesh)

  def rows(dtype, *shape):
    return jax.ShapeDtypeStruct((B, *shape), dtype, sharding=by_rows)

  cfg = training.tokenizer.cfg
  if training.config.kind == "var" and training.config.data.token_cache:
    drawn = {"tokens": rows(jnp.uint16, cfg.schedule.num_tokens)}
  else:
    drawn = {"image": rows(jnp.uint8, *cfg.image_shape, 3)}
  return drawn | {
    "label": rows(jnp.int32),
    "index": rows(jnp.uint32),
    "position": rows(jnp.uint32),
    "skipped": rows(jnp.int32),
    "raw_digest": rows(jnp.uint32, 2),
    "digest": rows(jnp.uint32, 2),
  }


@functools.cache
def tokenizer_shapes(tokenizer: Tokenizer) -> Any:
  """Return the shapes and dtypes of a tokenizer's variables."""
  key = jax.random.key(0)
  return jax.eval_shape(lambda: tokenizer_step.init_params(tokenizer, key))


def sample_programs(
  training: VARTraining, images: int
) -> Iterator[tuple[str, jax.stages.Lowered, int]]:
  """Yield the finest scale's program and the decoder's.

  No other scale needs more: all of them hold the same cache. Each comes with
  its name and the bytes that a chip holds beside it: the other model and, in a
  stream, the cache.

  Args:
    images: drawn at once, by all devices together.
  """
  mesh, cfg = training.mesh, training.cfg
  # `load` gives both models one dtype.
  tokenizer = dataclasses.replace(training.tokenizer.cfg, dtype=cfg.dtype)
  models = sampler.Models(Tokenizer(tokenizer), VAR(cfg), rules.Context(mesh))
  params = _held(training)
  by_rows = mesh_lib.by_rows(mesh)

  def rows(dtype, *shape):
    return jax.ShapeDtypeStruct((images, *shape), dtype, sharding=by_rows)

  keys_B = rows(jax.eval_shape(lambda: jax.random.key(0)).dtype)
  state, modulation = jax.eval_shape(
    lambda params, labels_B: sampler.start_program(
      models, params, labels_B, True
    ),
    params,
    rows(jnp.int32),
  )
  state = step.State(
    _placed(state.cache, mesh, ("layers", "batch", "length", "heads")),
    _placed(state.f_hat_BhwZ, mesh, ("batch", None, None, None)),
  )
  modulation = Modulation(
    _placed(modulation.cond_BD, mesh, ("batch", None)),
    _placed(modulation.blocks_RB6D, mesh, (None, "batch", None, None)),
    _placed(modulation.head_B2D, mesh, ("batch", None)),
  )
  finest = len(cfg.schedule) - 1
  how = dict(guided=True, smooth=False)
  with models.context():
    yield (
      "finest scale",
      sampler.scale_program.lower(
        models,
        finest,
        params=params,
        state=state,
        modulation=modulation,
        keys_B=keys_B,
        options=sampler.Options(),
        given=None,
        **how,
      ),
      _bytes(params.tokenizer["params"]["decoder"]),
    )
    yield (
      "decoder",
      sampler.decode_program.lower(
        models,
        params,
        state.f_hat_BhwZ,
        platform=mesh.devices.flat[0].platform,
      ),
      _bytes((params.var, state.cache)),
    )


def compiled(lowered: jax.stages.Lowered) -> Compiled | TooLarge:
  """Compile; return what it takes."""
  begin = time.monotonic()
  try:
    with _unkept():
      program = lowered.compile()
  except jax.errors.JaxRuntimeError as error:
    too_large = refused(str(error))
    if too_large is None:
      raise
    return too_large
  found = program.memory_analysis()
  memory = Memory(
    arguments=found.argument_size_in_bytes,
    temporaries=found.temp_size_in_bytes,
    code=found.generated_code_size_in_bytes,
    peak=found.peak_memory_in_bytes,
  )
  return Compiled(memory, time.monotonic() - begin)


@contextlib.contextmanager
def _unkept() -> Iterator[None]:
  """Write nothing into JAX's compilation cache.

  A program for devices that are not there cannot be read back from it.
  """
  name = "jax_persistent_cache_min_compile_time_secs"
  before = getattr(jax.config, name)
  jax.config.update(name, math.inf)
  try:
    yield
  finally:
    jax.config.update(name, before)


def refused(message: str) -> TooLarge | None:
  """Return what an error of the compiler says of HBM; None: it is another."""
  lower = message.lower()
  if "resource_exhausted" not in lower or "hbm" not in lower:
    return None
  size = r"([\d.]+)([kmgt])"
  for part, pattern in (
    ("all", rf"used {size} of [\d.]+\w hbm"),
    ("temporaries", rf"hlo temporaries \({size}\)"),
  ):
    found = re.search(pattern, lower)
    if found:
      number, unit = found.groups()
      scale = 2.0 ** (10 * (1 + "kmgt".index(unit)))
      return TooLarge(float(number) * scale, part)
  return TooLarge(None, "all")


def _held(training: VARTraining) -> sampler.ModelParams:
  """Return the shapes of a model's parameters as `load` holds them."""
  mesh, matmul = training.mesh, training.cfg.dtype

  def held(path, leaf):
    name = rules.name_of(path)
    return jax.ShapeDtypeStruct(
      leaf.shape,
      layers.held_dtype(name, leaf.dtype, matmul),
      sharding=rules.sharding(mesh, name, leaf.shape),
    )

  frozen = _tokenizer_like(training.tokenizer, mesh)
  return sampler.ModelParams(
    *(
      jax.tree.map_with_path(held, tree)
      for tree in (frozen, training.like.params)
    )
  )


def _tokenizer_like(tokenizer: Tokenizer, mesh) -> Any:
  """Return the shapes of a frozen tokenizer, the same on all devices."""
  return _placed(tokenizer_shapes(tokenizer), mesh, ())


def _bytes(tree: Any) -> int:
  """Return the bytes on a chip."""
  return sum(
    math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
    for x in jax.tree.leaves(tree)
  )


def _placed(shapes: Any, mesh, axes: tuple[str | None, ...]) -> Any:
  """Return shapes that lie on the mesh as logical axes say."""
  sharding = jax.NamedSharding(mesh, rules.logical(mesh, axes))
  return jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), shapes
  )
