"""A run on a slice that nobody rented yet: does it fit, how fast, what price.

The programs are the run's own (`compiling.py`) and memory is the compiler's
word. Rates are bounds, or what a stated MFU would give: nothing is timed here.
"""

from collections.abc import Iterable
from typing import Any

import jax

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
  head = _head(
    asked, training, [("train step", compiling.train_step(training))]
  )
  each = training.work(training.stage_of(steps - 1)).flops_per_step
  limits = bounds.of_step(training, mesh, asked.topology.chip)
  rate = batch / _seconds(asked, mesh.size, each, limits)
  days = steps * batch / rate / 86400
  estimate, remedies = None, []
  if isinstance(training, VARTraining):
    estimate = memory.estimate(training, mesh)
    estimate = estimate._asdict() | {"peak": estimate.peak}
    remedies = [] if head["fits"] else search.remedies(asked, training)
  elif not head["fits"]:
    remedies = ["a smaller batch, or more chips: each holds all parameters"]
  return head | {
    "program": "train",
    "batch": batch,
    "steps": steps,
    "state_bytes": memory.state_bytes(training, mesh),
    "estimate": estimate,
    "flops_per_step": each,
    "traffic_bytes": bounds.of_step_traffic(training, mesh)._asdict(),
    "bound_seconds": limits._asdict(),
    "mfu": asked.mfu,
    "images_per_second": rate,
    "days": days,
    "cost": asked.price and asked.price * mesh.size * days * 24,
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
  limits = bounds.of_draw(training, images, asked.topology.chip)
  fewer = ["fewer --images", "more chips for fsdp or model in --mesh"]
  return head | {
    "program": "sample",
    "images": images,
    "flops_per_image": each,
    "bound_seconds": limits._asdict(),
    "mfu": asked.mfu,
    "images_per_second": images
    / _seconds(asked, mesh.size, images * each, limits),
    "remedies": [] if head["fits"] else fewer,
  }


def _head(
  asked: Asked,
  training: Training,
  programs: Iterable[tuple[str, jax.stages.Lowered]],
) -> dict[str, Any]:
  """Compile the programs; return what plans of all kinds have."""
  compiled = [_compiled(name, lowered) for name, lowered in programs]
  axes = training.mesh.shape
  cfg = MeshConfig(axes["slice"], axes["data"], axes["fsdp"], axes["model"])
  return {
    "topology": asked.topology.name,
    "slices": asked.topology.slices,
    "chips": training.mesh.size,
    "mesh": str(cfg),
    "image_size": training.tokenizer.cfg.image_shape[0],
    "classes": asked.classes,
    "available_bytes": asked.topology.chip.hbm_bytes,
    "fits": all(program["fits"] for program in compiled),
    "programs": compiled,
  }


def _compiled(name: str, lowered: jax.stages.Lowered) -> dict[str, Any]:
  try:
    found = compiling.compiled(lowered)
  except compiling.DoesNotFit as error:
    return {"name": name, "fits": False, "needed_bytes": error.needed}
  seconds = {"compile_seconds": found.seconds}
  return {"name": name, "fits": True} | found.memory._asdict() | seconds


def _seconds(asked: Asked, chips: int, products: float, limits) -> float:
  """Return the seconds at the stated MFU, or the bound if it is slower."""
  peak = chips * asked.topology.chip.flops
  return max(products / (asked.mfu * peak), *limits)
