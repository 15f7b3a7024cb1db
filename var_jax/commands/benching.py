"""`var-jax bench sample`, `var-jax bench train`, `var-jax bench scaling`."""

import argparse
import json
import pathlib

from var_jax.commands.arguments import (
  UsageError,
  check_matplotlib,
  ended_by_sigterm,
  positive,
)


def add(commands) -> None:
  """Add the parsers of the command."""
  bench = commands.add_parser("bench", help="measure speed and memory")
  what = bench.add_subparsers(
    dest="what", required=True, parser_class=type(bench)
  )
  sample = what.add_parser(
    "sample",
    help="time drawing of random weights, and its parts",
    description="Compile times are apart; seconds are medians.",
  )
  sample.add_argument(
    "--depth", type=positive, default=16, help="of a published shape; 16"
  )
  sample.add_argument(
    "--image-size", type=int, default=256, help="256 or 512; %(default)s"
  )
  sample.add_argument(
    "--batch", type=_batches, default=[1], help="like 1,8,64; 1"
  )
  sample.add_argument(
    "--raster",
    choices=("none", "cached", "free"),
    nargs="+",
    default=["cached"],
    help="raster order beside it, with a cache and free of one; %(default)s",
  )
  sample.add_argument(
    "--no-parts", action="store_true", help="leave the parts of a scale out"
  )
  sample.add_argument(
    "--growth",
    type=_grids,
    help="instead time grids like 8,12,16,24,32, one image each",
  )
  sample.add_argument("--plot", help="with --growth: a .png or .svg to draw")
  _add_measuring(sample)
  sample.set_defaults(run=_sample)

  train = what.add_parser(
    "train",
    help="time a training step of random weights on random images",
    usage="var-jax bench train --config FILE.py[:PRESET] [--batch N] "
    "[--cached] [--config.a.b=value ...]",
  )
  train.add_argument("--config", required=True, help="configs/var.py:d16")
  train.add_argument(
    "--batch", type=positive, help="in place of the config's, on all devices"
  )
  train.add_argument(
    "--cached", action="store_true", help="tokens in place of images"
  )
  _add_measuring(train)
  train.set_defaults(run=_train)
  _add_scaling(what)


def _add_scaling(what) -> None:
  scaling = what.add_parser(
    "scaling",
    help="train a ladder of sizes and fit power laws",
    usage="var-jax bench scaling --config configs/scaling.py[:PRESET] --output "
    "DIR [--config.a.b=value ...]",
  )
  scaling.add_argument(
    "--config", required=True, help="configs/scaling.py:fashion32"
  )
  scaling.add_argument(
    "--output",
    required=True,
    help="a folder for a workdir each, scaling.json and scaling.png; called "
    "again it goes on",
  )
  scaling.set_defaults(run=_scaling)


def _add_measuring(parser) -> None:
  parser.add_argument(
    "--dtype", default="auto", help="auto, float32 or bfloat16; %(default)s"
  )
  parser.add_argument(
    "--seconds", type=positive, default=10, help="for a program; %(default)s"
  )
  parser.add_argument(
    "--repeats", type=positive, default=30, help="at most; %(default)s"
  )
  parser.add_argument("--output", help="a .json file with all numbers")


def _batches(text: str) -> list[int]:
  return _numbers(text, 1, "batch sizes like 1,8,64")


def _grids(text: str) -> list[int]:
  grids = _numbers(text, 2, "grid sides like 8,16,32")
  if len(set(grids)) < 2:
    raise argparse.ArgumentTypeError("two sides or more are needed for a fit")
  return grids


def _numbers(text: str, least: int, what: str) -> list[int]:
  try:
    numbers = [int(number) for number in text.split(",")]
  except ValueError:
    numbers = []
  if not numbers or min(numbers) < least:
    raise argparse.ArgumentTypeError(f"{text!r} are no {what}")
  return numbers


