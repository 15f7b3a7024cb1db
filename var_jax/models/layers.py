"""Numerics of the transformer as free functions of arrays.

Norms and softmax are float32 whatever comes in; the caller casts back.
"""

import re
from typing import Any

import jax
import jax.numpy as jnp

HIGHEST = jax.lax.Precision.HIGHEST

# Parameters that meet nothing but a product in `dtype`: nn.Dense and nn.Conv
# would cast them at each use. The encoder and all norms stay float32.
_ONLY_MULTIPLIED = re.compile(
  r"(blocks/(attn|ffn)/\w+|(shared_|head_)?ada/linear"
  r"|decoder/(?!.*norm)[\w/]+)/(kernel|bias)"
)


def matmul_precision(dtype) -> jax.lax.Precision | None:
  """Return the precision that makes `dtype` mean what it says on TPU.

  float32 dots default to bfloat16 passes there; bfloat16 needs no help.
  """
  return HIGHEST if jnp.dtype(dtype) == jnp.float32 else None


def resolve_dtype(dtype, platform: str | None = None) -> str:
  """Return the name of the dtype of matmul inputs.

  Args:
    dtype: float32 or bfloat16, by name or as JAX has them; "auto" and None
      leave it to the platform.
    platform: by default that of the first device.
  """
  if dtype is None or dtype == "auto":
    platform = platform or jax.default_backend()
    return "float32" if platform == "cpu" else "bfloat16"
  try:
    name = jnp.dtype(dtype).name
  except TypeError:
    name = None
  if name not in ("float32", "bfloat16"):
    raise ValueError(
      f"dtype {dtype!r} is not known; use auto, float32 or bfloat16."
    )
  return name


def held_dtype(path: str, dtype: Any, matmul: str) -> Any:
  """Return the dtype that a parameter is held in, to be drawn with.

  Args:
    path: of the parameter, as in blocks/attn/proj/kernel.
    matmul: dtype of matmul inputs.
  """
  return matmul if _ONLY_MULTIPLIED.fullmatch(path) else dtype


def mean_square(x_BhwZ: jax.Array) -> jax.Array:
  """Return the mean of squares: of each row, then of these.

  One float32 sum over a batch loses digits, and others on each mesh.
  """
  of_rows_B = jnp.mean(jnp.square(x_BhwZ), axis=tuple(range(1, x_BhwZ.ndim)))
  return jnp.mean(of_rows_B)


def layer_norm(x_BlD: jax.Array, eps: float) -> jax.Array:
  """Normalise over D in float32, without scale and shift of its own."""
  x_BlD = x_BlD.astype(jnp.float32)
  mean_Bl1 = jnp.mean(x_BlD, axis=-1, keepdims=True)
  centred_BlD = x_BlD - mean_Bl1
  variance_Bl1 = jnp.mean(jnp.square(centred_BlD), axis=-1, keepdims=True)
  return centred_BlD * jax.lax.rsqrt(variance_Bl1 + eps)


def modulate(
  x_BlD: jax.Array, scale_B1D: jax.Array, shift_B1D: jax.Array
) -> jax.Array:
  """Return x (1 + scale) + shift, the affine part of AdaLN."""
  return x_BlD * (1.0 + scale_B1D) + shift_B1D


def l2_normalize(x_BlNK: jax.Array, eps: float = 1e-12) -> jax.Array:
  """Scale each head's vector to length one, in float32."""
  x_BlNK = x_BlNK.astype(jnp.float32)
  square_BlN1 = jnp.sum(jnp.square(x_BlNK), axis=-1, keepdims=True)
  # The maximum sits under the root, so that a zero vector has a gradient.
  return x_BlNK * jax.lax.rsqrt(jnp.maximum(square_BlN1, eps * eps))


def attend(
  q_BlNK: jax.Array,
  k_BTNK: jax.Array,
  v_BTNK: jax.Array,
  mask_lT: jax.Array | None,
) -> jax.Array:
  """Return softmax(q k^T) v, [B, l, N, K]; q comes already scaled.

  Args:
    mask_lT: bool, True where l may see T; None where all is visible.
  """
  logits_BNlT = _scores(q_BlNK, k_BTNK)
  if mask_lT is not None:
    logits_BNlT = jnp.where(mask_lT, logits_BNlT, -jnp.inf)
  weights_BNlT = jax.nn.softmax(logits_BNlT, axis=-1).astype(v_BTNK.dtype)
  return _product("bnlt,btnk->blnk", weights_BNlT, v_BTNK)


@jax.custom_vjp
def _scores(q_BlNK: jax.Array, k_BTNK: jax.Array) -> jax.Array:
  """Return q k^T in float32, [B, N, l, T]; gradients are products in dtype."""
  return _product("blnk,btnk->bnlt", q_BlNK, k_BTNK, jnp.float32)


def _scores_fwd(q_BlNK, k_BTNK):
  return _scores(q_BlNK, k_BTNK), (q_BlNK, k_BTNK)


def _scores_bwd(qk, grad_BNlT):
  q_BlNK, k_BTNK = qk
  # By itself the float32 gradient would make float32 products of these.
  grad_BNlT = grad_BNlT.astype(q_BlNK.dtype)
  return (
    _product("bnlt,btnk->blnk", grad_BNlT, k_BTNK),
    _product("bnlt,blnk->btnk", grad_BNlT, q_BlNK),
  )


_scores.defvjp(_scores_fwd, _scores_bwd)


def _product(axes: str, a: jax.Array, b: jax.Array, dtype=None) -> jax.Array:
  return jnp.einsum(
    axes,
    a,
    b,
    precision=matmul_precision(a.dtype),
    preferred_element_type=dtype,
  )


def drop_path(x_BlD: jax.Array, rate: jax.Array, key: jax.Array) -> jax.Array:
  """Zero the whole branch of a sample with probability `rate` < 1.

  Survivors are scaled by 1 / (1 - rate) (stochastic depth, 1603.09382).
  """
  keep_B11 = jax.random.bernoulli(key, 1.0 - rate, (x_BlD.shape[0], 1, 1))
  return jnp.where(keep_B11, x_BlD / (1.0 - rate), 0.0)


def dropout(x: jax.Array, rate: float, key: jax.Array) -> jax.Array:
  """Zero single elements with probability `rate` < 1, scaling the rest."""
  keep = jax.random.bernoulli(key, 1.0 - rate, x.shape)
  return jnp.where(keep, x / (1.0 - rate), 0.0)
