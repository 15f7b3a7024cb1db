"""Images to tokens, the next batch on the device while one is put to use."""

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from var_jax.models.tokenizer import Tokenizer, TokenizerConfig
from var_jax.parallel import mesh as mesh_lib
from var_jax.training.state import to_float_images

Encode = Callable[[np.ndarray], jax.Array]


def encoder(cfg: TokenizerConfig, variables, mesh) -> Encode:
  """Return encode(images uint8 [b, C, H, W, 3]) -> tokens uint16 [b, C, L]."""
  tokenizer, by_rows = Tokenizer(cfg), mesh_lib.by_rows(mesh)
  return lambda image_bCHW3: _encode(
    tokenizer, variables, jax.device_put(image_bCHW3, by_rows)
  )


@functools.partial(jax.jit, static_argnums=0)
def _encode(tokenizer: Tokenizer, variables, image_bCHW3: jax.Array):
  b, C, *shape = image_bCHW3.shape
  image_BHW3 = to_float_images(image_bCHW3.reshape(b * C, *shape))
  tokens_BL = tokenizer.apply(variables, image_BHW3, method="encode")
  return tokens_BL.reshape(b, C, -1).astype(jnp.uint16)


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
