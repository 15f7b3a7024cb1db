"""Transforms against plain Pillow, and the laws of augmentation."""

import pickle

import numpy as np
import pytest
from PIL import Image

from var_jax.data import transforms


def _noise(height, width, seed=0):
  rng = np.random.default_rng(seed)
  return rng.integers(0, 256, (height, width, 3), dtype=np.uint8)


def _smooth(side):
  """Return an image without high frequencies, for which resampling is mild."""
  small = Image.fromarray(_noise(4, 4))
  return np.asarray(small.resize((side, side), Image.Resampling.BICUBIC))


@pytest.mark.parametrize("height, width", [(50, 80), (80, 50), (36, 39)])
def test_center_crop_is_lanczos_on_the_short_side_then_the_middle(
  height, width
):
  image = _noise(height, width)
  # As in the official code for 32 pixels: short side 36, long side truncated.
  size = (36 * width // min(height, width), 36 * height // min(height, width))
  oracle = Image.fromarray(image).resize(size, Image.Resampling.LANCZOS)
  left, top = (round((n - 32) / 2.0) for n in size)
  oracle = oracle.crop((left, top, left + 32, top + 32))

  cropped = transforms.center_crop(image, (32, 32))

  np.testing.assert_array_equal(cropped, np.asarray(oracle))


@pytest.mark.parametrize("shape", [(32, 32), (16, 40), (40, 16)])
def test_random_crops_are_all_places_of_the_resized_image(shape):
  image = _noise(60, 60)
  side = round(1.125 * max(shape))
  whole = np.asarray(
    Image.fromarray(image).resize((side, side), Image.Resampling.LANCZOS)
  )
  windows = np.lib.stride_tricks.sliding_window_view(whole, (*shape, 3))
  places = {window.tobytes() for window in windows.reshape(-1, *shape, 3)}

  rng = np.random.default_rng(0)
  crops = [transforms.random_crop(image, shape, rng) for _ in range(3000)]

  # At most 250 places, each missed with probability e^-12.
  assert {crop.tobytes() for crop in crops} == places


@pytest.mark.parametrize("shape", [(24, 32), (32, 24), (31, 7)])
@pytest.mark.parametrize("height, width", [(40, 90), (90, 40), (33, 34)])
def test_crops_have_the_shape_asked_for(shape, height, width):
  image = _noise(height, width)
  rng = np.random.default_rng(0)
  assert transforms.center_crop(image, shape).shape == (*shape, 3)
  assert transforms.random_crop(image, shape, rng).shape == (*shape, 3)


@pytest.mark.parametrize("name", transforms.NAMES)
def test_flip_mirrors_half_of_the_images(name):
  ramp = np.tile(np.arange(0, 256, 4, np.uint8)[:, None], (64, 1, 3))
  transform = transforms.make_transform(name, (64, 64), train=True, flip=True)
  rng = np.random.default_rng(0)
  outputs = [transform(ramp, rng).astype(int) for _ in range(400)]
  mirrored = np.mean([image[0, 0, 0] > image[0, -1, 0] for image in outputs])
  assert abs(mirrored - 0.5) < 0.1  # Four standard deviations.


@pytest.mark.parametrize("name", transforms.NAMES)
def test_without_flip_no_image_is_mirrored(name):
  ramp = np.tile(np.arange(0, 256, 4, np.uint8)[:, None], (64, 1, 3))
  transform = transforms.make_transform(name, (64, 64), train=True, flip=False)
  rng = np.random.default_rng(0)
  outputs = [transform(ramp, rng).astype(int) for _ in range(50)]
  assert all(image[0, 0, 0] < image[0, -1, 0] for image in outputs)


def test_jitter_without_limits_is_the_identity():
  image = _noise(32, 32)
  rng = np.random.default_rng(0)
  still = transforms.jitter(image, (32, 32), rng, degrees=0, scale=0, shift=0)
  np.testing.assert_array_equal(still, image)


@pytest.mark.parametrize("seed", range(4))
def test_jitter_turns_as_pillow_rotates(seed):
  image = _smooth(48)
  angle = np.random.default_rng(seed).uniform(-1, 1) * 15
  oracle = Image.fromarray(image).rotate(angle, Image.Resampling.BICUBIC)

  rng = np.random.default_rng(seed)
  turned = transforms.jitter(image, (48, 48), rng, degrees=15, scale=0, shift=0)

  # Pillow fills the corners with black; one level for its rounded sines.
  inner = slice(10, -10)
  difference = np.asarray(oracle, int) - turned
  assert np.abs(difference[inner, inner]).max() <= 1


@pytest.mark.parametrize("seed", range(4))
def test_jitter_zooms_and_moves_as_pillow_reads_a_box(seed):
  image = _smooth(48)
  draw = np.random.default_rng(seed).uniform(-1, 1, 4)
  half, dy, dx = 24 / (1 + draw[1] * 0.2), draw[2] * 3, draw[3] * 3
  top, left = 24 - half - dy * half / 24, 24 - half - dx * half / 24
  box = (left, top, left + 2 * half, top + 2 * half)
  oracle = Image.fromarray(image).transform(
    (48, 48), Image.Transform.EXTENT, box, Image.Resampling.BICUBIC
  )

  rng = np.random.default_rng(seed)
  zoomed = transforms.jitter(
    image, (48, 48), rng, degrees=0, scale=0.2, shift=3
  )

  inner = slice(10, -10)
  difference = np.asarray(oracle, int) - zoomed
  assert np.abs(difference[inner, inner]).max() <= 1


def test_jitter_continues_the_border():
  white = np.full((32, 32, 3), 255, np.uint8)
  rng = np.random.default_rng(0)
  for _ in range(20):
    np.testing.assert_array_equal(transforms.jitter(white, (32, 32), rng), 255)


def test_jitter_brings_other_shapes_to_the_one_asked_for():
  image = _smooth(64)
  rng = np.random.default_rng(0)
  still = transforms.jitter(image, (32, 24), rng, degrees=0, scale=0, shift=0)
  np.testing.assert_array_equal(still, transforms.resize(image, (32, 24)))


def test_resize_is_pillow_bicubic():
  image = _noise(20, 50)
  oracle = Image.fromarray(image).resize((24, 32), Image.Resampling.BICUBIC)
  resized = transforms.resize(image, (32, 24))
  np.testing.assert_array_equal(resized, np.asarray(oracle))


@pytest.mark.parametrize("name", transforms.NAMES)
def test_a_transform_depends_on_its_generator_alone(name):
  transform = transforms.make_transform(name, (16, 16), train=True, flip=True)
  image = _noise(40, 30)
  untouched = image.copy()
  first, second = (
    np.stack([transform(image, np.random.default_rng(i)) for i in range(10)])
    for _ in range(2)
  )
  np.testing.assert_array_equal(first, second)
  np.testing.assert_array_equal(image, untouched)
  assert first.dtype == np.uint8


@pytest.mark.parametrize(
  "name, plain",
  [
    ("crop", transforms.center_crop),
    ("jitter", transforms.resize),
    ("resize", transforms.resize),
  ],
)
def test_evaluation_leaves_nothing_to_chance(name, plain):
  transform = transforms.make_transform(name, (16, 16), train=False, flip=True)
  image = _noise(40, 30)
  np.testing.assert_array_equal(transform(image, None), plain(image, (16, 16)))


def test_an_unknown_transform_is_refused():
  with pytest.raises(
    ValueError, match="'warp' is unknown; use one of crop, jitter, resize"
  ):
    transforms.make_transform("warp", (8, 8), train=True, flip=False)


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("name", transforms.NAMES)
def test_only_a_crop_refuses_images_that_it_would_enlarge(name, train):
  transform = transforms.make_transform(name, (16, 24), train=train, flip=False)
  refused = {
    shape: transform.refusal(_noise(*shape))
    for shape in [(16, 24), (15, 90), (90, 23)]
  }
  assert refused[16, 24] is None
  for (height, width), reason in list(refused.items())[1:]:
    if name == "crop":
      assert f"{height}x{width} pixels is smaller than the crop of" in reason
      assert "16x24; use the transform resize, or remove it" in reason
    else:
      assert reason is None


@pytest.mark.parametrize("name", transforms.NAMES)
def test_a_transform_is_the_same_in_another_process(name):
  transform = transforms.make_transform(name, (16, 16), train=True, flip=True)
  copy = pickle.loads(pickle.dumps(transform))
  image = _noise(40, 30)
  for seed in range(4):
    np.testing.assert_array_equal(
      copy(image, np.random.default_rng(seed)),
      transform(image, np.random.default_rng(seed)),
    )


def test_a_crop_of_tokens_is_drawn_or_the_first():
  tokens_CL = np.arange(12, dtype=np.uint16).reshape(3, 4)
  rng = np.random.default_rng(0)
  drawn = {tuple(transforms.pick_crop(tokens_CL, rng)) for _ in range(60)}
  assert drawn == set(map(tuple, tokens_CL))
  np.testing.assert_array_equal(
    transforms.pick_crop(tokens_CL, None), tokens_CL[0]
  )
