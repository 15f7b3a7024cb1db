"""What a run is made of: opened and checked, before a step is taken.

Training and replay open the same `Run`, so that they take the same steps.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from etils import epath

from var_jax.checkpoints import orbax_trees
from var_jax.data import pipeline, sources, token_cache, transforms
from var_jax.parallel import mesh as mesh_lib
from var_jax.training import caching, tokenizer_program, var_program
from var_jax.training.feed import Feed
from var_jax.training.programs import Program
from var_jax.training.state import TrainState


@dataclasses.dataclass(frozen=True)
class Run:
  """Everything but the state."""

  config: ml_collections.ConfigDict
  mesh: jax.sharding.Mesh
  source: sources.Source
  transform: transforms.Transform
  held_out: sources.Source | None  # None: nothing is evaluated
  plain: transforms.Transform  # without chance, for held-out images
  program: Program
  is_new: bool  # nothing of it is in the workdir yet

  @property
  def replicated(self) -> jax.sharding.Sharding:
    return mesh_lib.replicated(self.mesh)

  def fresh(self) -> TrainState:
    """Return the state before the first step."""
    return self.program.init()

  def restore(self, checkpoints, step: int) -> TrainState:
    """Return the state of a kept step, without a fresh one beside it."""
    like = self.program.like
    folder = checkpoints.folder(step)
    orbax_trees.check_shapes(folder / "params", like.params["params"])
    wanted = trees_of(like)["training"]
    orbax_trees.check_fields(folder / "training", wanted)
    new_average = like.ema is not None and not (folder / "ema").exists()
    wanted = like.replace(ema=None) if new_average else like
    trees, position = checkpoints.restore(step, trees_of(wanted))
    batch_size = self.config.data.batch_size
    if position != step * batch_size:
      raise ValueError(
        f"data.batch_size {batch_size} is not that of {folder}, "
        f"{position // step}; it cannot change within a workdir: start a new "
        "one with config.init_from."
      )
    if new_average:
      trees["ema"] = jax.tree.map(jnp.copy, trees["params"])
    return like.replace(
      params=trees["params"], ema=trees["ema"], **trees["training"]
    )

  def take(self, state: TrainState, batch, step: int):
    """Return the state after step `step`, counted from 1, and its metrics."""
    stage_of = self.program.stage
    if step > 1 and stage_of(step - 2) != stage_of(step - 1):
      # A scale that joins raises the loss, a discriminator may; that is no
      # spike.
      zero = jax.device_put(np.float32(0.0), self.replicated)
      state = state.replace(running_loss=zero)
    return self.program.step(state, batch, stage_of(step - 1))

  def at_step(self, state: TrainState, step: int) -> TrainState:
    """Return the state with its clock at `step`."""
    clock = jax.device_put(np.int32(step), self.replicated)
    return state.replace(step=clock)

  def feed(self, start: int) -> Feed:
    """Return the batches of the steps after `start`."""
    data = self.config.data
    return Feed(
      self.mesh,
      pipeline.training_batches(
        self.source,
        self.transform,
        batch_size=data.batch_size,
        seed=self.config.seed,
        start_step=start,
        rows=mesh_lib.rows(self.mesh, data.batch_size),
        workers=data.workers,
        on_broken=data.on_broken,
      ),
    )


def open_run(config: ml_collections.ConfigDict, workdir: epath.Path) -> Run:
  """Open sources and models; write nothing.

  Raises:
    ValueError: something does not exist, or does not fit the rest.
  """
  mesh = mesh_lib.make_mesh(mesh_lib.MeshConfig(**config.mesh))
  # Each part of an accumulated batch lies on all devices.
  mesh_lib.check_batch(mesh, config.data.batch_size, config.accumulate)
  source = _training_source(config)
  held_out = _held_out(config, source)
  of_kind = {"tokenizer": tokenizer_program.make, "var": var_program.make}
  program = of_kind[config.kind](config, mesh, source, held_out, workdir)
  tokenizer = program.description.tokenizer
  make_transform = functools.partial(
    transforms.make_transform, config.data.transform, tokenizer.image_shape
  )
  plain = make_transform(train=False, flip=False)
  if is_cached(config):
    transform = transforms.pick_crop
    caching.check(source.manifest, program.tokenizer_checksum(), config)
  else:
    transform = make_transform(train=True, flip=config.data.flip)
  pipeline.check_first(source, transform, config.data.on_broken)
  if held_out is not None:
    pipeline.check_first(held_out, plain, config.data.on_broken)
  is_new = not (workdir / "config.json").exists()
  return Run(config, mesh, source, transform, held_out, plain, program, is_new)


def is_cached(config) -> bool:
  return config.kind == "var" and bool(config.data.token_cache)


def trees_of(state: TrainState) -> dict[str, Any]:
  """Return what a checkpoint holds, by item."""
  rest = {
    field.name: getattr(state, field.name)
    for field in dataclasses.fields(state)
    if field.name not in ("params", "ema")
  }
  # What came later is left out where there is none: runs of before go on.
  later = ("grace_V", "explained_S", "rate", "adversary")
  rest = {k: v for k, v in rest.items() if v is not None or k not in later}
  return {"params": state.params, "ema": state.ema, "training": rest}


def _training_source(config) -> sources.Source:
  if is_cached(config):
    return token_cache.TokenSource(config.data.token_cache)
  return sources.open_source(config.data.source, "train")


def _held_out(config, source) -> sources.Source | None:
  if not config.eval_every:
    return None
  spec = config.data.eval_source
  # A file has one split: what is named for evaluation is that.
  one_split = spec.startswith("npz:")
  if not spec and config.data.source.startswith("npz:"):
    raise ValueError(
      f"eval_every {config.eval_every} needs held-out images and "
      f"{config.data.source} has one split; set data.eval_source, or "
      "eval_every=0."
    )
  held_out = sources.open_source(
    spec or config.data.source, "train" if one_split else "val"
  )
  here, there = tuple(source.class_names), tuple(held_out.class_names)
  # A file without names has numbers.
  unnamed = tuple(map(str, range(len(here)))) in (here, there)
  if len(here) != len(there) or (here != there and not unnamed):
    odd = [pair for pair in zip(here, there, strict=False) if len({*pair}) > 1]
    first = f", like {odd[0][1]!r} for {odd[0][0]!r}" if odd else ""
    raise ValueError(
      f"the held-out classes are not those of training: {len(there)} and "
      f"{len(here)}{first}; set data.eval_source to the same classes."
    )
  return held_out
