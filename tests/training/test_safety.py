"""What a run does when it is told to stop, breaks, or is set otherwise."""

import gc
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from configs import tokenizer as tokenizer_presets
from configs import var as var_presets
from var_jax.checkpoints import store, weights
from var_jax.ledger import history
from var_jax.training import loop, observer, preemption, replay


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
  folder = tmp_path_factory.mktemp("tokenizer") / "workdir"
  config = tokenizer_presets.get_config("tiny")
  config.steps = 1
  config.data.batch_size = 4
  loop.train(config, folder)
  return folder


def var_config(tokenizer, **settings):
  config = var_presets.get_config("tiny")
  config.steps = 8
  config.tokenizer_path = str(tokenizer)
  config.data.batch_size = 8
  config.model.depth, config.model.width, config.model.heads = 1, 32, 2
  config.log_every, config.checkpoint_every = 1, 4
  config.keep_checkpoints = 10
  config.update_from_flattened_dict(settings)
  return config


@pytest.fixture(scope="module")
def undisturbed(tokenizer, tmp_path_factory):
  folder = tmp_path_factory.mktemp("undisturbed")
  loop.train(var_config(tokenizer), folder)
  return folder


def params_of(workdir):
  return weights.read_transformer(workdir, weights="raw")[1]


def assert_same_params(one, other):
  jax.tree.map(np.testing.assert_array_equal, params_of(one), params_of(other))


def records(workdir):
  return history.History.read(workdir / "ledger.jsonl")


def at_step(monkeypatch, step, action):
  """Do something when the numbers of a step are read."""
  plain = observer.Observer.step

  def and_act(self, number, metrics):
    plain(self, number, metrics)
    if number == step:
      action()

  monkeypatch.setattr(observer.Observer, "step", and_act)


