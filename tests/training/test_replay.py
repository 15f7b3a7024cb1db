"""A replay proves a clean run, and names what is not as it was."""

import json
import os
import pathlib
import shutil
import subprocess
import sys

import numpy as np
import pytest

from configs import tokenizer as presets
from var_jax import cli
from var_jax.training import checks, loop, replay

ROOT = pathlib.Path(__file__).parents[2]


def config_for(source):
  config = presets.get_config("tiny")
  config.steps = 6
  config.data.source = f"npz:{source}"
  config.data.batch_size = 4
  config.data.transform = "jitter"
  config.loss.update(revive_every=2, kmeans_rounds=2, scale_dropout=0.3)
  config.collapse.update(policy="revive", every=2, min_perplexity=4.0)
  config.adversary.update(
    weight=0.1, start=2, lecam=0.1, channels=8, layers=2, norm_groups=4
  )
  config.log_every = config.ledger_every = 1
  config.checkpoint_every = 3
  config.keep_checkpoints = 2
  return config


def write_images(path, images):
  np.savez(path, images=images, labels=np.arange(len(images)) % 2)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
  """Return (workdir, npz, its images) of a run of six steps."""
  folder = tmp_path_factory.mktemp("replay")
  source = folder / "images.npz"
  images = np.random.default_rng(0).integers(0, 256, (12, 16, 16), np.uint8)
  write_images(source, images)
  loop.train(config_for(source), folder / "run")
  return folder / "run", source, images


@pytest.fixture
def copy(run, tmp_path):
  """A copy of the workdir, to break."""
  return pathlib.Path(shutil.copytree(run[0], tmp_path / "copy"))


def command(workdir, first, last):
  return cli.main(
    ["replay", "--workdir", str(workdir), "--from", str(first)]
    + ["--to", str(last)]
  )


def line_of(capsys):
  out, err = capsys.readouterr()
  assert err.count("\n") == 1 and err.startswith("var-jax: ")
  return out, err


@pytest.mark.parametrize("first, last", [(1, 2), (5, 6)])
def test_a_clean_run_is_equal_bit_for_bit(run, capsys, first, last):
  before = {p: p.stat().st_mtime_ns for p in run[0].rglob("*")}
  assert command(run[0], first, last) == 0
  out, _ = capsys.readouterr()
  assert f"steps {first}..{last} are equal, bit for bit" in out
  assert "not as it was" not in out
  assert {p: p.stat().st_mtime_ns for p in run[0].rglob("*")} == before


def test_a_run_of_before_a_setting_came_is_replayed(run, monkeypatch):
  now = checks.run_config

  def later(kind):
    config = now(kind)
    config.came_later = ""
    return config

  monkeypatch.setattr(checks, "run_config", later)
  assert len(list(replay.Replay(run[0], 2, 2).verdicts())) == 1


def test_one_flipped_pixel_is_named(run, capsys):
  _, source, images = run
  changed = images.copy()
  changed[7, 3, 3] ^= 1
  try:
    write_images(source, changed)
    assert command(run[0], 4, 6) == 1
  finally:
    write_images(source, images)
  out, err = line_of(capsys)
  assert "data: sample 7 " in out + err and "sample 6" not in out
  assert "differ, the first is step" in err


def test_one_changed_line_of_the_loss_is_named(run, tmp_path):
  package = tmp_path / "var_jax"
  shutil.copytree(ROOT / "var_jax", package)
  path = package / "training" / "tokenizer_step.py"
  line = "loss = rest + cfg.quantizer_weight * quantized.loss"
  text = path.read_text()
  assert text.count(line) == 1
  path.write_text(text.replace(line, f"{line} * 1.001"))
  done = subprocess.run(
    [sys.executable, "-m", "var_jax.cli", "replay", "--workdir", str(run[0])]
    + ["--from", "4", "--to", "5"],
    cwd=tmp_path,
    env=os.environ | {"PYTHONPATH": str(tmp_path)},
    capture_output=True,
    text=True,
  )
  assert done.returncode == 1, done.stderr
  assert "code: var_jax/training/tokenizer_step.py changed" in done.stderr
  assert "the first is step 4" in done.stderr
  assert "losses.py" not in done.stdout + done.stderr


def test_one_edited_record_is_named(copy, capsys):
  path = copy / "ledger.jsonl"
  lines = path.read_text().splitlines(keepends=True)
  place = next(
    i
    for i, line in enumerate(lines)
    if json.loads(line)["kind"] == "step" and json.loads(line)["step"] == 5
  )
  loss = json.loads(lines[place])["loss"]
  lines[place] = lines[place].replace(repr(loss), repr(loss / 2))
  path.write_text("".join(lines))
  assert command(copy, 1, 2) == 1
  _, err = line_of(capsys)
  assert f"record {place + 1}" in err and "step 5" in err


def test_an_edited_config_is_named(copy, capsys):
  path = copy / "config.json"
  content = json.loads(path.read_text())
  content["config"]["optimizer"]["b2"] = 0.5
  path.write_text(json.dumps(content))
  assert command(copy, 4, 4) == 0  # the run was what its ledger says
  out, _ = capsys.readouterr()
  assert "not as it was: config: optimizer.b2 is 0.95" in out


def test_a_changed_checkpoint_is_named(copy, capsys):
  path = max(
    (copy / "checkpoints" / "3" / "params").rglob("*"),
    key=lambda path: path.stat().st_size if path.is_file() else 0,
  )
  data = bytearray(path.read_bytes())
  data[len(data) // 2] ^= 1
  path.write_bytes(bytes(data))
  assert command(copy, 4, 4) == 1
  assert "is not what was written" in line_of(capsys)[1]


@pytest.mark.parametrize(
  "first, last, message",
  [(4, 3, "4..3 are no range"), (5, 9, "no step 7, its last is 6")],
)
def test_steps_that_were_not_taken(run, first, last, message):
  with pytest.raises(ValueError, match=message):
    replay.Replay(run[0], first, last)


def test_a_workdir_without_a_ledger(copy):
  (copy / "ledger.jsonl").unlink()
  with pytest.raises(ValueError, match="ledger.jsonl does not exist"):
    replay.Replay(copy, 1, 2)
