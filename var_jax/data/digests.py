"""Digests of samples: 64 bits that say what was read and what was learnt from.

Two samples with one digest are one sample: among 10^6 different ones, two
agree by chance with probability 3e-8.
"""

import hashlib

import numpy as np


def sample_digest(array: np.ndarray, label: int) -> np.ndarray:
  """Return the digest, uint32 [2], of an array's shape and content and a label.

  Two halves, because JAX has no 64-bit integers unless asked.
  """
  header = np.array([label, *array.shape], np.int64)
  digest = hashlib.blake2b(header, digest_size=8)
  digest.update(np.ascontiguousarray(array))
  return np.frombuffer(digest.digest(), np.uint32)
