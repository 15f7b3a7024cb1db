"""The token cache: what is written comes back, and what is damaged is named."""

import dataclasses
import hashlib
import json
import pickle
import subprocess
import sys
import threading

import numpy as np
import pytest

from var_jax.data.broken import Tolerant
from var_jax.data.crops import CropSource, crop_batches
from var_jax.data.sources import ArraySource
from var_jax.data.token_cache import TokenSource, Writer
from var_jax.data.token_manifest import Settings, default_shards

SETTINGS = Settings(
  tokenizer="a" * 64,
  source="npz:/data/some.npz",
  samples=11,
  class_names=("cat", "dog", "bird"),
  transform="crop",
  flip=False,
  image_shape=(16, 16),
  seed=0,
  crops=2,
  length=5,
  vocab_size=65536,
  num_shards=3,
)
RNG = np.random.default_rng(0)
TOKENS_11_CL = RNG.integers(0, 65536, (11, 2, 5)).astype(np.uint16)
LABELS_11 = RNG.integers(0, 3, 11)


def write_shard(writer, s, settings=SETTINGS, index=lambda i: i):
  with writer.shard(s) as write:
    for i in settings.samples_of(s):
      write(LABELS_11[i], index(i), TOKENS_11_CL[i])


@pytest.fixture
def cache(tmp_path):
  """Return the folder of a finished cache."""
  writer = Writer(tmp_path / "cache", SETTINGS)
  for s in range(3):
    write_shard(writer, s)
  assert writer.finish()
  return tmp_path / "cache"


def shards(folder):
  return sorted(folder.glob("*.array_record"))


def edit_manifest(folder, **changes):
  path = folder / "manifest.json"
  path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_what_was_written_comes_back_in_the_order_of_the_source(cache):
  source = TokenSource(cache, verify=True)
  assert len(source) == 11
  assert source.class_names == ("cat", "dog", "bird")
  assert source.manifest.settings == SETTINGS
  for i in range(11):
    sample = source[i]
    assert sample["label"] == LABELS_11[i]
    assert type(sample["label"]) is int
    assert sample["tokens"].dtype == np.uint16
    np.testing.assert_array_equal(sample["tokens"], TOKENS_11_CL[i])


def test_a_record_is_label_index_tokens_little_endian(cache):
  """Other programs read the shards too."""
  from array_record.python import array_record_data_source

  records = array_record_data_source.ArrayRecordDataSource(
    [str(path) for path in shards(cache)]
  )
  assert len(records) == 11
  for i in range(11):
    assert records[i] == b"".join(
      [
        int(LABELS_11[i]).to_bytes(4, "little"),
        i.to_bytes(8, "little"),
        TOKENS_11_CL[i].astype("<u2").tobytes(),
      ]
    )


def test_the_folder_holds_the_manifest_and_the_shards_it_lists(cache):
  manifest = json.loads((cache / "manifest.json").read_text())
  assert sorted(path.name for path in cache.iterdir()) == [
    "manifest.json",
    *(shard["name"] for shard in manifest["shards"]),
  ]
  assert manifest["shards"][0]["name"] == "tokens-00000-of-00003.array_record"
  assert manifest["format_version"] == 1
  for shard, path in zip(manifest["shards"], shards(cache), strict=True):
    content = path.read_bytes()
    assert shard["bytes"] == len(content)
    assert shard["sha256"] == hashlib.sha256(content).hexdigest()


@pytest.mark.parametrize("samples, count", [(11, 3), (7, 7), (1024, 10)])
def test_shards_hold_every_sample_once_in_order(samples, count):
  settings = dataclasses.replace(SETTINGS, samples=samples, num_shards=count)
  held = [i for s in range(count) for i in settings.samples_of(s)]
  assert held == list(range(samples))


def test_large_sources_get_more_shards_up_to_a_limit():
  counts = [default_shards(n) for n in (1, 1024, 1025, 10**6, 10**9)]
  assert counts == [1, 1, 2, 977, 1024]


def test_a_source_travels_to_other_processes_open_or_not(cache):
  source = TokenSource(cache)
  source[0]
  code = """
import pickle, sys
source = pickle.load(sys.stdin.buffer)
print([source[i]["tokens"].tolist() for i in range(len(source))])
"""
  output = subprocess.run(
    [sys.executable, "-c", code],
    input=pickle.dumps(source),
    capture_output=True,
    check=True,
  ).stdout
  assert json.loads(output) == TOKENS_11_CL.tolist()


