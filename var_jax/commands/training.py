"""`var-jax demo`, `var-jax train` and `var-jax replay`."""

import difflib
import pathlib
import runpy
from collections.abc import Sequence

from var_jax.commands.arguments import (
  UsageError,
  add_joining,
  ended_by_sigterm,
  joining,
  step,
  step_range,
)


def add(commands) -> None:
  """Add the parsers of the commands."""
  demo = commands.add_parser(
    "demo", help="train a tokenizer and a VAR on the embedded digits"
  )
  demo.add_argument("--workdir", default="runs/demo", help="%(default)s")
  demo.set_defaults(run=_demo)

  train = commands.add_parser(
    "train",
    help="train a tokenizer or a transformer",
    usage="var-jax train --config FILE.py[:PRESET] --workdir DIR "
    "[--allow-config-change] [--compile-cache DIR] [--profile FROM:TO] "
    "[--coordinator HOST:PORT --processes N --process-id I] "
    "[--config.a.b=value ...]",
  )
  train.add_argument(
    "--config", required=True, help="configs/var.py:d16, for example"
  )
  train.add_argument(
    "--workdir", required=True, help="created, or resumed from"
  )
  train.add_argument(
    "--allow-config-change",
    action="store_true",
    help="go on in a workdir of another config",
  )
  train.add_argument(
    "--compile-cache",
    metavar="DIR",
    help="keep compiled programs there; shared by all hosts, or one a host",
  )
  train.add_argument(
    "--profile",
    type=step_range,
    metavar="FROM:TO",
    help="trace these steps into WORKDIR/profile, for xprof",
  )
  add_joining(train)
  train.set_defaults(run=_train)

  replay = commands.add_parser(
    "replay", help="take steps of a run again and compare with its ledger"
  )
  replay.add_argument("--workdir", required=True, help="of the run")
  replay.add_argument(
    "--from", dest="first", type=step, required=True, help="a step, from 1"
  )
  replay.add_argument(
    "--to", dest="last", type=step, required=True, help="a step"
  )
  add_joining(replay)
  replay.set_defaults(run=_replay)


def _demo(args) -> None:
  from var_jax import demo

  demo.run(args.workdir)


def _train(args) -> int:
  from var_jax.parallel import multihost
  from var_jax.training import loop
  from var_jax.training.preemption import Preempted

  config = read_config(args.config, args.overrides)
  with multihost.joined(**joining(args)):
    if args.compile_cache:
      multihost.enable_compile_cache(args.compile_cache)
    try:
      loop.train(
        config,
        args.workdir,
        allow_config_change=args.allow_config_change,
        profile=args.profile,
      )
    except Preempted as stopped:
      return ended_by_sigterm(stopped)
  return 0


def _replay(args) -> None:
  from var_jax.parallel import multihost

  with multihost.joined(**joining(args)):
    _compare(args)


def _compare(args) -> None:
  from var_jax.training.replay import Replay

  replay = Replay(args.workdir, args.first, args.last)
  for cause in replay.causes:
    print(f"not as it was: {cause}")
  wrong = []
  for verdict in replay.verdicts():
    if verdict.differs:
      wrong.append(verdict)
    print(f"step {verdict.step}: {'; '.join(verdict.differs) or 'equal'}")
  if wrong:
    first = wrong[0]
    causes = "; ".join(replay.causes) or first.differs[0]
    raise ValueError(
      f"{len(wrong)} of {args.last - args.first + 1} steps differ, the first "
      f"is step {first.step} (record {first.number} of the ledger): {causes}."
    )
  print(f"steps {args.first}..{args.last} are equal, bit for bit")


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
