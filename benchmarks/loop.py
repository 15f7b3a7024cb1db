"""What the training loop adds to the bare jitted step, side by side.

    python benchmarks/loop.py --steps 20
    python benchmarks/loop.py --steps 10 --source folder --batch 16

A transformer of depth 8 on the digits, sized so that a step takes about a
second on two CPU cores, or on a folder of JPEGs at 256 px. The bare step is the
loop's own program on one batch; the loop reads, augments, logs and records
every step. Both are timed in turns; medians, without compilation.
"""

import argparse
import json
import pathlib
import statistics
import tempfile
import time

import jax
from data import write_images

from var_jax.commands.training import read_config
from var_jax.training import loop, setup

CONFIGS = pathlib.Path(__file__).parents[1] / "configs"
# Of the tiny tokenizer; the folder's has 256 px.
TOKENIZERS = {
  "digits": {},
  "folder": dict(channel_mults=(1, 1, 1, 1, 1), scales=(1, 2, 4, 8, 16)),
}


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--steps", type=int, default=20, help="of each turn")
  parser.add_argument("--turns", type=int, default=3)
  parser.add_argument("--batch", type=int, default=64)
  parser.add_argument("--source", default="digits", choices=TOKENIZERS)
  parser.add_argument(
    "--transform", default="resize", help="of the digits; jitter costs more"
  )
  parser.add_argument("--workers", type=int, default=0)
  args = parser.parse_args()

  bare, whole, waits = [], [], []
  with tempfile.TemporaryDirectory() as name:
    folder = pathlib.Path(name)
    config = var_config(folder, args)
    run = setup.open_run(config, folder / "bare")
    for turn in range(args.turns):
      bare += bare_steps(run, args.steps)
      records = loop_steps(config, folder / f"run{turn}")
      whole += [record["step_seconds"] for record in records]
      waits += [record["data_wait_share"] for record in records]
  step, in_loop = statistics.median(bare), statistics.median(whole)
  record = {
    "device": jax.devices()[0].device_kind,
    "source": args.source,
    "workers": args.workers,
    "batch": args.batch,
    "bare_step_seconds": round(step, 4),
    "loop_step_seconds": round(in_loop, 4),
    "overhead": round(in_loop / step - 1.0, 4),
    "data_wait_share": round(statistics.median(waits), 4),
  }
  print(json.dumps(record))


def var_config(folder: pathlib.Path, args):
  """Return the config of a run on a tokenizer that is made here."""
  source = args.source
  if source == "folder":
    write_images(folder / "images", count=256)
    source = f"folder:{folder}/images"
  tokenizer = read_config(f"{CONFIGS}/tokenizer.py:tiny", ())
  tokenizer.model.update(TOKENIZERS[args.source])
  tokenizer.data.update(source=source, batch_size=4)
  tokenizer.steps = 1
  loop.train(tokenizer, folder / "tokenizer")
  config = read_config(f"{CONFIGS}/var.py:tiny", ())
  config.tokenizer_path = str(folder / "tokenizer")
  config.model.update(depth=8, width=256, heads=4)
  config.data.update(
    source=source,
    batch_size=args.batch,
    transform=args.transform if source == "digits" else "crop",
    workers=args.workers,
  )
  config.steps, config.checkpoint_every = args.steps, args.steps
  config.log_every = 1
  return config


def bare_steps(run: setup.Run, steps: int) -> list[float]:
  """Return the seconds of each step but the first, which may compile."""
  feed = run.feed(0)
  batch, state = feed.take(), run.fresh()
  feed.close()
  seconds = []
  for _ in range(steps):
    start = time.perf_counter()
    state, metrics = run.program.step(state, batch, None)
    jax.block_until_ready(metrics)
    seconds.append(time.perf_counter() - start)
  return seconds[1:]


def loop_steps(config, workdir: pathlib.Path) -> list[dict]:
  """Return what the loop logged of each step but the first and the last.

  The last one saves.
  """
  loop.train(config, workdir)
  lines = (workdir / "metrics.jsonl").read_text().splitlines()
  return [json.loads(line) for line in lines[1:-1]]


if __name__ == "__main__":
  main()
