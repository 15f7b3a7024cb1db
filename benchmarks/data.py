"""Images a second that `folder:` yields for training, by worker processes.

    python benchmarks/data.py --workers 0,1,2 --side 256

Synthetic JPEGs of ImageNet's usual size and weight (500x400, 100 KB) go
through the official augmentation. Prints one JSON line for each number of
workers: the median over windows of images a second, and of images for each
second of processor time, of this process and the workers together.
"""

import argparse
import json
import multiprocessing
import os
import pathlib
import statistics
import tempfile
import time

import numpy as np
from PIL import Image

from var_jax.data.pipeline import THREADS, training_batches
from var_jax.data.sources import open_source
from var_jax.data.transforms import make_transform


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--workers", default="0,1,2")
  parser.add_argument("--side", type=int, default=256)
  parser.add_argument("--images", type=int, default=256)
  parser.add_argument("--batch", type=int, default=32)
  parser.add_argument("--window", type=int, default=10, help="batches")
  parser.add_argument("--repeats", type=int, default=5)
  args = parser.parse_args()

  with tempfile.TemporaryDirectory() as folder:
    size = write_images(pathlib.Path(folder), args.images)
    source = open_source(f"folder:{folder}", "train")
    shape = (args.side, args.side)
    transform = make_transform("crop", shape, train=True, flip=False)
    for workers in map(int, args.workers.split(",")):
      batches = training_batches(
        source, transform, batch_size=args.batch, seed=0, workers=workers
      )
      first, windows = measure(batches, args.window, args.repeats)
      images = args.window * args.batch
      rates = [images / seconds for seconds, _ in windows]
      record = {
        "workers": workers,
        "threads": 0 if workers else THREADS,
        "side": args.side,
        "jpeg_kb": round(size / 1000),
        "first_batch_s": round(first, 2),
        "images_per_s": round(statistics.median(rates), 1),
        "images_per_s_all": [round(rate, 1) for rate in rates],
        "images_per_core_s": round(
          statistics.median(images / used for _, used in windows), 1
        ),
      }
      print(json.dumps(record), flush=True)


def measure(batches, window, repeats):
  """Return seconds to the first batch, and (wall, processor) of windows."""
  start = time.perf_counter()
  next(batches)
  first = time.perf_counter() - start
  for _ in range(window):  # Until what was made ahead is used up.
    next(batches)
  windows = []
  for _ in range(repeats):
    start, used = time.perf_counter(), processor_seconds()
    for _ in range(window):
      next(batches)
    windows.append((time.perf_counter() - start, processor_seconds() - used))
  batches.close()
  return first, windows


def processor_seconds():
  """Return the processor time of this process and its children so far."""
  used = time.process_time()
  for child in multiprocessing.active_children():
    stat = pathlib.Path(f"/proc/{child.pid}/stat").read_text()
    user, system = stat.rsplit(")", 1)[1].split()[11:13]
    used += (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")
  return used


def write_images(folder, count):
  """Write `count` images in two classes; return their mean size in bytes."""
  rng = np.random.default_rng(0)
  sizes = []
  for i in range(count):
    # Coarse shapes and fine grain: as hard to compress as a photograph.
    coarse = rng.integers(0, 256, (10, 8, 3), np.uint8)
    pixels = Image.fromarray(coarse).resize(
      (500, 400), Image.Resampling.BICUBIC
    )
    grain = rng.normal(0, 28, (400, 500, 3))
    noisy = np.clip(np.asarray(pixels) + grain, 0, 255).astype(np.uint8)
    path = folder / "train" / str(i % 2) / f"{i}.jpg"
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(noisy).save(path, quality=85)
    sizes.append(path.stat().st_size)
  return statistics.mean(sizes)


if __name__ == "__main__":
  main()
