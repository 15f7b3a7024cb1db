"""The mesh of a run and how a batch lies on it; no other file builds one.

One axis so far, `data`: the state is replicated, a batch is split by rows. A
process makes the rows of its own devices only.
"""

from collections.abc import Mapping, Sequence

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

Batch = Mapping[str, np.ndarray]


def make_mesh(devices: Sequence[jax.Device] | None = None) -> Mesh:
  """Return a mesh of all devices, those of a process side by side."""
  devices = jax.devices() if devices is None else devices
  ordered = sorted(devices, key=lambda d: (d.process_index, d.id))
  # Linen names activations with logical axes, which needs Auto.
  return Mesh(np.array(ordered), ("data",), axis_types=(AxisType.Auto,))


def replicated(mesh: Mesh) -> NamedSharding:
  return NamedSharding(mesh, PartitionSpec())


def by_rows(mesh: Mesh) -> NamedSharding:
  return NamedSharding(mesh, PartitionSpec("data"))


def check_batch(mesh: Mesh, batch_size: int, parts: int = 1) -> None:
  """Raise ValueError unless every device gets as many rows of each part."""
  unit = mesh.size * parts
  if batch_size % unit:
    near = max(batch_size // unit, 1) * unit
    in_parts = f" in {parts} parts" if parts > 1 else ""
    raise ValueError(
      f"batch {batch_size}{in_parts} is not divisible by {mesh.size} devices; "
      f"use a multiple of {unit} like {near}."
    )


def rows(mesh: Mesh, batch_size: int) -> slice:
  """Return the rows of a global batch that this process makes."""
  own = [d.process_index == jax.process_index() for d in mesh.devices.flat]
  size = batch_size // mesh.size
  return slice(own.index(True) * size, (own.index(True) + sum(own)) * size)


def to_devices(mesh: Mesh, batch: Batch) -> dict[str, jax.Array]:
  """Return the global batch of which this process holds its `rows`."""
  sharding = by_rows(mesh)
  return {
    name: jax.make_array_from_process_local_data(sharding, array)
    for name, array in batch.items()
  }
