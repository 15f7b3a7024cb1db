"""Other meshes and settings for a transformer's run, by estimate."""

import dataclasses

from var_jax.parallel import mesh as mesh_lib
from var_jax.parallel.mesh import MeshConfig
from var_jax.planning import bounds, memory
from var_jax.planning.asked import Asked
from var_jax.training.var_training import VARTraining

# The estimate is within a tenth of what the compiler finds.
_SAFE = 1.1


def ranked(asked: Asked) -> list[tuple[MeshConfig, memory.Estimate]]:
  """Return the meshes that the run can have, the best one first.

  What fits by the estimate comes before what does not; then counts the time
  bound, or how much is missing.

  Raises:
    ValueError: there is none, or the config makes no sense.
  """
  chip, devices = asked.topology.chip, asked.topology.devices()
  training = asked.training(mesh_lib.make_mesh(MeshConfig(), devices[:1]))
  found, why = [], None
  for cfg in mesh_lib.factorisations(len(devices) // asked.topology.slices):
    cfg = dataclasses.replace(cfg, slices=asked.topology.slices)
    mesh = asked.mesh(cfg)
    try:
      estimate = memory.estimate(training, mesh)
    except ValueError as error:  # something does not divide
      why = why or error
      continue
    over = max(_SAFE * estimate.peak - chip.hbm_bytes, 0.0)
    seconds = max(bounds.of_step(training, mesh, chip))
    found.append((over, seconds, cfg, estimate))
  if not found:
    raise ValueError(f"no mesh of {len(devices)} chips works: {why}")
  found.sort(key=lambda candidate: candidate[:2])
  return [(cfg, estimate) for *_, cfg, estimate in found]


def remedies(asked: Asked, training: VARTraining) -> list[str]:
  """Return the single changes that fit by the estimate; none may."""
  config, mesh = asked.config, training.mesh
  batch, parts = config.data.batch_size, config.accumulate
  options = {}
  for remat in ("dots", "full"):
    peak = memory.estimate(training, mesh, remat=remat).peak
    options[f"--config.model.remat={remat}"] = peak
  for times in (2, 4, 8, 16):
    if batch % (times * parts * mesh_lib.row_shards(mesh)) == 0:
      peak = memory.estimate(training, mesh, accumulate=times * parts).peak
      options[f"--config.accumulate={times * parts}"] = peak
      peak = memory.estimate(training, mesh, batch=batch // times).peak
      options[f"--config.data.batch_size={batch // times}"] = peak
  for cfg, estimate in ranked(asked)[:2]:
    options[f"--mesh {cfg}"] = estimate.peak
  # The estimate may have taken this for one that fits: it has to get less.
  now = memory.estimate(training, mesh).peak
  limit = min(asked.topology.chip.hbm_bytes / _SAFE, now / _SAFE)
  return [change for change, peak in options.items() if peak <= limit]
