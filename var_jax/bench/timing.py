"""Compile programs apart from running them, and time the runs."""

import concurrent.futures
import os
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax

GIB = 2.0**30


class Program(NamedTuple):
  """What is compiled and timed.

  Args:
    function: of arrays.
    make_args: returns them; they live as long as the program is timed.
    carries: the first argument is donated, and comes back as the first result
      for the next call.
    compiler_options: of jax.jit.
  """

  function: Callable[..., Any]
  make_args: Callable[[], tuple]
  carries: bool = False
  compiler_options: dict[str, Any] | None = None


class Measured(NamedTuple):
  """One program."""

  median_s: float
  low_s: float
  high_s: float
  compile_s: float
  peak_bytes: int  # arguments and results included, by the compiler's word


def measure(
  programs: Mapping[str, Program], seconds: float, repeats: int
) -> dict[str, Measured]:
  """Compile all, several at once, then time one after the other.

  Compile times are therefore of a busy machine.

  Args:
    seconds: spent on each program, about, but for three runs at least.
    repeats: at most.
  """

  def build(program: Program):
    begin = time.perf_counter()
    jitted = jax.jit(
      program.function,
      donate_argnums=(0,) if program.carries else (),
      compiler_options=program.compiler_options,
    )
    compiled = jitted.lower(*jax.eval_shape(program.make_args)).compile()
    return compiled, time.perf_counter() - begin

  with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
    built = dict(zip(programs, pool.map(build, programs.values()), strict=True))
  found = {}
  for name, (compiled, compile_s) in built.items():
    call = _caller(compiled, programs[name])
    times = time_calls(call, seconds, repeats)
    found[name] = Measured(
      statistics.median(times),
      min(times),
      max(times),
      compile_s,
      peak(compiled),
    )
  return found


def _caller(compiled, program: Program) -> Callable[[], Any]:
  args = list(program.make_args())

  def call():
    result = compiled(*args)
    if program.carries:
      args[0] = result[0]
    return result

  return call


def time_calls(
  call: Callable[[], Any], seconds: float, repeats: int
) -> list[float]:
  """Return the seconds of each call; the first, which warms up, is not kept."""
  jax.block_until_ready(call())
  times = []
  while len(times) < 3 or (sum(times) < seconds and len(times) < repeats):
    begin = time.perf_counter()
    jax.block_until_ready(call())
    times.append(time.perf_counter() - begin)
  return times


def peak(compiled: jax.stages.Compiled) -> int:
  """Return the bytes that a program holds at most."""
  found = compiled.memory_analysis()
  return (
    found.argument_size_in_bytes
    + found.output_size_in_bytes
    + found.temp_size_in_bytes
    - found.alias_size_in_bytes  # what results share with arguments
  )
