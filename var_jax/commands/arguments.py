"""What commands share: the parser, its errors and the types of arguments."""

import argparse
import importlib.util
import signal
import sys
from typing import Any


class UsageError(Exception):
  """The command line or the config cannot be understood."""


class Parser(argparse.ArgumentParser):
  def __init__(self, **kwargs):
    super().__init__(**kwargs, allow_abbrev=False)

  def error(self, message: str):
    raise UsageError(f"{message.rstrip('.')}; see {self.prog} --help.")


def integers(text: str) -> list[int]:
  try:
    return [int(number) for number in text.split(",")]
  except ValueError:
    raise argparse.ArgumentTypeError(
      f"{text!r} is not a list of integers like 3,7 (or =-1,3)"
    ) from None


def scales(text: str) -> tuple[int, ...]:
  return tuple(integers(text))


def count(text: str) -> int:
  if not text.isdigit() or not 1 <= int(text) <= 10_000:
    raise argparse.ArgumentTypeError(f"{text!r} is not a count of 1..10000")
  return int(text)


def check_matplotlib(what: str) -> None:
  if importlib.util.find_spec("matplotlib") is None:
    raise UsageError(f"{what} needs matplotlib; pip install 'var-jax[bench]'.")


def ended_by_sigterm(stopped: Exception) -> int:
  """Say where a command stopped; return its exit code."""
  print(f"var-jax: {stopped}", file=sys.stderr)
  return 128 + signal.SIGTERM


def numbers(kind):
  """Return a type for one number or several, like 1,1.5,2."""

  def parse(text: str) -> list:
    try:
      found = [kind(number) for number in text.split(",")]
    except ValueError:
      raise argparse.ArgumentTypeError(
        f"{text!r} is no number, nor a list of them like 1,2"
      ) from None
    if len(set(found)) < len(found):
      raise argparse.ArgumentTypeError(f"{text!r} has a number twice")
    return found

  return parse


def positive(text: str) -> int:
  if not text.isdigit() or int(text) < 1:
    raise argparse.ArgumentTypeError(f"{text!r} is not a number from 1")
  return int(text)


def step(text: str) -> int:
  if not text.isdigit() or int(text) < 1:
    raise argparse.ArgumentTypeError(f"{text!r} is not a step; they start at 1")
  return int(text)


def seed(text: str) -> int:
  if not text.isdigit() or int(text) >= 2**32:
    raise argparse.ArgumentTypeError(f"{text!r} is not in 0..2^32-1")
  return int(text)


def temperature(text: str) -> float | list[float]:
  try:
    numbers = [float(number) for number in text.split(",")]
  except ValueError:
    raise argparse.ArgumentTypeError(
      f"{text!r} is no number, nor a list of them like 1,1,0.9"
    ) from None
  return numbers if len(numbers) > 1 else numbers[0]


def scale_range(text: str) -> tuple[int, int]:
  try:
    first, stop = (int(scale) for scale in text.split(":"))
  except ValueError:
    raise argparse.ArgumentTypeError(
      f"{text!r} is not FIRST:STOP like 0:7"
    ) from None
  return first, stop


def box(text: str) -> tuple[float, ...]:
  try:
    y0, x0, y1, x1 = (float(number) for number in text.split(","))
  except ValueError:
    raise argparse.ArgumentTypeError(
      f"{text!r} is not y0,x0,y1,x1 like 0.1,0.1,0.8,0.8"
    ) from None
  return y0, x0, y1, x1


def seconds(text: str) -> int:
  if not text.isdigit() or not 1 <= int(text) <= 86_400:
    raise argparse.ArgumentTypeError(f"{text!r} is not in 1..86400 seconds")
  return int(text)


def number(text: str) -> int:
  if not text.isdigit():
    raise argparse.ArgumentTypeError(f"{text!r} is not a number from 0")
  return int(text)


def mesh(text: str):
  from var_jax.parallel import mesh as mesh_lib

  try:
    return mesh_lib.parse(text)
  except ValueError as error:
    raise argparse.ArgumentTypeError(str(error)) from None


def step_range(text: str) -> tuple[int, int]:
  first, _, last = text.partition(":")
  if not (first.isdigit() and last.isdigit() and 1 <= int(first) <= int(last)):
    raise argparse.ArgumentTypeError(f"{text!r} is not FROM:TO like 100:110")
  return int(first), int(last)


def add_joining(parser: argparse.ArgumentParser) -> None:
  """Add the flags that say how several processes find each other."""
  group = parser.add_argument_group(
    "several processes",
    "On TPU VMs, GKE and Slurm they find each other; elsewhere give these to "
    "each, or JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID.",
  )
  group.add_argument("--coordinator", metavar="HOST:PORT", help="of process 0")
  group.add_argument("--processes", type=count, help="how many there are")
  group.add_argument("--process-id", type=number, help="of this one, from 0")
  group.add_argument(
    "--join-timeout",
    type=seconds,
    metavar="SECONDS",
    help="to wait for all of them, 300 if unsaid",
  )
  group.add_argument(
    "--heartbeat-timeout",
    type=seconds,
    metavar="SECONDS",
    help="after which a silent one is given up, 100 if unsaid",
  )


_JOINING = (
  "coordinator", "processes", "process_id", "join_timeout", "heartbeat_timeout",
)  # fmt: skip


def joining(args: argparse.Namespace) -> dict[str, Any]:
  """Return what was said of what `multihost.joined` takes."""
  said = {name: getattr(args, name) for name in _JOINING}
  return {name: value for name, value in said.items() if value is not None}
