"""Sources: what they return, and what they refuse to open."""

import errno
import pathlib
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from var_jax.data.sources import open_source


def _save_image(path, colour=(10, 20, 30), mode="RGB"):
  path.parent.mkdir(parents=True, exist_ok=True)
  Image.new("RGB", (6, 4), colour).convert(mode).save(path)


def _save_npz(path, **changes):
  arrays = {
    "images": np.arange(3 * 4 * 5, dtype=np.uint8).reshape(3, 4, 5),
    "labels": np.array([0, 2, 1]),
  }
  arrays |= changes
  np.savez(path, **{k: v for k, v in arrays.items() if v is not None})
  return f"npz:{path}"


def test_importing_the_data_folder_loads_no_optional_package():
  code = """
import sys
import var_jax.data.pipeline, var_jax.data.sources, var_jax.data.transforms
optional = {"grain", "sklearn", "PIL", "tensorflow_datasets"}
loaded = optional & set(sys.modules)
assert not loaded, loaded
"""
  subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
  "spec", ["", "cifar", "npz:", "folder", "digits:32", "tfds:"]
)
def test_an_unknown_source_is_refused(spec):
  with pytest.raises(
    ValueError, match="use digits, npz:/path, folder:/path or tfds:"
  ):
    open_source(spec, "train")


def test_an_unknown_split_is_refused():
  with pytest.raises(ValueError, match="'test' is unknown; use 'train' or"):
    open_source("digits", "test")


def test_the_digits_are_split_once_and_by_class():
  from sklearn.datasets import load_digits

  splits = [open_source("digits", split) for split in ("train", "val")]
  images = [
    sample["image"].tobytes() for source in splits for sample in list(source)
  ]
  whole = load_digits()
  assert [len(source) for source in splits] == [1257, 540]
  # No two digits are equal even at 8x8, so equal bytes would be one sample.
  assert len(np.unique(whole.data, axis=0)) == len(set(images)) == 1797
  counts = np.bincount(whole.target)
  for source, share in zip(splits, (0.7, 0.3), strict=True):
    labels = [sample["label"] for sample in list(source)]
    assert np.abs(np.bincount(labels) - share * counts).max() <= 1


def test_a_digit_is_the_embedded_one_enlarged():
  from sklearn.datasets import load_digits

  whole = load_digits()
  source = open_source("digits", "val")
  assert source.class_names == tuple("0123456789")
  for i in range(0, 540, 60):
    sample = source[i]
    assert sample["image"].shape == (32, 32, 3)
    assert sample["image"].dtype == np.uint8
    assert type(sample["label"]) is int
    red, green, blue = np.moveaxis(sample["image"], 2, 0)
    assert (red == green).all() and (red == blue).all()
    small = Image.fromarray(red).resize((8, 8), Image.Resampling.BOX)
    distance = np.abs(whole.images * (255 / 16) - np.asarray(small)).mean(
      (1, 2)
    )
    assert whole.target[distance.argmin()] == sample["label"]
    assert distance.min() < 16  # One grey level of the original.


def test_npz_returns_what_was_saved(tmp_path):
  grey = open_source(_save_npz(tmp_path / "grey.npz"), "train")
  assert len(grey) == 3
  assert grey.class_names == ("0", "1", "2")
  expected = np.arange(20, 40, dtype=np.uint8).reshape(4, 5, 1).repeat(3, 2)
  np.testing.assert_array_equal(grey[1]["image"], expected)
  assert grey[1]["label"] == 2

  images = np.random.default_rng(0).integers(0, 256, (3, 4, 5, 3), np.uint8)
  names = np.array(["a", "b", "c", "spare"])
  spec = _save_npz(tmp_path / "rgb.npz", images=images, class_names=names)
  rgb = open_source(spec, "train")
  np.testing.assert_array_equal(rgb[2]["image"], images[2])
  assert rgb.class_names == ("a", "b", "c", "spare")


