"""Pictures that a run shows of itself, always of the same draws or images."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from var_jax import images
from var_jax.generation import sampler
from var_jax.models.tokenizer import Tokenizer
from var_jax.parallel import mesh as mesh_lib
from var_jax.parallel import multihost

# As the published FID is drawn; a vocabulary may be smaller.
TOP_K, TOP_P, GUIDANCE = 900, 0.96, 1.5


def samples(
  models: sampler.Models,
  params: sampler.ModelParams,
  columns: int,
  mesh: jax.sharding.Mesh,
) -> dict[str, np.ndarray]:
  """Return {"samples": two rows of classes, "scales": one growing a row}.

  Args:
    mesh: that the parameters are on; its context is in `models`.
  """
  cfg = models.var.cfg
  labels_B = np.linspace(0, cfg.num_classes - 1, columns).round()
  labels_B = labels_B.astype(np.int32)
  spread = functools.partial(mesh_lib.spread, mesh)
  options = sampler.Options(GUIDANCE, min(TOP_K, cfg.vocab_size), TOP_P)
  rows = []
  for seed in range(2):
    keys_B = sampler.image_keys(jax.random.key(seed), columns)
    stages = [
      _pixels(sampler.decode(models, params, drawn.f_hat_BhwZ), columns)
      for drawn in sampler.draw_scales(
        models=models,
        params=params,
        labels_B=spread(labels_B),
        keys_B=spread(keys_B),
        options=options,
        guided=True,
        smooth=False,
      )
    ]
    rows.append(stages)
  names = [str(label) for label in labels_B]
  drawn = [list(stages[-1]) for stages in rows]
  growing = [list(image) for image in np.stack(rows[0], axis=1)]
  return {
    "samples": images.grid(drawn),
    "scales": images.grid(growing, names),
  }


def reconstructions(
  tokenizer: Tokenizer,
  params,
  pixels_BHW3: np.ndarray,
  mesh: jax.sharding.Mesh,
) -> dict[str, np.ndarray]:
  """Return {"reconstructions": images, and what each scale makes of them}.

  A row a scale, coarse to fine; the last is the whole reconstruction.
  """
  image_BHW3 = mesh_lib.spread(mesh, images.to_float(pixels_BHW3))
  again_SBHW3 = after_each_scale(tokenizer, params, image_BHW3)
  rows = [list(pixels_BHW3)]
  rows += [list(_pixels(x, len(pixels_BHW3))) for x in again_SBHW3]
  names = [f"{i}x{j}" for i, j in tokenizer.cfg.schedule.shapes]
  return {"reconstructions": images.grid(rows, ("real", *names))}


def _pixels(image_BHW3: jax.Array, count: int) -> np.ndarray:
  """Return the first images, without what filled up the batch."""
  return images.to_uint8(multihost.gathered(image_BHW3)[:count])


@functools.partial(jax.jit, static_argnums=0)
def after_each_scale(tokenizer, params, image_BHW3) -> list[jax.Array]:
  """Return the image after each scale."""
  tokens_BL = tokenizer.apply(params, image_BHW3, method="encode")
  f_hats = tokenizer.apply(params, tokens_BL, method="accumulate")
  # One after another: the memory is that of one, and so is the program.
  again_SBHW3 = jax.lax.map(
    lambda f_BhwZ: tokenizer.apply(params, f_BhwZ, method="to_image"),
    jnp.stack(f_hats),
  )
  return list(again_SBHW3)
