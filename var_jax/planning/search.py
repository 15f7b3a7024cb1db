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
  """Return the single changes that fit by the estimate.

  If there is none, the one that comes closest, and that more chips are needed.
  """
  config, mesh = asked.config, training.mesh
  options = {}
  for remat in ("dots", "full"):
    if remat != config.model.remat:
      peak = memory.estimate(training, mesh, remat=remat).peak
      options[f"--config.model.remat={remat}"] = peak
  for times in (2, 4, 8, 16):
    parts = times * config.accumulate
    if config.data.batch_size % (parts * mesh_lib.row_shards(mesh)) == 0:
      peak = memory.estimate(training, mesh, accumulate=parts).peak
      options[f"--config.accumulate={parts}"] = peak
  best, estimate = ranked(asked)[0]
  if asked.mesh(best) != mesh:
    options[f"--mesh {best}"] = estimate.peak
  limit = asked.topology.chip.hbm_bytes
  fits = [name for name, peak in options.items() if _SAFE * peak <= limit]
  if fits:
    return fits
  closest = min(options, key=options.get, default="")
  return [" and ".join(filter(None, [closest, "more chips"]))]
