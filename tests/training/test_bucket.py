"""A run whose workdir is in a bucket, beside the same run on a disk.

The bucket is `bucket_server.py`: no real one was ever reached.
"""

import json
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from etils import epath

from configs import tokenizer as tokenizer_presets
from configs import var as var_presets
from var_jax import cli, files, images, loading
from var_jax.checkpoints import store, weights
from var_jax.ledger.history import History
from var_jax.training import loop, profiling, report, setup

VAR_STEPS = 6


def tokenizer_config():
  config = tokenizer_presets.get_config("tiny")
  config.steps = 2
  config.data.batch_size = 8
  config.ema_decay = 0.0  # half the objects
  return config


VAR_SETTINGS = dict(
  steps=VAR_STEPS, ema_decay=0.0, log_every=1, checkpoint_every=2
)


def var_config(tokenizer_path):
  config = var_presets.get_config("tiny")
  config.update(VAR_SETTINGS)
  config.data.batch_size = 8
  config.tokenizer_path = str(tokenizer_path)
  return config


def train_until_killed(workdir, tokenizer_path, log):
  """Kill a run of `var_config` once it has a checkpoint: most likely in a save.

  On the command line, as all else about it is.
  """
  settings = {
    **VAR_SETTINGS,
    "data.batch_size": 8,
    "tokenizer_path": tokenizer_path,
  }
  flags = [f"--config.{name}={value}" for name, value in settings.items()]
  command = ["train", "--config", "configs/var.py:tiny", "--workdir", workdir]
  with open(log, "w") as output:
    run = subprocess.Popen(
      [sys.executable, "-m", "var_jax.cli", *map(str, command), *flags],
      stdout=output,
      stderr=output,
    )
  while not store.all_steps(workdir):
    assert run.poll() is None, log.read_text()
    time.sleep(0.05)
  run.kill()
  assert run.wait() == -signal.SIGKILL


@pytest.fixture(scope="module")
def trained(bucket, tmp_path_factory):
  """Return (a folder, one in the bucket), each with a tokenizer and a VAR.

  The run in the bucket was killed once.
  """
  disk = epath.Path(tmp_path_factory.mktemp("trained"))
  there = files.absolute(f"{bucket}/runs")
  for root in (disk, there):
    loop.train(tokenizer_config(), root / "tokenizer")
    if root is there:
      log = tmp_path_factory.mktemp("killed") / "log"
      train_until_killed(root / "var", root / "tokenizer", log)
    loop.train(var_config(root / "tokenizer"), root / "var")
  return disk, there


def content(folder, prefix=""):
  """Return the names of all files, those of arrays and events left out."""
  found = set()
  for path in folder.iterdir():
    name = prefix + path.name
    if not path.is_dir():
      found.add(name)
    elif path.name not in ("d", "ocdbt.process_0", "tensorboard"):
      found |= content(path, f"{name}/")
  return found


def metrics(workdir):
  lines = (workdir / "metrics.jsonl").read_text().splitlines()
  records = [json.loads(line) for line in lines]
  for record in records:
    for name in report.TIMING_KEYS:
      record.pop(name, None)
  return records


def steps(workdir):
  """Return what the ledger says of each step, but for its place in it."""
  history = History.read(workdir / "ledger.jsonl")
  assert not history.contradictions
  return [{**record, "number": None} for record in history.steps.values()]


def test_a_bucket_holds_what_a_disk_holds(trained):
  disk, there = trained
  for name in ("tokenizer", "var"):
    assert content(there / name) == content(disk / name)
    checkpoints = f"{name}/checkpoints"
    assert content(there / checkpoints) == content(disk / checkpoints)


def test_a_killed_run_in_a_bucket_ends_as_one_on_a_disk(trained):
  disk, there = trained
  assert metrics(there / "var") == metrics(disk / "var")
  assert steps(there / "var") == steps(disk / "var")
  assert len(steps(there / "var")) == VAR_STEPS
  assert steps(there / "var")[-1]["checksum"]  # so the parameters are equal
  starts = History.read(there / "var" / "ledger.jsonl").starts
  first, second = (start["step"] for start in starts)
  assert first == 0 and second in (2, 4)


