"""A small classifier of a dataset, whose features measure images like its own.

For data that Inception has never seen the like of, and where nothing can be
downloaded. What it gives has names of its own and never is FID: it can be
compared only among receipts that used the same folder.
"""

import functools
from collections.abc import Mapping
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from etils import epath
from flax.traverse_util import flatten_dict, unflatten_dict

from var_jax.checkpoints import network_weights
from var_jax.evaluation.inception import Features
from var_jax.models.layers import HIGHEST

WIDTH = 128  # of its features
_EPOCHS, _BATCH, _RATE = 6, 128, 2e-3
_LEAST_STEPS = 500  # a small dataset is seen more often
_AT_ONCE = 1000  # images
_NAME = "classifier"


class Network(nn.Module):
  """Three convolutions on blocks of 2x2 pixels, and two layers.

  In full float32 everywhere, so that numbers do not depend on the device.
  """

  num_classes: int

  @nn.compact
  def __call__(self, x_BHWZ: jax.Array, key: jax.Array | None = None):
    """Return features [B, D] and logits [B, C]; with a key, of training."""
    B, H, W, Z = x_BHWZ.shape
    # Pixels of a block become channels: pooling is slow on CPU.
    x = x_BHWZ.reshape(B, H // 2, 2, W // 2, 2, Z).transpose(0, 1, 3, 2, 4, 5)
    x = x.reshape(B, H // 2, W // 2, 4 * Z)
    for features, stride in ((32, 1), (64, 2), (128, 2)):
      x = nn.relu(nn.Conv(features, (3, 3), stride, precision=HIGHEST)(x))
    x = x.reshape(B, -1)
    features_BD = nn.relu(nn.Dense(WIDTH, precision=HIGHEST)(x))
    x = nn.Dropout(0.4)(features_BD, deterministic=key is None, rng=key)
    return features_BD, nn.Dense(self.num_classes, precision=HIGHEST)(x)


class Classifier(NamedTuple):
  network: Network
  params: Mapping

  def logits(self, pixels_BHWZ: np.ndarray) -> np.ndarray:
    """Return those of any number of uint8 images, [B, C]."""
    parts = range(0, len(pixels_BHWZ), _AT_ONCE)
    return np.concatenate(
      [
        _apply(self.network, self.params, pixels_BHWZ[i : i + _AT_ONCE])[1]
        for i in parts
      ]
    )


@functools.partial(jax.jit, static_argnums=0)
def _apply(network, params, pixels_BHWZ):
  return network.apply(params, _scaled(pixels_BHWZ))


def _scaled(pixels_BHWZ):
  return pixels_BHWZ.astype(jnp.float32) / 127.5 - 1.0


def fit(pixels_BHWZ: np.ndarray, labels_B: np.ndarray) -> Classifier:
  """Return a classifier of uint8 images with 1 or 3 channels.

  Raises:
    ValueError: there are too few images, or their sides are odd.
  """
  B, H, W = pixels_BHWZ.shape[:3]
  if B < _BATCH or H % 2 or W % 2:
    raise ValueError(
      f"{B} images of {H}x{W}: the classifier needs {_BATCH} or more, with "
      "even sides; give it such."
    )
  network = Network(int(labels_B.max()) + 1)
  steps_an_epoch = B // _BATCH
  epochs = max(_EPOCHS, -(-_LEAST_STEPS // steps_an_epoch))
  optimizer = optax.adamw(
    optax.cosine_onecycle_schedule(epochs * steps_an_epoch, _RATE)
  )
  params = jax.jit(network.init)(
    jax.random.key(0), np.zeros((1, *pixels_BHWZ.shape[1:]), np.float32)
  )

  @functools.partial(jax.jit, donate_argnums=(0, 1))
  def step(params, opt_state, pixels_BHWZ, labels_B, key):
    def loss_fn(params):
      _, logits_BC = network.apply(params, _scaled(pixels_BHWZ), key)
      return jnp.mean(
        optax.softmax_cross_entropy_with_integer_labels(logits_BC, labels_B)
      )

    grads = jax.grad(loss_fn)(params)
    updates, opt_state = optimizer.update(grads, opt_state, params)
    return optax.apply_updates(params, updates), opt_state

  rng, opt_state = np.random.default_rng(0), optimizer.init(params)
  for epoch in range(epochs):
    order = rng.permutation(B)
    for k in range(steps_an_epoch):
      rows = order[k * _BATCH : (k + 1) * _BATCH]
      key = jax.random.fold_in(jax.random.key(1), epoch * steps_an_epoch + k)
      params, opt_state = step(
        params, opt_state, pixels_BHWZ[rows], labels_B[rows], key
      )
  return Classifier(network, params)


def write(
  output: epath.PathLike,
  pixels_BHW3: np.ndarray,
  labels_B: np.ndarray,
  name: str,
) -> float:
  """Fit to nine tenths of a dataset and write a folder for `read`.

  Args:
    name: of the dataset.

  Returns:
    Its accuracy on the other tenth.
  """
  order = np.random.default_rng(0).permutation(len(labels_B))
  unseen, seen = np.split(order, [len(order) // 10])
  made = fit(pixels_BHW3[seen], labels_B[seen])
  found_B = made.logits(pixels_BHW3[unseen]).argmax(axis=1)
  accuracy = float(np.mean(found_B == labels_B[unseen]))
  about = {
    "data": name,
    "images": len(seen),
    "shape": list(pixels_BHW3.shape[1:]),
    "classes": made.network.num_classes,
    "held_out_accuracy": accuracy,
  }
  weights = flatten_dict(jax.device_get(made.params["params"]), sep="/")
  network_weights.write(output, _NAME, weights, about)
  return accuracy


def shapes(about: Mapping) -> dict[str, tuple[int, ...]]:
  """Return the shapes of the weights that `write` told of."""
  like = jax.eval_shape(
    Network(about["classes"]).init,
    jax.random.key(0),
    jnp.zeros((1, *about["shape"])),
  )
  flat = flatten_dict(like["params"], sep="/")
  return {name: x.shape for name, x in flat.items()}


def read(folder: epath.PathLike) -> tuple[dict, dict[str, np.ndarray]]:
  """Return what was told of a classifier, and its weights.

  Raises:
    ValueError: `write` did not write this folder, or it is damaged.
  """
  network_weights.check(folder, _NAME)
  about = network_weights.about(folder, _NAME)
  return about, network_weights.read(folder, _NAME, shapes(about))


def features(
  num_classes: int, weights: Mapping[str, jax.Array], pixels_BHW3: jax.Array
) -> Features:
  """Return what the network sees in uint8 images of its size."""
  params = {"params": unflatten_dict(weights, sep="/")}
  network = Network(num_classes)
  pooled_BD, logits_BC = network.apply(params, _scaled(pixels_BHW3))
  return Features(pooled_BD, None, jax.nn.softmax(logits_BC))
