"""TensorFlow Datasets without TensorFlow and without a network."""

import itertools
import pathlib
import subprocess
import sys

import numpy as np
import pytest
import tensorflow_datasets as tfds
import tiny_dataset

from var_jax.data.pipeline import training_batches
from var_jax.data.sources import open_source
from var_jax.data.transforms import make_transform


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """Return the TFDS_DATA_DIR that holds our datasets."""
  tfds.disable_progress_bar()
  path = tmp_path_factory.mktemp("tfds")
  for name in ("tiny_pets", "tiny_sounds", "tiny_unlabelled"):
    builder = tfds.builder(name, data_dir=path, file_format="array_record")
    builder.download_and_prepare()
  return path


@pytest.fixture(autouse=True)
def data_dir(folder, monkeypatch):
  monkeypatch.setenv("TFDS_DATA_DIR", str(folder))


def _refusal(name, split="train"):
  with pytest.raises(ValueError) as caught:
    open_source(f"tfds:{name}", split)
  assert "\n" not in str(caught.value)
  return str(caught.value)


@pytest.mark.parametrize("name", ["tiny_pets", "tiny_pets:1.0.0"])
@pytest.mark.parametrize("split, there", [("train", "train"), ("val", "test")])
def test_examples_are_those_of_the_builder(name, split, there):
  source = open_source(f"tfds:{name}", split)
  assert source.class_names == tiny_dataset.CLASSES
  size = tiny_dataset.SPLITS[there]
  assert len(source) == size
  expected = {
    tiny_dataset.pixels(there, i).tobytes(): i % 3 for i in range(size)
  }
  for i in range(size):
    sample = source[i]
    assert sample["image"].dtype == np.uint8
    assert sample["image"].shape[1:] == (12, 3)
    assert type(sample["label"]) is int
    assert expected.pop(sample["image"].tobytes()) == sample["label"]
    assert source.name_of(i) == f"tfds:{name} {there}[{i}]"
  assert not expected


def _write_metadata(name, folder, splits, file_format="array_record"):
  """Write of a known dataset what its preparation would, without examples."""
  builder = tfds.builder(name, data_dir=folder, file_format=file_format)
  builder.data_path.mkdir(parents=True)
  builder.info.set_splits(
    tfds.core.splits.SplitDict(
      [
        tfds.core.SplitInfo(
          name=split,
          shard_lengths=[5],
          num_bytes=1,
          filename_template=tfds.core.ShardedFileTemplate(
            dataset_name=name,
            data_dir=builder.data_dir,
            filetype_suffix=file_format,
            split=split,
          ),
        )
        for split in splits
      ]
    )
  )
  builder.info.write_to_directory(builder.data_dir)
  return builder.data_dir


def _mock_records(builder, split, *, decoders, file_format):
  """Return five examples; drawing them by tfds would take TensorFlow."""
  assert split in builder.info.splits
  assert file_format == "array_record"
  assert type(decoders["image"]) is type(tfds.decode.SkipDecoding())
  return [
    {"image": tiny_dataset.encode(tiny_dataset.pixels(split, i)).getvalue()}
    | {"label": i}
    for i in range(5)
  ]


@pytest.mark.parametrize(
  "name, splits, split, there, classes",
  [
    ("imagenet2012", ("train", "validation", "test"), "train", "train", 1000),
    (
      "imagenet2012",
      ("train", "test", "validation"),
      "val",
      "validation",
      1000,
    ),
    ("fashion_mnist", ("train", "test"), "val", "test", 10),
  ],
)
def test_known_datasets_open_as_their_own_code_describes_them(
  tmp_path, name, splits, split, there, classes
):
  _write_metadata(name, tmp_path, splits)
  mocked = tfds.testing.mock_data(
    data_dir=tmp_path, as_data_source_fn=_mock_records
  )
  with mocked:
    source = open_source(f"tfds:{name}", split)
  assert source.name_of(3) == f"tfds:{name} {there}[3]"
  assert len(source.class_names) == classes
  assert len(source) == 5
  for i in range(5):
    sample = source[i]
    np.testing.assert_array_equal(
      sample["image"], tiny_dataset.pixels(there, i)
    )
    assert sample["label"] == i


