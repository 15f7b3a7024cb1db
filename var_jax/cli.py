"""`var-jax <command>`: parses, calls one function, prints.

Exit codes: 0; 2 when the command line or the config cannot be understood; 1
for everything else that fails. A user's mistake is one line on stderr.
"""

import argparse
import difflib
import pathlib
import runpy
import sys
from collections.abc import Sequence


class UsageError(Exception):
  """The command line or the config cannot be understood."""


class _Parser(argparse.ArgumentParser):
  def __init__(self, **kwargs):
    super().__init__(**kwargs, allow_abbrev=False)

  def error(self, message: str):
    raise UsageError(f"{message}; see {self.prog} --help.")


def main(argv: Sequence[str] | None = None) -> int:
  """Run a command; return its exit code."""
  try:
    args, rest = _parser().parse_known_args(argv)
    args.overrides = _overrides(args.command, rest)
    args.run(args)
  except UsageError as error:
    return _fail(error, 2)
  except (ValueError, OSError) as error:
    return _fail(error, 1)
  except (MemoryError, OverflowError) as error:
    return _fail(f"too large for this machine ({error}); ask for less.", 1)
  except KeyboardInterrupt:
    return _fail("interrupted", 1)
  return 0


def _fail(error, code: int) -> int:
  print("var-jax: " + " ".join(str(error).split()), file=sys.stderr)
  return code


def _parser() -> argparse.ArgumentParser:
  parser = _Parser(prog="var-jax", description=__doc__.splitlines()[0])
  commands = parser.add_subparsers(
    dest="command", required=True, parser_class=_Parser
  )

  demo = commands.add_parser(
    "demo", help="train a tokenizer and a VAR on the embedded digits"
  )
  demo.add_argument("--workdir", default="runs/demo", help="%(default)s")
  demo.set_defaults(run=_demo)

  train = commands.add_parser(
    "train",
    help="train a tokenizer or a transformer",
    usage="var-jax train --config FILE.py[:PRESET] --workdir DIR "
    "[--config.a.b=value ...]",
  )
  train.add_argument(
    "--config", required=True, help="configs/var.py:d16, for example"
  )
  train.add_argument(
    "--workdir", required=True, help="created, or resumed from"
  )
  train.set_defaults(run=_train)

  sample = commands.add_parser("sample", help="draw images")
  sample.add_argument("--checkpoint", required=True, help="a workdir")
  sample.add_argument(
    "--labels",
    type=_integers,
    required=True,
    help="3,7; unconditional is -1, as in --labels=-1,3",
  )
  sample.add_argument("--count", type=_count, default=4, help="a label")
  sample.add_argument("--output", required=True, help="a .png file")
  sample.add_argument(
    "--show-scales", action="store_true", help="each image after each scale"
  )
  _add_drawing(sample)
  sample.set_defaults(run=_sample)

  edit = commands.add_parser("edit", help="in- or outpaint an image")
  edit.add_argument("--checkpoint", required=True, help="a workdir")
  edit.add_argument("--image", required=True, help="of the model's resolution")
  edit.add_argument(
    "--box", type=_box, required=True, help="y0,x0,y1,x1 as fractions"
  )
  edit.add_argument("--mode", choices=("inpaint", "outpaint"), required=True)
  edit.add_argument("--label", type=int, default=-1, help="%(default)s")
  edit.add_argument("--method", default="official", help="%(default)s")
  edit.add_argument("--output", required=True, help="a .png file")
  _add_drawing(edit)
  edit.set_defaults(run=_edit)
  return parser


def _overrides(command: str, rest: list[str]) -> list[str]:
  """Return the --config.a.b=value arguments, which only `train` takes."""
  for argument in rest:
    if command != "train" or not argument.startswith("--config."):
      raise UsageError(
        f"argument {argument} is not known; see var-jax {command} --help."
      )
  return rest


def _add_drawing(parser) -> None:
  parser.add_argument("--guidance", type=float, default=1.5, help="%(default)s")
  parser.add_argument("--top-k", type=int, default=900, help="%(default)s")
  parser.add_argument("--top-p", type=float, default=0.96, help="%(default)s")
  parser.add_argument("--seed", type=_seed, default=0, help="%(default)s")
  parser.add_argument(
    "--smooth", action="store_true", help="mix codes instead of drawing them"
  )


def _demo(args) -> None:
  from var_jax import demo

  demo.run(args.workdir)


def _train(args) -> None:
  from var_jax.training import loop

  loop.train(read_config(args.config, args.overrides), args.workdir)


