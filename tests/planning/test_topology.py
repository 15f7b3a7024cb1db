import pytest

from var_jax.planning import topology
from var_jax.training import flops


def test_a_topology_that_does_not_exist_is_told_those_that_do():
  for name in ("v5e:3x3", "v5p:4x4", "v5litepod-16", "v9:2x2", ""):
    with pytest.raises(ValueError, match="v5e:1x1, v5e:2x2, .*v6e:16x16"):
      topology.Topology(name)


def test_a_single_chip_has_no_second_slice():
  with pytest.raises(ValueError, match="2 slices of v5e:1x1"):
    topology.Topology("v5e:1x1", 2)


def test_chips_are_as_fast_here_as_where_mfu_is_reckoned():
  for chip in topology.CHIPS.values():
    assert flops.peak(chip.kind) == chip.flops


@pytest.mark.parametrize(
  ("name", "slices", "count", "hosts"),
  [
    ("v5e:4x4", 1, 16, 4),
    ("v5e:1x1", 1, 1, 1),
    ("v6e:2x4", 2, 16, 4),
    ("v5p:4x4x4", 1, 64, 16),
  ],
)
def test_devices_are_those_of_the_slices(name, slices, count, hosts):
  pytest.importorskip("libtpu")
  topology.use_no_tpu()
  devices = topology.Topology(name, slices).devices()
  assert len(devices) == count
  assert len({device.process_index for device in devices}) == hosts
  kind = topology.CHIPS[name.partition(":")[0]].kind
  assert {device.device_kind for device in devices} == {kind}