def test_sigterm_saves_the_step_that_is_reached(
  tokenizer, undisturbed, tmp_path, monkeypatch
):
  with monkeypatch.context() as patch:
    at_step(patch, 2, lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(preemption.Preempted) as stopped:
      loop.train(var_config(tokenizer), tmp_path)
  # The numbers of step 2 were read while step 3 was running.
  assert stopped.value.step == 3
  assert store.all_steps(tmp_path) == [3]
  assert list(records(tmp_path).steps) == [1, 2, 3]
  loop.train(var_config(tokenizer), tmp_path)
  assert_same_params(tmp_path, undisturbed)
  # It has what the undisturbed one has, and no average that nobody asked for.
  items = [
    sorted(item.name for item in (folder / "checkpoints" / "8").iterdir())
    for folder in (tmp_path, undisturbed)
  ]
  assert items[0] == items[1] and "ema" not in items[0]


def test_sigterm_is_what_it_was_after_a_run(undisturbed):
  assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_another_config_is_an_error_that_names_all_differences(
  tokenizer, undisturbed
):
  config = var_config(tokenizer, **{"seed": 1, "optimizer.b2": 0.9})
  message = "optimizer.b2 is 0.95 there and 0.9 here; seed is 0 there and 1"
  with pytest.raises(ValueError, match=message):
    loop.train(config, undisturbed)


def test_another_config_is_used_where_that_is_allowed(
  tokenizer, undisturbed, tmp_path
):
  workdir = tmp_path / "changed"
  shutil.copytree(undisturbed, workdir)
  settings = {
    "steps": 9,
    "model.dropout": 0.1,
    "optimizer.clip_norm": 0.0,
    "ema_decay": 0.9,
  }
  config = var_config(tokenizer, **settings)
  loop.train(config, workdir, allow_config_change=True)
  assert store.latest_step(workdir) == 9
  there = json.loads((workdir / "config.json").read_text())
  assert there["config"]["steps"] == 9
  assert there["transformer"]["dropout"] == 0.1
  starts = records(workdir).starts
  assert [start["step"] for start in starts] == [0, 8]
  assert starts[1]["provenance"]["config"]["steps"] == 9
  # Weights of before the change belong to it still.
  shutil.rmtree(workdir / "checkpoints" / "9")
  assert_same_params(workdir, undisturbed)


def test_a_batch_cannot_change_within_a_workdir(
  tokenizer, undisturbed, tmp_path
):
  workdir = tmp_path / "changed"
  shutil.copytree(undisturbed, workdir)
  config = var_config(tokenizer, **{"data.batch_size": 4, "steps": 9})
  with pytest.raises(ValueError, match="batch_size 4 is not that of .*8, 8; "):
    loop.train(config, workdir, allow_config_change=True)


def test_a_change_that_fits_no_checkpoint_changes_nothing(
  tokenizer, undisturbed, tmp_path
):
  workdir = tmp_path / "changed"
  shutil.copytree(undisturbed, workdir)
  shutil.rmtree(workdir / "checkpoints" / "8")
  before = (workdir / "config.json").read_bytes()
  config = var_config(tokenizer, **{"model.width": 64})
  with pytest.raises(
    ValueError, match="4 cannot be read: .* has shape .*, the config"
  ):
    loop.train(config, workdir, allow_config_change=True)
  assert (workdir / "config.json").read_bytes() == before


def test_a_loss_that_is_not_finite_stops_and_names_step_and_samples(
  tokenizer, tmp_path
):
  config = var_config(tokenizer, **{"optimizer.learning_rate": 1e30})
  with pytest.raises(ValueError) as stopped:
    loop.train(config, tmp_path)
  message = str(stopped.value)
  assert "\n" not in message and "guard.policy" in message
  (step,) = [
    r["step"] for r in records(tmp_path).steps.values() if r["skipped"]
  ]
  assert f"step {step}: loss nan" in message
  seen = np.concatenate([record["index"] for record in samples(tmp_path)])
  named = message.partition("samples ")[2].partition(" of the source")[0]
  assert {int(i) for i in named.split(", ")} <= set(seen.tolist())


def samples(workdir):
  lines = (workdir / "ledger.jsonl").read_text().splitlines()
  return [r for r in map(json.loads, lines) if r["kind"] == "samples"]


def spiky_config(tokenizer, folder, policy):
  """One image of noise among blank ones: its batch is a spike."""
  images = np.zeros((40, 16, 16), np.uint8)
  images[7] = np.random.default_rng(0).integers(0, 256, (16, 16))
  source = folder / "images.npz"
  np.savez(source, images=images, labels=np.arange(40) % 2)
  settings = {
    "data.source": f"npz:{source}",
    "optimizer.learning_rate": 1.0,
    "guard.policy": policy,
    "guard.spike_factor": 1.5,
    "guard.warmup": 4,
    "guard.decay": 0.5,  # the loss falls fast
    "steps": 12,
    "checkpoint_every": 3,
  }
  if policy == "none":
    settings |= {"guard.policy": "stop", "guard.spike_factor": 0.0}
  return var_config(tokenizer, **settings)


def skipped(steps):
  return [step for step, record in steps.items() if record["skipped"]]


def digests(steps):
  return [record["batch_digest"] for record in steps.values()]


@pytest.fixture(scope="module")
def spiky(tokenizer, tmp_path_factory):
  """Return {policy: workdir} of the same twelve steps."""
  root = tmp_path_factory.mktemp("spiky")
  for policy in ("none", "skip", "rollback"):
    config = spiky_config(tokenizer, root, policy)
    loop.train(config, root / policy)
  return root


def test_a_spike_can_be_skipped(spiky):
  steps = records(spiky / "skip").steps
  refused = skipped(steps)
  assert 1 <= len(refused) <= 3 and list(steps) == list(range(1, 13))
  assert skipped(records(spiky / "none").steps) == []
  seen = {step: record["loss"] for step, record in steps.items()}
  calm = records(spiky / "none").steps
  for step in range(1, refused[0] + 1):  # up to there nothing is different
    assert seen[step] == calm[step]["loss"]
  assert seen[refused[0] + 1] != calm[refused[0] + 1]["loss"]


def test_a_spike_can_be_rolled_back_and_the_clock_goes_on(spiky):
  told = records(spiky / "rollback")
  assert told.rollbacks
  for record in told.rollbacks:
    step, to = record["step"], record["to_step"]
    assert told.steps[step]["skipped"]
    assert to == (step - 1) // 3 * 3  # the newest that was kept
  # The batches are those of a run without any trouble.
  assert list(told.steps) == list(range(1, 13))
  assert digests(told.steps) == digests(records(spiky / "none").steps)


def test_a_run_that_rolled_back_resumes_as_if_it_was_not_stopped(
  spiky, tokenizer, tmp_path
):
  whole, again = spiky / "rollback", tmp_path / "again"
  step = records(whole).rollbacks[0]["step"]
  shutil.copytree(whole, again)
  for kept in store.all_steps(again):
    if kept >= step:
      shutil.rmtree(again / "checkpoints" / str(kept))
  config = spiky_config(tokenizer, spiky, "rollback")
  loop.train(config, again)
  assert_same_params(again, whole)
  assert not records(again).contradictions


def test_sigterm_does_not_change_what_is_rolled_back_to(
  spiky, tokenizer, tmp_path, monkeypatch
):
  whole = spiky / "rollback"
  record = records(whole).rollbacks[0]
  config = spiky_config(tokenizer, spiky, "rollback")
  config.keep_checkpoints = 1
  # Saved between the checkpoint that counts and the spike.
  read = record["to_step"] + 1
  assert read + 1 < record["step"]
  with monkeypatch.context() as patch:
    at_step(patch, read, lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(preemption.Preempted):
      loop.train(config, tmp_path)
  loop.train(config, tmp_path)
  assert records(tmp_path).rollbacks[0]["to_step"] == record["to_step"]
  assert_same_params(tmp_path, whole)


def test_a_last_step_that_is_refused_is_saved_all_the_same(tokenizer, tmp_path):
  config = var_config(tokenizer, **{"guard.policy": "rollback", "steps": 2})
  config.optimizer.learning_rate = 1e30  # step 1 is the last good one
  loop.train(config, tmp_path)
  (record,) = records(tmp_path).rollbacks
  assert (record["step"], record["to_step"]) == (2, 0)
  assert store.latest_step(tmp_path) == 2
  assert np.isfinite(params_of(tmp_path)["params"]["pos"]).all()


def test_growing_in_parts_with_workers_resumes_and_replays(tokenizer, tmp_path):
  settings = {
    "progressive.until": 0.7,
    "progressive.first": 0,
    "accumulate": 2,
    "data.workers": 1,
    "model.remat": "dots",
    "model.dropout": 0.1,
  }
  config = var_config(tokenizer, **settings)
  loop.train(config, tmp_path / "whole")
  shutil.copytree(tmp_path / "whole", tmp_path / "again")
  shutil.rmtree(tmp_path / "again" / "checkpoints" / "8")
  loop.train(config, tmp_path / "again")
  assert_same_params(tmp_path / "again", tmp_path / "whole")
  lines = (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()
  scales = [sum("loss_scale" in key for key in json.loads(x)) for x in lines]
  assert scales[0] == 1 and scales[-1] == 3 and scales == sorted(scales)
  again = replay.Replay(tmp_path / "again", 3, 6)
  assert [v.differs for v in again.verdicts()] == [()] * 4
  assert again.causes == []


@pytest.mark.parametrize("name", ["", "s3://bucket/run", "http://host/run"])
def test_a_workdir_is_a_folder(tokenizer, name):
  with pytest.raises(ValueError, match="is no folder|is no place that can"):
    loop.train(var_config(tokenizer), name)


def test_a_folder_that_is_no_runs_is_left_alone(tokenizer, tmp_path):
  (tmp_path / "README.md").write_text("mine")
  with pytest.raises(ValueError, match="has a README.md and is no run's"):
    loop.train(var_config(tokenizer), tmp_path)
  assert [path.name for path in tmp_path.iterdir()] == ["README.md"]


def test_two_runs_cannot_begin_in_one_workdir(tokenizer, tmp_path):
  held = f"""
import sys
from var_jax.ledger.records import Ledger
ledger = Ledger({str(tmp_path / "ledger.jsonl")!r})
print("held", flush=True)
sys.stdin.read()
"""
  with subprocess.Popen(
    [sys.executable, "-c", held], stdin=-1, stdout=-1, text=True
  ) as other:
    other.stdout.readline()
    with pytest.raises(ValueError, match="is being written by another"):
      loop.train(var_config(tokenizer), tmp_path)
    other.stdin.close()
  assert [path.name for path in tmp_path.iterdir()] == ["ledger.jsonl"]
  loop.train(var_config(tokenizer, steps=1), tmp_path)


def test_rolling_back_without_end_is_an_error(tokenizer, tmp_path):
  config = var_config(tokenizer, **{"guard.policy": "rollback"})
  config.optimizer.learning_rate = 1e30
  with pytest.raises(ValueError, match="after 3 rollbacks to step 4"):
    loop.train(config, tmp_path)
  # That a rolled back state was saved on the way does not start a new count.
  assert [r["to_step"] for r in records(tmp_path).rollbacks] == [0, 0, 4]


# Orbax drops its coroutines unawaited when one of them fails.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_full_disk_keeps_the_checkpoint_before(
  tokenizer, undisturbed, tmp_path, monkeypatch
):
  before = resource.getrlimit(resource.RLIMIT_FSIZE)

  def fill():  # no file can grow beyond it, but the ledger
    while store.latest_step(tmp_path) != 4:
      time.sleep(0.01)
    limit = (tmp_path / "ledger.jsonl").stat().st_size + 10_000
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))

  try:
    with monkeypatch.context() as patch:
      at_step(patch, 6, fill)
      with pytest.raises(OSError, match="checkpoint 8 could not be saved"):
        loop.train(var_config(tokenizer), tmp_path)
      gc.collect()
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
  assert store.all_steps(tmp_path) == [4]
  loop.train(var_config(tokenizer), tmp_path)
  assert_same_params(tmp_path, undisturbed)
  left = [path.name for path in (tmp_path / "checkpoints").iterdir()]
  assert sorted(left) == ["4", "8"]


