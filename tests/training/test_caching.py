"""Writing a token cache: what it holds, and that nothing changes that."""

import dataclasses
import itertools
import os
import pathlib
import signal
import subprocess
import sys
import threading

import jax
import numpy as np
import pytest

import var_jax
from configs import tokenizer as tokenizer_presets
from configs import var as var_presets
from var_jax import cli
from var_jax.checkpoints import weights
from var_jax.checkpoints.description import Description
from var_jax.data import sources, transforms
from var_jax.data.token_cache import TokenSource, Writer
from var_jax.models.tokenizer import Tokenizer, TokenizerConfig
from var_jax.training import caching, tokenizer_step

ROOT = pathlib.Path(__file__).parents[2]
SAMPLES, SHARDS = 70, 3  # 23, 23 and 24 samples: batches of 8 are padded


def write_tokenizer(folder, seed):
  """Write a tokenizer that no one trained; its tokens differ all the same."""
  cfg = TokenizerConfig(**tokenizer_presets.PRESETS["tiny"])
  variables = tokenizer_step.init_params(
    Tokenizer(cfg), jax.random.key(seed, impl="rbg")
  )
  folder.mkdir()
  weights.write_model(folder, Description(cfg), variables)
  return cfg, variables


@pytest.fixture(scope="module")
def root(tmp_path_factory):
  """Return a folder with images.npz, and with the tokenizers one and other."""
  root = tmp_path_factory.mktemp("caching")
  rng = np.random.default_rng(0)
  np.savez(
    root / "images.npz",
    images=rng.integers(0, 256, (SAMPLES, 20, 22, 3), np.uint8),
    labels=rng.integers(0, 5, SAMPLES),
  )
  write_tokenizer(root / "one", 0)
  write_tokenizer(root / "other", 1)
  return root


def make_config(root, **data):
  config = var_presets.get_config("tiny")
  config.seed = 3
  config.tokenizer_path = str(root / "one")
  config.data.source = f"npz:{root / 'images.npz'}"
  config.data.transform = "crop"
  config.data.flip = True
  config.data.cache_crops = 2
  config.data.update(data)
  return config


@pytest.fixture(scope="module")
def cache(root):
  """Return the folder of the cache that was written without interruption."""
  caching.build(make_config(root), root / "cache", num_shards=SHARDS)
  return root / "cache"


def content(folder):
  assert folder.exists()
  return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_cached_tokens_are_those_of_the_same_crops_bit_for_bit(root, cache):
  source = sources.open_source(f"npz:{root / 'images.npz'}", "train")
  crop = transforms.make_transform("crop", (16, 16), train=True, flip=True)
  images = [
    crop(source[i]["image"], np.random.default_rng((3, i, c)))
    for i in range(SAMPLES)
    for c in range(2)
  ]
  images_BHW3 = np.stack(images).astype(np.float32) / 127.5 - 1
  tokens_BL = np.asarray(var_jax.load(root / "one").encode(images_BHW3))
  assert len(np.unique(tokens_BL)) > 10
  cached = TokenSource(cache, verify=True)
  assert len(cached) == SAMPLES
  assert cached.class_names == source.class_names
  for i in range(SAMPLES):
    np.testing.assert_array_equal(
      cached[i]["tokens"], tokens_BL[2 * i : 2 * i + 2]
    )
    assert cached[i]["label"] == source[i]["label"]


def test_the_manifest_says_what_it_is_of(root, cache):
  cfg, variables = weights.read_tokenizer(root / "one")
  settings = TokenSource(cache).manifest.settings
  assert dataclasses.asdict(settings) == {
    "tokenizer": caching.tokenizer_checksum(variables, cfg.tokenizer),
    "source": f"npz:{root / 'images.npz'}",
    "samples": SAMPLES,
    "class_names": tuple("01234"),
    "transform": "crop",
    "flip": True,
    "image_shape": (16, 16),
    "seed": 3,
    "crops": 2,
    "length": 1 + 4 + 16,
    "vocab_size": 32,
    "num_shards": SHARDS,
  }