def _sample(args) -> None:
  from var_jax import checks, compile_cache, loading
  from var_jax.bench import growth, report, sampling
  from var_jax.generation.sampler import Models
  from var_jax.models.layers import resolve_dtype
  from var_jax.models.scales import SCALES
  from var_jax.models.tokenizer import Tokenizer, TokenizerConfig
  from var_jax.models.transformer import VARConfig

  if args.overrides:
    raise UsageError("bench sample takes no --config; see --help.")
  if args.plot and not args.growth:
    raise UsageError("--plot draws what --growth measures; give both.")
  if args.plot:
    check_matplotlib("--plot")
    plot = pathlib.Path(args.plot)
    if plot.suffix not in (".png", ".svg") or not plot.parent.is_dir():
      raise UsageError(
        f"--plot {plot} is no .png or .svg in a folder that exists."
      )
  if args.image_size not in SCALES:
    sizes = ", ".join(map(str, SCALES))
    raise UsageError(f"--image-size {args.image_size} is not one of {sizes}.")
  compile_cache.enable()
  dtype = resolve_dtype(args.dtype)
  kinds = tuple(kind for kind in args.raster if kind != "none")
  settings = sampling.Settings(
    args.seconds, args.repeats, parts=not args.no_parts, raster=kinds
  )
  scales = SCALES[args.image_size]
  cfg = VARConfig.official(args.depth, dtype=dtype, scales=scales)
  device = _device() | {"depth": args.depth, "dtype": dtype}
  if args.growth:
    found = growth.measure(cfg, args.growth, settings)
    report.print_growth(found)
    _write(args.output, device | found)
    if args.plot:
      growth.plot(found, args.plot)
    return
  tokenizer = TokenizerConfig(dtype=dtype, scales=scales)
  models = Models(
    Tokenizer(tokenizer),
    loading.sampling_var(cfg),
    decode_rows=loading.decode_rows(tokenizer),
  )
  params = sampling.random_params(models)
  for batch in args.batch:
    checks.fits(batch, models, params)
  records = sampling.of_batches(models, params, args.batch, settings)
  title = f"d{args.depth} at {args.image_size} px, {dtype}, {device['device']}"
  report.print_samples(records, title)
  _write(args.output, device | {"batches": records})


def _train(args) -> None:
  from var_jax.bench import report, training
  from var_jax.commands.training import read_config
  from var_jax.planning.asked import tokenizer_of

  config = read_config(args.config, args.overrides)
  if config.kind != "var":
    raise UsageError(f"--config {args.config} is of no transformer.")
  if args.batch:
    config.data.batch_size = args.batch
  if args.dtype != "auto":
    config.model.dtype = args.dtype
  config.data.token_cache = "random" if args.cached else ""
  tokenizer = tokenizer_of(config)
  found = training.of_step(config, tokenizer, args.seconds, args.repeats)
  device = _device()
  report.print_mapping(
    found, f"a training step of {args.config} on {device['device']}"
  )
  _write(args.output, device | {"config": args.config} | found)


def _scaling(args) -> int:
  from var_jax import compile_cache, files
  from var_jax.bench import report, scaling
  from var_jax.commands.training import read_config
  from var_jax.training.preemption import Preempted

  check_matplotlib("bench scaling")
  config = read_config(args.config, args.overrides)
  scaling.check(config)
  folder = files.absolute(args.output)
  compile_cache.enable()
  try:
    points = scaling.run(config, folder)
  except Preempted as stopped:
    return ended_by_sigterm(stopped)
  found = scaling.laws(points)
  record = {"points": [p._asdict() for p in points], "laws": found}
  files.write_json(folder / "scaling.json", _device() | record)
  scaling.plot(points, found, str(folder / "scaling.png"))
  report.print_laws(found, scaling.PUBLISHED)
  print(f"wrote {folder}/scaling.json and scaling.png")
  return 0


def _device() -> dict:
  import jax

  return {
    "device": jax.devices()[0].device_kind,
    "devices": jax.device_count(),
    "jax": jax.__version__,
  }


def _write(path: str | None, record: dict) -> None:
  from var_jax import files

  if path:
    files.write_json(path, record)
    print(f"wrote {path}")
  else:
    print(json.dumps(record))
