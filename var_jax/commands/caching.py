"""`var-jax cache`."""

from var_jax.commands.arguments import add_joining, ended_by_sigterm, joining
from var_jax.commands.training import read_config


def add(commands) -> None:
  """Add the parser of the command."""
  cache = commands.add_parser(
    "cache",
    help="write the tokens of a training split, to train on them",
    usage="var-jax cache --config FILE.py[:PRESET] --output DIR "
    "[--config.a.b=value ...]",
    description="Train on them with the preset PRESET,cached and "
    "--config.data.token_cache=DIR.",
  )
  cache.add_argument(
    "--config", required=True, help="configs/var.py:d16, for example"
  )
  cache.add_argument("--output", required=True, help="created, or gone on with")
  add_joining(cache)
  cache.set_defaults(run=_cache)


def _cache(args) -> int:
  from var_jax.parallel import multihost
  from var_jax.training import caching

  config = read_config(args.config, args.overrides)
  with multihost.joined(**joining(args)):
    try:
      caching.build(config, args.output)
    except caching.Stopped as stopped:
      return ended_by_sigterm(stopped)
  return 0