def test_npz_holds_no_validation_split(tmp_path):
  spec = _save_npz(tmp_path / "data.npz")
  with pytest.raises(ValueError, match="one split.*an npz of its own"):
    open_source(spec, "val")


@pytest.mark.parametrize(
  "changes, message",
  [
    ({"images": None}, r"no array 'images' among \['labels'\]"),
    ({"labels": None}, r"no array 'labels' among \['images'\]"),
    ({"images": np.zeros((3, 4, 5))}, r"images are float64 \[3, 4, 5\]"),
    ({"images": np.zeros((3, 4), np.uint8)}, r"images are uint8 \[3, 4\]"),
    ({"images": np.zeros((3, 4, 5, 1), np.uint8)}, r"\[3, 4, 5, 1\]; save"),
    ({"labels": np.zeros(3)}, r"labels are float64 \[3\]; save integers"),
    ({"labels": np.zeros((3, 1), int)}, r"labels are int64 \[3, 1\]"),
    ({"labels": np.zeros(2, int)}, "3 images but 2 labels"),
    ({"labels": np.array([0, -1, 1])}, "label -1 is negative"),
    ({"labels": np.array([2, 2, 2])}, "all labels are 2; a class-conditional"),
    ({"labels": np.array(["a", "b", "c"])}, r"labels are <U1 \[3\]; save int"),
    ({"class_names": np.array(["a", "b"])}, "do not name label 2; save 3"),
    ({"class_names": np.array(list("abc"), object)}, "cannot be read"),
    (
      {"images": np.zeros((0, 4, 5), np.uint8), "labels": np.zeros(0, int)},
      r"images \[0, 4, 5\] are empty",
    ),
  ],
)
def test_a_bad_npz_is_refused(tmp_path, changes, message):
  spec = _save_npz(tmp_path / "bad.npz", **changes)
  with pytest.raises(ValueError, match=message) as caught:
    open_source(spec, "train")
  assert "\n" not in str(caught.value)


def test_a_file_that_is_no_npz_is_refused(tmp_path):
  with pytest.raises(ValueError, match="absent.npz is not a file"):
    open_source(f"npz:{tmp_path}/absent.npz", "train")
  np.save(tmp_path / "array.npy", np.zeros(3))
  with pytest.raises(ValueError, match="array.npy is not an npz"):
    open_source(f"npz:{tmp_path}/array.npy", "train")


def test_a_damaged_npz_is_refused(tmp_path):
  spec = _save_npz(tmp_path / "data.npz")
  content = bytearray((tmp_path / "data.npz").read_bytes())
  content[200] ^= 255  # A byte of the first array.
  (tmp_path / "data.npz").write_bytes(content)
  with pytest.raises(ValueError, match=r"data.npz cannot be read \("):
    open_source(spec, "train")


def test_folder_labels_are_the_sorted_classes_of_train(tmp_path):
  _save_image(tmp_path / "train/b/2.JPG")
  _save_image(tmp_path / "train/b/1.png", (1, 2, 3))
  _save_image(tmp_path / "train/c/x.webp")
  _save_image(tmp_path / "train/a/x.bmp")
  _save_image(tmp_path / "val/c/y.jpeg")
  (tmp_path / "train/b/notes.txt").write_text("no image")
  (tmp_path / "train/b/._1.png").write_text("no image")
  (tmp_path / "train/.cache").mkdir()

  train = open_source(f"folder:{tmp_path}", "train")
  val = open_source(f"folder:{tmp_path}", "val")

  assert train.class_names == val.class_names == ("a", "b", "c")
  assert [sample["label"] for sample in list(train)] == [0, 1, 1, 2]
  assert [sample["label"] for sample in list(val)] == [2]
  image = train[1]["image"]
  assert image.shape == (4, 6, 3) and image.dtype == np.uint8
  assert (image == (1, 2, 3)).all()


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "1", "LA"])
def test_every_image_mode_becomes_rgb(tmp_path, mode):
  _save_image(tmp_path / "train/a/x.png", (255, 255, 255), mode)
  _save_image(tmp_path / "train/b/x.png")
  image = open_source(f"folder:{tmp_path}", "train")[0]["image"]
  np.testing.assert_array_equal(image, np.full((4, 6, 3), 255))


