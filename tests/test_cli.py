"""The commands, as somebody's script calls them."""

import dataclasses
import pathlib
import shutil
import subprocess
import sys

import golden_files
import jax
import numpy as np
import pytest
from PIL import Image

from var_jax import cli, images
from var_jax.checkpoints import store, weights
from var_jax.checkpoints.description import Description
from var_jax.commands import drawing, training
from var_jax.commands.arguments import UsageError

ROOT = pathlib.Path(__file__).parents[1]


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
  """The recorded pair A as a workdir."""
  folder = tmp_path_factory.mktemp("workdir")
  models, params = golden_files.pair("A")
  description = Description(models.tokenizer.cfg, models.var.cfg)
  alone = Description(models.tokenizer.cfg)
  weights.write_tokenizer(folder, alone, params.tokenizer)
  checkpoints = store.Store(folder, keep=1)
  checkpoints.save(7, {"params": params.var}, position=0)
  checkpoints.close()
  description.write(folder)
  return folder


def run(*arguments):
  return cli.main([str(argument) for argument in arguments])


def picture(path):
  with Image.open(path) as image:
    return np.asarray(image)


def assert_one_line(capsys, *parts):
  out, err = capsys.readouterr()
  assert out == ""
  assert err.count("\n") == 1 and err.startswith("var-jax: ")
  for part in parts:
    assert part in err


def test_an_interrupted_process_ends_at_once_with_a_line():
  code = """
import atexit, os, signal, time
from var_jax import cli

def command(argv):
  print("what was printed")
  os.kill(os.getpid(), signal.SIGINT)
  time.sleep(60)

atexit.register(print, "Python ends as usual")
cli._run = command
cli.run()
"""
  found = subprocess.run(
    [sys.executable, "-c", code], capture_output=True, text=True, timeout=60
  )
  assert found.returncode == 1
  assert found.stdout == "what was printed\n"
  assert found.stderr == "var-jax: interrupted\n"


def test_sample_writes_a_row_per_label(workdir, tmp_path):
  output = tmp_path / "out.png"
  code = run(
    "sample", "--checkpoint", workdir, "--labels=3,-1", "--count", 2,
    "--seed", 5, "--guidance", 2, "--top-k", 50, "--top-p", 0.9,
    "--output", output,
  )  # fmt: skip
  assert code == 0
  models, params = golden_files.pair("A")
  import var_jax

  sample = var_jax.Model(models, params).sample(
    [3, 3, -1, -1], jax.random.key(5), guidance=2.0, top_k=50, top_p=0.9
  )
  pixels = images.to_uint8(sample.images_BHW3).reshape(2, 2, 64, 64, 3)
  expected = images.grid([list(row) for row in pixels], ["3", "-1"])
  np.testing.assert_array_equal(picture(output), expected)


def test_sample_shows_every_scale_and_smooth_is_another_picture(
  workdir, tmp_path
):
  names = {"sharp": [], "smooth": ["--smooth"]}
  pictures = {}
  for name, flags in names.items():
    output = tmp_path / f"{name}.png"
    code = run(
      "sample", "--checkpoint", workdir, "--labels", 3, "--count", 1,
      "--show-scales", "--output", output, *flags,
    )  # fmt: skip
    assert code == 0
    pictures[name] = picture(output)
  assert pictures["sharp"].shape[1] > 4 * 64
  assert np.any(pictures["sharp"] != pictures["smooth"])


def test_sample_writes_a_file_an_image_whatever_the_batches(workdir, tmp_path):
  drawn = []
  for size in (2, 5):
    folder = tmp_path / f"by{size}"
    code = run(
      "sample", "--checkpoint", workdir, "--labels=3,-1", "--count", 2,
      "--batch-size", size, "--guided-scales", "1:3",
      "--temperature", "1,1,0.9,0.8", "--output", f"{folder}/",
    )  # fmt: skip
    assert code == 0
    files = sorted(folder.iterdir())
    assert len(files) == 4
    drawn.append([picture(file).astype(int) for file in files])
  difference = np.abs(np.array(drawn[0]) - np.array(drawn[1]))
  assert difference.max() <= 1  # rounding to 8 bits


