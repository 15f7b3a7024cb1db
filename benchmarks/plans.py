"""Plan the published models on pods; print the table of docs/pods.md.

    python benchmarks/plans.py --folder runs/plans

A row takes minutes to compile. FOLDER keeps one JSON each: rows that are there
are not compiled again.
"""

import argparse
import json
import pathlib
import subprocess
import sys

# Each on the mesh that `--mesh auto` puts first.
ROWS = (
  ("d16", "v5e:4x4", 1, "data=16"),
  ("d16", "v5e:16x16", 1, "data=256"),
  ("d20", "v5e:4x4", 1, "data=8,fsdp=2"),
  ("d20", "v5p:4x4x4", 1, "data=64"),
  ("d24", "v5e:16x16", 1, "data=128,fsdp=2"),
  ("d24", "v6e:16x16", 1, "data=128,fsdp=2"),
  ("d30", "v5e:16x16", 1, "data=64,fsdp=4"),
  ("d30", "v5p:4x4x4", 1, "data=64"),
  ("d36-512", "v5e:16x16", 1, "data=64,fsdp=4"),
  ("d36-512", "v6e:16x16", 1, "data=128,fsdp=2"),
  ("d30", "v5e:16x16", 2, "data=64,fsdp=4"),
)
_GIB = 2.0**30


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--folder", type=pathlib.Path, required=True)
  parser.add_argument(
    "--rows",
    type=int,
    nargs="+",
    choices=range(len(ROWS)),
    default=range(len(ROWS)),
    help="of the table, from 0; all of them if unsaid",
  )
  args = parser.parse_args()
  args.folder.mkdir(parents=True, exist_ok=True)
  for row in (ROWS[number] for number in args.rows):
    if not _path(args.folder, row).exists():
      _plan(args.folder, row)
  print(_table(args.folder))


def _path(folder: pathlib.Path, row) -> pathlib.Path:
  words = "_".join(map(str, row))
  return folder / f"{words.replace(':', '_').replace(',', '_')}.json"


def _plan(folder: pathlib.Path, row) -> None:
  preset, topology, slices, mesh = row
  command = [sys.executable, "-m", "var_jax.cli", "plan"]
  command += [f"--config=configs/var.py:{preset}", f"--topology={topology}"]
  command += [f"--slices={slices}", f"--mesh={mesh}"]
  done = subprocess.run([*command, f"--output={_path(folder, row)}"])
  # 1 is also what a plan that does not fit ends with.
  if not _path(folder, row).exists():
    sys.exit(done.returncode)


def _table(folder: pathlib.Path) -> str:
  lines = [
    "| model | slice | mesh | images a chip | peak GiB | estimate "
    "| compiled in s | PFLOP a step | GiB over ICI | over DCN | at least ms "
    "| images/s | busy | days |",
    "|---" * 14 + "|",
  ]
  for row in ROWS:
    if _path(folder, row).exists():
      (found,) = json.loads(_path(folder, row).read_text())
      lines.append(_line(row, found))
  return "\n".join(lines)


def _line(row, found) -> str:
  preset, topology, slices, _ = row
  (program,) = found["programs"]
  available = found["available_bytes"] / _GIB
  peak, seconds = f"does not fit; {'; '.join(found['remedies'])}", ""
  if program["fits"]:
    peak = f"{program['peak'] / _GIB:.2f} of {available:.2f}"
    seconds = f"{program['compile_seconds']:.0f}"
  limits = found["bound_seconds"]
  slowest = max(limits, key=limits.get)
  traffic = found["traffic_bytes"]
  cells = (
    preset,
    f"{slices} x {topology}" if slices > 1 else topology,
    found["mesh"],
    f"{found['batch'] / found['chips']:g}",
    peak,
    f"{found['estimate']['peak'] / _GIB:.2f}",
    seconds,
    f"{found['flops'] / 1e15:.2f}",
    f"{traffic['ici'] / _GIB:.2f}",
    f"{traffic['dcn'] / _GIB:.3f}" if slices > 1 else "",
    f"{1000 * limits[slowest]:.0f} ({slowest})",
    f"{found['images_per_second']:.0f}",
    f"{100 * found['busy']:.0f}%",
    f"{found['days']:.1f}",
  )
  return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
  main()
