"""A run on a slice that nobody rented yet: does it fit, how fast, what price.

The programs are the run's own (`compiling.py`) and memory is the compiler's
word. Rates are bounds, or what a stated MFU would give: nothing is timed here.
"""

from collections.abc import Iterable
from typing import Any

import jax

from var_jax.parallel import attention as attention_lib
from var_jax.parallel import mesh as mesh_lib
from var_jax.parallel.mesh import MeshConfig
from var_jax.planning import bounds, compiling, memory, search
from var_jax.planning.asked import Asked, Training
from var_jax.training import flops
from var_jax.training.var_training import VARTraining


def train(asked: Asked, cfg: MeshConfig) -> dict[str, Any]:
  """Compile the training step; return what is known of it.

  Raises:
    ValueError: the config makes no sense, or does not fit the mesh.
  """
  config, mesh = asked.config, asked.mesh(cfg)
  batch, steps = config.data.batch_size, config.steps
  training = asked.training(mesh)
  mesh_lib.check_batch(mesh, batch, config.accumulate)
  estimate, attention, beside = None, None, 0
  if isinstance(training, VARTraining):
    estimate = memory.estimate(training, mesh)
    estimate = estimate._asdict() | {"peak": estimate.peak}
    attention = attention_lib.name_of(training.var.attend)
    beside = memory.beside(training)
  step = ("train step", compiling.train_step(training), beside)
  head = _head(asked, training, [step])
  each = training.work(training.stage_of(steps - 1)).flops_per_step
  limits = bounds.of_step(training, mesh, asked.topology.chip)
  seconds, mfu = _pace(asked, mesh.size, each, limits)
  days = steps * seconds / 86400
  remedies = []
  if not head["fits"]:
    if isinstance(training, VARTraining):
      remedies = search.remedies(asked, training)
    remedies = remedies or ["more chips, a smaller batch, or both"]
  cost = None
  if asked.price is not None:
    cost = asked.price * mesh.size * days * 24
  return head | {
    "program": "train",
    "batch": batch,
    "steps": steps,
    "attention": attention,
    "state_bytes": memory.state_bytes(training, mesh),
    "estimate": estimate,
    "flops": each,
    "traffic_bytes": bounds.of_step_traffic(training, mesh)._asdict(),
    "bound_seconds": limits._asdict(),
    "mfu": mfu,
    "busy": limits.compute / seconds,
    "images_per_second": batch / seconds,
    "days": days,
    "cost": cost,
    "remedies": remedies,
  }


def sample(asked: Asked, cfg: MeshConfig) -> dict[str, Any]:
  """Compile the sampler's programs; return what is known of them.

  Raises:
    ValueError: as of `train`; the images do not divide, or the config is a
      tokenizer's.
  """
  mesh = asked.mesh(cfg)
  training = asked.training(mesh)
  if not isinstance(training, VARTraining):
    raise ValueError(
      "program 'sample' is of a transformer and the config is a tokenizer's; "
      "use train."
    )
  images = asked.images or 8 * mesh_lib.row_shards(mesh)
  mesh_lib.check_batch(mesh, images)
  head = _head(asked, training, compiling.sample_programs(training, images))
  each = flops.var_sample(training.cfg, rows=2)
  each += flops.tokenizer_forward(training.tokenizer.cfg).decoder
  limits = bounds.of_draw(training, mesh, images, asked.topology.chip)
  seconds, mfu = _pace(asked, mesh.size, images * each, limits)
  fewer = "fewer --images, or fsdp or model in --mesh"
  return head | {
    "program": "sample",
    "images": images,
    "flops": images * each,
    "bound_seconds": limits._asdict(),
    "mfu": mfu,
    "busy": limits.compute / seconds,
    "images_per_second": images / seconds,
    "remedies": [] if head["fits"] else [fewer],
  }


def _head(
  asked: Asked,
  training: Training,
  programs: Iterable[tuple[str, jax.stages.Lowered, int]],
) -> dict[str, Any]:
  """Compile the programs; return what plans of all kinds have."""
  limit = asked.topology.chip.hbm_bytes
  compiled = [_compiled(*program, limit) for program in programs]
  axes = training.mesh.shape
  cfg = MeshConfig(axes["slice"], axes["data"], axes["fsdp"], axes["model"])
  return {
    "topology": asked.topology.name,
    "slices": asked.topology.slices,
    "chips": training.mesh.size,
    "mesh": str(cfg),
    "image_size": training.tokenizer.cfg.image_shape[0],
    "classes": asked.classes,
    "available_bytes": limit,
    "fits": all(program["fits"] for program in compiled),
    "programs": compiled,
  }


def _compiled(name: str, lowered, beside: int, limit: float) -> dict[str, Any]:
  """Compile one program; it fits with what a chip holds beside it."""
  found = compiling.compiled(lowered)
  if isinstance(found, compiling.TooLarge):
    return {"name": name, "fits": False} | found._asdict()
  return {
    "name": name,
    "fits": found.memory.peak + beside <= limit,
    **found.memory._asdict(),
    "beside": beside,
    "compile_seconds": found.seconds,
  }


def _pace(
  asked: Asked, chips: int, products: float, limits: bounds.Bounds
) -> tuple[float, float]:
  """Return seconds at the MFU that is asked for, and the MFU that it is.

  That is less where a bound is slower.
  """
  least = products / (chips * asked.topology.chip.flops)
  seconds = max(least / asked.mfu, *limits)
  return seconds, least / seconds
