"""The public files of LPIPS become a folder that training reads."""

import numpy as np
import pytest

from var_jax import cli
from var_jax.checkpoints import lpips
from var_jax.models import perceptual

CONVS = (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28)
SLICES = (1, 1, 2, 2, 3, 3, 3, 4, 4, 4, 5, 5, 5)


@pytest.fixture(scope="module")
def torch():
  return pytest.importorskip("torch")


def weights():
  rng = np.random.default_rng(0)
  return {
    name: rng.normal(size=shape).astype("f4")
    for name, shape in perceptual.shapes().items()
  }


def heads_of(torch):
  return {
    f"lin{l}.model.1.weight": torch.tensor(weights()[f"head{l}"]).reshape(
      1, -1, 1, 1
    )
    for l in range(5)
  }


def convolutions_of(torch, name):
  """Return VGG16 as torchvision or the package calls its parts."""
  found = {}
  for i, place in enumerate(CONVS):
    kernel = weights()[f"conv{i}_kernel"].transpose(3, 2, 0, 1)
    prefix = name.format(SLICES[i])
    found[f"{prefix}.{place}.weight"] = torch.tensor(kernel.copy())
    found[f"{prefix}.{place}.bias"] = torch.tensor(weights()[f"conv{i}_bias"])
  return found


@pytest.fixture(scope="module")
def files(torch, tmp_path_factory):
  """The two public files, and one with both."""
  folder = tmp_path_factory.mktemp("lpips")
  classifier = {"classifier.0.weight": torch.zeros(2, 2)}
  vgg = convolutions_of(torch, "features") | classifier
  # Both were written by torch before 1.6.
  old = dict(_use_new_zipfile_serialization=False)
  torch.save(heads_of(torch), folder / "heads.pth", **old)
  torch.save(vgg, folder / "vgg16.pth", **old)
  both = convolutions_of(torch, "net.slice{}") | heads_of(torch)
  torch.save(both, folder / "both.pth")
  return folder


def run(*flags):
  return cli.main(["convert", *map(str, flags)])


def assert_read(folder):
  found = lpips.read(folder)
  assert found.keys() == weights().keys()
  for name, expected in weights().items():
    np.testing.assert_array_equal(found[name], expected, name)


def test_two_files_or_one_become_a_folder(files, tmp_path, capsys):
  two, one = tmp_path / "two", tmp_path / "one"
  heads, vgg = files / "heads.pth", files / "vgg16.pth"
  assert run("--lpips", heads, "--vgg", vgg, "--output", two) == 0
  assert str(two) in capsys.readouterr().out
  assert run("--lpips", files / "both.pth", "--output", one) == 0
  assert_read(two)
  assert_read(one)


def line(capsys):
  (line,) = capsys.readouterr().err.splitlines()
  return line


def test_what_is_missing_is_said_and_nothing_is_left(files, tmp_path, capsys):
  output = tmp_path / "out"
  cases = [
    (["--lpips", files / "heads.pth"], "VGG16's convolutions are missing"),
    (["--lpips", files / "vgg16.pth"], "the heads are missing"),
    (["--lpips", tmp_path / "none.pth"], "none.pth is no file"),
  ]
  for flags, message in cases:
    assert run(*flags, "--output", output) == 1
    assert message in line(capsys)
    assert not list(tmp_path.iterdir())


def test_a_file_that_was_cut_short_is_named(files, tmp_path, capsys):
  short = tmp_path / "short.pth"
  short.write_bytes((files / "both.pth").read_bytes()[:-1000])
  assert run("--lpips", short, "--output", tmp_path / "out") == 1
  assert f"{short} cannot be read" in line(capsys)


def test_weights_of_another_network_are_refused(torch, files, tmp_path, capsys):
  state = torch.load(files / "both.pth")
  state["lin2.model.1.weight"] = torch.zeros(1, 128, 1, 1)
  torch.save(state, tmp_path / "other.pth")
  flags = ["--lpips", tmp_path / "other.pth", "--output", tmp_path / "out"]
  assert run(*flags) == 1
  assert "lin2.model.1.weight has shape (128,) here and (256,)" in line(capsys)


@pytest.mark.parametrize(
  "flags, message",
  [
    (["--vgg", "a.pth"], "--vgg needs --lpips"),
    (["--lpips", "a.pth", "--vae", "b.pth"], "--vae does not go with --lpips"),
    (["--lpips", "a.pth", "--verify"], "--verify does not go with --lpips"),
  ],
)
def test_flags_that_do_not_go_together(flags, message, tmp_path, capsys):
  assert run(*flags, "--output", tmp_path / "out") == 2
  assert message in capsys.readouterr().err


def test_a_damaged_folder_is_named(files, tmp_path):
  folder = tmp_path / "weights"
  lpips.convert(str(files / "both.pth"), folder)
  path = folder / "lpips.safetensors"
  content = bytearray(path.read_bytes())
  content[-1] ^= 1
  path.write_bytes(content)
  with pytest.raises(ValueError, match="is not what was written"):
    lpips.read(folder)
  with pytest.raises(ValueError, match="has no lpips.safetensors"):
    lpips.read(tmp_path)