@pytest.mark.parametrize("mode", ["inpaint", "outpaint"])
def test_edit_writes_an_image(workdir, tmp_path, mode):
  image = golden_files.arrays("vae_share4_znorm0.npz")["img_u8"][0]
  Image.fromarray(golden_files.nhwc(image)).save(tmp_path / "in.png")
  code = run(
    "edit", "--checkpoint", workdir, "--image", tmp_path / "in.png",
    "--box", "0.1,0.1,0.8,0.8", "--mode", mode, "--label", 3,
    "--output", tmp_path / "out.png",
  )  # fmt: skip
  assert code == 0
  assert picture(tmp_path / "out.png").shape == (64, 64, 3)


def test_labels_can_be_names_of_classes():
  names = ("cat", "red fox", "7")
  labels = drawing.labels_of("red fox,0, cat,-1,7", names)
  assert labels == [1, 0, 0, -1, 2]
  with pytest.raises(UsageError, match="'red fux' is not a label.* red fox"):
    drawing.labels_of("cat,red fux", names)


def test_names_of_classes_come_from_the_checkpoint(workdir, tmp_path):
  named = pathlib.Path(shutil.copytree(workdir, tmp_path / "named"))
  described = Description.read(named)
  names = tuple(f"kind {i}" for i in range(10))
  dataclasses.replace(described, class_names=names).write(named)
  pictures = []
  for labels in ("kind 3", "3"):
    output = tmp_path / "out.png"
    code = run(
      "sample", "--checkpoint", named, "--labels", labels, "--count", 1,
      "--output", output,
    )  # fmt: skip
    assert code == 0
    pictures.append(picture(output))
  np.testing.assert_array_equal(*pictures)


SAMPLE = {"--labels": "3", "--count": "1", "--output": "out.png"}


@pytest.mark.parametrize(
  "change, code, parts",
  [
    ({"--labels": "10"}, 1, ["label 10", "0..9", "-1"]),
    ({"--labels": "cat"}, 2, ["'cat'", "3,7"]),
    ({"--count": "0"}, 2, ["'0'", "1..10000"]),
    ({"--count": "2000000000"}, 2, ["'2000000000'"]),
    ({"--labels": "9" * 20}, 1, ["labels", "numbers"]),
    ({"--output": "."}, 1, ["."]),
    ({"--guidance": "nan"}, 1, ["guidance nan", "finite"]),
    ({"--top-k": "-1"}, 1, ["top_k -1"]),
    ({"--top-k": "x"}, 2, ["--top-k", "'x'"]),
    ({"--top-p": "2"}, 1, ["top_p 2.0"]),
    ({"--output": "out.pdf"}, 1, ["out.pdf", ".png"]),
    ({"--seed": "1e9"}, 2, ["--seed", "'1e9'"]),
    ({"--seed": str(2**70)}, 2, ["--seed", "2^32-1"]),
    ({"--checkpoint": "/nothing"}, 1, ["/nothing/config.json"]),
    ({"--wat": "1"}, 2, ["--wat"]),
    ({"--temperature": "0"}, 1, ["temperature 0.0", "above 0"]),
    ({"--temperature": "1,x"}, 2, ["--temperature", "'1,x'"]),
    ({"--temperature": "1,1"}, 1, ["temperature", "4, one a scale"]),
    ({"--guided-scales": "0:9"}, 1, ["(0, 9)", "4 scales"]),
    ({"--guided-scales": "3"}, 2, ["'3'", "0:7"]),
    ({"--batch-size": "0"}, 2, ["--batch-size", "'0'"]),
  ],
)
def test_bad_samples_are_one_line_and_leave_nothing(
  workdir, tmp_path, monkeypatch, capsys, change, code, parts
):
  monkeypatch.chdir(tmp_path)
  flags = {"--checkpoint": str(workdir)} | SAMPLE | change
  assert run("sample", *(f"{k}={v}" for k, v in flags.items())) == code
  assert_one_line(capsys, *parts)
  assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
  "change, code, parts",
  [
    ({"--image": "missing.png"}, 1, ["missing.png", "cannot be read"]),
    ({"--image": "text.png"}, 1, ["text.png", "PNG or JPEG"]),
    ({"--image": "small.png"}, 1, ["(32, 32)", "(64, 64)"]),
    ({"--box": "0.8,0.1,0.1,0.8"}, 1, ["box", "fractions"]),
    ({"--box": "1,2"}, 2, ["'1,2'", "y0,x0,y1,x1"]),
    ({"--mode": "over"}, 2, ["'over'", "outpaint"]),
    ({"--method": "x"}, 1, ["method 'x'", "official"]),
    ({"--label": "11"}, 1, ["label 11"]),
  ],
)
def test_bad_edits_are_one_line_and_leave_nothing(
  workdir, tmp_path, monkeypatch, capsys, change, code, parts
):
  monkeypatch.chdir(tmp_path)
  (tmp_path / "text.png").write_text("no image")
  for name, side in (("small.png", 32), ("in.png", 64)):
    Image.new("RGB", (side, side)).save(tmp_path / name)
  before = sorted(tmp_path.iterdir())
  flags = {
    "--checkpoint": str(workdir),
    "--image": "in.png",
    "--box": "0.1,0.1,0.8,0.8",
    "--mode": "inpaint",
    "--output": "out.png",
  } | change
  assert run("edit", *(f"{k}={v}" for k, v in flags.items())) == code
  assert_one_line(capsys, *parts)
  assert sorted(tmp_path.iterdir()) == before


