"""Programs that are compiled before they are called, side by side."""

import concurrent.futures
import os
from collections.abc import Callable
from typing import Any

import jax


class Ahead:
  """Calls of jitted functions on one device that are noted and not made.

  Shapes go from call to call in place of arrays. What `compile` compiles, JAX
  then finds when it is called.
  """

  def __init__(self):
    self._calls = {}

  def through(self, program) -> Callable:
    """Return what notes a call of a jitted function and gives its shapes."""

    def call(*args) -> Any:
      self._calls.setdefault((program, _kind(args)), (program, args))
      shapes = program.eval_shape(*args)
      sharding = _committed(args)
      return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        shapes,
      )

    return call

  def compile(self) -> None:
    """Compile what was noted, a thread for each core."""

    def compile_one(noted):
      program, args = noted
      program.lower(*args).compile()

    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
      list(pool.map(compile_one, self._calls.values()))


def _kind(args: tuple) -> tuple:
  """Return what decides which program serves a call."""
  leaves, tree = jax.tree.flatten(args)
  return tree, tuple(
    (x.shape, x.dtype) if hasattr(x, "dtype") else x for x in leaves
  )


def _committed(args: tuple) -> jax.sharding.Sharding | None:
  """Return the sharding of an argument that is bound to its device, if any.

  Results then are too, and programs of bound arguments are others.
  """
  for x in jax.tree.leaves(args):
    bound = isinstance(x, jax.Array) and x.committed
    if bound or isinstance(x, jax.ShapeDtypeStruct) and x.sharding:
      return x.sharding
  return None