def _sample(args) -> None:
  import jax
  import numpy as np

  from var_jax import api, images

  images.check_output(args.output)
  model = api.load(args.checkpoint)
  labels = np.repeat(args.labels, args.count)
  draw = (labels, jax.random.key(args.seed))
  if args.show_scales:
    previews = [p.preview_BHW3 for p in model.stream(*draw, **_drawing(args))]
    rows = images.to_uint8(np.stack(previews, axis=1))
    names = [str(label) for label in labels]
  else:
    pixels = images.to_uint8(model.sample(*draw, **_drawing(args)).images_BHW3)
    rows = pixels.reshape(-1, args.count, *pixels.shape[1:])
    names = [str(label) for label in args.labels]
  images.write_image(args.output, images.grid(rows, names))
  print(f"wrote {len(labels)} images to {args.output}")


def _edit(args) -> None:
  import jax
  import numpy as np

  from var_jax import api, images
  from var_jax.generation.edit import box_mask

  images.check_output(args.output)
  model = api.load(args.checkpoint)
  image = images.read_image(args.image)
  keep_hw = box_mask(args.box, model.config.tokenizer.schedule.grid, args.mode)
  sample = model.edit(
    image[None],
    keep_hw,
    np.array([args.label]),
    jax.random.key(args.seed),
    method=args.method,
    **_drawing(args),
  )
  images.write_image(args.output, images.to_uint8(sample.images_BHW3)[0])
  print(f"wrote {args.output}")


def _drawing(args) -> dict:
  return dict(
    guidance=args.guidance,
    top_k=args.top_k,
    top_p=args.top_p,
    smooth=args.smooth,
  )


def read_config(config: str, overrides: Sequence[str]):
  """Return the ConfigDict of FILE.py[:PRESET] with --config.a.b=value applied.

  Raises:
    UsageError: the file, the preset, a key or a value makes no sense.
  """
  from absl import flags
  from ml_collections import config_flags

  path, _, preset = config.partition(":")
  if not pathlib.Path(path).is_file():
    raise UsageError(
      f"config {path} is not a file; give a path like configs/var.py:d16."
    )
  try:
    get_config = runpy.run_path(path)["get_config"]
    base = get_config(preset) if preset else get_config()
    known = _keys(base)
  except ValueError as error:  # the preset's own word
    raise UsageError(f"config {config}: {error}") from error
  except Exception as error:  # whatever somebody's file raises
    raise UsageError(
      f"config {path} cannot be run ({type(error).__name__}: {error}); it "
      "needs a get_config(preset) that returns a ConfigDict."
    ) from error
  for override in overrides:
    name = override.removeprefix("--config.").partition("=")[0]
    if name not in known:
      near = difflib.get_close_matches(name, known) or known
      raise UsageError(
        f"config {config}: key {name} does not exist; try {', '.join(near)}."
      )
  argv = ["var-jax", *overrides]
  values = flags.FlagValues()
  try:
    config_flags.DEFINE_config_dict(
      "config", base, flag_values=values, sys_argv=argv
    )
    values(argv)
    return values.config
  except (flags.Error, ValueError, TypeError) as error:
    raise UsageError(f"config {config}: {error}") from error


def _keys(config, prefix: str = "") -> list[str]:
  names = []
  for name, value in config.items():
    if hasattr(value, "items"):
      names += _keys(value, f"{prefix}{name}.")
    else:
      names.append(prefix + name)
  return names


def _integers(text: str) -> list[int]:
  try:
    return [int(number) for number in text.split(",")]
  except ValueError:
    raise argparse.ArgumentTypeError(
      f"{text!r} is not a list of integers like 3,7 (or =-1,3)"
    ) from None


def _count(text: str) -> int:
  if not text.isdigit() or not 1 <= int(text) <= 10_000:
    raise argparse.ArgumentTypeError(f"{text!r} is not a count of 1..10000")
  return int(text)


def _seed(text: str) -> int:
  if not text.isdigit() or int(text) >= 2**32:
    raise argparse.ArgumentTypeError(f"{text!r} is not in 0..2^32-1")
  return int(text)


def _box(text: str) -> tuple[float, ...]:
  try:
    y0, x0, y1, x1 = (float(number) for number in text.split(","))
  except ValueError:
    raise argparse.ArgumentTypeError(
      f"{text!r} is not y0,x0,y1,x1 like 0.1,0.1,0.8,0.8"
    ) from None
  return y0, x0, y1, x1


if __name__ == "__main__":
  sys.exit(main())