VAR = f"{ROOT}/configs/var.py"


@pytest.mark.parametrize(
  "config, overrides, code, parts",
  [
    (f"{VAR}:d99", [], 2, ["preset 'd99'", "d16"]),
    (f"{VAR}:d16", ["--config.model.dept=3"], 2, ["model.dept", "model.depth"]),
    (f"{VAR}:d16", ["--config.steps=many"], 2, ["config.steps=many"]),
    ("nothing.py", [], 2, ["nothing.py", "configs/var.py:d16"]),
    (f"{VAR}:tiny", [], 1, ["tokenizer_path is empty"]),
    (f"{VAR}:tiny", ["--config.steps=0"], 1, ["steps 0"]),
  ],
)
def test_bad_configs_are_one_line_and_leave_nothing(
  tmp_path, capsys, config, overrides, code, parts
):
  new = tmp_path / "new"
  assert run("train", "--config", config, "--workdir", new, *overrides) == code
  assert_one_line(capsys, *parts)
  assert not new.exists()


def test_overrides_reach_the_config():
  config = training.read_config(
    f"{VAR}:d16",
    ["--config.optimizer.learning_rate=3e-4", "--config.data.flip=true"],
  )
  assert config.optimizer.learning_rate == 3e-4
  assert config.data.flip is True
  assert config.model.depth == 16


@pytest.mark.parametrize("ending", ["jpg", "JPEG", "webp", "PNG"])
def test_the_ending_decides_the_format(tmp_path, ending):
  output = tmp_path / f"out.{ending}"
  images.write_image(output, np.zeros((8, 8, 3), np.uint8))
  with Image.open(output) as image:
    assert image.format == {"jpg": "JPEG"}.get(ending, ending.upper())


@pytest.mark.parametrize(
  "source, part",
  [
    ("import nothing_like_it", "nothing_like_it"),
    ("def get_config():\n  return 5", "ConfigDict"),
    ("def get_config():\n  raise KeyError(1)", "KeyError"),
    ("x = ", "SyntaxError"),
    ("x = 1", "get_config"),
  ],
)
def test_a_config_file_that_cannot_run_exits_with_2(
  tmp_path, capsys, source, part
):
  path = tmp_path / "config.py"
  path.write_text(source)
  new = tmp_path / "new"
  assert run("train", "--config", path, "--workdir", new) == 2
  assert_one_line(capsys, "config.py", part)
  assert not new.exists()


def test_train_ends_with_0_and_a_workdir_that_loads(tmp_path):
  code = run(
    "train", "--config", f"{ROOT}/configs/tokenizer.py:tiny",
    "--workdir", tmp_path / "new", "--config.steps=1",
    "--config.data.batch_size=2", "--config.loss.revive_every=0",
  )  # fmt: skip
  assert code == 0
  import var_jax

  assert var_jax.load(tmp_path / "new").config.transformer is None