def stop_after(monkeypatch, count, error=KeyError):
  """Let the writer fail once `count` samples are written."""
  shard, calls = Writer.shard, itertools.count()

  class Context:
    def __init__(self, context):
      self.context = context

    def __enter__(self):
      write = self.context.__enter__()

      def counted(*sample):
        if next(calls) == count:
          raise error
        write(*sample)

      return counted

    def __exit__(self, *exception):
      return self.context.__exit__(*exception)

  monkeypatch.setattr(Writer, "shard", lambda *a: Context(shard(*a)))


@pytest.mark.parametrize(
  "count, finished", [(0, 0), (10, 0), (23, 1), (40, 1), (69, 2)]
)
def test_resumed_equals_uninterrupted(
  root, cache, tmp_path, monkeypatch, count, finished
):
  """Whether the end came between two shards or within one."""
  config, folder = make_config(root), tmp_path / "again"
  with monkeypatch.context() as patch:
    stop_after(patch, count)
    with pytest.raises(KeyError):
      caching.build(config, folder, num_shards=SHARDS)
  left = sorted(path.name for path in folder.iterdir())
  names = sorted(path.name for path in cache.glob("tokens-*"))
  assert left == ["progress", *names[:finished]]
  times = {name: (folder / name).stat().st_mtime_ns for name in left[1:]}
  caching.build(config, folder, num_shards=SHARDS)
  assert content(folder) == content(cache)
  for name, time in times.items():
    assert (folder / name).stat().st_mtime_ns == time  # not made again


def test_a_finished_cache_is_left_alone(root, cache, monkeypatch):
  before = content(cache)
  stop_after(monkeypatch, 0)
  caching.build(make_config(root), cache, num_shards=SHARDS)
  assert content(cache) == before


def test_two_processes_share_the_work(root, cache, tmp_path):
  """Each writes every second shard; the last one makes it a cache."""
  config, folder = make_config(root), tmp_path / "shared"
  caching.build(config, folder, share=(1, 2), num_shards=SHARDS)
  names = sorted(path.name for path in cache.glob("tokens-*"))
  there = sorted(path.name for path in folder.iterdir())
  assert there == ["progress", names[1]]
  caching.build(config, folder, share=(0, 2), num_shards=SHARDS)
  assert content(folder) == content(cache)


BUILD = """
import json, sys, ml_collections
from var_jax.parallel import multihost
from var_jax.training import caching

config, folder, shards = sys.argv[1:]
with multihost.joined():
  config = ml_collections.ConfigDict(json.loads(config))
  caching.build(config, folder, num_shards=int(shards))
"""


def test_joined_processes_share_the_work(root, cache, tmp_path):
  """Two and one of the shards, and the first process writes the manifest."""
  folder = tmp_path / "shared"
  arguments = [make_config(root).to_json(), folder, str(SHARDS)]
  done = subprocess.run(
    [ROOT / "launch" / "local.sh", "2", "-c", BUILD, *arguments],
    env=os.environ
    | {"VAR_JAX": sys.executable, "DEVICES": "1", "PYTHONPATH": str(ROOT)},
    capture_output=True,
    text=True,
  )
  assert done.returncode == 0, done.stdout
  assert content(folder) == content(cache)
  for said in ("[0] shard 2/2  47/47", "[1] shard 1/1  23/23"):
    assert done.stdout.count(said) == 1, done.stdout
  (line,) = [x for x in done.stdout.splitlines() if " holds 70 samples" in x]
  assert line.startswith("[0] ")


def test_worker_processes_change_nothing(root, cache, tmp_path):
  config = make_config(root, workers=1)
  caching.build(config, tmp_path / "again", num_shards=SHARDS)
  assert content(tmp_path / "again") == content(cache)


