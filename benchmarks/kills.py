"""Kill a run again and again, and show that it ends where it would have ended.

    python benchmarks/kills.py --kills 20

A small tokenizer is trained once undisturbed, and once with SIGKILL at random
moments, every other one while a checkpoint is being written. Both runs have to
end with the same parameters, bit for bit, and the same ledger of steps.
"""

import argparse
import os
import pathlib
import random
import signal
import subprocess
import sys
import tempfile
import time

import numpy as np

ROOT = pathlib.Path(__file__).parents[1]
EVERY = 3
SETTINGS = {
  "checkpoint_every": EVERY,
  "log_every": 5,
  "ledger_every": 5,
  "ema_decay": 0.9,
  "data.batch_size": 16,
  "data.transform": "jitter",
}
PATIENCE = 300.0  # seconds without which a start must save or end
LONGEST = 20.0  # seconds from a start to its kill
STEPS_A_KILL = 25  # more than a killed start gets, so that each finds a run


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--kills", type=int, default=20)
  parser.add_argument("--seed", type=int, default=0)
  args = parser.parse_args()
  with tempfile.TemporaryDirectory() as folder:
    compare(pathlib.Path(folder), args.kills, random.Random(args.seed))


def compare(folder: pathlib.Path, kills: int, rng: random.Random) -> None:
  """Train with and without kills; raise AssertionError if they differ."""
  undisturbed, killed = folder / "undisturbed", folder / "killed"
  steps = STEPS_A_KILL * kills
  seconds = _time_of(undisturbed, folder, steps)
  print(f"undisturbed: {steps} steps in {seconds:.0f} s, start included")
  for i in range(kills):
    process = start(killed, folder, steps)
    print(f"kill {i + 1}: {_kill(process, killed, rng, i % 2 == 0)}")
  _time_of(killed, folder, steps)
  same(undisturbed, killed, steps)
  print(f"after {kills} kills: the same parameters and steps, bit for bit")


def same(one: pathlib.Path, other: pathlib.Path, steps: int) -> None:
  """Raise AssertionError unless two runs ended alike."""
  import jax

  from var_jax.checkpoints import weights
  from var_jax.ledger.history import History

  for which in ("raw", "ema"):
    pair = [weights.read_tokenizer(w, weights=which)[1] for w in (one, other)]
    jax.tree.map(np.testing.assert_array_equal, *pair)
  histories = [History.read(w / "ledger.jsonl") for w in (one, other)]
  told = [
    {step: _facts(record) for step, record in history.steps.items()}
    for history in histories
  ]
  assert list(told[0]) == list(range(1, steps + 1))
  assert told[0] == told[1]
  assert not histories[1].contradictions, histories[1].contradictions


def start(
  workdir: pathlib.Path, folder: pathlib.Path, steps: int
) -> subprocess.Popen:
  """Return a process that trains; compiled programs are kept in `folder`."""
  command = [
    *(sys.executable, "-m", "var_jax.cli", "train"),
    *("--config", str(ROOT / "configs/tokenizer.py:tiny")),
    *("--workdir", str(workdir), f"--config.steps={steps}"),
    *(f"--config.{name}={value}" for name, value in SETTINGS.items()),
  ]
  cache = {
    "JAX_COMPILATION_CACHE_DIR": str(folder / "compiled"),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
  }
  with (folder / f"{workdir.name}.log").open("a") as log:
    return subprocess.Popen(
      command, cwd=ROOT, env=os.environ | cache, stdout=log, stderr=log
    )


def _time_of(workdir: pathlib.Path, folder: pathlib.Path, steps: int) -> float:
  begin = time.monotonic()
  code = start(workdir, folder, steps).wait()
  if code:
    raise AssertionError((folder / f"{workdir.name}.log").read_text())
  return time.monotonic() - begin


def _kill(process, workdir, rng, inside_a_save: bool) -> str:
  """Kill a process that trains, and say when."""
  begin = time.monotonic()
  wait = rng.uniform(0.0, LONGEST)
  while process.poll() is None and time.monotonic() - begin < PATIENCE:
    if time.monotonic() - begin >= wait:
      if not inside_a_save or _saving(workdir):
        break
    time.sleep(0.002)
  process.send_signal(signal.SIGKILL)
  code = process.wait()
  after = time.monotonic() - begin
  return (
    f"after {after:.1f} s, {'inside a save, ' if _saving(workdir) else ''}"
    f"newest step {_newest(workdir)}"
    + ("" if code == -signal.SIGKILL else f" (it had ended with {code})")
  )


def _saving(workdir: pathlib.Path) -> bool:
  return any(workdir.glob("checkpoints/*.orbax-checkpoint-tmp*"))


def _newest(workdir: pathlib.Path) -> int:
  steps = [
    int(p.name) for p in workdir.glob("checkpoints/[0-9]*") if p.name.isdigit()
  ]
  return max(steps, default=0)


def _facts(record) -> dict:
  """Return what a record says of its step; not where it stands."""
  return {k: v for k, v in record.items() if k != "number"}


if __name__ == "__main__":
  main()
