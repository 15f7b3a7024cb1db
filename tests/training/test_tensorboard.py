"""Event files, read back record by record."""

import io
import types

import numpy as np
import rich.console
from etils import epath
from PIL import Image
from tensorboardX.proto.event_pb2 import Event, SessionLog

from var_jax.training import report, tensorboard


def events(workdir):
  """Return the events of all files, oldest first, as TensorBoard reads them."""
  found = []
  for path in sorted((workdir / "tensorboard").iterdir()):
    data = path.read_bytes()
    while data:
      # Record: length, its checksum, content, its checksum.
      length = int.from_bytes(data[:8], "little")
      found.append(Event.FromString(data[12 : 12 + length]))
      data = data[16 + length :]
  return found


def scalars(workdir):
  return [
    (event.step, value.tag, value.simple_value)
    for event in events(workdir)
    for value in event.summary.value
    if value.HasField("simple_value")
  ]


def test_numbers_and_pictures_come_back(tmp_path):
  pixels_HW3 = np.arange(4 * 5 * 3, dtype=np.uint8).reshape(4, 5, 3)
  file = tensorboard.EventFile(epath.Path(tmp_path / "tensorboard"), 0)
  file.scalars(2, {"loss": 1.5, "loss_scale/0": np.nan, "skipped_steps": 3})
  file.image(2, "samples", pixels_HW3)
  file.close()
  (loss, of_scale, skipped) = scalars(tmp_path)
  assert loss == (2, "loss", 1.5) and skipped == (2, "skipped_steps", 3.0)
  assert of_scale[1] == "loss_scale/0" and np.isnan(of_scale[2])
  *_, picture = events(tmp_path)
  (value,) = picture.summary.value
  assert (picture.step, value.tag) == (2, "samples")
  with Image.open(io.BytesIO(value.image.encoded_image_string)) as image:
    np.testing.assert_array_equal(np.asarray(image), pixels_HW3)


def test_a_resumed_run_tells_what_to_forget(tmp_path):
  folder = epath.Path(tmp_path / "tensorboard")
  for start in (0, 3):
    tensorboard.EventFile(folder, start).close()
  begins = [
    event.step
    for event in events(tmp_path)
    if event.session_log.status == SessionLog.SessionStatus.START
  ]
  assert begins == [1, 4]
  assert len(list(folder.iterdir())) == 2  # within one second


def test_events_reach_the_disk_while_the_run_goes_on(tmp_path, monkeypatch):
  fake = types.SimpleNamespace(now=0.0, time=lambda: 1e9)
  fake.monotonic = lambda: fake.now
  monkeypatch.setattr(tensorboard, "time", fake)
  file = tensorboard.EventFile(epath.Path(tmp_path / "tensorboard"), 0)
  file.scalars(1, {"loss": 1.0})
  assert not scalars(tmp_path)
  fake.now = 6.0
  file.scalars(2, {"loss": 2.0})
  assert scalars(tmp_path) == [(1, "loss", 1.0), (2, "loss", 2.0)]
  file.close()


def test_a_report_writes_what_it_logs_evaluates_and_shows(tmp_path):
  told = report.Report(
    workdir=epath.Path(tmp_path),
    start=0,
    steps=9,
    batch_size=8,
    tokens_per_image=10,
    flops_per_step=1e12,
    devices=1,
    device_kind="cpu",
    console=rich.console.Console(file=io.StringIO()),
  )
  told.step(2, {"loss": 1.5})
  told.log(2)
  told.evaluation(2, {"accuracy": 0.25})
  told.images(2, "samples", np.zeros((4, 5, 3), np.uint8))
  told.close()
  got = {(step, tag): value for step, tag, value in scalars(tmp_path)}
  assert got[2, "loss"] == 1.5 and got[2, "eval/accuracy"] == 0.25
  assert got[2, "host_memory_gib"] > 0
  *_, picture = events(tmp_path)
  assert picture.summary.value[0].HasField("image")
