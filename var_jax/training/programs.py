"""What the loop needs to know of the model it trains, for both models.

Programs are compiled for the mesh with explicit shardings: the state lies as
`parallel/rules.py` says and is donated, a batch is split by rows, and metrics
are the same everywhere.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath

from var_jax.checkpoints.description import Description
from var_jax.models.layers import resolve_dtype
from var_jax.parallel import mesh as mesh_lib
from var_jax.parallel import rules
from var_jax.training import checks, optim
from var_jax.training.guard import GuardConfig
from var_jax.training.state import TrainState

# What the ledger wants to know of a batch, as the devices got it.
_RECORD = ("index", "position", "label", "skipped", "raw_digest", "digest")


class Work(NamedTuple):
  """What a step amounts to, for rates and MFU."""

  tokens_per_image: int
  flops_per_step: float  # of the model, on all devices together


class Program(NamedTuple):
  """A model in training. A step counts from 0 here: the one that is next."""

  description: Description
  init: Callable[[], TrainState]  # of a new run, warm or not, on the mesh
  like: TrainState  # its shapes and shardings
  step: Callable[..., tuple[TrainState, Mapping]]  # (state, batch, stage)
  stage: Callable[[int], int | None]  # of a step; None: there is one only
  evaluate: Callable[[Any, Mapping], Mapping]  # sums over a batch, features
  summary: Callable[..., Mapping]  # numbers, of means and moments of features
  drawn: Callable[..., Mapping | None]  # numbers: (run, state, stopped)
  pictures: Callable[..., Mapping[str, np.ndarray]]  # (run, state)
  prepare: Callable[[], None]  # writes what a new workdir needs
  tokenizer_checksum: Callable[[], str]
  held_out_loss: str  # the measure that the best checkpoint has least of
  work: Callable[[int | None], Work]  # of a step, by stage


def build(cls, config, name: str, **derived):
  """Return the dataclass of a section of the config.

  Args:
    name: of the section; said in errors, for several have a `learning_rate`.
    derived: fields that follow from other settings.
  """
  try:
    return cls(**config[name], **derived)
  except TypeError as error:
    raise ValueError(
      f"config.{name}: {cls.__name__} cannot be built from it ({error}); "
      "compare with the presets in configs/."
    ) from None
  except ValueError as error:
    raise ValueError(f"config.{name}: {error}") from None


def compiled_step(step, mesh, like: TrainState) -> rules.Jit:
  """Return the program of a step, with the batch's record in its metrics."""

  def recorded(state, frozen, batch):
    state, metrics = step(state, frozen, batch)
    return state, metrics | {"record": {name: batch[name] for name in _RECORD}}

  same, split = mesh_lib.replicated(mesh), mesh_lib.by_rows(mesh)
  lies = shardings_of(like)
  return rules.Jit(
    mesh,
    recorded,
    donate_argnums=0,
    in_shardings=(lies, same, split),
    out_shardings=(lies, same),
  )


def compiled_sums(evaluate, mesh, like: TrainState) -> rules.Jit:
  """Return the program of evaluate(params, frozen, batch)."""
  same, split = mesh_lib.replicated(mesh), mesh_lib.by_rows(mesh)
  return rules.Jit(
    mesh,
    evaluate,
    in_shardings=(shardings_of(like.params), same, split),
    out_shardings=same,
  )


def abstract(create: Callable[[], TrainState], mesh) -> TrainState:
  """Return the shapes and shardings of the state that `create` makes.

  Raises:
    ValueError: a parameter does not divide on the mesh.
  """
  shapes = jax.eval_shape(create)
  return jax.tree.map(
    lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where),
    shapes,
    rules.shardings(mesh, shapes),
  )


def created(create, mesh, like: TrainState, *args) -> TrainState:
  """Return create(*args), each device making its own part."""
  return rules.Jit(mesh, create, out_shardings=shardings_of(like))(*args)


def shardings_of(like):
  return jax.tree.map(lambda x: x.sharding, like)


def averaged(state: TrainState) -> Any:
  return state.params if state.ema is None else state.ema


def optimizer(config, part: str = "all"):
  """Return the optimiser, and what both steps are made with besides it."""
  cfg = build(optim.OptimizerConfig, config, "optimizer")
  how = dict(steps=config.steps, batch_size=config.data.batch_size)
  return optim.make_optimizer(cfg, **how, part=part), dict(
    ema_decay=config.ema_decay,
    seed=config.seed,
    accumulate=config.accumulate,
    guard=build(GuardConfig, config, "guard"),
    schedules=optim.schedules(cfg, **how),
  )


def with_dtype(cfg, mesh):
  """Return a model's config with the dtype that the mesh's platform wants."""
  platform = mesh.devices.flat[0].platform
  return dataclasses.replace(cfg, dtype=resolve_dtype(cfg.dtype, platform))


def init_key(config) -> jax.Array:
  # rbg: a hundred draws of the default generator take a minute to compile.
  return jax.random.key(config.seed, impl="rbg")


def describe(
  config, source, workdir: epath.Path, tokenizer, transformer
) -> Description:
  """Return the description of a run; its origin is that of its beginning."""
  if (workdir / "config.json").exists():
    origin = Description.read(workdir).origin
  else:
    origin = _origin(config, source)
  return Description(
    tokenizer,
    transformer,
    tuple(source.class_names),
    checks.to_json(config),
    origin,
  )


def _origin(config, source) -> dict[str, Any]:
  """Return what the model card says of how the weights were made."""
  made_by = (
    f"Trained by `var-jax train` on `{config.data.source}`, {len(source)} "
    f"images, for {config.steps} steps of {config.data.batch_size}."
  )
  if not config.init_from:
    return {"made_by": made_by}
  licence = Description.read(config.init_from).origin.get("licence")
  made_by += f" It started from the weights in `{config.init_from}`."
  return {"made_by": made_by, "licence": licence}
