"""One training step of the tokenizer: L2, commitment, living codes.

loss = |image - reconstruction|^2 + quantiser loss (paper eq. 5, without
the perceptual and adversarial terms)
"""

import dataclasses

import jax
import jax.numpy as jnp
import optax

from var_jax.models import quantizer
from var_jax.models.layers import mean_square
from var_jax.models.tokenizer import Tokenizer
from var_jax.training import losses, optim
from var_jax.training.accumulation import mean_over_parts
from var_jax.training.guard import GuardConfig, judge
from var_jax.training.state import TrainState, step_key, to_float_images

REVIVAL = 3  # what the key is for, see var_step

_GUARD = GuardConfig()


@dataclasses.dataclass(frozen=True)
class TokenizerLossConfig:
  """Args:
  quantizer_weight: of the quantiser loss.
  revive_every: steps between looks for dead codes, the first one before the
    first step; 0 never looks.
  revive_below: share of an even use below which a code is dead.
  """

  quantizer_weight: float = 1.0
  revive_every: int = 0
  revive_below: float = 0.03

  def __post_init__(self):
    for name in ("quantizer_weight", "revive_every", "revive_below"):
      if getattr(self, name) < 0:
        raise ValueError(
          f"{name} {getattr(self, name)} is negative; 0 turns it off."
        )


def init_params(tokenizer: Tokenizer, key: jax.Array):
  """Return fresh parameters."""
  image_1HW3 = jnp.zeros((1, *tokenizer.cfg.image_shape, 3))
  return jax.jit(tokenizer.init)(key, image_1HW3)


def make_step(
  tokenizer: Tokenizer,
  optimizer: optax.GradientTransformation,
  cfg: TokenizerLossConfig,
  *,
  ema_decay: float,
  seed: int,
  accumulate: int = 1,
  guard: GuardConfig = _GUARD,
  schedules: optim.Schedules | None = None,
):
  """Return step(state, batch) -> (state, metrics).

  Args:
    accumulate: parts that the batch is taken in, one after another; dead
      codes are looked for in the whole batch.
    schedules: reported as learning_rate and weight_decay.
  """
  scales, V = tokenizer.cfg.schedule, tokenizer.cfg.vocab_size

  def step(state: TrainState, batch):
    before = state
    if cfg.revive_every:
      key = step_key(seed, REVIVAL, state.step)
      image_BHW3 = to_float_images(batch["image"])
      state = jax.lax.cond(
        state.step % cfg.revive_every == 0,
        lambda state: _revive(tokenizer, cfg, state, image_BHW3, key),
        lambda state: state,
        state,
      )

    def gradients(part, number):
      """Return (gradients, metrics, draws of each code) of a part."""
      image_BHW3 = to_float_images(part["image"])

      def loss_fn(params):
        reconstruction_BHW3, quantized = tokenizer.apply(params, image_BHW3)
        l2 = mean_square(reconstruction_BHW3 - image_BHW3)
        loss = l2 + cfg.quantizer_weight * quantized.loss
        return loss, (l2, quantized)

      (loss, (l2, quantized)), grads = jax.value_and_grad(
        loss_fn, has_aux=True
      )(state.params)
      metrics = {
        "loss": loss,
        "l2": l2,
        "quantizer_loss": quantized.loss,
        "residual_energy": _per_scale(quantized.residual_energy_S),
      }
      return grads, metrics, count_codes(quantized.tokens_BL, scales, V)

    grads, metrics, hits_SV = mean_over_parts(gradients, batch, accumulate)
    # VAR: the first count as it is, then a short memory, then a long one.
    decay = jnp.where(state.step < 100, 0.9, 0.99)
    decay = jnp.where(state.step == 0, 0.0, decay)
    hits_SV = optax.incremental_update(
      accumulate * hits_SV, state.code_hits_SV, 1.0 - decay
    )
    after, updates = state.apply_gradients(grads, optimizer, ema_decay)
    after = after.replace(code_hits_SV=hits_SV)
    # A refused step leaves no trace, revived codes included.
    after, health = judge(guard, before, after, metrics["loss"], grads, updates)
    area = batch["image"].shape[0] * scales.grid[0] * scales.grid[1]
    return after, {
      **metrics,
      "psnr": _psnr(metrics["l2"]),
      "code_usage": _per_scale(code_usage(hits_SV, area)),
      **health,
      **optim.rates(schedules, state.step),
    }

  return step


