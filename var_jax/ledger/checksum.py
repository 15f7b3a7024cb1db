"""A checksum of parameters that every single bit counts in.

    sum over leaves and elements of mix(word ^ key(index, leaf))  modulo 2^32

twice, with different keys and mixes. `mix` is a permutation of 32 bits, so one
flipped bit always changes both sums; what changes more than one word escapes
with probability 2^-64. Whole numbers add up to the same in any order, so
sharding and the number of devices do not matter. A leaf's key follows from its
path, type and shape. Elements further than 2^32 apart share a key: their swap
would go unseen.
"""

import functools
import hashlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def param_checksum(params: Any) -> jax.Array:
  """Return uint32 [2], with or without jit.

  No temporary is of a leaf's size. Without, a shape compiles once, however
  many leaves have it: one program of a hundred leaves takes far longer.
  """
  return functools.reduce(
    jnp.add,
    [
      _leaf_checksum(leaf, _salts(jax.tree_util.keystr(path), leaf))
      for path, leaf in jax.tree_util.tree_leaves_with_path(params)
    ],
  )


def as_hex(checksum_2: jax.Array) -> str:
  """Return 16 hexadecimal digits."""
  return "".join(f"{int(number):08x}" for number in np.asarray(checksum_2))


def _salts(path: str, leaf: jax.Array) -> np.ndarray:
  """Return uint32 [2], other ones for each leaf."""
  name = f"{path} {leaf.dtype} {leaf.shape}"
  return np.frombuffer(hashlib.sha256(name.encode()).digest(), "<u4")[:2]


@jax.jit
def _leaf_checksum(leaf: jax.Array, salts_2: jax.Array) -> jax.Array:
  """Return uint32 [2], of one leaf."""
  word = _words(leaf)
  index = jnp.zeros(word.shape, jnp.uint32)
  # Not by a reshape: on a mesh that would gather the leaf.
  for axis, size in enumerate(word.shape):
    iota = jax.lax.broadcasted_iota(jnp.uint32, word.shape, axis)
    index = index * np.uint32(size % 2**32) + iota
  index = _mix(index, *_MIXES[0])
  hashes = [
    _mix(word ^ _mix(index ^ salt, *mix), *mix)
    for salt, mix in zip(salts_2, _MIXES, strict=True)
  ]
  # One reduction of both: two would each want the hashes in memory.
  zero, axes = np.uint32(0), range(word.ndim)
  sums = jax.lax.reduce(hashes, [zero, zero], _add, tuple(axes))
  return jnp.stack(sums)


def _add(left, right):
  return [a + b for a, b in zip(left, right, strict=True)]


def _words(leaf: jax.Array) -> jax.Array:
  """Return the bits of each element as uint32, one or more."""
  if leaf.dtype == jnp.bool_:
    return leaf.astype(jnp.uint32)
  bits = min(8 * leaf.dtype.itemsize, 32)
  word = jax.lax.bitcast_convert_type(leaf, jnp.dtype(f"uint{bits}"))
  return word.astype(jnp.uint32)


# Shifts and odd factors of two well-known finalisers of hashes: murmur3's, and
# the one of C. Wellons' search for the least bias.
_MIXES = (
  (16, 0x85EBCA6B, 13, 0xC2B2AE35, 16),
  (16, 0x7FEB352D, 15, 0x846CA68B, 16),
)


def _mix(word, shift_a, factor_a, shift_b, factor_b, shift_c):
  """Return a permutation of 32 bits, applied to each word."""
  word = (word ^ (word >> shift_a)) * np.uint32(factor_a)
  word = (word ^ (word >> shift_b)) * np.uint32(factor_b)
  return word ^ (word >> shift_c)