@pytest.mark.parametrize(
  "number, error",
  [(signal.SIGTERM, caching.Stopped), (signal.SIGINT, KeyboardInterrupt)],
)
def test_a_signal_leaves_finished_shards_and_no_partial_ones(
  root, cache, tmp_path, monkeypatch, number, error
):
  config, folder = make_config(root), tmp_path / "again"
  before, crop = signal.getsignal(number), transforms.random_crop
  made = itertools.count()

  def crop_and_signal(*args, **options):
    if next(made) == 130:  # in the second batch of the last shard
      os.kill(os.getpid(), number)
    return crop(*args, **options)

  monkeypatch.setattr(transforms, "random_crop", crop_and_signal)
  # One batch at a time, or all are made before the first is written.
  monkeypatch.setattr(caching.crops, "THREADS", 0)
  with pytest.raises(error):
    caching.build(config, folder, num_shards=SHARDS)
  monkeypatch.undo()
  assert signal.getsignal(number) is before
  names = sorted(path.name for path in cache.glob("tokens-*"))
  assert sorted(path.name for path in folder.iterdir()) == [
    "progress",
    *names[:2],
  ]
  caching.build(config, folder, num_shards=SHARDS)
  assert content(folder) == content(cache)


class Damaged:
  """A source of which some samples are broken."""

  def __init__(self, source, broken):
    self.source, self.broken = source, broken
    self.class_names = source.class_names

  def __len__(self):
    return len(self.source)

  def __getitem__(self, i):
    if i in self.broken:
      raise ValueError(f"{self.name_of(i)} cannot be decoded")
    return self.source[i]

  def name_of(self, i):
    return f"{i}.png"


def damage(monkeypatch, *broken):
  open_source = sources.open_source
  monkeypatch.setattr(
    sources, "open_source", lambda *args: Damaged(open_source(*args), broken)
  )


def test_broken_images_keep_their_place_and_are_named(
  root, cache, tmp_path, monkeypatch, capsys
):
  damage(monkeypatch, 0, 1, 30)
  config = make_config(root, on_broken="skip")
  caching.build(config, tmp_path / "skipped", num_shards=SHARDS)
  there, whole = TokenSource(tmp_path / "skipped"), TokenSource(cache)
  for i in range(SAMPLES):
    instead = {0: 2, 1: 2, 30: 31}.get(i, i)
    assert there[i]["label"] == whole[instead]["label"]
    same = (there[i]["tokens"] == whole[i]["tokens"]).all()
    assert same == (instead == i)
  names = [shard.broken for shard in there.manifest.shards]
  assert names == [("0.png", "1.png"), ("30.png",), ()]
  assert "3 are broken, manifest.json names them" in capsys.readouterr().out


def test_a_broken_image_ends_it_if_that_is_the_policy(
  root, tmp_path, monkeypatch
):
  damage(monkeypatch, 30)
  with pytest.raises(ValueError, match="30.png cannot be decoded"):
    caching.build(make_config(root), tmp_path / "new", num_shards=SHARDS)
  assert not list((tmp_path / "new").glob(".*"))
  damage(monkeypatch, 0)
  with pytest.raises(ValueError, match="0.png cannot be decoded"):
    caching.build(make_config(root), tmp_path / "none", num_shards=SHARDS)
  assert not (tmp_path / "none").exists()


def check(cache, config, tokenizer):
  described, variables = weights.read_tokenizer(tokenizer)
  checksum = caching.tokenizer_checksum(variables, described.tokenizer)
  caching.check(TokenSource(cache).manifest, checksum, config)


def test_a_cache_of_the_same_config_is_taken(root, cache):
  config = make_config(root, token_cache=str(cache))
  # The cache has its own seed and crops, and the data may lie elsewhere.
  config.seed, config.data.cache_crops = 0, 1
  config.data.source = "npz:/elsewhere/images.npz"
  check(cache, config, root / "one")


def test_a_cache_of_another_tokenizer_is_refused_in_one_line(root, cache):
  config = make_config(root, token_cache=str(cache))
  with pytest.raises(ValueError, match="is of another tokenizer") as error:
    check(cache, config, root / "other")
  assert str(cache) in str(error.value)
  assert "\n" not in str(error.value)


@pytest.mark.parametrize(
  "name, value, message",
  [
    ("transform", "resize", "data.transform is 'crop' there and 'resize' here"),
    ("flip", False, "data.flip is True there and False here"),
    ("source", "npz:/data/others.npz", "others.npz' here"),
    ("source", "digits", "data.source is .* here"),
  ],
)
def test_a_cache_of_another_config_is_refused(
  root, cache, name, value, message
):
  config = make_config(root, token_cache=str(cache), **{name: value})
  with pytest.raises(ValueError, match=message):
    check(cache, config, root / "one")


