"""The mesh of a run and how a batch lies on it; no other file builds one.

    slice   TPU slices, joined by the data centre's network
    data    copies of the model
    fsdp    parts of the parameters; each layer is gathered where it is used
    model   parts of the heads and the MLP, for the same rows of the batch

A batch is split by rows over the first three. A process makes the rows of its
own devices only.
"""

import dataclasses
import functools
import math
from collections.abc import Iterator, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

AXES = ("slice", "data", "fsdp", "model")
BATCH_AXES = AXES[:3]

Batch = Mapping[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class MeshConfig:
  """How many devices lie along each axis.

  Args:
    slices: 0 is as many as the devices say.
    data: -1 is all devices that the others leave.
  """

  slices: int = 0
  data: int = -1
  fsdp: int = 1
  model: int = 1

  def __post_init__(self):
    for field in dataclasses.fields(self):
      size = getattr(self, field.name)
      if size < 1 and size != field.default:
        raise ValueError(
          f"mesh axis {field.name} has {size} devices; use 1 or more, or "
          f"{field.default}."
        )

  def __str__(self):
    parts = f"data={self.data},fsdp={self.fsdp},model={self.model}"
    return f"slices={self.slices},{parts}" if self.slices > 1 else parts


def parse(text: str) -> MeshConfig:
  """Return the config that "data=1,fsdp=16,model=1" means."""
  sizes = {}
  for part in filter(None, text.split(",")):
    name, _, size = part.partition("=")
    if name not in _NAMES or not size.removeprefix("-").isdigit():
      raise ValueError(
        f"mesh {text!r} is not understood at {part!r}; write "
        "data=-1,fsdp=16,model=1 or some of these."
      )
    if name in sizes:
      raise ValueError(f"mesh {text!r} says {name} twice; say it once.")
    sizes[name] = int(size)
  return MeshConfig(**sizes)


_NAMES = [field.name for field in dataclasses.fields(MeshConfig)]


def make_mesh(
  cfg: MeshConfig | None = None,
  devices: Sequence[jax.Device] | None = None,
) -> Mesh:
  """Return the mesh of a config on all devices, or those given.

  Raises:
    ValueError: the axes do not multiply to the devices.
  """
  devices = list(jax.devices() if devices is None else devices)
  shape = resolve(cfg or MeshConfig(), devices)
  size = len(devices) // shape[0]
  on_torus = devices[0].platform == "tpu"
  if on_torus:
    devices.sort(key=_slice_of)
  else:
    devices.sort(key=lambda d: (d.process_index, d.id))
  slices = [devices[s * size : (s + 1) * size] for s in range(shape[0])]
  # On a torus, neighbours on the mesh are neighbours there, as far as can be.
  grids = [
    mesh_utils.create_device_mesh(
      shape[1:], part, allow_split_physical_axes=True
    )
    if on_torus
    else np.array(part).reshape(shape[1:])
    for part in slices
  ]
  # Linen names activations with logical axes, which needs Auto.
  return Mesh(np.stack(grids), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def is_one_cpu(mesh: Mesh) -> bool:
  """Return whether what is for one CPU only may be used."""
  return mesh.size == 1 and mesh.devices.flat[0].platform == "cpu"


def resolve(
  cfg: MeshConfig, devices: Sequence[jax.Device]
) -> tuple[int, int, int, int]:
  """Return the sizes of AXES on the devices; errors as of `make_mesh`."""
  found = len({_slice_of(device) for device in devices})
  slices = cfg.slices or found
  each, rest = divmod(len(devices), slices)
  if rest or (found > 1 and slices != found):
    raise ValueError(
      f"{len(devices)} devices in {found} slices are no {slices} slices; use "
      f"mesh.slices={found}."
    )
  inner = cfg.fsdp * cfg.model
  data = each // inner if cfg.data == -1 else cfg.data
  if data * inner != each:
    a_slice = "devices" if slices == 1 else "devices of a slice"
    raise ValueError(
      f"mesh {cfg} does not multiply to {each} {a_slice}; use one like "
      f"{', or '.join(map(str, _near(cfg, each)))}."
    )
  return slices, data, cfg.fsdp, cfg.model


def factorisations(devices: int) -> Iterator[MeshConfig]:
  """Yield every mesh of so many devices of a slice."""
  for model in _divisors(devices):
    for fsdp in _divisors(devices // model):
      yield MeshConfig(1, devices // model // fsdp, fsdp, model)


def _near(cfg: MeshConfig, devices: int) -> list[MeshConfig]:
  """Return the meshes of so many devices that are most like `cfg`."""

  def distance(other: MeshConfig) -> float:
    return sum(
      abs(math.log(max(getattr(cfg, name), 1) / getattr(other, name)))
      for name in ("model", "fsdp", "data")
    )

  return sorted(factorisations(devices), key=distance)[:2]


def _divisors(number: int) -> list[int]:
  return [d for d in range(1, number + 1) if number % d == 0]


def _slice_of(device: jax.Device) -> int:
  # Other platforms count something else there, or nothing.
  # A single slice has no number either.
  of_slice = getattr(device, "slice_index", None) or 0
  return of_slice if device.platform == "tpu" else 0


def replicated(mesh: Mesh) -> NamedSharding:
  return NamedSharding(mesh, PartitionSpec())


def by_rows(mesh: Mesh) -> NamedSharding:
  return NamedSharding(mesh, PartitionSpec(present(mesh, BATCH_AXES)))


def row_shards(mesh: Mesh) -> int:
  """Return the number of parts that the rows of a batch are split into."""
  return math.prod(mesh.shape[axis] for axis in present(mesh, BATCH_AXES))


def present(mesh: Mesh, axes: Sequence[str]) -> tuple[str, ...]:
  """Return those of the axes that a mesh has, which `load` may be given."""
  return tuple(axis for axis in axes if axis in mesh.axis_names)


def check_batch(mesh: Mesh, batch_size: int, parts: int = 1) -> None:
  """Raise ValueError unless every device gets as many rows of each part."""
  shards = row_shards(mesh)
  unit = shards * parts
  if batch_size % unit:
    near = max(batch_size // unit, 1) * unit
    in_parts = f" in {parts} parts" if parts > 1 else ""
    raise ValueError(
      f"batch {batch_size}{in_parts} is not divisible by {shards} data shards; "
      f"use a multiple of {unit} like {near}."
    )


def rows(mesh: Mesh, batch_size: int) -> np.ndarray:
  """Return the rows of a global batch that this process makes, in order.

  They need not follow one another: hosts own squares of a torus.
  """
  parts = mesh.devices.reshape(row_shards(mesh), -1)
  size = batch_size // len(parts)
  here = jax.process_index()
  mine = [
    np.arange(part * size, (part + 1) * size)
    for part, devices in enumerate(parts)
    if any(device.process_index == here for device in devices)
  ]
  return np.concatenate(mine)


def to_devices(mesh: Mesh, batch: Batch) -> dict[str, jax.Array]:
  """Return the global batch of which this process holds its `rows`."""
  shards = row_shards(mesh)
  own = len(rows(mesh, shards))

  def placed(array: np.ndarray) -> jax.Array:
    B = len(array) * shards // own
    mine = rows(mesh, B)

    def part(index):
      start, stop, _ = index[0].indices(B)
      first = np.searchsorted(mine, start)
      return array[first : first + stop - start]

    shape = (B, *array.shape[1:])
    return jax.make_array_from_callback(shape, by_rows(mesh), part)

  return {name: placed(array) for name, array in batch.items()}


def spread(mesh: Mesh, array: np.ndarray | jax.Array) -> jax.Array:
  """Return an array by rows, filled up with its last row until it divides.

  Args:
    array: the same in all processes, or on the devices of the mesh; keys of
      jax.random too.
  """
  if jax.dtypes.issubdtype(array.dtype, jax.dtypes.prng_key):
    data = spread(mesh, jax.random.key_data(array))
    return jax.random.wrap_key_data(data, impl=jax.random.key_impl(array))
  missing = -len(array) % row_shards(mesh)
  if _is_on(mesh, array):
    return _resized(array, len(array) + missing, by_rows(mesh))
  array = np.asarray(array)
  array = np.concatenate([array, np.repeat(array[-1:], missing, axis=0)])
  return jax.make_array_from_callback(
    array.shape, by_rows(mesh), lambda index: array[index]
  )


def cut(mesh: Mesh, array: jax.Array, rows: int) -> jax.Array:
  """Return the first rows, by rows, or on every device if they do not divide.

  Args:
    array: on the devices of the mesh.
  """
  even = rows % row_shards(mesh) == 0
  return _resized(array, rows, by_rows(mesh) if even else replicated(mesh))


def _is_on(mesh: Mesh, array: np.ndarray | jax.Array) -> bool:
  return isinstance(array, jax.Array) and (
    array.sharding.device_set == set(mesh.devices.flat)
  )


def _resized(array: jax.Array, rows: int, where: NamedSharding) -> jax.Array:
  """Return an array cut to so many rows, or filled up with its last one."""
  lies = array.sharding.is_equivalent_to(where, array.ndim)
  return array if lies and len(array) == rows else _resizer(where)(array, rows)


@functools.cache
def _resizer(where: NamedSharding):
  def resized(array, rows: int):
    more = jnp.repeat(array[-1:], max(rows - len(array), 0), axis=0)
    return jnp.concatenate([array[:rows], more])

  return jax.jit(resized, static_argnums=1, out_shardings=where)
