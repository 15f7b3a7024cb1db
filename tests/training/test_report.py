"""What a run says of itself, against what it was told."""

import io
import json
import types

import jax
import numpy as np
import pytest
import rich.console
from etils import epath

from var_jax.training import interval, report


@pytest.fixture
def clock(monkeypatch):
  """Return a clock that stands still until it is moved."""
  fake = types.SimpleNamespace(now=100.0)
  fake.monotonic = lambda: fake.now
  monkeypatch.setattr(report, "time", fake)
  monkeypatch.setattr(interval, "time", fake)
  return fake


def console(terminal=False):
  return rich.console.Console(
    file=io.StringIO(), force_terminal=terminal, width=120, color_system=None
  )


def open_report(workdir, start=0, **options):
  settings = dict(
    workdir=epath.Path(workdir),
    start=start,
    steps=100,
    batch_size=8,
    tokens_per_image=10,
    flops_per_step=1e12,
    devices=4,
    device_kind="cpu",
    console=console(),
  )
  return report.Report(**(settings | options))


def lines(workdir):
  text = (workdir / "metrics.jsonl").read_text()
  return [json.loads(line) for line in text.splitlines()]


def without_timing(line):
  return {k: v for k, v in line.items() if k not in report.TIMING_KEYS}


def of_step(rng):
  return {
    "loss": rng.normal(size=()).astype(np.float32),
    "loss_scale": {"0": np.float32(rng.normal()), "1": np.float32(2.5)},
    "skipped": np.float32(0),
  }


def test_a_line_holds_the_numpy_means_of_all_steps_since_the_last(tmp_path):
  rng = np.random.default_rng(0)
  steps = [of_step(rng) for _ in range(7)]
  told = open_report(tmp_path)
  for step, values in enumerate(steps, start=1):
    told.step(step, values)
    if step in (3, 7):
      told.log(step)
  told.close()
  for line, window in zip(lines(tmp_path), (steps[:3], steps[3:]), strict=True):
    want = {
      "loss": np.mean([v["loss"] for v in window], dtype=np.float64),
      "loss_scale/0": np.mean(
        [v["loss_scale"]["0"] for v in window], dtype=np.float64
      ),
      "loss_scale/1": 2.5,
      "skipped_steps": 0,
    }
    got = without_timing(line)
    assert got.pop("step") == (3 if window[0] is steps[0] else 7)
    assert got.keys() == want.keys()
    for name in want:
      np.testing.assert_allclose(got[name], want[name], rtol=1e-15)


def test_skipped_steps_are_counted_and_part_of_no_mean(tmp_path):
  told = open_report(tmp_path)
  refused = {"loss": np.float32(np.nan), "skipped": np.float32(1)}
  told.step(1, {"loss": np.float32(2), "skipped": np.float32(0)})
  told.step(2, refused)
  told.step(3, {"loss": np.float32(4), "skipped": np.float32(0)})
  told.log(3)
  told.step(4, refused)
  told.log(4)
  told.close()
  first, second = map(without_timing, lines(tmp_path))
  assert first == {"step": 3, "loss": 3.0, "skipped_steps": 1}
  assert second == {"step": 4, "loss": "nan", "skipped_steps": 1}


def test_numbers_that_json_lacks_are_strings(tmp_path):
  told = open_report(tmp_path)
  told.step(1, {"a": np.float32(np.nan), "b": np.float32(np.inf)})
  told.log(1)
  told.evaluation(1, {"c": -np.inf})
  told.close()
  first, second = lines(tmp_path)
  assert (first["a"], first["b"], second["eval/c"]) == ("nan", "inf", "-inf")


def test_nothing_is_put_on_a_device(tmp_path):
  told = open_report(tmp_path)
  arrays = len(jax.live_arrays())
  with jax.transfer_guard("disallow_explicit"):
    for step in range(1, 5):
      told.step(step, of_step(np.random.default_rng(step)))
    told.log(4)
    told.evaluation(4, {"loss": np.float64(1)})
    told.overview({"params": {"w_DF": np.zeros((2, 3))}})
  told.close()
  assert len(jax.live_arrays()) == arrays