def test_the_best_the_newest_and_every_nth_are_kept(tokenizer, tmp_path):
  config = var_config(tokenizer)
  config.optimizer.learning_rate = 10.0
  config.eval_every = config.checkpoint_every = 1
  config.eval_samples, config.pictures = 16, 0
  config.keep_checkpoints, config.keep_best, config.keep_every = 1, 1, 3
  loop.train(config, tmp_path)
  lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
  losses = {
    record["step"]: record["eval/loss_mean"]
    for record in map(json.loads, lines)
    if "eval/loss_mean" in record
  }
  best = min(losses, key=losses.get)
  assert set(store.all_steps(tmp_path)) == {best, 3, 6, 8}


def test_evaluation_is_the_same_each_time_and_changes_nothing(
  tokenizer, undisturbed, tmp_path
):
  config = var_config(tokenizer, eval_every=4, eval_samples=20)
  loop.train(config, tmp_path / "one")
  loop.train(config, tmp_path / "two")
  lines = [
    [
      line
      for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()
      if "eval/" in line
    ]
    for name in ("one", "two")
  ]
  assert len(lines[0]) == 2 and lines[0] == lines[1]
  assert_same_params(tmp_path / "one", undisturbed)


def test_the_log_shows_pictures(tokenizer, tmp_path):
  config = var_config(tokenizer, eval_every=8, eval_samples=8)
  loop.train(config, tmp_path)
  (events,) = (tmp_path / "tensorboard").iterdir()
  content = events.read_bytes()
  for name in (b"samples", b"scales", b"loss_scale/0", b"eval/loss_mean"):
    assert name in content