def test_workers_read_what_this_process_does():
  source = open_source("tfds:tiny_pets", "train")
  resize = make_transform("resize", (8, 8), train=True, flip=True)
  taken = []
  for workers in (0, 1):
    batches = training_batches(
      source, resize, batch_size=5, seed=0, workers=workers
    )
    taken.append(list(itertools.islice(batches, 3)))
    batches.close()
  for here, there in zip(*taken, strict=True):
    for key in here:
      np.testing.assert_array_equal(here[key], there[key])


def test_tensorflow_is_never_imported():
  tests = pathlib.Path(tiny_dataset.__file__).parent
  code = """
import sys
import tiny_dataset
from var_jax.data.sources import open_source
for split in ("train", "val"):
  source = open_source("tfds:tiny_pets", split)
  source[0], source[1]
assert "tensorflow_datasets" in sys.modules
assert "tensorflow" not in sys.modules
"""
  subprocess.run([sys.executable, "-c", code], check=True, cwd=tests)


def test_a_prepared_dataset_opens_without_the_code_that_made_it():
  code = """
import sys
from var_jax.data.sources import open_source
source = open_source("tfds:tiny_pets", "train")
assert source.class_names == ("cat", "dog", "eel")
assert source[0]["image"].shape[2] == 3
assert "tiny_dataset" not in sys.modules
"""
  subprocess.run([sys.executable, "-c", code], check=True)


def test_an_unknown_name_suggests_the_nearest():
  message = _refusal("cifar1000")
  assert "tfds has no dataset 'cifar1000'; did you mean" in message
  assert "cifar100, cifar10" in message
  assert "did you mean tiny_pets" in _refusal("tiny_pet/big:1.0.0")
  assert "'qqqqqqqq'; see tensorflow.org/datasets" in _refusal("qqqqqqqq")


@pytest.mark.parametrize("name", ["tiny_pets:9.9.9", "tiny_pets/big", "No!"])
def test_a_name_that_cannot_be_opened_is_refused(name):
  message = _refusal(name)
  assert message.startswith(f"tfds:{name} cannot be opened (")
  assert message.endswith("give it as tfds:name[/config][:version].")


def test_a_dataset_that_is_not_prepared_says_how_to(tmp_path, monkeypatch):
  monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
  message = _refusal("tiny_pets")
  assert f"is not in {tmp_path}/tiny_pets/1.0.0; set TFDS_DATA_DIR" in message
  command = message.split("python -c ")[1].strip('"')
  exec(
    command.replace("'tiny_pets'", f"'tiny_pets', data_dir={str(tmp_path)!r}")
  )
  assert len(open_source("tfds:tiny_pets", "train")) == 7


def test_a_dataset_stored_without_random_access_is_refused(
  tmp_path, monkeypatch
):
  monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
  where = _write_metadata("mnist", tmp_path, ["train"], "tfrecord")
  message = _refusal("mnist")
  assert f"is stored as tfrecord in {where}; prepare it with" in message


def test_a_split_that_is_missing_is_refused():
  assert "has the splits other, none of train; use" in _refusal("tiny_sounds")
  assert "none of validation, test, val" in _refusal("tiny_sounds", "val")


def test_a_dataset_without_image_and_class_is_refused(monkeypatch):
  from var_jax.data import tfds_source

  monkeypatch.setattr(tfds_source, "VAL_SPLITS", ("other",))
  message = _refusal("tiny_sounds", "val")
  assert "holds number: not one Image a sample, or one named 'image'" in message
  assert "has 1 class; a class-conditional" in _refusal("tiny_unlabelled")


def test_a_label_of_no_class_and_a_damaged_image_are_named():
  source = open_source("tfds:tiny_pets", "train")
  image = tiny_dataset.encode(tiny_dataset.pixels("train", 0)).getvalue()
  records = [
    {"image": image, "kind": -1},
    {"image": image[:60], "kind": 1},
  ]
  damaged = type(source)(**vars(source) | {"records": records})
  with pytest.raises(
    ValueError, match=r"train\[0\] has label -1, outside of 0"
  ):
    damaged[0]
  with pytest.raises(ValueError, match=r"train\[1\] cannot be decoded"):
    damaged[1]
