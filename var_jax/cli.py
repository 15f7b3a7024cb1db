"""`var-jax <command>`: parses, calls one function, prints.

Exit codes: 0; 2 when the command line or the config cannot be understood; 1
for everything else that fails; 143 after a SIGTERM that was answered with a
save. A user's mistake is one line on stderr.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from var_jax.commands import (
  benching,
  caching,
  conversion,
  doctoring,
  drawing,
  evaluating,
  planning,
  training,
)
from var_jax.commands.arguments import Parser, UsageError


def run() -> NoReturn:
  """Run a command as a process of its own."""
  try:
    code = _run(None)
  except KeyboardInterrupt:
    _fail("interrupted", 1)
    # Threads of the compiler may be at work: Python's own end is a crash then.
    sys.stdout.flush()
    os._exit(1)
  sys.exit(code)


def main(argv: Sequence[str] | None = None) -> int:
  """Run a command; return its exit code."""
  try:
    return _run(argv)
  except KeyboardInterrupt:
    return _fail("interrupted", 1)


def _run(argv: Sequence[str] | None) -> int:
  try:
    args, rest = _parser().parse_known_args(argv)
    args.overrides = _overrides(args.command, rest)
    return args.run(args) or 0
  except UsageError as error:
    return _fail(error, 2)
  except (ValueError, OSError) as error:
    return _fail(error, 1)
  except (MemoryError, OverflowError) as error:
    return _fail(f"too large for this machine ({error}); ask for less.", 1)


def _fail(error, code: int) -> int:
  print("var-jax: " + " ".join(str(error).split()), file=sys.stderr)
  return code


def _parser() -> argparse.ArgumentParser:
  parser = Parser(
    prog="var-jax",
    description="Visual autoregressive modeling: images by next-scale "
    "prediction.",
  )
  commands = parser.add_subparsers(
    dest="command", required=True, parser_class=Parser
  )
  for module in (
    training,
    caching,
    drawing,
    conversion,
    doctoring,
    planning,
    benching,
    evaluating,
  ):
    module.add(commands)
  return parser


def _overrides(command: str, rest: list[str]) -> list[str]:
  """Return the --config.a.b=value arguments of commands that take them."""
  for argument in rest:
    takes_them = command in ("train", "cache", "doctor", "plan", "bench")
    if not takes_them or not argument.startswith("--config."):
      raise UsageError(
        f"argument {argument} is not known; see var-jax {command} --help."
      )
  return rest


if __name__ == "__main__":
  run()
