"""The discriminator's part in a step of the tokenizer."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from var_jax.models.tokenizer import Tokenizer
from var_jax.models.vae import last_kernel_gradient
from var_jax.training import adversary as adversary_lib
from var_jax.training.adversary import Adversary, AdversaryConfig
from var_jax.training.state import TrainState, sample_keys

# What a key is for, see var_step.
AUGMENT_REAL, AUGMENT_FAKE = 5, 6


class Against(NamedTuple):
  """A discriminator in training."""

  cfg: AdversaryConfig
  network: adversary_lib.PatchDiscriminator
  optimizer: optax.GradientTransformation


def init(against: Against, tokenizer: Tokenizer, key) -> Adversary:
  """Return a fresh discriminator."""
  image_1HW3 = jnp.zeros((1, *tokenizer.cfg.image_shape, 3))
  params = jax.jit(against.network.init)(key, image_1HW3)
  zero = jnp.zeros(())
  return Adversary(params, against.optimizer.init(params), zero, zero)


def play(against, seed, part, listened, image_grad, features_BHWZ):
  """Return the image's gradient with D's part, D's gradients, and metrics.

  Args:
    image_grad: of all other losses.
    features_BHWZ: what the decoder's last convolution takes.
  """
  cfg, apply = against.cfg, against.network.apply
  state, image_BHW3, again_BHW3 = listened

  def seen(image_BHW3, use):
    if not cfg.augment:
      return image_BHW3
    keys_B = sample_keys(seed, use, part["position"])
    return adversary_lib.augment(image_BHW3, keys_B)

  def fooled(again_BHW3):
    return -jnp.mean(apply(state.params, seen(again_BHW3, AUGMENT_FAKE)))

  generator_loss, fooled_grad = jax.value_and_grad(fooled)(again_BHW3)
  weight = jnp.float32(cfg.weight)
  if cfg.adaptive:
    weight *= adversary_lib.adaptive_weight(
      last_kernel_gradient(features_BHWZ, image_grad),
      last_kernel_gradient(features_BHWZ, fooled_grad),
    )

  def loss_of(params):
    real_Bij = apply(params, seen(image_BHW3, AUGMENT_REAL))
    fake_Bij = apply(params, seen(again_BHW3, AUGMENT_FAKE))
    loss = adversary_lib.hinge(real_Bij, fake_Bij)
    if cfg.lecam:
      loss += cfg.lecam * adversary_lib.lecam(
        real_Bij, fake_Bij, state.real, state.fake
      )
    return loss, (jnp.mean(real_Bij), jnp.mean(fake_Bij))

  (loss, (real, fake)), grads = jax.value_and_grad(loss_of, has_aux=True)(
    state.params
  )
  return (
    image_grad + weight * fooled_grad,
    grads,
    {
      "adversary_loss": generator_loss,
      "adversary_weight": weight,
      "discriminator_loss": loss,
      "real_logit": real,
      "fake_logit": fake,
    },
  )


def advance(against, state, after, grads, metrics) -> TrainState:
  """Return the state with one step of the discriminator."""
  cfg, old = against.cfg, state.adversary
  updates, opt_state = optax.with_extra_args_support(against.optimizer).update(
    grads, old.opt_state, old.params, step=state.step
  )
  decay = cfg.lecam_decay
  new = Adversary(
    optax.apply_updates(old.params, updates),
    opt_state,
    decay * old.real + (1.0 - decay) * metrics["real_logit"],
    decay * old.fake + (1.0 - decay) * metrics["fake_logit"],
  )
  return after.replace(adversary=new)
