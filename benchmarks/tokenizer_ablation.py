"""What each part of the tokenizer recipe does, one added after the other.

    python benchmarks/tokenizer_ablation.py --data emoji64.npz --output DIR

The archive holds `images` (uint8, RGB), `labels` and `class_names`. A tenth of
it is held out. All rows take the same steps over the same batches. Writes
DIR/ROW, a workdir whose report.html has pictures, ablation.json, and
reconstructions.png: held-out images, and what each row makes of all scales and
of the first three. A later call goes on with rows that are missing or were
interrupted.
"""

import argparse
import hashlib
import json
import time

import numpy as np
from etils import epath

import var_jax
from configs import tokenizer as presets
from var_jax import files, images
from var_jax.data import sources
from var_jax.training import loop, pictures

COLUMNS = 12
COARSE = 3  # scales, of the pictures of few

# Each row has what those above it have.
ROWS = {
  "plain": {},
  "living codes": {"loss.revive_every": 50, "loss.kmeans_rounds": 5},
  "scale dropout": {"loss.scale_dropout": 0.1},
  "adversary": {
    "adversary.weight": 0.5,
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
  "loss.scale_dropout": 0.0,
  "collapse.policy": "report",
}


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--data", required=True)
  parser.add_argument("--output", required=True)
  parser.add_argument("--rows", default=",".join(ROWS))
  parser.add_argument("--steps", type=int, default=0, help="of the preset if 0")
  args = parser.parse_args()

  output, asked = epath.Path(args.output), args.rows.split(",")
  for name in asked:
    if name not in ROWS:
      raise SystemExit(f"row {name!r} is not one of {', '.join(ROWS)}.")
  if args.steps < 0:
    raise SystemExit(f"steps {args.steps} is negative; 0 takes the preset's.")
  source = sources.open_source(f"npz:{args.data}", "train")
  steps = args.steps or presets.get_config("emoji64").steps
  same = {
    "steps": steps,
    "data": hashlib.sha256(source.images.tobytes()).hexdigest(),
  }
  before = output / "ablation.json"
  record = files.read_json(before) if before.exists() else {}
  for name, row in record.items():
    for key, value in {**same, "settings": settings_of(name)}.items():
      if row.get(key) != value:
        raise SystemExit(
          f"row {name} of {output} has {key} {row.get(key)}, not {value}; use "
          "another folder."
        )
  output.mkdir(parents=True, exist_ok=True)
  split(source, output)
  held_out = np.load(output / "held_out.npz")["images"]
  for name in ROWS:
    if name not in asked or name in record:
      continue
    settings = settings_of(name)
    config = presets.get_config("emoji64")
    config.update_from_flattened_dict(settings)
    config.data.source = f"npz:{output / 'train.npz'}"
    config.data.eval_source = f"npz:{output / 'held_out.npz'}"
    config.steps = config.checkpoint_every = config.eval_every = steps
    begin = time.monotonic()
    loop.train(config, output / name)
    record[name] = {
      "minutes": round((time.monotonic() - begin) / 60, 1),
      **same,
      "settings": settings,
      **last_evaluation(output / name),
    }
    record = {row: record[row] for row in ROWS if row in record}
    files.write_json(output / "ablation.json", record)
    print(json.dumps(record[name], indent=2), flush=True)
  compare(output, record, held_out)
  files.write_json(output / "ablation.json", record)
  print(table(record))


def settings_of(row: str) -> dict:
  """Return what a row changes of the preset: its own, and those above it."""
  settings = dict(_OFF)
  for name, more in ROWS.items():
    settings |= more
    if name == row:
      return settings
  raise ValueError(f"row {row!r} is not one of {', '.join(ROWS)}.")


def split(source, output: epath.Path) -> None:
  """Write train.npz and held_out.npz, nine tenths and one."""
  n = len(source)
  order = np.random.default_rng(0).permutation(n)
  for name, rows in (
    ("held_out", order[: n // 10]),
    ("train", order[n // 10 :]),
  ):
    np.savez(
      output / f"{name}.npz",
      images=source.images[rows],
      labels=source.labels[rows],
      class_names=source.class_names,
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


def after_each_scale(workdir: epath.Path, pixels_BHW3) -> np.ndarray:
  """Return the images as the scales up to each make them, uint8 [S, ..]."""
  model = var_jax.load(workdir)
  again_SBHW3 = pictures.after_each_scale(
    model.models.tokenizer, model.params.tokenizer, images.to_float(pixels_BHW3)
  )
  return images.to_uint8(np.stack(again_SBHW3))


def compare(output: epath.Path, record: dict, pixels_BHW3) -> None:
  """Add to each row its PSNR after each scale; write reconstructions.png.

  The mean over images, of pixels that are rounded.
  """
  rows, coarse = {"real": list(pixels_BHW3[:COLUMNS])}, {}
  for name, row in record.items():
    again_SBHW3 = after_each_scale(output / name, pixels_BHW3)
    error = again_SBHW3.astype(np.float64) - pixels_BHW3
    error_SB = np.mean(np.square(error), axis=(2, 3, 4))
    psnr_S = np.mean(10 * np.log10(255**2 / error_SB), axis=1)
    row["psnr_by_scale"] = psnr_S.round(2).tolist()
    rows[name] = list(again_SBHW3[-1, :COLUMNS])
    coarse[f"{name}, {COARSE}"] = list(again_SBHW3[COARSE - 1, :COLUMNS])
  rows |= coarse
  grid = images.grid(list(rows.values()), list(rows))
  images.write_image(output / "reconstructions.png", grid)


def table(record: dict) -> str:
  """Return a row of Markdown each."""
  lines = [
    "| | PSNR | SSIM | codes | used by scale | explained by scale | PSNR after "
    "each scale | min |",
    "|---|---|---|---|---|---|---|---|",
  ]
  for name, row in record.items():
    S = sum(key.startswith("codes_used/") for key in row)
    used = [f"{row[f'codes_used/{s}']:.0f}" for s in range(S)]
    explained = [f"{row[f'explained/{s}']:.2f}" for s in range(S)]
    lines.append(
      f"| {name} | {row['psnr']:.2f} | {row['ssim']:.3f} | "
      f"{row['code_share']:.2f} | {' '.join(used)} | {' '.join(explained)} | "
      f"{' '.join(map(str, row['psnr_by_scale']))} | {row['minutes']} |"
    )
  return "\n".join(lines)


if __name__ == "__main__":
  try:
    main()
  except ValueError as error:
    raise SystemExit(f"{error}") from None