def test_rates_leave_out_the_first_step_and_pauses(tmp_path, clock):
  told = open_report(tmp_path, device_kind="TPU v4")
  clock.now += 60.0  # compiles
  told.waited(50.0)
  told.step(1, {"loss": 1.0})
  told.log(1)
  for step in range(2, 6):
    clock.now += 2.0
    told.waited(0.5)
    told.step(step, {"loss": 1.0})
    with told.pause():
      clock.now += 1000.0
  told.log(5)
  for step in (6, 7):
    clock.now += 4.0
    told.step(step, {"loss": 1.0})
  told.log(7)
  told.close()
  first, second, third = lines(tmp_path)
  assert not {"images_per_second", "mfu", "eta_seconds"} & set(first)
  want = {
    "images_per_second": 4.0,
    "tokens_per_second": 40.0,
    "step_seconds": 2.0,
    "data_wait_share": 0.25,
    "eta_seconds": 2.0 * 95,
    # 1e12 in two seconds, on four devices of 275e12 each.
    "mfu": 0.5e12 / (4 * 275e12),
  }
  for name, value in want.items():
    assert second[name] == pytest.approx(value, rel=1e-12), name
  assert third["step_seconds"] == pytest.approx(4.0)
  assert third["data_wait_share"] == 0.0


def test_a_pause_just_before_a_log_is_left_out_of_what_follows(tmp_path, clock):
  told = open_report(tmp_path)
  told.waited(50.0)  # for the first batch of all
  for step in (1, 2):
    clock.now += 2.0
    told.step(step, {"loss": 1.0})
  with told.pause():
    clock.now += 1000.0
  told.log(2)
  clock.now += 2.0
  told.step(3, {"loss": 1.0})
  told.log(3)
  told.close()
  first, second = lines(tmp_path)
  assert first["data_wait_share"] == 0.0
  assert first["step_seconds"] == second["step_seconds"] == pytest.approx(2.0)


def test_steps_of_another_program_count_as_what_they_are(tmp_path, clock):
  told = open_report(tmp_path, device_kind="TPU v4", devices=1)
  for step in (1, 2, 3):
    clock.now += 1.0
    if step == 3:
      told.tokens_per_image, told.flops_per_step = 30, 3e12
    told.step(step, {"loss": 1.0})
  told.log(3)
  told.close()
  (line,) = lines(tmp_path)
  assert line["tokens_per_second"] == pytest.approx(8 * (10 + 30) / 2)
  assert line["mfu"] == pytest.approx((1e12 + 3e12) / 2 / 275e12)


def test_without_a_known_peak_there_is_no_mfu(tmp_path):
  told = open_report(tmp_path)
  for step in (1, 2):
    told.step(step, {"loss": 1.0})
  told.log(2)
  told.close()
  (line,) = lines(tmp_path)
  assert "images_per_second" in line and "mfu" not in line


def test_memory_is_that_of_the_fullest_device_or_else_of_the_process(
  tmp_path, monkeypatch
):
  told = open_report(tmp_path)
  told.log(1)
  full = [
    types.SimpleNamespace(memory_stats=lambda n=n: {"peak_bytes_in_use": n})
    for n in (2**30, 3 * 2**30)
  ]
  monkeypatch.setattr(jax, "local_devices", lambda: full)
  told.log(2)
  told.close()
  process, device = lines(tmp_path)
  assert 0.05 < process["host_memory_gib"] < 1000
  assert "memory_gib" not in process
  assert device["memory_gib"] == 3.0 and "host_memory_gib" not in device


def test_timing_keys_are_all_that_two_runs_differ_in(tmp_path, clock):
  for name, seconds in (("slow", 9.0), ("fast", 1.0)):
    told = open_report(tmp_path / name, device_kind="TPU v4")
    for step in range(1, 5):
      clock.now += seconds
      told.step(step, of_step(np.random.default_rng(step)))
    told.log(4)
    told.evaluation(4, {"loss": 1.5})
    told.close()
  slow, fast = lines(tmp_path / "slow"), lines(tmp_path / "fast")
  assert slow != fast
  assert list(map(without_timing, slow)) == list(map(without_timing, fast))
  assert set(slow[0]) & set(report.TIMING_KEYS) == (
    set(report.TIMING_KEYS) - {"memory_gib"}
  )