def make_eval_step(tokenizer: Tokenizer):
  """Return eval_step(params, batch) -> sums over samples.

  A batch has "image" uint8 [B, H, W, 3] and "real" [B]: False for what only
  fills the batch. The sums are of l2, quantizer_loss, psnr (each image's, in
  dB) and "count".
  """

  def measure(params, image_HW3):
    reconstruction_1HW3, quantized = tokenizer.apply(params, image_HW3[None])
    l2 = mean_square(reconstruction_1HW3 - image_HW3)
    return {"l2": l2, "quantizer_loss": quantized.loss, "psnr": _psnr(l2)}

  def eval_step(params, batch):
    image_BHW3 = to_float_images(batch["image"])
    of_samples = jax.vmap(measure, in_axes=(None, 0))(params, image_BHW3)
    return losses.sum_of_real(of_samples, batch["real"])

  return eval_step


def _psnr(l2: jax.Array) -> jax.Array:
  """Return dB of a mean square error in [-1, 1]."""
  return 10.0 * jnp.log10(4.0 / l2)


def _per_scale(values_S: jax.Array) -> dict[str, jax.Array]:
  return {str(s): values_S[s] for s in range(values_S.shape[0])}


def count_codes(tokens_BL: jax.Array, scales, vocab_size: int) -> jax.Array:
  """Return how often each scale drew each code, float32 [S, V]."""
  counts = [
    jnp.bincount(
      tokens_BL[:, scales.start(s) : scales.end(s)].ravel(), length=vocab_size
    )
    for s in range(len(scales))
  ]
  return jnp.stack(counts).astype(jnp.float32)


def code_usage(hits_SV: jax.Array, cells: int) -> jax.Array:
  """Return the share of codes in use at each scale, percent [S].

  VAR: a code counts from 8% of an even use of the finest scale on.

  Args:
    cells: latent cells of a batch, B h w.
  """
  enough = cells / hits_SV.shape[1] * 0.08
  return 100.0 * jnp.mean(hits_SV >= enough, axis=1)


def _revive(tokenizer, cfg, state, image_BHW3, key) -> TrainState:
  """Move dead codes onto vectors that this batch asks the codebook for."""
  params = state.params["params"]
  f_BhwZ = tokenizer.apply(state.params, image_BHW3, method="to_latent")
  _, f_hats = tokenizer.apply(state.params, f_BhwZ, method="quantize_latent")
  wanted_BLZ = quantizer.wanted_vectors(f_BhwZ, f_hats, tokenizer.cfg.schedule)
  wanted_MZ = wanted_BLZ.reshape(-1, wanted_BLZ.shape[-1])
  pick_key, noise_key = jax.random.split(key)
  codebook_VZ = params["codebook"]
  picks_VZ = jax.random.choice(
    pick_key, wanted_MZ, codebook_VZ.shape[:1], replace=True
  )
  # Two codes that land on one vector must be able to part.
  spread_Z = 0.01 * jnp.std(wanted_MZ, axis=0)
  picks_VZ += spread_Z * jax.random.normal(noise_key, picks_VZ.shape)
  hits_V = jnp.sum(state.code_hits_SV, axis=0)
  even = jnp.sum(hits_V) / hits_V.shape[0]
  # Before the first step nothing was drawn yet: all codes start from data.
  dead_V = (hits_V < cfg.revive_below * even) | (state.step == 0)
  codebook_VZ = jnp.where(dead_V[:, None], picks_VZ, codebook_VZ)
  revived = {**state.params, "params": {**params, "codebook": codebook_VZ}}
  # Revived codes get an even share, or they would be dead next time too.
  share = jnp.where(even > 0, even / len(tokenizer.cfg.scales), 0.0)
  hits_SV = jnp.where(dead_V, share, state.code_hits_SV)
  return state.replace(params=revived, code_hits_SV=hits_SV)