def test_threads_may_read_at_once(cache):
  source, wrong = TokenSource(cache), []

  def read():
    for i in range(11):
      if (source[i]["tokens"] != TOKENS_11_CL[i]).any():
        wrong.append(i)

  threads = [threading.Thread(target=read) for _ in range(8)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  assert not wrong


def test_a_sample_is_named_by_the_shard_it_lies_in(cache):
  source = TokenSource(cache)
  for s in range(3):
    for i in SETTINGS.samples_of(s):
      assert SETTINGS.shard_name(s) in source.name_of(i)
      assert source.name_of(i).endswith(f"sample {i}")


def test_broken_samples_keep_their_place_and_are_named(tmp_path):
  writer = Writer(tmp_path, SETTINGS, "picture {}".format)
  for s in range(3):
    write_shard(writer, s, index=lambda i: {4: 6, 5: 6, 10: 0}.get(i, i))
  manifest = writer.finish()
  assert [shard.broken for shard in manifest.shards] == [
    (),
    ("picture 4", "picture 5"),
    ("picture 10",),
  ]
  assert TokenSource(tmp_path).manifest == manifest
  assert TokenSource(tmp_path)[4]["label"] == LABELS_11[4]


def test_a_restarted_writer_keeps_what_is_finished_and_makes_the_same(
  cache, tmp_path
):
  again = tmp_path / "again"
  write_shard(Writer(again, SETTINGS), 1)
  with pytest.raises(KeyError):
    with Writer(again, SETTINGS).shard(2) as write:
      write(0, 7, TOKENS_11_CL[7])
      raise KeyError
  assert [path.name for path in shards(again)] == [SETTINGS.shard_name(1)]
  # What a kill in the middle of a shard leaves.
  (again / f".{SETTINGS.shard_name(2)}.partial").write_bytes(b"half")
  writer = Writer(again, SETTINGS)
  assert [writer.has(s) for s in range(3)] == [False, True, False]
  assert writer.finish() is None
  write_shard(writer, 0)
  write_shard(writer, 2)
  assert writer.finish()
  names = sorted(path.name for path in again.iterdir())
  assert names == sorted(path.name for path in cache.iterdir())
  for name in names:
    assert (again / name).read_bytes() == (cache / name).read_bytes()


def test_a_finished_shard_that_changed_is_made_again(tmp_path):
  writer = Writer(tmp_path, SETTINGS)
  write_shard(writer, 0)
  content = bytearray(shards(tmp_path)[0].read_bytes())
  content[100] ^= 1
  shards(tmp_path)[0].write_bytes(content)
  assert not Writer(tmp_path, SETTINGS).has(0)


def test_a_shard_that_a_finished_cache_lost_can_be_made_again(cache):
  before = shards(cache)[1].read_bytes()
  shards(cache)[1].unlink()
  writer = Writer(cache, SETTINGS)
  assert [writer.has(s) for s in range(3)] == [True, False, True]
  write_shard(writer, 1)
  assert writer.finish() == TokenSource(cache, verify=True).manifest
  assert shards(cache)[1].read_bytes() == before


@pytest.mark.parametrize("finished", [True, False])
@pytest.mark.parametrize(
  "name, value, message",
  [
    ("tokenizer", "b" * 64, "tokenizer is 'aaaa"),
    ("crops", 3, "crops is 2 there and 3 here"),
    ("seed", 1, "seed is 0 there and 1 here"),
    ("flip", True, "flip is False there and True here"),
    ("num_shards", 2, "num_shards is 3 there and 2 here"),
    ("class_names", ("a", "b"), "class_names is"),
  ],
)
def test_a_cache_of_other_settings_is_an_error(
  cache, tmp_path, finished, name, value, message
):
  folder = cache
  if not finished:
    folder = tmp_path / "unfinished"
    Writer(folder, SETTINGS)
  settings = dataclasses.replace(SETTINGS, **{name: value})
  with pytest.raises(ValueError, match=message):
    Writer(folder, settings)


def test_a_folder_of_other_things_is_an_error(tmp_path):
  (tmp_path / "thesis.tex").write_text("dear reader")
  with pytest.raises(ValueError, match="holds thesis.tex, which is no part"):
    Writer(tmp_path, SETTINGS)
  assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_full_disk_is_an_oserror_and_leaves_no_shard(tmp_path, monkeypatch):
  from array_record.python import array_record_module

  class Full(array_record_module.ArrayRecordWriter):
    def close(self):
      super().close()
      raise RuntimeError("No space left on device")

  monkeypatch.setattr(array_record_module, "ArrayRecordWriter", Full)
  writer = Writer(tmp_path, SETTINGS)
  with pytest.raises(OSError, match="No space left on device.*make room"):
    write_shard(writer, 0)
  assert [path.name for path in tmp_path.iterdir()] == ["progress"]
  assert not writer.has(0)


@pytest.mark.parametrize(
  "changes, message",
  [
    ({"vocab_size": 65537}, "vocab_size 65537 does not fit into uint16"),
    ({"crops": 0}, "crops 0 is below 1"),
    ({"num_shards": 12}, "11 samples do not fill 12 shards; use 1..11"),
  ],
)
def test_settings_that_make_no_cache_are_errors(changes, message):
  with pytest.raises(ValueError, match=message):
    dataclasses.replace(SETTINGS, **changes)


def test_a_missing_shard_is_named(cache):
  shards(cache)[1].unlink()
  with pytest.raises(ValueError, match="00001-of-00003.* is missing; restore"):
    TokenSource(cache)


def test_a_shard_that_was_cut_short_is_named(cache):
  content = shards(cache)[2].read_bytes()
  shards(cache)[2].write_bytes(content[:-100])
  message = f"00002-of.* has {len(content) - 100} bytes of the {len(content)}"
  with pytest.raises(ValueError, match=message):
    TokenSource(cache)


def test_a_flipped_bit_is_found_by_hashing_and_by_reading(cache):
  content = bytearray(shards(cache)[0].read_bytes())
  content[100] ^= 1
  shards(cache)[0].write_bytes(content)
  with pytest.raises(ValueError, match="00000-of.* is not what was written"):
    TokenSource(cache, verify=True)
  with pytest.raises(OSError, match="00000-of.*, sample 0 cannot be read"):
    TokenSource(cache)[0]


def test_an_unfinished_cache_is_no_source(tmp_path):
  write_shard(Writer(tmp_path, SETTINGS), 0)
  with pytest.raises(ValueError, match="not a finished token cache"):
    TokenSource(tmp_path)


@pytest.mark.parametrize(
  "changes, message",
  [
    ({"format_version": 2}, "has format_version 2, this code reads 1"),
    ({"samples": 12}, "does not list 12 samples in 3 shards"),
    ({"shards": [{"name": "x"}]}, "does not describe a token cache"),
    ({"colour": "red"}, "does not describe a token cache"),
  ],
)
def test_a_broken_manifest_is_one_line(cache, changes, message):
  edit_manifest(cache, **changes)
  with pytest.raises(ValueError, match=message) as error:
    TokenSource(cache)
  assert "\n" not in str(error.value)


def _draw(image, rng):
  return rng.integers(0, 256, (4, 4, 3), np.uint8)


def crops_of(places, workers=0, seed=0, count=2, batch_size=3):
  source = ArraySource(
    np.zeros((9, 2, 2), np.uint8), np.arange(9), tuple("abcdefghi")
  )
  wanted = CropSource(Tolerant(source), _draw, np.array(places), seed, count)
  batches = crop_batches(wanted, batch_size=batch_size, workers=workers)
  try:
    found = list(batches)
  finally:
    batches.close()
  return {
    key: np.concatenate([batch[key] for batch in found]) for key in found[0]
  }


def test_a_crop_is_a_function_of_seed_sample_and_crop():
  found = crops_of([3, 1, 8, 1])
  np.testing.assert_array_equal(found["label"], [3, 1, 8, 1])
  np.testing.assert_array_equal(found["index"], [3, 1, 8, 1])
  assert found["image"].shape == (4, 2, 4, 4, 3)
  for k, place in enumerate([3, 1, 8, 1]):
    for c in range(2):
      oracle = _draw(None, np.random.default_rng((0, place, c)))
      np.testing.assert_array_equal(found["image"][k, c], oracle)
  more = crops_of([1], count=3)
  np.testing.assert_array_equal(more["image"][0, :2], found["image"][1])
  assert (crops_of([1], seed=1)["image"] != found["image"][1]).any()


def test_worker_processes_change_nothing():
  places = list(range(9)) * 2
  threads, processes = crops_of(places), crops_of(places, workers=2)
  for key, array in threads.items():
    np.testing.assert_array_equal(processes[key], array)
