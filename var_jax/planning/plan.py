"""A run on a slice that nobody rented yet: does it fit, how fast, what price.

The programs are the run's own (`compiling.py`) and memory is the compiler's
word. Rates are bounds, or what a stated MFU would give: nothing is timed here.
"""

import dataclasses
import math
from typing import Any

import jax
import ml_collections

from var_jax.checkpoints.description import Description
from var_jax.models.scales import SCALES
from var_jax.models.tokenizer import TokenizerConfig
from var_jax.parallel import mesh as mesh_lib
from var_jax.parallel.mesh import MeshConfig
from var_jax.planning import bounds, compiling, memory
from var_jax.planning.topology import Topology
from var_jax.training import checks, flops
from var_jax.training.tokenizer_training import TokenizerTraining
from var_jax.training.var_training import VARTraining

Training = VARTraining | TokenizerTraining


@dataclasses.dataclass(frozen=True)
class Asked:
  """What a plan is for.

  Args:
    config: of a training run.
    tokenizer: architecture of a transformer's.
    classes: of the data.
    images: drawn at once, by all chips together; None is 8 for each part that
      the rows of a batch are split into.
    mfu: share of the peak that a run is taken to reach, above 0 up to 1.
    price: of a chip-hour; the cost comes in the same currency.
  """

  config: ml_collections.ConfigDict
  topology: Topology
  tokenizer: TokenizerConfig | None
  classes: int = 1000
  images: int | None = None
  mfu: float = 0.4
  price: float | None = None

  def training(self, mesh: jax.sharding.Mesh) -> Training:
    """Return the programs of the run on a mesh.

    Raises:
      ValueError: the config makes no sense, or does not fit the mesh.
    """
    checks.check_config(self.config)
    if self.config.kind == "tokenizer":
      return TokenizerTraining.of(self.config, mesh)
    return VARTraining.of(self.config, mesh, self.tokenizer, self.classes)


def tokenizer_of(config: ml_collections.ConfigDict) -> TokenizerConfig | None:
  """Return the architecture of the tokenizer that a transformer trains on.

  It is that of the config's tokenizer_path or init_from, or the released one at
  data.image_size, or at 256 px; None if a tokenizer is trained.

  Raises:
    ValueError: the path has none, or nothing was released at that size.
  """
  if config.kind == "tokenizer":
    return None
  path = config.tokenizer_path or config.init_from
  if path:
    return Description.read(path).tokenizer
  size = config.data.image_size or 256
  if size not in SCALES:
    raise ValueError(
      f"data.image_size {size} has no published scale list; set "
      f"tokenizer_path, or use one of {', '.join(map(str, SCALES))}."
    )
  return TokenizerConfig(scales=SCALES[size], dtype="bfloat16")


# The estimate is within a tenth of what the compiler finds.
_SAFE = 1.1


def ranked(asked: Asked) -> list[tuple[MeshConfig, memory.Estimate]]:
  """Return the meshes that a transformer's run can have, the best one first.

  What fits by the estimate comes before what does not; then counts the time
  bound, or how much is missing.

  Raises:
    ValueError: there is none, or the config makes no sense.
  """
  devices = asked.topology.devices()
  each = len(devices) // asked.topology.slices
  training = asked.training(mesh_lib.make_mesh(MeshConfig(), devices[:1]))
  found, why = [], None
  for cfg in mesh_lib.factorisations(each):
    cfg = dataclasses.replace(cfg, slices=asked.topology.slices)
    mesh = mesh_lib.make_mesh(cfg, devices)
    try:
      estimate = memory.estimate(training, mesh)
    except ValueError as error:  # something does not divide
      why = why or error
      continue
    seconds = max(_train_bounds(asked, training, mesh))
    over = max(_SAFE * estimate.peak - asked.topology.chip.hbm_bytes, 0.0)
    found.append((over, seconds, cfg, estimate))
  if not found:
    raise ValueError(f"no mesh of {len(devices)} chips works: {why}")
  found.sort(key=lambda candidate: candidate[:2])
  return [(cfg, estimate) for *_, cfg, estimate in found]