def test_models_in_a_bucket_draw_and_export_as_those_on_a_disk(
  trained, tmp_path
):
  for number, root in enumerate(trained):
    step = root / "var" / "checkpoints" / str(VAR_STEPS)
    draw = ["sample", "--checkpoint", step, "--labels", "3", "--count", "1"]
    assert not command_line(*draw, "--output", root / "3.png")
    export = ["convert", "--checkpoint", root / "tokenizer", "--to"]
    output = tmp_path / str(number)
    assert not command_line(*export, "safetensors", "--output", output)
  drawn = [(root / "3.png").read_bytes() for root in trained]
  assert drawn[0] == drawn[1]
  assert images.read_image(trained[1] / "3.png").ndim == 3
  exported = [tmp_path / number / "vae.safetensors" for number in "01"]
  assert exported[0].read_bytes() == exported[1].read_bytes()


def command_line(*arguments):
  return cli.main([str(argument) for argument in arguments])


def test_a_run_in_a_bucket_replays(trained, capsys):
  workdir = trained[1] / "var"
  assert not command_line("replay", "--workdir", workdir, "--from=5", "--to=6")
  assert "steps 5..6 are equal, bit for bit" in capsys.readouterr().out


def test_a_run_starts_from_a_model_in_a_bucket(trained, tmp_path):
  config = tokenizer_config()
  states = []
  for root in trained:
    config.init_from = str(root / "tokenizer")
    states.append(setup.open_run(config, tmp_path).fresh())
  jax.tree.map(np.testing.assert_array_equal, *states)
  trained_to = weights.read_tokenizer(trained[0] / "tokenizer")[1]
  jax.tree.map(np.testing.assert_array_equal, states[0].params, trained_to)


def test_an_unfinished_step_in_a_bucket_is_no_checkpoint(trained):
  _, there = trained
  kept = store.all_steps(there / "var")
  left = there / "var" / "checkpoints" / "8"
  (left / "params" / "_METADATA").write_text("{}")
  (left / "params" / "commit_success.txt").write_text("")
  try:
    assert sorted(store.all_steps(there / "var")) == sorted(kept)
    assert weights.newest(there / "var").name == str(VAR_STEPS)
    with pytest.raises(ValueError, match="8 is no finished checkpoint; "):
      loading.load(left)
    store.Store(there / "var", keep=10).close()  # what a start tidies up
    assert not left.exists()
  finally:
    left.rmtree(missing_ok=True)


def test_a_copied_tokenizer_counts_when_all_of_it_is_there(trained):
  """A kill on the way leaves a folder that has its name."""
  marked = trained[1] / "var" / "tokenizer" / "checkpoints" / "0"
  mark = marked / "commit_success.txt"
  content = mark.read_bytes()
  mark.unlink()
  with pytest.raises(ValueError, match="holds no finished checkpoint"):
    loading.load(trained[1] / "var")
  mark.write_bytes(content)
  assert weights.newest(marked.parent.parent).name == "0"


def test_events_of_each_start_are_in_the_bucket(trained):
  found = sorted((trained[1] / "var" / "tensorboard").iterdir())
  starts = History.read(trained[1] / "var" / "ledger.jsonl").starts
  begins = [path.name.rpartition(".")[2] for path in found]
  assert begins == [f"{start['step']:09d}" for start in starts]
  assert all(path.stat().length > 100 for path in found)


# aiohttp's, of what gcsfs sends above a megabyte.
@pytest.mark.filterwarnings("ignore:Sending a large body:ResourceWarning")
def test_a_trace_gets_into_the_bucket(bucket):
  folder = files.absolute(f"{bucket}/profile")
  profiler = profiling.Profiler(folder, (1, 1))
  with profiler.step(1, ()):
    jax.block_until_ready(jax.numpy.ones(3) + 1)
  profiler.close()
  (run,) = (folder / "plugins" / "profile").iterdir()
  assert any(path.name.endswith(".xplane.pb") for path in run.iterdir())


def test_a_doctor_writes_to_a_bucket_and_leaves_nothing(bucket, capsys):
  command_line("doctor", "--workdir", f"{bucket}/new")
  assert "cannot be written" not in capsys.readouterr().out
  assert not files.absolute(f"{bucket}/new").exists()


def test_a_bucket_that_is_not_there_is_one_line(bucket):
  with pytest.raises(ValueError, match="workdir gs://none/run: gs://none/run/"):
    loop.train(var_config("tokenizer"), "gs://none/run")
  with pytest.raises(OSError, match="gs://none/3.png cannot be written"):
    images.write_image("gs://none/3.png", np.zeros((2, 2, 3), np.uint8))
  with pytest.raises(ValueError, match="gs://none/run/config.json does not ex"):
    loading.load("gs://none/run")
