"""What commands share: the parser, its errors and the types of arguments."""

import argparse


class UsageError(Exception):
  """The command line or the config cannot be understood."""


class Parser(argparse.ArgumentParser):
  def __init__(self, **kwargs):
    super().__init__(**kwargs, allow_abbrev=False)

  def error(self, message: str):
    raise UsageError(f"{message}; see {self.prog} --help.")


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


def step(text: str) -> int:
  if not text.isdigit() or int(text) < 1:
    raise argparse.ArgumentTypeError(f"{text!r} is not a step; they start at 1")
  return int(text)


def seed(text: str) -> int:
  if not text.isdigit() or int(text) >= 2**32:
    raise argparse.ArgumentTypeError(f"{text!r} is not in 0..2^32-1")
  return int(text)


def box(text: str) -> tuple[float, ...]:
  try:
    y0, x0, y1, x1 = (float(number) for number in text.split(","))
  except ValueError:
    raise argparse.ArgumentTypeError(
      f"{text!r} is not y0,x0,y1,x1 like 0.1,0.1,0.8,0.8"
    ) from None
  return y0, x0, y1, x1
