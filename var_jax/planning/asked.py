"""What a plan is asked about."""

import dataclasses

import jax
import ml_collections

from var_jax.checkpoints.description import Description
from var_jax.models.scales import SCALES
from var_jax.models.tokenizer import TokenizerConfig
from var_jax.parallel import mesh as mesh_lib
from var_jax.parallel.mesh import MeshConfig
from var_jax.planning.topology import Topology
from var_jax.training import checks
from var_jax.training.tokenizer_training import TokenizerTraining
from var_jax.training.var_training import VARTraining

Training = VARTraining | TokenizerTraining


@dataclasses.dataclass(frozen=True)
class Asked:
  """A run, a slice to have it on, and what rate and cost follow from.

  Args:
    config: of a training run.
    classes: of the data.
    images: drawn at once, by all chips together; None is 8 for each part that
      the rows of a batch are split into.
    mfu: share of the peak that a run is taken to reach, above 0 up to 1.
    price: of a chip-hour; the cost comes in the same currency.
  """

  config: ml_collections.ConfigDict
  topology: Topology
  classes: int = 1000
  images: int | None = None
  mfu: float = 0.4
  price: float | None = None

  def mesh(self, cfg: MeshConfig) -> jax.sharding.Mesh:
    """Return the mesh of a config on the slices.

    Raises:
      ValueError: the axes do not multiply to the chips.
    """
    return mesh_lib.make_mesh(cfg, self.topology.devices())

  def training(self, mesh: jax.sharding.Mesh) -> Training:
    """Return the programs of the run on a mesh.

    Raises:
      ValueError: the config makes no sense, or does not fit the mesh.
    """
    checks.check_config(self.config)
    if self.config.kind == "tokenizer":
      return TokenizerTraining.of(self.config, mesh)
    tokenizer = tokenizer_of(self.config)
    return VARTraining.of(self.config, mesh, tokenizer, self.classes)


def tokenizer_of(config: ml_collections.ConfigDict) -> TokenizerConfig:
  """Return the architecture of the tokenizer that a transformer trains on.

  It is that of the config's tokenizer_path or init_from; without them the
  released one, at data.image_size or at 256 px.

  Raises:
    ValueError: the path has none, or nothing was released at that size.
  """
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
