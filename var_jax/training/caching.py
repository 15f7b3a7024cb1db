"""`var-jax cache`: encode a training split once, for many runs to train on.

What is written depends on the config alone. Processes share the work by
shards, and a shard is always encoded in the same batches, so that one which is
made again is the same.
"""

import contextlib
import hashlib
import json
import signal
import threading
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import ml_collections
import numpy as np
from etils import epath
from flax.traverse_util import flatten_dict
from jax.experimental import multihost_utils

from var_jax.checkpoints import weights
from var_jax.data import (
  broken,
  crops,
  pipeline,
  sources,
  token_cache,
  transforms,
)
from var_jax.data.token_manifest import Manifest, Settings, default_shards
from var_jax.models.tokenizer import TokenizerConfig
from var_jax.parallel import mesh as mesh_lib
from var_jax.training import checks, encoding
from var_jax.training.caching_report import Report

# What a device encodes at once: at 256 px some GiB of activations.
IMAGES_PER_DEVICE = 16

# The fields of TokenizerConfig that tokens depend on.
TOKEN_FIELDS = (
  "vocab_size", "latent_channels", "channels", "channel_mults",
  "encoder_blocks", "norm_groups", "scales", "num_phis", "quant_resi",
  "distance",
)  # fmt: skip


class Stopped(Exception):
  """SIGTERM came; the shards that were finished are kept."""