def test_a_folder_with_another_cache_is_left_alone(root, cache):
  before = content(cache)
  config = make_config(root)
  config.tokenizer_path = str(root / "other")
  with pytest.raises(ValueError, match="of other settings: tokenizer is"):
    caching.build(config, cache, num_shards=SHARDS)
  assert content(cache) == before


@pytest.mark.parametrize(
  "change, message",
  [
    ({"tokenizer_path": ""}, "tokenizer_path is empty"),
    ({"kind": "tokenizer"}, "kind 'tokenizer' trains on images"),
    ({"data.cache_crops": 0}, "crops 0 is below 1"),
    ({"data.transform": "blur"}, "transform 'blur' is unknown"),
  ],
)
def test_a_config_that_makes_no_cache_leaves_nothing(
  root, tmp_path, change, message
):
  config = make_config(root)
  config.update_from_flattened_dict(change)
  with pytest.raises(ValueError, match=message):
    caching.build(config, tmp_path / "new")
  assert not (tmp_path / "new").exists()


def test_every_field_of_a_tokenizer_changes_tokens_or_is_known_not_to():
  fields = {field.name for field in dataclasses.fields(TokenizerConfig)}
  assert fields - set(caching.TOKEN_FIELDS) == {
    "decoder_blocks",
    "beta",
    "dtype",
  }


def test_the_checksum_depends_on_each_parameter_and_field():
  cfg = TokenizerConfig(scales=(1, 2))
  variables = {"params": {"a": np.zeros(3, np.float32), "b": np.ones(2)}}
  others = [
    (variables, dataclasses.replace(cfg, quant_resi=0.25)),
    (variables, dataclasses.replace(cfg, scales=(1, 1, 2))),
    ({"params": {**variables["params"], "c": np.zeros(0)}}, cfg),
    ({"params": {"a": variables["params"]["a"], "c": np.ones(2)}}, cfg),
    ({"params": {**variables["params"], "b": np.ones((2, 1))}}, cfg),
    ({"params": {**variables["params"], "b": np.array([1, 1.0000001])}}, cfg),
  ]
  checksums = [
    caching.tokenizer_checksum(*pair) for pair in [(variables, cfg), *others]
  ]
  assert len(set(checksums)) == len(checksums)
  jaxed = {"params": dict(reversed(variables["params"].items()))}
  same = dataclasses.replace(cfg, dtype="bfloat16", decoder_blocks=1)
  assert caching.tokenizer_checksum(jaxed, same) == checksums[0]


def test_the_command_writes_a_cache(root, tmp_path, capsys):
  data = f"npz:{root / 'images.npz'}"
  arguments = ["cache", "--config", "configs/var.py:tiny"]
  arguments += ["--output", str(tmp_path / "cache")]
  overrides = [
    f"--config.tokenizer_path={root / 'one'}",
    f"--config.data.source={data}",
    "--config.data.cache_crops=3",
  ]
  assert cli.main([*arguments, *overrides]) == 0
  assert TokenSource(tmp_path / "cache")[0]["tokens"].shape == (3, 21)
  output = capsys.readouterr()
  assert "70 samples in 3 crops" in output.out
  assert "shard 1/1  70/70 samples" in output.err
  assert cli.main([*arguments, *overrides, "--config.seed=1"]) == 1
  assert "seed is 0 there and 1 here" in capsys.readouterr().err


def test_the_command_answers_sigterm_with_143(root, tmp_path, monkeypatch):
  monkeypatch.setattr(transforms, "random_crop", _terminate)
  code = cli.main(
    [
      "cache",
      "--config=configs/var.py:tiny",
      f"--output={tmp_path / 'cache'}",
      f"--config.tokenizer_path={root / 'one'}",
      f"--config.data.source=npz:{root / 'images.npz'}",
      "--config.data.transform=crop",
    ]
  )
  assert code == 143
  assert [path.name for path in (tmp_path / "cache").iterdir()] == ["progress"]


def _terminate(image, shape, rng, *, flip):
  # The first image is tried before a cache is there.
  if threading.current_thread() is not threading.main_thread():
    os.kill(os.getpid(), signal.SIGTERM)
  return image[: shape[0], : shape[1]]
