"""The data mesh: rows of processes, and batches that divide."""

import types

import jax
import numpy as np
import pytest

from var_jax.parallel import mesh as mesh_lib


def fake_mesh(processes, each):
  """A mesh of devices of several processes, of which this is the first."""
  devices = [
    types.SimpleNamespace(process_index=p)
    for p in range(processes)
    for _ in range(each)
  ]
  return types.SimpleNamespace(devices=np.array(devices), size=processes * each)


@pytest.mark.parametrize("index", [0, 1, 2])
def test_processes_share_the_rows_in_order(monkeypatch, index):
  monkeypatch.setattr(jax, "process_index", lambda: index)
  rows = mesh_lib.rows(fake_mesh(3, 2), batch_size=12)
  assert rows == slice(4 * index, 4 * index + 4)


def test_a_batch_that_does_not_divide_is_an_error():
  mesh_lib.check_batch(fake_mesh(2, 4), 16)
  with pytest.raises(ValueError, match="12 is not divisible by 8 devices.* 8"):
    mesh_lib.check_batch(fake_mesh(2, 4), 12)
  with pytest.raises(ValueError, match="8 in 2 parts is not divisible by 8"):
    mesh_lib.check_batch(fake_mesh(2, 4), 8, parts=2)


def test_a_batch_lies_on_all_devices():
  mesh = mesh_lib.make_mesh()
  batch = {"label": np.arange(2 * mesh.size, dtype=np.int32)}
  on_mesh = mesh_lib.to_devices(mesh, batch)["label"]
  assert on_mesh.sharding == mesh_lib.by_rows(mesh)
  np.testing.assert_array_equal(on_mesh, batch["label"])
