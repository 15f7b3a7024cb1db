"""A step of a tokenizer with all its losses, against gradients of their sum."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny_models

from var_jax.models import perceptual
from var_jax.models.tokenizer import Tokenizer
from var_jax.training import adversary, adversary_step, tokenizer_step
from var_jax.training.adversary import AdversaryConfig
from var_jax.training.state import TrainState, sample_keys

RNG = np.random.default_rng(0)

CFG = tiny_models.tokenizer_config((1, 8))
TOKENIZER = Tokenizer(CFG)
WEIGHTS = dict(
  l2_weight=0.7, l1_weight=0.5, quantizer_weight=2.0, lpips_weight=0.2
)


@functools.cache
def real_step(accumulate=1, adaptive=True):
  """Return (step, state); both optimisers are SGD at a rate of 1."""
  played = AdversaryConfig(
    weight=0.3,
    adaptive=adaptive,
    channels=4,
    layers=1,
    norm_groups=2,
    lecam=0.1,
  )
  cfg = adversary_step.Against(
    played, adversary.make_discriminator(played, "float32"), optax.sgd(1.0)
  )
  step = tokenizer_step.make_step(
    TOKENIZER,
    optax.sgd(1.0),
    tokenizer_step.TokenizerLossConfig(**WEIGHTS),
    ema_decay=0.0,
    seed=0,
    accumulate=accumulate,
    against=cfg,
  )
  params = tokenizer_step.init_params(TOKENIZER, jax.random.key(0, impl="rbg"))
  state = TrainState.create(
    params,
    optax.sgd(1.0),
    use_ema=False,
    code_hits_SV=jnp.zeros((2, 16)),
    explained_S=jnp.ones(2),
    grace_V=jnp.zeros(16),
    rate=jnp.ones(()),
    adversary=adversary_step.init(cfg, TOKENIZER, jax.random.key(3)),
  )
  quick = {"xla_backend_optimization_level": 0}
  return jax.jit(step, compiler_options=quick), state


@functools.cache
def frozen():
  rng = np.random.default_rng(1)
  found = {}
  for name, shape in perceptual.shapes().items():
    scale = np.sqrt(2 / np.prod(shape[:-1])) if len(shape) == 4 else 0.1
    found[name] = (scale * rng.normal(size=shape)).astype("f4")
  return {"lpips": found}


def batch():
  images = np.random.default_rng(2).integers(0, 256, (4, 16, 16, 3), np.uint8)
  return {"image": images, "position": np.arange(4, dtype=np.uint32)}


@pytest.mark.parametrize("adaptive", [True, False])
def test_the_step_follows_the_gradient_of_one_sum_of_losses(adaptive):
  """SGD at a rate of 1 moves parameters by the gradient of what is written."""
  step, state = real_step(adaptive=adaptive)
  shown = batch()
  after, metrics = step(state, frozen(), shown)
  image_BHW3 = jnp.asarray(shown["image"] / 127.5 - 1.0, jnp.float32)
  network = adversary.PatchDiscriminator(norm_groups=2, channels=4, layers=1)
  keys_B = sample_keys(0, adversary_step.AUGMENT_FAKE, shown["position"])

  def losses(params):
    again_BHW3, quantized = TOKENIZER.apply(params, image_BHW3)
    apart = again_BHW3 - image_BHW3
    lpips = jnp.mean(
      perceptual.distance(frozen()["lpips"], again_BHW3, image_BHW3)
    )
    rest = 0.7 * jnp.mean(apart**2) + 0.5 * jnp.mean(jnp.abs(apart))
    seen = adversary.augment(again_BHW3, keys_B)
    fooled = -jnp.mean(network.apply(state.adversary.params, seen))
    return rest + 0.2 * lpips, fooled, 2.0 * quantized.loss

  def gradient(weights):
    def total(params):
      return sum(w * x for w, x in zip(weights, losses(params), strict=True))

    quick = {"xla_backend_optimization_level": 0}
    return jax.jit(jax.grad(total), compiler_options=quick)(state.params)

  weight = 0.3
  if adaptive:
    last = [
      np.linalg.norm(
        gradient(weights)["params"]["decoder"]["conv_out"]["kernel"]
      )
      for weights in ((1.0, 0.0, 0.0), (0.0, 1.0, 0.0))
    ]
    weight *= last[0] / (last[1] + 1e-4)
  np.testing.assert_allclose(metrics["adversary_weight"], weight, rtol=1e-4)

  grads = gradient((1.0, weight, 1.0))
  largest = max(np.abs(g).max() for g in jax.tree.leaves(grads))
  jax.tree.map(
    lambda old, new, g: np.testing.assert_allclose(
      old - new, g, atol=1e-5 * largest
    ),
    state.params, after.params, grads,
  )  # fmt: skip
  rest, _, quantizer_loss = losses(state.params)
  np.testing.assert_allclose(metrics["loss"], rest + quantizer_loss, rtol=1e-5)


def test_a_step_that_is_refused_leaves_the_discriminator_as_it_was():
  step, state = real_step()
  broken = jax.tree.map(jnp.copy, state.adversary.params)
  broken["params"]["patch_out"]["bias"] *= jnp.nan
  state = state.replace(adversary=state.adversary.replace(params=broken))
  after, metrics = step(state, frozen(), batch())
  assert metrics["skipped"] == 1.0
  jax.tree.map(
    np.testing.assert_array_equal, after, state.replace(step=jnp.int32(1))
  )


def test_parts_of_a_batch_train_the_discriminator_on_all_of_it():
  shown = batch()
  step, state = real_step(adaptive=False)
  whole, _ = step(state, frozen(), shown)
  step, state = real_step(accumulate=2, adaptive=False)
  parts, _ = step(state, frozen(), shown)
  # Each part has a mean of its own, so the means are those of the whole.
  old, new, other = (
    jax.tree.leaves(x.adversary) for x in (state, whole, parts)
  )
  for before, a, b in zip(old, new, other, strict=True):
    assert np.any(a != before)
    np.testing.assert_allclose(a, b, atol=1e-5)