def build(
  config: ml_collections.ConfigDict,
  output: epath.PathLike,
  *,
  share: tuple[int, int] | None = None,
  num_shards: int | None = None,
) -> None:
  """Write the token cache of a config's training split, or what it lacks.

  Args:
    config: of a transformer, as `configs/var.py` returns it.
    output: created if missing, or gone on with.
    share: (p, P) makes the shards p, p + P, ...; by default this process's
      share among all that JAX knows. The last to finish writes the manifest.
    num_shards: by default as many as the number of samples asks for.

  Raises:
    ValueError: the config makes no sense, or `output` is of another one.
    OSError: `output` cannot be written.
    Stopped: SIGTERM came.
  """
  _check_config(config)
  source = sources.open_source(config.data.source, "train")
  mesh = mesh_lib.make_mesh(devices=jax.local_devices())
  described, variables = weights.read_tokenizer(
    config.tokenizer_path or config.init_from,
    sharding=mesh_lib.replicated(mesh),
  )
  transform = transforms.make_transform(
    config.data.transform,
    described.tokenizer.image_shape,
    train=True,
    flip=config.data.flip,
  )
  pipeline.check_first(source, transform, config.data.on_broken)
  settings = Settings(
    **_of_tokenizer(described.tokenizer, variables),
    **_of_data(config, source),
    num_shards=num_shards or default_shards(len(source)),
  )
  writer = _shared_writer(output, settings, source.name_of)
  first, step = share or (jax.process_index(), jax.process_count())
  mine = range(first, settings.num_shards, step)
  todo = [s for s in mine if not writer.has(s)]
  if todo:
    rows = mesh.size * max(1, IMAGES_PER_DEVICE // settings.crops)
    batches = _batches(config, source, transform, settings, todo, rows)
    encode = encoding.encoder(described.tokenizer, variables, mesh)
    _write(writer, settings, todo, rows, batches, encode)
  multihost_utils.sync_global_devices("token cache: all shards are written")
  if jax.process_index() == 0:
    _finish(writer, output, alone=share is None)


def check(manifest: Manifest, checksum: str, config) -> None:
  """Raise ValueError if a cache is not what a config would have cached.

  The number of crops, the seed of their augmentation and the path to the data
  are the cache's own matter.

  Args:
    checksum: that of the frozen tokenizer, as `tokenizer_checksum` gives it.
  """
  there, path = manifest.settings, config.data.token_cache
  if there.tokenizer != checksum:
    raise ValueError(
      f"token cache {path} is of another tokenizer ({there.tokenizer[:12]}.. "
      f"there, {checksum[:12]}.. here); set config.tokenizer_path to the one "
      "it is of, or write a new cache."
    )
  pairs = {
    "source": (there.source, config.data.source),
    "transform": (there.transform, config.data.transform),
    "flip": (there.flip, config.data.flip),
  }
  for name, (cached, here) in pairs.items():
    same = _name(cached) == _name(here) if name == "source" else cached == here
    if not same:
      raise ValueError(
        f"token cache {path} is of another config: data.{name} is {cached!r} "
        f"there and {here!r} here; set that, or write a new cache."
      )


def tokenizer_checksum(variables: Mapping, cfg: TokenizerConfig) -> str:
  """Return the SHA-256 of a tokenizer: parameters, and what uses them how."""
  fields = {name: getattr(cfg, name) for name in TOKEN_FIELDS}
  digest = hashlib.sha256(json.dumps(fields, sort_keys=True).encode())
  for name, leaf in sorted(flatten_dict(variables["params"], sep="/").items()):
    array = np.ascontiguousarray(leaf)
    digest.update(f"\n{name} {array.dtype} {array.shape} ".encode())
    digest.update(array.data)
  return digest.hexdigest()


def _check_config(config) -> None:
  if config.get("kind") == "tokenizer":
    raise ValueError(
      f"kind {config.kind!r} trains on images; cache the tokens of a config of "
      "kind 'var'."
    )
  checks.check_config(config)
  if not (config.tokenizer_path or config.init_from):
    raise ValueError(
      "tokenizer_path is empty; set config.tokenizer_path to the workdir of a "
      "trained tokenizer."
    )


def _of_tokenizer(cfg: TokenizerConfig, variables) -> dict[str, Any]:
  return dict(
    tokenizer=tokenizer_checksum(variables, cfg),
    image_shape=cfg.image_shape,
    length=cfg.schedule.num_tokens,
    vocab_size=cfg.vocab_size,
  )


def _of_data(config, source) -> dict[str, Any]:
  return dict(
    source=config.data.source,
    samples=len(source),
    class_names=source.class_names,
    transform=config.data.transform,
    flip=config.data.flip,
    seed=config.seed,
    crops=config.data.cache_crops,
  )


def _shared_writer(output, settings: Settings, name_of) -> token_cache.Writer:
  """Return the writer of this process; the first one makes the folder."""
  if jax.process_index() == 0:
    writer = token_cache.Writer(output, settings, name_of)
  multihost_utils.sync_global_devices("token cache: the folder is there")
  if jax.process_index():
    writer = token_cache.Writer(output, settings, name_of)
  return writer


def _batches(config, source, transform, settings: Settings, todo, rows: int):
  """Return the crops of the shards `todo`, each in whole batches of `rows`."""
  wanted = crops.CropSource(
    broken.Tolerant(source, config.data.on_broken, transform.refusal),
    transform,
    np.concatenate(
      [_whole_batches(settings.samples_of(s), rows) for s in todo]
    ),
    settings.seed,
    settings.crops,
  )
  return crops.crop_batches(
    wanted, batch_size=rows, workers=config.data.workers
  )


def _whole_batches(samples: range, rows: int) -> np.ndarray:
  """Return samples and, up to a multiple of `rows`, the last one again."""
  return np.pad(np.array(samples), (0, -len(samples) % rows), "edge")


def _write(writer, settings: Settings, todo, rows: int, batches, encode):
  """Write the shards `todo`, whose crops `batches` has one after another."""
  sizes = [len(settings.samples_of(s)) for s in todo]
  report = Report(sum(sizes), len(sizes))
  with _noticed_signals() as came, contextlib.closing(batches), report:
    encoded = encoding.encoded(batches, encode)
    for s, size in zip(todo, sizes, strict=True):
      with writer.shard(s) as write:
        for start in range(0, size, rows):
          batch, tokens_bCL = next(encoded)
          _leave_if(came)
          count = min(rows, size - start)
          for row in range(count):
            write(batch["label"][row], batch["index"][row], tokens_bCL[row])
          report.advance(count)
      report.shard_is_written()


@contextlib.contextmanager
def _noticed_signals() -> Iterator[list[int]]:
  """Give a list of the SIGINT and SIGTERM that came, in place of their effect.

  An exception at any moment would have to find its way through libraries that
  wait for threads and processes.
  """
  came = []
  if threading.current_thread() is not threading.main_thread():
    yield came  # signals are the main thread's
    return
  numbers = (signal.SIGINT, signal.SIGTERM)
  before = {n: signal.signal(n, lambda n, _: came.append(n)) for n in numbers}
  try:
    yield came
  finally:
    for number, handler in before.items():
      signal.signal(number, handler)


def _leave_if(came: list[int]) -> None:
  if signal.SIGINT in came:
    raise KeyboardInterrupt
  if came:
    raise Stopped(
      "stopped by SIGTERM; the shards that are finished are kept: run the same "
      "command to go on."
    )


def _finish(writer: token_cache.Writer, output, alone: bool) -> None:
  manifest = writer.finish()
  if manifest:
    settings = manifest.settings
    names = sum(len(shard.broken) for shard in manifest.shards)
    print(
      f"{output} holds {settings.samples} samples in {settings.crops} crops"
      + (f"; {names} are broken, manifest.json names them" if names else "")
    )
  elif alone:
    raise ValueError(
      f"{output} lacks shards that other processes wrote; give an --output "
      "that all processes share."
    )


def _name(source: str) -> tuple[str, str]:
  """Return what a source is, wherever it lies: its kind and its last name."""
  kind, _, path = source.partition(":")
  return kind, path.rstrip("/").rpartition("/")[2]