def train(asked: Asked, cfg: MeshConfig) -> dict[str, Any]:
  """Compile the training step; return what is known of it.

  Raises:
    ValueError: the config makes no sense, or does not fit the mesh.
  """
  mesh = mesh_lib.make_mesh(cfg, asked.topology.devices())
  mesh_lib.check_batch(
    mesh, asked.config.data.batch_size, asked.config.accumulate
  )
  training = asked.training(mesh)
  config, steps = asked.config, asked.config.steps
  batch, chips = config.data.batch_size, training.mesh.size
  is_var = isinstance(training, VARTraining)
  estimate = memory.estimate(training, training.mesh) if is_var else None
  programs = [_compiled("train step", compiling.train_step(training))]
  last = training.stage_of(steps - 1) if is_var else None
  work = training.work(last) if is_var else training.work()
  limits = _train_bounds(asked, training, training.mesh)
  rate = _rate(asked, chips, batch, work.flops_per_step, limits)
  seconds = steps * batch / rate
  found = _head(asked, "train", training, programs) | {
    "batch": batch,
    "steps": steps,
    "state_bytes": memory.state_bytes(training, training.mesh),
    "estimate": estimate and estimate._asdict() | {"peak": estimate.peak},
    "flops_per_step": work.flops_per_step,
    "traffic_bytes": _traffic(asked, training, training.mesh)._asdict(),
    "bound_seconds": limits._asdict(),
    "mfu": asked.mfu,
    "images_per_second": rate,
    "days": seconds / 86400,
    "cost": asked.price and asked.price * chips * seconds / 3600,
    "remedies": [],
  }
  if not found["fits"] and is_var:
    found["remedies"] = remedies(asked, training, cfg)
  return found


def sample(asked: Asked, cfg: MeshConfig) -> dict[str, Any]:
  """Compile the sampler's programs; return what is known of them.

  Raises:
    ValueError: as of `train`, or the images do not divide.
  """
  mesh = mesh_lib.make_mesh(cfg, asked.topology.devices())
  training = asked.training(mesh)
  if not isinstance(training, VARTraining):
    raise ValueError(
      "program 'sample' is of a transformer and the config is a tokenizer's; "
      "use train."
    )
  images = asked.images or 8 * mesh_lib.row_shards(mesh)
  mesh_lib.check_batch(mesh, images)
  programs = [
    _compiled(name, lowered)
    for name, lowered in compiling.sample_programs(training, images)
  ]
  tokenizer = training.tokenizer.cfg
  each = flops.var_sample(training.cfg, rows=2)
  each += flops.tokenizer_forward(tokenizer).decoder
  limits = _sample_bounds(asked, training, images)
  return _head(asked, "sample", training, programs) | {
    "images": images,
    "flops_per_image": each,
    "bound_seconds": limits._asdict(),
    "mfu": asked.mfu,
    "images_per_second": _rate(asked, mesh.size, images, images * each, limits),
    "remedies": [] if all(p["fits"] for p in programs) else _SAMPLE_REMEDIES,
  }


_SAMPLE_REMEDIES = [
  "--images: fewer at once", "--mesh: more chips for fsdp or model"
]  # fmt: skip


def remedies(asked: Asked, training: VARTraining, cfg: MeshConfig) -> list[str]:
  """Return single changes that fit by the estimate, or the smallest peak."""
  config, limit = asked.config, asked.topology.chip.hbm_bytes
  fits, closest = [], (math.inf, "")

  def consider(change: str, peak: float) -> None:
    nonlocal closest
    closest = min(closest, (peak, change))
    if peak <= limit:
      fits.append(change)

  for remat in ("dots", "full"):
    if config.model.remat != remat:
      changed = memory.estimate(training, training.mesh, remat=remat)
      consider(f"--config.model.remat={remat}", changed.peak)
  for parts in (2, 4, 8, 16):
    parts *= config.accumulate
    rows = mesh_lib.row_shards(training.mesh) * parts
    if config.data.batch_size % rows == 0:
      changed = memory.estimate(training, training.mesh, accumulate=parts)
      consider(f"--config.accumulate={parts}", changed.peak)
  for other, estimate in ranked(asked)[:2]:
    if str(other) != str(cfg):
      consider(f"--mesh {other}", estimate.peak)
  return fits or [f"{closest[1]}, and a larger slice"]


