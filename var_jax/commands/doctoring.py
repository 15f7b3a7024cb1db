"""`var-jax doctor`."""

from var_jax.commands.arguments import (
  UsageError,
  add_joining,
  count,
  joining,
  mesh,
)
from var_jax.commands.training import read_config


def add(commands) -> None:
  """Add the parser of the command."""
  doctor = commands.add_parser(
    "doctor",
    help="see that a run can start: on this machine, or on all its workers",
    usage="var-jax doctor [--workdir DIR] [--config FILE.py[:PRESET]] "
    "[--devices N] [--mesh data=..,fsdp=..,model=..] [--coordinator HOST:PORT "
    "--processes N --process-id I] [--config.a.b=value ...]",
    description="Run it on every worker at once, with the flags of the run. "
    "Exit code 1 if anything is off.",
  )
  doctor.add_argument("--workdir", help="that the run will have")
  doctor.add_argument("--config", help="configs/var.py:d16, for example")
  doctor.add_argument("--devices", type=count, help="that there should be")
  doctor.add_argument("--mesh", type=mesh, help="in place of the config's")
  add_joining(doctor)
  doctor.set_defaults(run=_doctor)


def _doctor(args) -> int:
  if args.overrides and not args.config:
    raise UsageError(f"{args.overrides[0]} needs --config; give both.")
  import jax

  from var_jax.doctor import facts, verdicts
  from var_jax.parallel import multihost

  def config():
    try:
      return read_config(args.config, args.overrides)
    except UsageError as error:
      raise ValueError(str(error)) from error

  asked = facts.Asked(args.workdir, config if args.config else None, args.mesh)
  with multihost.joined(**joining(args)):
    workers = facts.gather(asked)
    found = verdicts.judge(workers, args.devices)
    if jax.process_index() == 0:
      _print(found, len(workers))
  return int(any(verdict.remedy for verdict in found))


def _print(found, workers: int) -> None:
  import rich.console
  import rich.table
  import rich.text

  table = rich.table.Table(title=f"{workers} worker(s)")
  for name in ("", "check", "found", "remedy"):
    table.add_column(name, overflow="fold")
  for verdict in found:
    well = not verdict.remedy
    row = ("ok" if well else "OFF", verdict.check, verdict.found)
    style = None if well else "red"
    table.add_row(*map(rich.text.Text, (*row, verdict.remedy)), style=style)
  rich.console.Console().print(table)
