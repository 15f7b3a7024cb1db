"""Time and memory to save and restore the training state of a transformer.

    python benchmarks/checkpoints.py --depth 16

The state is parameters and both moments of AdamW in float32, random. A save
has two parts: what the loop waits for, and what goes on behind the next steps
(writing and hashing). A restore verifies the hashes first.
"""

import argparse
import json
import pathlib
import resource
import statistics
import tempfile
import threading
import time

import jax

from var_jax import VAR, TokenizerConfig, VARConfig
from var_jax.checkpoints import store
from var_jax.checkpoints.description import Description
from var_jax.training import optim, setup, var_step
from var_jax.training.state import TrainState


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--depth", type=int, default=16)
  parser.add_argument("--repeats", type=int, default=3)
  args = parser.parse_args()

  cfg = VARConfig.official(args.depth)
  optimizer = optim.make_optimizer(
    optim.OptimizerConfig(), steps=10, batch_size=256
  )
  params = var_step.init_params(VAR(cfg), jax.random.key(0, impl="rbg"))
  state = jax.block_until_ready(
    TrainState.create(params, optimizer, use_ema=False)
  )
  size = sum(leaf.nbytes for leaf in jax.tree.leaves(state)) / 2**30
  waited, whole, restored, peaks = [], [], [], {"save": [], "restore": []}
  with tempfile.TemporaryDirectory() as name:
    workdir = pathlib.Path(name)
    Description(TokenizerConfig(), cfg).write(workdir)
    checkpoints = store.Store(workdir, keep=1)
    like = setup.trees_of(state)
    for step in range(1, args.repeats + 1):
      with Peak() as peak:
        start = time.perf_counter()
        checkpoints.save(step, setup.trees_of(state), position=0)
        waited.append(time.perf_counter() - start)
        checkpoints.wait()
        whole.append(time.perf_counter() - start)
      peaks["save"].append(peak.gib)
      with Peak() as peak:
        start = time.perf_counter()
        trees, _ = checkpoints.restore(step, like)
        jax.block_until_ready(trees)
        restored.append(time.perf_counter() - start)
        del trees
      peaks["restore"].append(peak.gib)
    checkpoints.close()
  record = {
    "device": jax.devices()[0].device_kind,
    "depth": args.depth,
    "state_gib": round(size, 2),
    "save_seconds_waited_for": round(statistics.median(waited), 2),
    "save_seconds": round(statistics.median(whole), 2),
    "restore_seconds": round(statistics.median(restored), 2),
    "save_peak_over_state": round(max(peaks["save"]) / size, 2),
    "restore_peak_over_state": round(max(peaks["restore"]) / size, 2),
  }
  print(json.dumps(record))


class Peak:
  """The most memory that is resident above what was when it began, in GiB."""

  def __enter__(self):
    self.gib, self._over = 0.0, threading.Event()
    self._base = _resident()
    self._thread = threading.Thread(target=self._watch)
    self._thread.start()
    return self

  def __exit__(self, *exception):
    self._over.set()
    self._thread.join()

  def _watch(self):
    while not self._over.wait(0.02):
      self.gib = max(self.gib, _resident() - self._base)


def _resident() -> float:
  pages = int(pathlib.Path("/proc/self/statm").read_text().split()[1])
  return pages * resource.getpagesize() / 2**30


if __name__ == "__main__":
  main()
