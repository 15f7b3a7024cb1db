"""Digests against plain dictionaries and the bytes that go into them."""

import numpy as np
import pytest

from var_jax.ledger import digests


def test_raw_digests_are_those_of_a_dictionary():
  rng = np.random.default_rng(0)
  ours, theirs = digests.RawDigests(), {}
  for _ in range(200):
    index_B = rng.integers(0, rng.integers(1, 400), 8)
    raw_B2 = np.stack([index_B, index_B + (rng.random(8) < 0.05)], 1)
    raw_B2 = raw_B2.astype(np.uint32)
    new, changes = [], []
    for row, index in enumerate(index_B.tolist()):
      if index not in theirs:
        new.append(row)
        theirs[index] = digests.as_hex(raw_B2[row])
    for row, index in enumerate(index_B.tolist()):
      digest = digests.as_hex(raw_B2[row])
      if theirs[index] != digest:
        changes.append((index, theirs[index], digest))
        theirs[index] = digest
    assert ours.add(index_B, raw_B2).tolist() == new
    # Those that stand twice, changing and back, are told differently.
    if len(set(index_B.tolist())) == 8:
      assert ours.update(index_B, raw_B2) == changes
    else:
      ours.update(index_B, raw_B2)
      theirs.update({i: ours[i] for i in index_B.tolist()})
  assert {i: ours[i] for i in range(401) if ours[i]} == theirs


def test_hexadecimal_digits_are_the_numbers():
  pair_22 = np.asarray([[1, 0xABCDEF01], [2**32 - 1, 0]], np.uint32)
  assert digests.as_hex(pair_22) == "00000001abcdef01ffffffff00000000"
  assert digests.as_hex(pair_22.astype(">u4")) == digests.as_hex(pair_22)


@pytest.mark.parametrize("name", ["position", "index", "label", "digest"])
def test_a_batch_digest_sees_each_array_and_no_type(name):
  batch = {name: np.arange(3) for name in ("position", "index", "label")}
  batch["digest"] = np.arange(6).reshape(3, 2)
  before = digests.batch_digest(batch)
  as_32_bits = {k: v.astype(np.int32) for k, v in batch.items()}
  assert digests.batch_digest(as_32_bits) == before
  batch[name] = batch[name][::-1]
  assert digests.batch_digest(batch) != before
