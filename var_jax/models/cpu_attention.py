"""Attention head by head, for programs that run on one CPU only.

What `layers.attend` returns. The weights of a head stay near the cores, where
those of all heads would cross memory several times.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from var_jax.models import layers

_MIN_QUERIES = 64  # below, plain attention is faster
_MIN_PART = 128  # queries that are worth a part of their own


def attend(q_BlNK, k_BTNK, v_BTNK, mask_lT) -> jax.Array:
  """Return what `layers.attend` does, one head of one row after another.

  The weights of a head stay near the cores; they are divided by their sum when
  they are multiplied already.
  """
  l = q_BlNK.shape[1]
  if mask_lT is not None or q_BlNK.dtype != jnp.float32 or l < _MIN_QUERIES:
    return layers.attend(q_BlNK, k_BTNK, v_BTNK, mask_lT)

  def of_head(head):
    q_lK, k_TK, v_TK = head
    logits_lT = _product("lk,tk->lt", q_lK, k_TK)
    weights_lT = jnp.exp(logits_lT - jnp.max(logits_lT, axis=1, keepdims=True))
    out_lK = _product("lt,tk->lk", weights_lT, v_TK)
    return out_lK / jnp.sum(weights_lT, axis=1, keepdims=True)

  return _over_heads(of_head, q_BlNK, k_BTNK, v_BTNK)


@dataclasses.dataclass(frozen=True)
class Attend:
  """Attention under the block-causal mask, one head of one row after another.

  The weights of a head stay near the cores, and the backward pass makes them
  again; they lie as [T, l], which sums over T want. Queries are taken in parts,
  large scales by themselves: what a part does not see is never computed.

  Args:
    level_ids: the scale of each token.
  """

  level_ids: tuple[int, ...]

  def __call__(self, q_BlNK, k_BTNK, v_BTNK, mask_lT) -> jax.Array:
    """Return [B, l, N, K]; a mask must be that of the first l tokens."""
    l = q_BlNK.shape[1]
    if mask_lT is None:
      return attend(q_BlNK, k_BTNK, v_BTNK, None)
    if q_BlNK.dtype != jnp.float32 or l < _MIN_QUERIES:
      return layers.attend(q_BlNK, k_BTNK, v_BTNK, mask_lT)
    return _attend_parts(self._parts(l), q_BlNK, k_BTNK, v_BTNK)

  def _parts(self, length: int) -> "tuple[_Part, ...]":
    level_l = np.array(self.level_ids[:length])
    # Where scales end, the last of them perhaps early.
    ends = [*np.flatnonzero(np.diff(level_l)) + 1, length]
    parts, start = [], 0  # of what is in no part yet
    for begin, end in zip([0, *ends], ends, strict=False):
      large = end - begin >= _MIN_PART
      if start < begin and (large or end == length):
        # Small scales, up to a large one or the end.
        stop = begin if large else end
        parts.append(_Part(start, stop, tuple(level_l[:stop].tolist())))
        start = stop
      if large:
        parts.append(_Part(begin, end, None))
        start = end
    if start < length:
      parts.append(_Part(start, length, tuple(level_l.tolist())))
    return tuple(parts)


class _Part(NamedTuple):
  """Queries start .. end - 1, which see nothing past them.

  Args:
    level_ids: of 0 .. end - 1; None where each query sees all of them.
  """

  start: int
  end: int
  level_ids: tuple[int, ...] | None


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend_parts(parts, q_BlNK, k_BlNK, v_BlNK):
  def of_head(head):
    q_lK, k_lK, v_lK = head
    outs = []
    for part in parts:
      weights_Tl, sum_l = _weights(part, q_lK, k_lK)
      out_lK = _product("tl,tk->lk", weights_Tl, v_lK[: part.end])
      outs.append(out_lK / sum_l[:, None])
    return jnp.concatenate(outs)

  return _over_heads(of_head, q_BlNK, k_BlNK, v_BlNK)


def _attend_parts_fwd(parts, q_BlNK, k_BlNK, v_BlNK):
  out_BlNK = _attend_parts(parts, q_BlNK, k_BlNK, v_BlNK)
  return out_BlNK, (q_BlNK, k_BlNK, v_BlNK, out_BlNK)


def _attend_parts_bwd(parts, held, grad_BlNK):
  def of_head(head):
    q_lK, k_lK, v_lK, out_lK, grad_lK = head
    q_grads, k_grad_lK, v_grad_lK = [], *(jnp.zeros_like(k_lK),) * 2
    for part in parts:
      rows, seen = slice(part.start, part.end), slice(part.end)
      weights_Tl, sum_l = _weights(part, q_lK, k_lK)
      rest_lK = grad_lK[rows] / sum_l[:, None]
      v_grad_lK = v_grad_lK.at[seen].add(
        _product("tl,lk->tk", weights_Tl, rest_lK)
      )
      # Of the softmax: weights (grad - mean of grad).
      mean_l = _product("lk,lk->l", out_lK[rows], rest_lK)
      score_grad_Tl = weights_Tl * (
        _product("tk,lk->tl", v_lK[seen], rest_lK) - mean_l
      )
      k_grad_lK = k_grad_lK.at[seen].add(
        _product("tl,lk->tk", score_grad_Tl, q_lK[rows])
      )
      q_grads.append(_product("tl,tk->lk", score_grad_Tl, k_lK[seen]))
    return jnp.concatenate(q_grads), k_grad_lK, v_grad_lK

  return _over_heads(of_head, *held, grad_BlNK)


_attend_parts.defvjp(_attend_parts_fwd, _attend_parts_bwd)


def _weights(part: _Part, q_lK, k_lK) -> tuple[jax.Array, jax.Array]:
  """Return exp of the logits, [T, l], and its sums over T."""
  scores_Tl = _product(
    "tk,lk->tl", k_lK[: part.end], q_lK[part.start : part.end]
  )
  if part.level_ids:
    level_T = jnp.asarray(part.level_ids)
    seen_Tl = level_T[:, None] <= level_T[part.start :]
    scores_Tl = jnp.where(seen_Tl, scores_Tl, -jnp.inf)
  weights_Tl = jnp.exp(scores_Tl - jnp.max(scores_Tl, axis=0))
  return weights_Tl, jnp.sum(weights_Tl, axis=0)


def _over_heads(of_head, *arrays_BlNK):
  """Return what a function of [l, K] makes of each head of each row."""
  B, _, N, K = arrays_BlNK[0].shape
  heads = [x.swapaxes(1, 2).reshape(B * N, -1, K) for x in arrays_BlNK]
  return jax.tree.map(
    lambda x: x.reshape(B, N, -1, K).swapaxes(1, 2),
    jax.lax.map(of_head, heads),
  )


_product = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)
