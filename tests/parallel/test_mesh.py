"""Meshes that fit their devices, rows of processes, batches that divide."""

import types

import jax
import numpy as np
import pytest

from var_jax.parallel import mesh as mesh_lib
from var_jax.parallel.mesh import MeshConfig


def device(process=0, slice_index=0, platform="cpu", number=0):
  return types.SimpleNamespace(
    process_index=process,
    slice_index=slice_index,
    platform=platform,
    id=number,
  )


def fake_mesh(devices, **sizes):
  """A mesh of devices by row-major order; axes that are not given are 1."""
  shape = {axis: sizes.get(axis, 1) for axis in mesh_lib.AXES}
  array = np.empty(len(devices), object)
  array[:] = devices
  return types.SimpleNamespace(
    devices=array.reshape(*shape.values()),
    axis_names=mesh_lib.AXES,
    shape=shape,
    size=len(devices),
  )


def of_processes(processes, each, **sizes):
  devices = [device(p) for p in range(processes) for _ in range(each)]
  return fake_mesh(devices, **sizes)


@pytest.mark.parametrize(
  "cfg, shape",
  [
    (MeshConfig(), (1, 8, 1, 1)),
    (MeshConfig(fsdp=4), (1, 2, 4, 1)),
    (MeshConfig(data=1, fsdp=4, model=2), (1, 1, 4, 2)),
    (MeshConfig(slices=2, model=2), (2, 2, 1, 2)),
  ],
)
def test_the_devices_that_are_left_hold_copies(cfg, shape):
  assert mesh_lib.resolve(cfg, [device()] * 8) == shape


def test_slices_are_those_that_the_devices_say():
  devices = [device(slice_index=i // 4, platform="tpu") for i in range(8)]
  assert mesh_lib.resolve(MeshConfig(fsdp=2), devices) == (2, 2, 2, 1)
  with pytest.raises(ValueError, match="2 slices are no 4 slices; use mesh.sl"):
    mesh_lib.resolve(MeshConfig(slices=4), devices)


@pytest.mark.parametrize(
  "cfg, message",
  [
    (
      MeshConfig(data=3, fsdp=2),
      "data=3,fsdp=2,model=1 does not multiply to 8 devices; use one like "
      "data=4,fsdp=2,model=1, or data=2,fsdp=4,model=1",
    ),
    (MeshConfig(fsdp=3), "data=-1,fsdp=3,model=1 does not multiply to 8"),
    (MeshConfig(fsdp=16), "use one like data=1,fsdp=8,model=1"),
    (MeshConfig(slices=2, data=8), "multiply to 4 devices of a slice"),
    (MeshConfig(slices=3), "8 devices in 1 slices are no 3 slices"),
  ],
)
def test_a_mesh_of_another_size_is_an_error_that_proposes(cfg, message):
  with pytest.raises(ValueError, match=message):
    mesh_lib.resolve(cfg, [device()] * 8)


def test_a_mesh_can_be_written_in_words():
  assert mesh_lib.parse("") == MeshConfig()
  full = "data=2,fsdp=16,model=4"
  assert mesh_lib.parse(full) == MeshConfig(data=2, fsdp=16, model=4)
  assert str(mesh_lib.parse(full)) == full
  assert mesh_lib.parse("slices=2,data=-1") == MeshConfig(slices=2)
  for wrong in ("tensor=2", "data", "data=x", "data=2;fsdp=2"):
    with pytest.raises(ValueError, match="is not understood at"):
      mesh_lib.parse(wrong)
  with pytest.raises(ValueError, match="axis model has 0 devices; use 1 or"):
    mesh_lib.parse("model=0")


@pytest.mark.parametrize("index", [0, 1, 2])
def test_processes_share_the_rows_in_order(monkeypatch, index):
  monkeypatch.setattr(jax, "process_index", lambda: index)
  rows = mesh_lib.rows(of_processes(3, 2, data=3, fsdp=2), batch_size=12)
  assert rows.tolist() == list(range(4 * index, 4 * index + 4))


def test_a_host_that_owns_a_square_of_a_torus_makes_rows_apart(monkeypatch):
  owners = [0, 0, 1, 1, 0, 0, 1, 1]
  mesh = fake_mesh([device(process) for process in owners], data=2, fsdp=4)
  monkeypatch.setattr(jax, "process_index", lambda: 1)
  assert mesh_lib.rows(mesh, batch_size=8).tolist() == [2, 3, 6, 7]


def test_processes_that_share_a_model_make_the_same_rows(monkeypatch):
  mesh = of_processes(4, 1, data=2, model=2)
  of_each = []
  for process in range(4):
    monkeypatch.setattr(jax, "process_index", lambda process=process: process)
    of_each.append(mesh_lib.rows(mesh, batch_size=4).tolist())
  assert of_each == [[0, 1], [0, 1], [2, 3], [2, 3]]


def test_a_batch_that_does_not_divide_is_an_error():
  mesh = of_processes(2, 4, data=2, fsdp=4)
  mesh_lib.check_batch(mesh, 16)
  with pytest.raises(ValueError, match="12 is not divisible by 8 data sh.* 8"):
    mesh_lib.check_batch(mesh, 12)
  with pytest.raises(ValueError, match="8 in 2 parts is not divisible by 8"):
    mesh_lib.check_batch(mesh, 8, parts=2)
  mesh_lib.check_batch(of_processes(2, 4, data=4, model=2), 12)


def test_a_batch_lies_on_all_devices():
  mesh = mesh_lib.make_mesh()
  batch = {"label": np.arange(2 * mesh.size, dtype=np.int32)}
  on_mesh = mesh_lib.to_devices(mesh, batch)["label"]
  assert on_mesh.sharding == mesh_lib.by_rows(mesh)
  np.testing.assert_array_equal(on_mesh, batch["label"])
