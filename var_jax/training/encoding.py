"""Images to tokens, the next batch on the device while one is put to use."""

from collections.abc import Callable, Iterable, Iterator, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from var_jax.models.tokenizer import Tokenizer, TokenizerConfig
from var_jax.parallel import mesh as mesh_lib
from var_jax.parallel import rules
from var_jax.training.state import to_float_images

Encode = Callable[[np.ndarray], jax.Array]


def encoder(cfg: TokenizerConfig, variables, mesh) -> Encode:
  """Return encode(images uint8 [b, C, H, W, 3]) -> tokens uint16 [b, C, L]."""
  tokenizer, split = Tokenizer(cfg), mesh_lib.by_rows(mesh)

  def encode(variables, image_bCHW3: jax.Array):
    b, C, *shape = image_bCHW3.shape
    image_BHW3 = to_float_images(image_bCHW3.reshape(b * C, *shape))
    tokens_BL = tokenizer.apply(variables, image_BHW3, method="encode")
    return tokens_BL.reshape(b, C, -1).astype(jnp.uint16)

  program = rules.Jit(
    mesh,
    encode,
    in_shardings=(mesh_lib.replicated(mesh), split),
    out_shardings=split,
  )
  return lambda image_bCHW3: program(
    variables, jax.device_put(image_bCHW3, split)
  )


def encoded(
  batches: Iterable[Mapping], encode: Encode
) -> Iterator[tuple[Mapping, np.ndarray]]:
  """Yield (batch, tokens [b, C, L]), the next one on the device meanwhile."""
  ahead = None
  for batch in batches:
    tokens_bCL = encode(batch["image"])
    if ahead:
      yield ahead[0], np.asarray(ahead[1])
    ahead = batch, tokens_bCL
  if ahead:
    yield ahead[0], np.asarray(ahead[1])
