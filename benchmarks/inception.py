"""How fast Inception looks at images, and whether its memory stays flat.

    python benchmarks/inception.py --counts 500,2000 --side 256 --batch 16

Synthetic images, random weights, a process each. Prints a line of JSON for
each count: images/s after the first batch, which compiles, and the peak of the
process's memory.
"""

import argparse
import json
import resource
import subprocess
import sys
import time

import numpy as np

from var_jax.evaluation import inception, networks, run
from var_jax.parallel import mesh as mesh_lib


class Noise:
  kind, name, lossy = "npz", "noise", False

  def __init__(self, count: int, side: int):
    self.count, self.shape = count, (side, side, 3)

  def batches(self, size: int, start: int = 0):
    rng = np.random.default_rng(0)
    for first in range(start, self.count, size):
      b = min(size, self.count - first)
      yield rng.integers(0, 256, (b, *self.shape), np.uint8)


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--counts", default="500,2000")
  parser.add_argument("--side", type=int, default=256)
  parser.add_argument("--batch", type=int, default=16)
  args = parser.parse_args()
  counts = args.counts.split(",")
  if len(counts) > 1:
    for count in counts:
      same = ["--side", str(args.side), "--batch", str(args.batch)]
      command = [sys.executable, __file__, "--counts", count, *same]
      subprocess.run(command, check=True)
    return
  print(json.dumps(measure(int(counts[0]), args.side, args.batch)), flush=True)


def measure(count: int, side: int, batch: int) -> dict:
  rng = np.random.default_rng(0)
  weights = {
    name: rng.normal(0, np.prod(shape[:-1]) ** -0.5, shape).astype(np.float32)
    for name, shape in inception.shapes().items()
  }
  network = networks.Network(
    networks.OF_INCEPTION, {}, weights, inception.features, official=False
  )
  times = []
  looking = run.Looking(
    network,
    mesh_lib.make_mesh(),
    batch,
    lambda done, of, began: times.append((done, time.monotonic())),
  )
  run.look(looking, Noise(count, side))
  # The first batch compiles; the next is under way when it is there.
  (first, since), (last, until) = times[2], times[-1]
  return {
    "images": count,
    "images_per_second": round((last - first) / (until - since), 2),
    "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
  }


if __name__ == "__main__":
  main()
