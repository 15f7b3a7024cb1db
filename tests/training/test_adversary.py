"""The discriminator: losses, weights and steps against NumPy."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from var_jax.training import adversary, adversary_step
from var_jax.training.adversary import AdversaryConfig

RNG = np.random.default_rng(0)
REAL, FAKE = RNG.normal(size=(2, 3, 4, 4)).astype("f4") * 2


def relu(x):
  return np.maximum(x, 0.0)


def test_the_hinge_loss_is_that_of_numpy():
  expected = (relu(1 - REAL).mean() + relu(1 + FAKE).mean()) / 2
  np.testing.assert_allclose(adversary.hinge(REAL, FAKE), expected, rtol=1e-6)


def test_lecam_is_that_of_numpy():
  """Official: real against the mean of fakes, and the other way round."""
  expected = np.square(relu(REAL + 0.7)).mean()
  expected += np.square(relu(0.4 - FAKE)).mean()
  found = adversary.lecam(REAL, FAKE, 0.4, -0.7)
  np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_the_adaptive_weight_is_a_ratio_of_norms_in_bounds():
  a, b = RNG.normal(size=(2, 3, 3, 8, 3)).astype("f4")
  expected = np.linalg.norm(a) / (np.linalg.norm(b) + 1e-4)
  found = adversary.adaptive_weight(a, b)
  np.testing.assert_allclose(found, expected, rtol=1e-6)
  assert adversary.adaptive_weight(a, 0 * b) == 1e4
  assert adversary.adaptive_weight(0 * a, b) == 0


IMAGES = RNG.uniform(-1, 1, size=(6, 16, 24, 3)).astype("f4")
KEYS = jax.random.split(jax.random.key(0), 6)


def test_an_image_is_augmented_by_its_own_key():
  together = adversary.augment(IMAGES, KEYS)
  alone = adversary.augment(IMAGES[2:3], KEYS[2:3])
  np.testing.assert_allclose(together[2:3], alone, atol=1e-6)
  others = adversary.augment(IMAGES, KEYS[::-1])
  assert np.abs(together - others).max() > 0.1


def test_augmentation_shifts_cuts_a_hole_and_changes_colours():
  holes, shifts, values = set(), set(), []
  ones = np.ones((200, 16, 24, 3), np.float32)
  keys = jax.random.split(jax.random.key(1), 200)
  for image_HW3 in np.asarray(adversary.augment(ones, keys)):
    kept_HW = np.any(image_HW3 != 0, axis=-1)
    level = image_HW3[kept_HW]
    # Of a single colour stays a single colour: 1 + brightness.
    assert level.std() < 1e-6
    values.append(level.mean())
    rows_H, cols_W = kept_HW.any(axis=1), kept_HW.any(axis=0)
    shifts.add((int(np.argmax(rows_H)), int(np.argmax(cols_W))))
    inner = kept_HW[np.ix_(rows_H, cols_W)]
    holes.add(int((~inner).sum()))
  assert min(values) < 0.6 and max(values) > 1.4
  # An eighth of a side comes in from outside, at most; half of it is cut out.
  assert max(y for y, _ in shifts) == 2 and max(x for _, x in shifts) == 3
  assert max(holes) == 8 * 12


def test_gradients_go_through_the_augmentation():
  """It is linear in the image, up to constants."""

  def total(image_BHW3):
    weights = np.linspace(-1, 1, 24)[:, None]
    return jnp.sum(adversary.augment(image_BHW3, KEYS) * weights)

  direction = RNG.normal(size=IMAGES.shape).astype("f4")
  grad = jax.grad(total)(jnp.asarray(IMAGES))
  expected = total(IMAGES + direction) - total(jnp.asarray(IMAGES))
  np.testing.assert_allclose(jnp.sum(grad * direction), expected, rtol=1e-3)


@pytest.mark.parametrize("side, layers, patches", [(64, 3, 8), (32, 2, 8)])
def test_a_patch_has_a_logit(side, layers, patches):
  cfg = AdversaryConfig(weight=1.0, channels=8, layers=layers, norm_groups=4)
  network = adversary.make_discriminator(cfg, "bfloat16")
  image = jax.ShapeDtypeStruct((2, side, side, 3), jnp.float32)
  logits, variables = jax.eval_shape(
    lambda image: network.init_with_output(jax.random.key(0), image), image
  )
  assert logits.shape == (2, patches, patches)
  assert logits.dtype == jnp.float32
  widths = [8 * min(2**i, 8) for i in range(layers + 1)]
  for i, name in enumerate(
    ["patch_in", *map("patch_conv_{}".format, range(1, layers + 1))]
  ):
    assert variables["params"][name]["kernel"].shape[-1] == widths[i]


FEATURES = RNG.normal(size=(5, 4, 4, 6)).astype("f4")


def last_kernel_gradient(grad_BHW3):
  """Return it in float64, tap by tap."""
  padded = np.pad(np.float64(FEATURES), ((0, 0), (1, 1), (1, 1), (0, 0)))
  taps = [
    np.einsum("bhwz,bhwc->zc", padded[:, i : i + 4, j : j + 4], grad_BHW3)
    for i in range(3)
    for j in range(3)
  ]
  return np.stack(taps).reshape(3, 3, 6, 3)


class Linear:
  """A discriminator that NumPy can train: a weight a pixel, one logit."""

  @staticmethod
  def apply(params, image_BHW3):
    logits_B = jnp.einsum("bhwc,hwc->b", image_BHW3, params["w"])
    return logits_B + params["b"]


def against(**fields):
  cfg = AdversaryConfig(weight=0.5, augment=False, **fields)
  return adversary_step.Against(cfg, Linear, optax.sgd(0.1))


def played(cfg, real_BHW3, fake_BHW3, params, image_grad):
  """Take the discriminator's part; return (image's gradient, new, metrics)."""
  state = types.SimpleNamespace(
    adversary=adversary.Adversary(
      params, cfg.optimizer.init(params), jnp.float32(0.3), jnp.float32(-0.2)
    ),
    step=jnp.int32(7),
  )

  grad, grads, metrics = adversary_step.play(
    cfg, 0, {}, (state.adversary, real_BHW3, fake_BHW3),
    image_grad, FEATURES,
  )  # fmt: skip
  after = types.SimpleNamespace(replace=lambda **fields: fields)
  new = adversary_step.advance(cfg, state, after, grads, metrics)["adversary"]
  return grad, new, metrics


def test_one_step_of_the_discriminator_is_that_of_numpy():
  real, fake = RNG.normal(size=(2, 5, 4, 4, 3)).astype("f4")
  w, b = RNG.normal(size=(4, 4, 3)).astype("f4"), np.float32(0.1)
  image_grad = RNG.normal(size=real.shape).astype("f4")
  cfg = against(lecam=0.2, lecam_decay=0.9)
  found = played(cfg, real, fake, {"w": w, "b": b}, jnp.asarray(image_grad))
  grad, new, metrics = found

  real_B = np.einsum("bhwc,hwc->b", real, w) + b
  fake_B = np.einsum("bhwc,hwc->b", fake, w) + b
  # Hinge, halved, and LeCAM with means 0.3 of real and -0.2 of fake.
  dreal_B = (-0.5 * (real_B < 1) + 0.2 * 2 * relu(real_B + 0.2)) / 5
  dfake_B = (0.5 * (fake_B > -1) - 0.2 * 2 * relu(0.3 - fake_B)) / 5
  dw = np.einsum("b,bhwc->hwc", dreal_B, real)
  dw += np.einsum("b,bhwc->hwc", dfake_B, fake)
  np.testing.assert_allclose(new.params["w"], w - 0.1 * dw, atol=1e-5)
  db = dreal_B.sum() + dfake_B.sum()
  np.testing.assert_allclose(new.params["b"], b - 0.1 * db, atol=1e-5)
  np.testing.assert_allclose(
    new.real, 0.9 * 0.3 + 0.1 * real_B.mean(), rtol=1e-5
  )
  np.testing.assert_allclose(
    new.fake, 0.9 * -0.2 + 0.1 * fake_B.mean(), rtol=1e-5
  )

  fooled = np.broadcast_to(-w / 5, real.shape)
  last = [np.linalg.norm(last_kernel_gradient(x)) for x in (image_grad, fooled)]
  weight = 0.5 * last[0] / (last[1] + 1e-4)
  np.testing.assert_allclose(metrics["adversary_weight"], weight, rtol=1e-5)
  np.testing.assert_allclose(grad, image_grad + weight * fooled, atol=1e-5)
  np.testing.assert_allclose(
    metrics["adversary_loss"], -fake_B.mean(), rtol=1e-4
  )


@pytest.mark.parametrize(
  "fields, message",
  [
    (dict(weight=-1.0), r"weight -1.0 is not in \[0, inf\)"),
    (dict(start=-1), r"start -1 is below 0; 0 is from"),
    (dict(lecam=-0.1), r"lecam -0.1 is not in \[0, inf\)"),
    (dict(weight=float("inf")), r"weight inf is not in \[0, inf\)"),
    (dict(lecam_decay=1.0), "lecam_decay 1.0 is not in"),
    (dict(layers=0), "layers 0 is below 1"),
    (dict(channels=48), "channels 48 do not split into 32 groups"),
  ],
)
def test_what_makes_no_sense_is_refused(fields, message):
  with pytest.raises(ValueError, match=message):
    AdversaryConfig(**fields)
