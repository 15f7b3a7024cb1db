"""The parameter checksum: every bit counts, and no sharding does."""

import hashlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from var_jax.ledger.checksum import as_hex, param_checksum

MIXES = (
  (16, 0x85EBCA6B, 13, 0xC2B2AE35, 16),
  (16, 0x7FEB352D, 15, 0x846CA68B, 16),
)


def mix(word, a, b, c, d, e):
  word = (word ^ word >> a) * b % 2**32
  word = (word ^ word >> c) * d % 2**32
  return word ^ word >> e


def oracle(leaves):
  """Return the two sums of {path: array}, in Python's whole numbers."""
  sums = [0, 0]
  for path, array in leaves.items():
    name = f"{path} {array.dtype} {array.shape}"
    salts = np.frombuffer(hashlib.sha256(name.encode()).digest(), "<u4")
    words = array.reshape(-1).view(f"<u{array.dtype.itemsize}").tolist()
    for index, word in enumerate(words):
      key = mix(index, *MIXES[0])
      for which, constants in enumerate(MIXES):
        salted = mix(key ^ int(salts[which]), *constants)
        sums[which] += mix(word ^ salted, *constants)
  return "".join(f"{total % 2**32:08x}" for total in sums)


def tree(seed=0):
  rng = np.random.default_rng(seed)
  return {
    "a": rng.normal(size=(3, 4, 5)).astype(np.float32),
    "b": {"c": rng.normal(size=(7,)).astype(jnp.bfloat16)},
    "d": rng.integers(-9, 9, (2, 3), np.int32),
    "e": np.float32(0.5),
    "f": rng.integers(0, 9, 6).astype(np.uint8),
  }


def digest(params):
  return as_hex(jax.jit(param_checksum)(params))


def test_the_sums_are_those_of_the_formula():
  params = tree()
  leaves = {
    "['a']": params["a"],
    "['b']['c']": params["b"]["c"],
    "['d']": params["d"],
    "['e']": np.asarray(params["e"]),
    "['f']": params["f"],
  }
  assert digest(params) == oracle(leaves)
  assert digest(params) == as_hex(param_checksum(params))
  assert digest({"z": np.asarray([True, False])}) == oracle(
    {"['z']": np.asarray([True, False])}
  )


@pytest.mark.parametrize("value", [0.0, 1.5, -3.25e-20])
def test_every_flipped_bit_changes_both_sums(value):
  leaf_n = np.full(33, value, np.float32)
  bits = jnp.uint32(1) << jnp.arange(32, dtype=jnp.uint32)

  def flipped(place, bit):
    word_n = jax.lax.bitcast_convert_type(leaf_n, jnp.uint32)
    word_n = word_n.at[place].set(word_n[place] ^ bit)
    return param_checksum(jax.lax.bitcast_convert_type(word_n, jnp.float32))

  over_bits = jax.vmap(flipped, (None, 0))
  all_2 = jax.jit(jax.vmap(over_bits, (0, None)))(jnp.arange(33), bits)
  all_n2 = np.asarray(all_2).reshape(-1, 2)
  assert (all_n2 != np.asarray(param_checksum(leaf_n))).all()
  assert len(np.unique(all_n2, axis=0)) == len(all_n2)  # no two are the same


def test_every_flipped_bit_of_a_small_type_changes_it():
  params = tree()
  seen = {digest(params)}
  for path in (("b", "c"), ("f",)):
    size = 8 * jax.tree.leaves(params[path[0]])[0].itemsize
    for bit in range(size):
      other = tree()
      leaf = other[path[0]] if len(path) == 1 else other["b"]["c"]
      leaf.view(f"u{size // 8}")[1] ^= 1 << bit
      seen.add(digest(other))
  assert len(seen) == 1 + 16 + 8


def test_pairs_of_flipped_signs_do_not_cancel():
  leaf_n = np.ones(64, np.float32)
  seen = set()
  for place in range(1, 64):
    other_n = leaf_n.copy()
    other_n[[0, place]] *= -1
    seen.add(digest(other_n))
  assert len(seen | {digest(leaf_n)}) == 64


def test_order_matters_within_a_leaf_and_between_leaves():
  params = {"a": np.arange(6.0, dtype=np.float32), "b": np.zeros(6, np.float32)}
  a_6, b_6 = params["a"], params["b"]
  others = [
    {"a": a_6[[1, 0, 2, 3, 4, 5]], "b": b_6},
    {"a": b_6, "b": a_6},
    {"a": a_6, "c": b_6},
    {"a": a_6},
    {"a": a_6.reshape(2, 3), "b": b_6},
    {"a": a_6, "b": b_6.view(np.int32)},
    {"a": a_6, "b": -b_6},
  ]
  digests = [digest(other) for other in [params, *others]]
  assert len(set(digests)) == len(digests)


def test_no_temporary_is_of_a_leafs_size():
  like = {"a": jax.ShapeDtypeStruct((64, 512, 512), jnp.float32)}
  compiled = jax.jit(param_checksum).lower(like).compile()
  assert compiled.memory_analysis().temp_size_in_bytes < 2**12


# Prints the digest of each way to lay the parameters on eight devices.
SHARDED = """
import jax, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from var_jax.ledger.checksum import as_hex, param_checksum
rng = np.random.default_rng(0)
params = {
  "a": rng.normal(size=(8, 16, 4)).astype(np.float32),
  "b": rng.normal(size=(16, 8)).astype(jax.numpy.bfloat16),
}
assert jax.device_count() == 8
mesh = Mesh(np.array(jax.devices()).reshape(4, 2), ("x", "y"))
print(as_hex(jax.jit(param_checksum)(params)))
for spec in (P(), P("x"), P(None, "y"), P(("x", "y")), P("y", "x")):
  on_mesh = jax.device_put(params, NamedSharding(mesh, spec))
  print(as_hex(jax.jit(param_checksum)(on_mesh)))
"""


def test_a_checksum_is_the_same_on_any_mesh(monkeypatch):
  monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=8")
  monkeypatch.setenv("JAX_PLATFORMS", "cpu")
  command = [sys.executable, "-c", SHARDED]
  printed = subprocess.run(command, check=True, capture_output=True, text=True)
  digests = printed.stdout.split()
  rng = np.random.default_rng(0)
  here = digest(
    {
      "a": rng.normal(size=(8, 16, 4)).astype(np.float32),
      "b": rng.normal(size=(16, 8)).astype(jnp.bfloat16),
    }
  )
  assert digests == [here] * 6
