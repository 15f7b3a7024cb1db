"""Time and memory of converting full-size checkpoints there and back.

    python benchmarks/conversion.py --depth 16 --folder /tmp/conversion

Makes vae.pth and var.pth with seeded weights and the exact names, shapes and
dtypes of the released files, converts them to a workdir and back in processes
of their own, and compares every tensor bit for bit; loads the workdir, too.
Prints one JSON line: file sizes, seconds, and the peak anonymous memory of each
process over the size of the files (memory-mapped pages of the files are not
anonymous). Linux; takes three times the size of the files on disk, and removes
what it made.
"""

import argparse
import json
import multiprocessing
import pathlib
import re
import shutil
import threading
import time

import numpy as np

from var_jax.models.scales import SCALES, ScaleSchedule

GOLDEN = pathlib.Path(__file__).parents[1] / "tests" / "golden"
POLL_SECONDS = 0.02


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument(
    "--depth", type=int, default=16, choices=(16, 20, 24, 30, 36)
  )
  parser.add_argument("--folder", type=pathlib.Path, required=True)
  parser.add_argument(
    "--verify", action="store_true", help="as part of the way in"
  )
  args = parser.parse_args()
  folder = args.folder
  folder.mkdir(parents=True)
  try:
    make = measured(make_files, folder, args.depth)
    size = sum(path.stat().st_size for path in folder.glob("*.pth"))
    into = measured(convert_in, folder, args.verify)
    out = measured(convert_out, folder)
    load = measured(load_model, folder, "float32")
    half = measured(load_model, folder, "bfloat16")
    tensors = compare(folder)
    record = {
      "depth": args.depth,
      "file_bytes": size,
      "verify": args.verify,
      "make_s": round(make["seconds"], 1),
      "in_s": round(into["seconds"], 1),
      "in_peak_over_file": round(into["peak_bytes"] / size, 3),
      "out_s": round(out["seconds"], 1),
      "out_peak_over_file": round(out["peak_bytes"] / size, 3),
      "load_s": round(load["seconds"], 1),
      "load_peak_over_file": round(load["peak_bytes"] / size, 3),
      "load_bfloat16_s": round(half["seconds"], 1),
      "load_bfloat16_peak_over_file": round(half["peak_bytes"] / size, 3),
      "tensors_bit_equal": tensors,
    }
    print(json.dumps(record))
  finally:
    shutil.rmtree(folder)


def make_files(folder: pathlib.Path, depth: int) -> None:
  import torch

  scales = ScaleSchedule(SCALES[512 if depth == 36 else 256])
  names = {"vae": "vae_ch160v4096z32", "var": f"var_d{depth}"}
  for kind, name in names.items():
    manifest = json.loads((GOLDEN / f"manifest_{name}.json").read_text())
    random = np.random.default_rng(depth)
    tensors = {}
    for tensor, (shape, dtype) in manifest.items():
      if tensor == "lvl_1L":
        array = scales.level_ids()[None]
      elif tensor == "attn_bias_for_masking":
        array = np.where(scales.block_causal_mask(), 0, -np.inf)[None, None]
      elif tensor.endswith("zero_k_bias"):
        array = np.zeros(shape)
      else:
        array = random.standard_normal(shape, dtype=np.float32) * 0.02
      assert list(array.shape) == shape
      tensors[tensor] = torch.from_numpy(array.astype(dtype, copy=False))
    torch.save(tensors, folder / f"{kind}.pth")


def convert_in(folder: pathlib.Path, verify: bool) -> None:
  flags = ["--verify"] if verify else []
  _command(
    "--vae", folder / "vae.pth", "--var", folder / "var.pth",
    "--output", folder / "workdir", *flags,
  )  # fmt: skip


def convert_out(folder: pathlib.Path) -> None:
  _command(
    "--checkpoint", folder / "workdir", "--to", "torch",
    "--output", folder / "back",
  )  # fmt: skip


def load_model(folder: pathlib.Path, dtype: str) -> None:
  import jax

  import var_jax

  model = var_jax.load(folder / "workdir", dtype=dtype)
  jax.block_until_ready(model.params)


def _command(*arguments) -> None:
  from var_jax import cli

  code = cli.main(["convert", *(str(argument) for argument in arguments)])
  if code:
    raise SystemExit(code)


def compare(folder: pathlib.Path) -> int:
  """Return how many tensors there are; all must be equal bit for bit."""
  import torch

  count = 0
  for kind in ("vae", "var"):
    there, back = (
      torch.load(path / f"{kind}.pth", weights_only=True, mmap=True)
      for path in (folder, folder / "back")
    )
    assert there.keys() == back.keys()
    for name, tensor in there.items():
      ours = back[name].numpy()
      assert ours.dtype == tensor.numpy().dtype, name
      assert ours.shape == tuple(tensor.shape), name
      same = ours.view(np.uint8) == tensor.numpy().view(np.uint8)
      assert same.all(), name
      count += 1
  return count


def measured(function, *arguments):
  """Return the seconds and peak of a call in a process of its own."""
  context = multiprocessing.get_context("spawn")
  queue = context.Queue()
  process = context.Process(target=_watched, args=(queue, function, arguments))
  process.start()
  process.join()
  if process.exitcode:
    raise SystemExit(f"{function.__name__} ended with {process.exitcode}")
  return queue.get()


def _watched(queue, function, arguments) -> None:
  peak, done = 0, threading.Event()

  def watch():
    nonlocal peak
    while not done.wait(POLL_SECONDS):
      peak = max(peak, _anonymous_bytes())

  watcher = threading.Thread(target=watch)
  watcher.start()
  start = time.perf_counter()
  try:
    function(*arguments)
  finally:
    done.set()
    watcher.join()
  queue.put({"seconds": time.perf_counter() - start, "peak_bytes": peak})


def _anonymous_bytes() -> int:
  status = pathlib.Path("/proc/self/status").read_text()
  return int(re.search(r"RssAnon:\s+(\d+) kB", status)[1]) * 1024


if __name__ == "__main__":
  main()