@pytest.mark.parametrize(
  "command", [(), ("demo",), ("train",), ("sample",), ("edit",)]
)
def test_every_command_has_help(capsys, command):
  with pytest.raises(SystemExit) as exit:
    run(*command, "--help")
  assert exit.value.code == 0
  assert "usage: var-jax" in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [(), ("paint",), ("sample",)])
def test_an_incomplete_command_line_exits_with_2(capsys, arguments):
  assert run(*arguments) == 2
  assert_one_line(capsys, "--help")


def test_a_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
  from var_jax import files

  path = tmp_path / "a.png"
  files.write_bytes(path, b"old")

  def full(self, target):
    raise OSError("disk full")

  monkeypatch.setattr(type(files.epath.Path(path)), "replace", full)
  with pytest.raises(OSError, match="disk full"):
    files.write_bytes(path, b"new")
  monkeypatch.undo()
  assert path.read_bytes() == b"old"
  assert [p.name for p in tmp_path.iterdir()] == ["a.png"]


TINY = ("train", "--config", ROOT / "configs" / "var.py:tiny")


@pytest.mark.parametrize(
  "settings, parts",
  [
    ({"data.source": "tfds:mnits"}, ["mnits", "mnist"]),
    ({"data.batch_size": 15, "accumulate": 2}, ["batch_size 15", "2 parts"]),
    ({"progressive.until": 0.5}, ["first 4", "4 scales"]),
    ({"keep_every": 30}, ["keep_every 30", "checkpoint_every 20"]),
    ({"optimizer.final_factor": -1.0}, ["final_factor -1.0"]),
    ({"eval_every": 1, "data.source": "npz:{npz}"},
     ["eval_every 1 needs held-out", "data.eval_source"]),
    ({"data.source": "npz:{no_images}"}, ["no array 'images'"]),
    ({"data.source": "npz:{float_labels}"}, ["labels are float"]),
    ({"data.source": "npz:{npz}", "data.transform": "crop"},
     ["10", "64", "resize"]),
    ({"data.source": "folder:{empty}"}, ["train"]),
    ({"data.token_cache": "{empty}"}, ["manifest.json"]),
    ({"guard.policy": "panic"}, ["'panic'", "rollback"]),
    ({"keep_best": 1}, ["eval_every"]),
    ({"progressive.until": 2.0}, ["until 2.0"]),
  ],
)  # fmt: skip
def test_training_refuses_in_one_line_and_leaves_nothing(
  workdir, tmp_path, capsys, settings, parts
):
  paths = {name: tmp_path / f"{name}.npz" for name in SOURCES}
  for name, arrays in SOURCES.items():
    np.savez(paths[name], **arrays)
  paths["empty"] = tmp_path / "empty"
  paths["empty"].mkdir()
  settings = {"tokenizer_path": str(workdir), **settings}
  overrides = [
    f"--config.{name}={str(value).format(**paths)}"
    for name, value in settings.items()
  ]
  output = tmp_path / "run"
  assert run(*TINY, "--workdir", output, *overrides) == 1
  assert_one_line(capsys, *parts)
  assert not output.exists()


IMAGES = np.zeros((4, 10, 10), np.uint8)
SOURCES = {
  "npz": dict(images=IMAGES, labels=np.arange(4) % 2),
  "no_images": dict(pixels=IMAGES, labels=np.arange(4) % 2),
  "float_labels": dict(images=IMAGES, labels=np.arange(4) % 2 + 0.5),
}


def test_a_workdir_that_cannot_be_made(workdir, tmp_path, capsys):
  (tmp_path / "file").write_text("")
  settings = f"--config.tokenizer_path={workdir}"
  assert run(*TINY, "--workdir", tmp_path / "file" / "run", settings) == 1
  assert_one_line(capsys, "cannot be made", "use another one")


@pytest.mark.parametrize("steps", [("0", "2"), ("1", "x")])
def test_a_replay_is_of_steps(workdir, capsys, steps):
  code = run(
    "replay", "--workdir", workdir, "--from", steps[0], "--to", steps[1]
  )
  assert code == 2
  assert_one_line(capsys, "is not a step")