def _head(asked, program: str, training: Training, programs) -> dict[str, Any]:
  axes = training.mesh.shape
  cfg = MeshConfig(axes["slice"], axes["data"], axes["fsdp"], axes["model"])
  return {
    "program": program,
    "topology": asked.topology.name,
    "slices": asked.topology.slices,
    "chips": training.mesh.size,
    "mesh": str(cfg),
    "image_size": training.tokenizer.cfg.image_shape[0],
    "classes": asked.classes,
    "available_bytes": asked.topology.chip.hbm_bytes,
    "fits": all(p["fits"] for p in programs),
    "programs": programs,
  }


def _compiled(name: str, lowered) -> dict[str, Any]:
  try:
    found = compiling.compiled(lowered)
  except compiling.DoesNotFit as error:
    return {"name": name, "fits": False, "needed_bytes": error.needed}
  seconds = {"compile_seconds": found.seconds}
  return {"name": name, "fits": True} | found.memory._asdict() | seconds


def _train_bounds(asked: Asked, training: Training, mesh) -> bounds.Bounds:
  config, chip = asked.config, asked.topology.chip
  if isinstance(training, TokenizerTraining):
    each = bounds.tokenizer_products(training.cfg)
  else:
    cached = config.data.token_cache
    encoded = None if cached else training.tokenizer.cfg
    last = training.stage_of(config.steps - 1)
    tokens = training.work(last).tokens_per_image
    each = bounds.var_products(training.cfg, encoded, tokens)
  traffic = _traffic(asked, training, mesh)
  return bounds.Bounds(
    compute=config.data.batch_size * each / mesh.size / chip.flops,
    # The state is read once and written once, at least.
    memory=2 * memory.state_bytes(training, mesh) / chip.hbm_rate,
    ici=traffic.ici / chip.ici_rate,
    dcn=traffic.dcn / chip.dcn_rate,
  )


def _sample_bounds(asked: Asked, training: VARTraining, images: int):
  mesh, cfg, chip = training.mesh, training.cfg, asked.topology.chip
  products = images * bounds.sample_products(cfg, training.tokenizer.cfg)
  shapes = memory.parameter_shapes(training)
  # Every scale reads all parameters: those of a chip and those it gathers.
  held = 2 * sum(map(math.prod, shapes.values())) / mesh.shape["model"]
  gathered = bounds.gathered(shapes, mesh.shape, cfg.dtype)
  times, rows = len(cfg.schedule), 2 * images / mesh_lib.row_shards(mesh)
  tokens = cfg.schedule.num_tokens
  summed = bounds.forward_sums(cfg, tokens, rows, mesh.shape)
  return bounds.Bounds(
    compute=products / mesh.size / chip.flops,
    memory=times * held / chip.hbm_rate,
    ici=(times * gathered + summed) / chip.ici_rate,
    dcn=0.0,
  )


def _traffic(asked: Asked, training: Training, mesh) -> bounds.Traffic:
  config = asked.config
  shapes = memory.parameter_shapes(training)
  parts = config.accumulate
  if isinstance(training, TokenizerTraining):
    return bounds.gradients(shapes, mesh.shape, "float32", parts)
  traffic = bounds.gradients(shapes, mesh.shape, training.cfg.dtype, parts)
  rows = config.data.batch_size / mesh_lib.row_shards(mesh)
  tokens = training.work(training.stage_of(config.steps - 1)).tokens_per_image
  summed = bounds.train_sums(training.cfg, tokens, rows, mesh.shape)
  return traffic._replace(ici=traffic.ici + summed)


def _rate(asked, chips: int, images: int, flops_each: float, limits) -> float:
  """Return images a second at the stated MFU, or at the bound if it is less."""
  seconds = flops_each / (asked.mfu * chips * asked.topology.chip.flops)
  return images / max(seconds, *limits)
