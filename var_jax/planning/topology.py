"""TPU slices by name, as devices that can be compiled for and do not exist.

`libtpu`, the package, has the compiler; no TPU is needed. Names are those of
Google Cloud: v5e:4x4 is sixteen v5e chips, of which four share a host.
"""

import dataclasses
import importlib.util
import os
from typing import NamedTuple

import jax
from jax.experimental import topologies


class Chip(NamedTuple):
  """One chip; bytes and FLOPs a second, one way where it is a link.

  Peak, memory and links are those of the system architecture pages of Google's
  documentation (cloud.google.com/tpu/docs): a chip's share of what they say of
  a pod or of both directions.
  """

  kind: str  # as JAX names the device
  flops: float  # bfloat16
  hbm_bytes: float  # that programs may use, by the compiler's word
  hbm_rate: float
  ici_rate: float  # out of a chip, over all its links
  dcn_rate: float


_GIB = 2.0**30
CHIPS = {
  "v5e": Chip("TPU v5 lite", 197e12, 15.75 * _GIB, 819e9, 1600e9 / 8, 25e9 / 8),
  "v5p": Chip("TPU v5", 459e12, 95.74 * _GIB, 2765e9, 4800e9 / 8, 50e9 / 8),
  "v6e": Chip(
    "TPU v6 lite", 918e12, 31.25 * _GIB, 1600e9, 3200e9 / 8, 100e9 / 8
  ),
}
_FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_CUBES = (
  "2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8",
  "8x8x16", "8x16x16", "16x16x16",
)  # fmt: skip
SHAPES = {"v5e": _FLAT, "v5p": _CUBES, "v6e": _FLAT}


@dataclasses.dataclass(frozen=True)
class Topology:
  """So many slices of one shape.

  Raises:
    ValueError: there is no such topology.
  """

  name: str
  slices: int = 1

  def __post_init__(self):
    kind, _, shape = self.name.partition(":")
    if shape not in SHAPES.get(kind, ()):
      raise ValueError(
        f"topology {self.name!r} does not exist; use one of "
        f"{', '.join(names())}."
      )
    if self.slices > 1 and shape == "1x1":
      raise ValueError(
        f"{self.slices} slices of {self.name} have no network of their own; "
        "use a larger shape."
      )

  @property
  def chip(self) -> Chip:
    """Return what one of its chips can do."""
    return CHIPS[self.name.partition(":")[0]]

  def devices(self) -> list[jax.Device]:
    """Return the devices; the first call loads the TPU compiler.

    Raises:
      ValueError: it is not installed.
    """
    more = {"num_slices": self.slices} if self.slices > 1 else {}
    if self.name.endswith(":1x1"):
      more["chips_per_host_bounds"] = (1, 1, 1)
    if importlib.util.find_spec("libtpu") is None:
      raise ValueError(
        "the TPU compiler, libtpu, is not installed; pip install 'jax[tpu]', "
        "which needs no TPU."
      )
    try:
      found = topologies.get_topology_desc(
        platform="tpu", topology_name=self.name, **more
      )
    except RuntimeError as error:
      raise ValueError(
        f"libtpu has no {self.slices} x {self.name} ({error}); try another "
        "topology, or the libtpu that pip install 'jax[tpu]' chooses."
      ) from None
    return list(found.devices)


# What libtpu would ask the machine for, and wait, if it had TPUs.
ALONE = {
  "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
  "TPU_SKIP_MDS_QUERY": "1",
  "TPU_ACCELERATOR_TYPE": "v5litepod-16",
  "TPU_WORKER_HOSTNAMES": "localhost",
}


def use_no_tpu() -> None:
  """Let this process compile for TPU and run on CPU; call it before JAX runs.

  Otherwise libtpu looks for chips, asks a metadata server, and bars a second
  process.
  """
  jax.config.update("jax_platforms", "cpu")
  os.environ.update(ALONE)


def names() -> list[str]:
  """Return the topologies that there are."""
  return [f"{kind}:{shape}" for kind in SHAPES for shape in SHAPES[kind]]