def test_an_undecodable_file_is_named(tmp_path):
  _save_image(tmp_path / "train/a/cut.png")
  path = tmp_path / "train/a/cut.png"
  path.write_bytes(path.read_bytes()[:50])
  (tmp_path / "train/a/text.jpg").write_text("no image")
  _save_image(tmp_path / "train/b/x.png")
  source = open_source(f"folder:{tmp_path}", "train")
  for i, name in enumerate(["cut.png", "text.jpg"]):
    assert source.name_of(i) == str(tmp_path / "train/a" / name)
    with pytest.raises(ValueError, match=f"{name} cannot be decoded"):
      source[i]


def test_more_than_8_bits_are_refused_rather_than_saturated(tmp_path):
  _save_image(tmp_path / "train/a/x.png")
  _save_image(tmp_path / "train/b/x.png")
  deep = Image.fromarray(np.full((4, 6), 1000, np.uint16))
  deep.save(tmp_path / "train/a/x.png")
  source = open_source(f"folder:{tmp_path}", "train")
  with pytest.raises(ValueError, match="x.png has pixels of mode I;16, more"):
    source[0]


def test_a_file_that_is_gone_is_broken_but_failing_storage_is_not(
  tmp_path, monkeypatch
):
  for name in ("a/x.png", "b/x.png"):
    _save_image(tmp_path / "train" / name)
  source = open_source(f"folder:{tmp_path}", "train")
  (tmp_path / "train/a/x.png").unlink()
  with pytest.raises(ValueError, match="a/x.png cannot be read .No such file"):
    source[0]

  def fail(path):
    raise OSError(errno.EIO, "Input/output error", str(path))

  monkeypatch.setattr(pathlib.Path, "read_bytes", fail)
  with pytest.raises(OSError, match="Input/output error: .*b/x.png"):
    source[1]


def test_samples_in_memory_are_named_by_their_place(tmp_path):
  assert open_source("digits", "val").name_of(7) == "digits val[7]"
  spec = _save_npz(tmp_path / "data.npz")
  assert open_source(spec, "train").name_of(2) == f"{tmp_path}/data.npz[2]"


TWO = ["train/a/x.png", "train/b/x.png"]


@pytest.mark.parametrize(
  "files, folders, split, message",
  [
    ([], [], "train", "has no train/; put the images in"),
    (TWO, [], "val", "has no val/; put the images in"),
    (["val/a/x.png"], [], "val", "has no train/; put the images in"),
    (["train/x.png"], [], "train", "train holds no class"),
    (["train/a/x.png"], [], "train", "train holds one class, 'a'; a class-con"),
    (["train/a/x.png", "val/b/x.png"], [], "val", "train holds one class, 'a'"),
    (TWO, ["val"], "val", "val holds no class"),
    (TWO, ["train/c"], "train", "train/c holds no image"),
    (TWO, ["val/a"], "val", "val/a holds no image"),
    ([*TWO, "val/c/x.png"], [], "val", "val/c is a class that train/ lacks"),
  ],
)
def test_a_bad_folder_is_refused(tmp_path, files, folders, split, message):
  for name in files:
    _save_image(tmp_path / name)
  for name in folders:
    (tmp_path / name).mkdir(parents=True)
  with pytest.raises(ValueError, match=message):
    open_source(f"folder:{tmp_path}", split)


def test_a_missing_folder_is_refused(tmp_path):
  with pytest.raises(ValueError, match="absent is not a directory"):
    open_source(f"folder:{tmp_path}/absent", "train")
