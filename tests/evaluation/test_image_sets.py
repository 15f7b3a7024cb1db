"""Images of folders and archives, a batch at a time."""

import hashlib
import tracemalloc

import numpy as np
import pytest
from PIL import Image

from var_jax.evaluation import image_sets

PIXELS = np.random.default_rng(0).integers(0, 256, (7, 4, 6, 3), np.uint8)


def all_of(found, size=3):
  batches = list(found.batches(size))
  assert [len(batch) for batch in batches] == [3, 3, 1]
  return np.concatenate(batches)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("name", ["arr_0", "images"])
def test_an_archive_is_read_in_batches(save, name, tmp_path):
  save(tmp_path / "a.npz", **{name: PIXELS, "labels": np.arange(7)})
  found = image_sets.open_set(str(tmp_path / "a.npz"))
  assert (found.count, found.shape) == (7, (4, 6, 3))
  np.testing.assert_array_equal(all_of(found), PIXELS)
  digest = hashlib.sha256((tmp_path / "a.npz").read_bytes()).hexdigest()
  assert found.sha256 == digest and not found.lossy


def test_grey_images_have_three_equal_channels(tmp_path):
  np.savez(tmp_path / "a.npz", PIXELS[..., 0])
  found = all_of(image_sets.open_set(str(tmp_path / "a.npz")))
  np.testing.assert_array_equal(found, np.repeat(PIXELS[..., :1], 3, -1))


def test_a_folder_is_read_in_the_order_of_names(tmp_path):
  for i, pixels in enumerate(PIXELS):
    folder = tmp_path / f"class{i % 2}"
    folder.mkdir(exist_ok=True)
    Image.fromarray(pixels).save(folder / f"{i}.png")
  (tmp_path / "notes.txt").write_text("no image")
  found = image_sets.open_set(str(tmp_path))
  order = [0, 2, 4, 6, 1, 3, 5]
  np.testing.assert_array_equal(all_of(found), PIXELS[order])
  assert not found.lossy
  before = found.sha256
  Image.fromarray(PIXELS[0]).save(tmp_path / "class1" / "5.png")
  changed = image_sets.open_set(str(tmp_path))
  assert changed.sha256 != before
  Image.fromarray(PIXELS[0]).save(tmp_path / "z.jpg")
  assert image_sets.open_set(str(tmp_path)).lossy


def test_an_archive_is_never_in_memory_as_a_whole(tmp_path):
  np.savez(tmp_path / "a.npz", np.zeros((400, 100, 100, 3), np.uint8))
  tracemalloc.start()
  found = image_sets.open_set(str(tmp_path / "a.npz"))
  assert sum(len(batch) for batch in found.batches(10)) == 400
  _, peak = tracemalloc.get_traced_memory()
  tracemalloc.stop()
  assert peak < 3e6  # of 12 MB; a batch has 0.3


@pytest.mark.parametrize(
  "arrays, message",
  [
    ({"arr_0": PIXELS / 255.0}, "arr_0 is float64 .* give uint8"),
    ({"arr_0": PIXELS[..., :2]}, "give uint8"),
    ({"arr_0": PIXELS[0, 0]}, "give uint8"),
    ({"arr_0": PIXELS[:0]}, "give some images"),
    ({"arr_0": np.asfortranarray(PIXELS)}, "Fortran's order"),
    ({"mu": np.zeros(3)}, "has arrays mu; images are to be in arr_0"),
  ],
)
def test_other_archives_are_refused(arrays, message, tmp_path):
  np.savez(tmp_path / "a.npz", **arrays)
  with pytest.raises(ValueError, match=message):
    image_sets.open_set(str(tmp_path / "a.npz"))


def test_what_is_broken_or_missing_is_named(tmp_path):
  with pytest.raises(ValueError, match="none does not exist; give a folder"):
    image_sets.open_set(str(tmp_path / "none"))
  with pytest.raises(ValueError, match="has no images; give one with .png"):
    image_sets.open_set(str(tmp_path))
  (tmp_path / "a.npz").write_bytes(b"no zip")
  with pytest.raises(ValueError, match="a.npz cannot be read"):
    image_sets.open_set(str(tmp_path / "a.npz"))
  Image.fromarray(PIXELS[0]).save(tmp_path / "0.png")
  Image.fromarray(PIXELS[0, :2]).save(tmp_path / "1.png")
  found = image_sets.open_set(str(tmp_path))
  with pytest.raises(ValueError, match=r"1.png has shape \(2, 6, 3\), others"):
    list(found.batches(2))
  (tmp_path / "1.png").write_bytes(b"no image")
  with pytest.raises(ValueError, match="1.png cannot be read"):
    list(image_sets.open_set(str(tmp_path)).batches(2))


def test_deep_pictures_are_refused(tmp_path):
  deep = np.full((4, 4), 40_000, np.uint16)
  Image.fromarray(deep).save(tmp_path / "deep.png")
  with pytest.raises(ValueError, match="more than 8 bits a channel"):
    image_sets.open_set(str(tmp_path))
