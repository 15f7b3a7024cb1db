"""LPIPS against PyTorch's operations, and the package where it is installed."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from var_jax.models import perceptual

RNG = np.random.default_rng(0)
IMAGES = RNG.uniform(-1, 1, (2, 2, 32, 48, 3)).astype("f4")


@functools.cache
def weights():
  """Return random weights that keep features about as large as they were."""
  found = {}
  for name, shape in perceptual.shapes().items():
    if name.startswith("head"):
      found[name] = RNG.uniform(0, 1, shape).astype("f4")
    else:
      fan_in = np.prod(shape[:-1]) if name.endswith("kernel") else 100
      found[name] = RNG.normal(0, np.sqrt(2 / fan_in), shape).astype("f4")
  return found


def reference(weights, x_BHW3, y_BHW3):
  """Return LPIPS as the paper has it, by PyTorch's operations."""
  torch = pytest.importorskip("torch")
  from torch.nn import functional

  def features(image_BHW3):
    x = torch.tensor(image_BHW3.transpose(0, 3, 1, 2))
    mean = torch.tensor([-0.030, -0.088, -0.188]).reshape(1, 3, 1, 1)
    std = torch.tensor([0.458, 0.448, 0.450]).reshape(1, 3, 1, 1)
    x, i = (x - mean) / std, 0
    for block, convs in enumerate((2, 2, 3, 3, 3)):
      x = functional.max_pool2d(x, 2) if block else x
      for _ in range(convs):
        kernel = weights[f"conv{i}_kernel"].transpose(3, 2, 0, 1)
        bias = torch.tensor(weights[f"conv{i}_bias"])
        x = functional.conv2d(x, torch.tensor(kernel), bias, padding=1).relu()
        i += 1
      yield x / (torch.sqrt((x**2).sum(1, keepdim=True)) + 1e-10)

  total = 0.0
  pairs = zip(features(x_BHW3), features(y_BHW3), strict=True)
  for l, (f, g) in enumerate(pairs):
    head = torch.tensor(weights[f"head{l}"]).reshape(1, -1, 1, 1)
    total = total + ((f - g) ** 2 * head).sum(1).mean((1, 2))
  return total.numpy()


def test_the_distance_is_that_of_pytorch():
  expected = reference(weights(), *IMAGES)
  found = jax.jit(perceptual.distance)(weights(), *IMAGES)
  assert found.shape == (2,) and expected.min() > 0.1
  np.testing.assert_allclose(found, expected, rtol=1e-4)


def test_an_image_has_no_distance_from_itself_nor_a_gradient_that_is_nan():
  x_BHW3 = jnp.zeros((1, 16, 16, 3)).at[:, :8].set(0.5)
  # Without biases the flat parts have no features at all.
  plain = {
    name: 0 * value if name.endswith("bias") else value
    for name, value in weights().items()
  }
  distance = jax.jit(
    jax.value_and_grad(lambda x: jnp.sum(perceptual.distance(plain, x, x_BHW3)))
  )
  value, grad = distance(x_BHW3)
  # Squares of what two programs of one image round differently.
  assert abs(value) < 1e-10 and np.all(np.isfinite(grad))
  value, grad = distance(x_BHW3 + 0.01)
  assert value > 0.0 and np.all(np.isfinite(grad)) and np.any(grad)


def test_half_precision_is_near():
  whole = jax.jit(perceptual.distance)(weights(), *IMAGES)
  half = jax.jit(functools.partial(perceptual.distance, dtype=jnp.bfloat16))(
    weights(), *IMAGES
  )
  assert half.dtype == jnp.float32
  np.testing.assert_allclose(half, whole, rtol=0.03)


def test_the_distance_is_that_of_the_lpips_package():
  lpips = pytest.importorskip("lpips")
  torch = pytest.importorskip("torch")
  from var_jax.checkpoints import lpips as lpips_files

  module = lpips.LPIPS(net="vgg", pretrained=False, pnet_rand=True).eval()
  state = {k: v.numpy() for k, v in module.state_dict().items()}
  ours = lpips_files.from_torch(state, "the package")
  x, y = (torch.tensor(image.transpose(0, 3, 1, 2)) for image in IMAGES)
  with torch.no_grad():
    expected = module(x, y).numpy().ravel()
  found = jax.jit(perceptual.distance)(ours, *IMAGES)
  np.testing.assert_allclose(found, expected, rtol=1e-4)