def test_a_resumed_run_drops_lines_of_steps_that_it_takes_again(tmp_path):
  told = open_report(tmp_path)
  for step in range(1, 6):
    told.step(step, {"loss": float(step)})
    told.log(step)
    told.evaluation(step, {"loss": float(step)})
  told.close()
  with (tmp_path / "metrics.jsonl").open("a") as file:
    file.write('{"step": 6, "lo')
  told = open_report(tmp_path, start=3)
  told.step(4, {"loss": -4.0})
  told.log(4)
  told.close()
  got = [(line["step"], line.get("loss")) for line in lines(tmp_path)]
  assert got == [
    (1, 1.0),
    (1, None),
    (2, 2.0),
    (2, None),
    (3, 3.0),
    (3, None),
    (4, -4.0),
  ]


def test_a_line_that_lacks_only_its_end_is_kept_whole(tmp_path):
  path = tmp_path / "metrics.jsonl"
  path.write_text('{"step": 1}\n{"step": 2}')
  assert report._lines_up_to(path, 2) == ['{"step": 1}\n', '{"step": 2}\n']


def test_a_log_gets_a_line_for_each_log_evaluation_and_message(tmp_path, clock):
  out = console()
  told = open_report(tmp_path, console=out, device_kind="TPU v4")
  for step in (1, 2):
    clock.now += 1.0
    told.advance(step)
    told.step(step, {"loss": 0.5, "accuracy_mean": 0.125, "grad_norm": 3.0})
  told.log(2)
  told.evaluation(2, {"loss_mean": 0.75, "loss_scale": {"0": 1.0}})
  told.message("[a/path] " + "long " * 60)
  told.close()
  assert out.file.getvalue().splitlines() == [
    "step 2/100  loss 0.5000  accuracy 0.1250  8.0 images/s  MFU 0.1%  "
    "eta 0:01:38",
    "step 2/100  eval/loss_mean 0.7500",
    "[a/path] " + "long " * 60,
  ]


def test_a_terminal_gets_a_bar_with_the_numbers_and_messages_above(tmp_path):
  out = console(terminal=True)
  told = open_report(tmp_path, console=out)
  told.step(1, {"loss": 0.5})
  told.log(1)
  told.advance(17)
  told.message("[a/path] is said")
  told.close()
  text = out.file.getvalue()
  assert "[a/path] is said\n" in text
  last = text[text.rindex(tmp_path.name) :]
  assert "17/100" in last and "loss 0.5000" in last
  assert "step 1/100" not in text  # the bar says it


def test_the_overview_is_shown_and_kept(tmp_path):
  out = console()
  told = open_report(tmp_path, console=out)
  shape = jax.ShapeDtypeStruct((16, 1024, 3072), np.float32)
  told.overview({"params": {"blocks": {"kernel": shape}}})
  told.close()
  table = (tmp_path / "parameters.txt").read_text()
  assert "params/blocks/kernel" in table and "(16, 1024, 3072)" in table
  assert f"Total: {16 * 1024 * 3072:,}" in table
  assert table in out.file.getvalue()


def test_other_processes_write_and_say_nothing(tmp_path, monkeypatch, capfd):
  monkeypatch.setattr(jax, "process_index", lambda: 1)
  workdir = tmp_path / "run"
  told = open_report(workdir, console=None)
  told.overview({"w": np.zeros(3)})
  told.step(1, {"loss": 1.0})
  with told.pause():
    told.evaluation(1, {"loss": 1.0})
    told.images(1, "samples", np.zeros((2, 2, 3), np.uint8))
  told.advance(1)
  told.log(1)
  told.message("hello")
  told.close()
  assert not workdir.exists()
  assert capfd.readouterr() == ("", "")
