"""Draw the samples that the published FID of the released weights is about.

    python benchmarks/reproduce.py --files DIR --depth 16 --output runs/d16

DIR holds vae_ch160v4096z32.pth and var_d16.pth (20, 24, 30) as published. They
are converted and verified, then 50 images of each of 1,000 classes are drawn
with the published settings and packed as samples.npz (arr_0, uint8 [N, H, W,
3]) for the ADM evaluator. Interrupted, it goes on where it was. What to do with
samples.npz, and which number to expect, is in docs/reproduce.md.
"""

import argparse
import pathlib

import jax
import numpy as np

import var_jax
from var_jax import cli, files

# The README of the official code: guidance 1.5, top-k 900, top-p 0.96.
SETTINGS = dict(guidance=1.5, top_k=900, top_p=0.96, smooth=False)


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--files", type=pathlib.Path, required=True)
  parser.add_argument("--depth", type=int, default=16)
  parser.add_argument("--output", type=pathlib.Path, required=True)
  parser.add_argument("--per-class", type=int, default=50)
  parser.add_argument("--batch", type=int, default=50)
  parser.add_argument("--seed", type=int, default=0)
  parser.add_argument("--dtype", help="float32 or bfloat16; by platform")
  args = parser.parse_args()

  settings = {
    "weights": str(args.files.absolute()),
    "depth": args.depth,
    "per_class": args.per_class,
    "batch": args.batch,
    "seed": args.seed,
    "dtype": args.dtype,
    **SETTINGS,
  }
  check_settings(args.output / "settings.json", settings)
  workdir = args.output / "model"
  if not workdir.exists():
    convert(args.files, args.depth, workdir)
  model = var_jax.load(workdir, dtype=args.dtype)
  total = args.per_class * model.config.transformer.num_classes
  key = jax.random.key(args.seed)
  parts = args.output / "parts"
  for first in range(0, total, args.batch):
    path = parts / f"{first:06}.npy"
    if not path.exists():
      draw(model, key, range(first, min(first + args.batch, total)), path)
      print(f"{min(first + args.batch, total)} of {total} images", flush=True)
  path = args.output / "samples.npz"
  pack(sorted(parts.glob("*.npy")), total, path)
  record = {**settings, "images": total, "sha256": files.sha256(path)}
  files.write_json(path.with_suffix(".json"), record)
  print(f"wrote {path}")


def check_settings(path: pathlib.Path, settings: dict) -> None:
  """Record the settings of a new run, refuse those of another."""
  if not path.exists():
    files.write_json(path, settings)
    return
  there = files.read_json(path)
  for name, value in settings.items():
    if there.get(name) != value:
      raise SystemExit(
        f"{path} is of another run: {name} is {there.get(name)!r} there and "
        f"{value!r} here; use a new --output."
      )


def convert(folder: pathlib.Path, depth: int, workdir: pathlib.Path) -> None:
  code = cli.main([
    "convert", "--vae", str(folder / "vae_ch160v4096z32.pth"),
    "--var", str(folder / f"var_d{depth}.pth"),
    "--output", str(workdir), "--verify",
  ])  # fmt: skip
  if code:
    raise SystemExit(code)


def draw(model, key, numbers: range, path: pathlib.Path) -> None:
  """Write images as uint8 [B, H, W, 3]; each is a function of its number."""
  n_B = np.arange(numbers.start, numbers.stop)
  # All classes in turn: the evaluator's Inception Score is a mean over runs of
  # 5,000 consecutive images, and sorted by class each would see 100 classes.
  labels_B = n_B % model.config.transformer.num_classes
  keys_B = jax.vmap(lambda n: jax.random.fold_in(key, n))(n_B)
  sample = model.sample(labels_B, keys_B, **SETTINGS)
  path.parent.mkdir(parents=True, exist_ok=True)
  aside = path.with_suffix(".partial")
  with aside.open("wb") as file:
    np.save(file, var_jax.to_uint8(sample.images_BHW3))
  aside.rename(path)


def pack(parts: list[pathlib.Path], total: int, path: pathlib.Path) -> None:
  """Write all parts as one array, through a file: it may exceed the memory."""
  shapes = [np.load(part, mmap_mode="r").shape for part in parts]
  assert sum(shape[0] for shape in shapes) == total
  whole = path.with_name("samples.npy")
  images_BHW3 = np.lib.format.open_memmap(
    whole, "w+", np.uint8, (total, *shapes[0][1:])
  )
  first = 0
  for part, (batch, *_) in zip(parts, shapes, strict=True):
    images_BHW3[first : first + batch] = np.load(part)
    first += batch
  with path.with_suffix(".partial").open("wb") as file:
    np.savez(file, arr_0=images_BHW3)
  path.with_suffix(".partial").rename(path)
  whole.unlink()


if __name__ == "__main__":
  main()
