"""`var-jax plan`."""

import argparse
import math
import os
import pathlib

from var_jax.commands.arguments import UsageError, count, mesh, positive
from var_jax.commands.training import read_config


def add(commands) -> None:
  """Add the parser of the command."""
  plan = commands.add_parser(
    "plan",
    help="compile a run for a TPU slice that is not there: memory, rate, cost",
    usage="var-jax plan --config FILE.py[:PRESET] --topology v5e:4x4 "
    "[--slices N] [--mesh data=..,fsdp=..,model=..|auto] "
    "[--program train|sample] [--config.a.b=value ...]",
    description="Exit code 1 if it does not fit. Needs libtpu, as "
    "pip install 'jax[tpu]' brings it, and no TPU.",
  )
  plan.add_argument("--config", required=True, help="configs/var.py:d16")
  plan.add_argument(
    "--topology",
    required=True,
    type=_topology,
    help="chips of a slice, like v5e:16x16",
  )
  plan.add_argument(
    "--slices", type=count, default=1, help="of that topology, %(default)s"
  )
  plan.add_argument(
    "--mesh",
    type=lambda text: text if text == "auto" else mesh(text),
    help="in place of the config's; auto compiles the best two by estimate",
  )
  plan.add_argument(
    "--program",
    choices=("train", "sample"),
    default="train",
    help="%(default)s",
  )
  plan.add_argument(
    "--images",
    type=positive,
    metavar="N",
    help="to sample at once; 8 for each part of a batch if unsaid",
  )
  plan.add_argument(
    "--classes", type=positive, default=1000, help="of the data, %(default)s"
  )
  plan.add_argument(
    "--mfu",
    type=_share,
    default=0.4,
    help="model FLOPs utilisation to reckon with, %(default)s",
  )
  plan.add_argument("--price", type=_price, help="of a chip for an hour")
  plan.add_argument(
    "--output", default="plan.json", help="the numbers, %(default)s"
  )
  plan.set_defaults(run=_plan)


def _topology(text: str) -> str:
  from var_jax.planning import topology

  try:
    return topology.Topology(text).name
  except ValueError as error:
    raise argparse.ArgumentTypeError(str(error)) from None


def _share(text: str) -> float:
  value = _price(text)
  if not 0.0 < value <= 1.0:
    raise argparse.ArgumentTypeError(f"{text!r} is not above 0 and up to 1")
  return value


def _price(text: str) -> float:
  try:
    value = float(text)
  except ValueError:
    value = math.nan
  if not 0.0 <= value < math.inf:
    raise argparse.ArgumentTypeError(f"{text!r} is not a number from 0")
  return value


def _plan(args) -> int:
  from var_jax import files
  from var_jax.parallel import mesh as mesh_lib
  from var_jax.planning import plan, search, topology
  from var_jax.planning.asked import Asked

  config = read_config(args.config, args.overrides)
  _check(args, config)
  topology.use_no_tpu()
  asked = Asked(
    config,
    topology.Topology(args.topology, args.slices),
    classes=args.classes,
    images=args.images,
    mfu=args.mfu,
    price=args.price,
  )
  chosen = [args.mesh or mesh_lib.MeshConfig(**config.mesh)]
  if args.mesh == "auto":
    chosen = [cfg for cfg, _ in search.ranked(asked)[:2]]
  compile_one = plan.train if args.program == "train" else plan.sample
  found = []
  for cfg in chosen:
    found.append({"config": args.config} | compile_one(asked, cfg))
    _print(found[-1])
    files.write_json(args.output, found)
  print(f"wrote {args.output}")
  return int(not any(row["fits"] for row in found))


def _check(args, config) -> None:
  """Raise before minutes of compiling, not after."""
  if args.mesh == "auto" and args.program == "sample":
    raise UsageError(
      "--mesh auto ranks meshes to train on; name one to sample on, or leave "
      "the flag out."
    )
  if args.mesh == "auto" and config.kind == "tokenizer":
    raise UsageError(
      "--mesh auto ranks meshes of a transformer; a tokenizer is whole on each "
      "chip: leave the flag out."
    )
  if args.images and args.program == "train":
    raise UsageError(
      f"--images {args.images} is of --program sample; training has "
      "--config.data.batch_size."
    )
  if args.price is not None and args.program == "sample":
    raise UsageError("--price is of a training, which ends; leave it out.")
  folder = pathlib.Path(args.output).absolute().parent
  if not os.access(folder, os.W_OK):
    raise ValueError(
      f"{args.output} cannot be written to {folder}; make that folder, or give "
      "another --output."
    )


def _print(found) -> None:
  import rich.console
  import rich.table

  from var_jax.planning import report

  lines = report.lines(found)
  table = rich.table.Table(show_header=False, title=report.title(found))
  table.add_column(overflow="fold")
  table.add_column(overflow="fold")
  for line in lines:
    table.add_row(*line)
  rich.console.Console().print(table)
