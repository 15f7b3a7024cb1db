"""What each part of the tokenizer recipe does, one added after the other.

    python benchmarks/tokenizer_ablation.py --data emoji64.npz --output DIR

The archive holds `images` (uint8, RGB), `labels` and `class_names`. A tenth of
it is held out. All rows take the same steps over the same batches. Writes
DIR/ROW, a workdir whose report.html has pictures, and ablation.json, to which
rows of a later call are added.
"""

import argparse
import json
import time

import numpy as np
from etils import epath

from configs import tokenizer as presets
from var_jax import files
from var_jax.training import loop

# Each row has what those above it have.
ROWS = {
  "plain": {},
  "living codes": {"loss.revive_every": 50, "loss.kmeans_rounds": 5},
  "scale dropout": {"loss.scale_dropout": 0.1},
  "adversary": {
    "adversary.weight": 0.1,
    "adversary.start": 500,
    "adversary.lecam": 0.001,
    "adversary.channels": 16,
    "adversary.norm_groups": 8,
    "adversary.layers": 3,
    "adversary_optimizer.learning_rate": 5e-4 * 16,
  },
}
_OFF = {
  "loss.revive_every": 0,
  "loss.kmeans_rounds": 0,
  "collapse.policy": "report",
}


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--data", required=True)
  parser.add_argument("--output", required=True)
  parser.add_argument("--rows", default=",".join(ROWS))
  parser.add_argument("--steps", type=int, default=0, help="of the preset if 0")
  args = parser.parse_args()

  output = epath.Path(args.output)
  output.mkdir(parents=True, exist_ok=True)
  split(args.data, output)
  asked, settings = args.rows.split(","), dict(_OFF)
  before = output / "ablation.json"
  record = json.loads(before.read_text()) if before.exists() else {}
  for name, more in ROWS.items():
    settings |= more
    if name not in asked:
      continue
    config = presets.get_config("emoji64")
    config.update_from_flattened_dict(settings)
    config.data.source = f"npz:{output / 'train.npz'}"
    config.data.eval_source = f"npz:{output / 'held_out.npz'}"
    config.steps = args.steps or config.steps
    config.checkpoint_every = config.steps
    config.eval_every = config.steps
    files.check_new(output / name)
    begin = time.monotonic()
    loop.train(config, output / name)
    record[name] = {
      "minutes": round((time.monotonic() - begin) / 60, 1),
      "settings": dict(settings),
      **last_evaluation(output / name),
    }
    record = {row: record[row] for row in ROWS if row in record}
    files.write_json(output / "ablation.json", record)
    print(json.dumps(record[name], indent=2), flush=True)
  print(table(record))


def split(path: str, output: epath.Path) -> None:
  """Write train.npz and held_out.npz, nine tenths and one."""
  arrays = np.load(path)
  n = len(arrays["images"])
  order = np.random.default_rng(0).permutation(n)
  for name, rows in (
    ("held_out", order[: n // 10]),
    ("train", order[n // 10 :]),
  ):
    content = {key: arrays[key][rows] for key in ("images", "labels")}
    np.savez(
      output / f"{name}.npz", **content, class_names=arrays["class_names"]
    )


def last_evaluation(workdir: epath.Path) -> dict:
  lines = (workdir / "metrics.jsonl").read_text().splitlines()
  records = [json.loads(line) for line in lines]
  last = [record for record in records if "eval/psnr" in record][-1]
  return {
    name.removeprefix("eval/"): value
    for name, value in last.items()
    if name.startswith("eval/")
  }


def table(record: dict) -> str:
  """Return a row of Markdown each."""
  lines = [
    "| | PSNR | SSIM | codes | used by scale | explained by scale | min |",
    "|---|---|---|---|---|---|---|",
  ]
  for name, row in record.items():
    S = sum(key.startswith("codes_used/") for key in row)
    used = [f"{row[f'codes_used/{s}']:.0f}" for s in range(S)]
    explained = [f"{row[f'explained/{s}']:.2f}" for s in range(S)]
    lines.append(
      f"| {name} | {row['psnr']:.2f} | {row['ssim']:.3f} | "
      f"{row['code_share']:.2f} | {' '.join(used)} | {' '.join(explained)} | "
      f"{row['minutes']} |"
    )
  return "\n".join(lines)


if __name__ == "__main__":
  main()
