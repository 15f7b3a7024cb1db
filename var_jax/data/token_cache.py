"""Token caches: what a frozen tokenizer makes of a data source, on disk.

    manifest.json                            written last: what the rest is
    tokens-00000-of-00008.array_record       a record is one sample
    progress/                                of a cache that is not finished

Sample i of the cache is sample i of the source, or, where that one is broken,
the one that took its place: a position of the data clock means the same with
and without a cache. A record is little-endian and packed: label int32, index
in the source int64, tokens uint16 [crops, L]. Shard s of S holds the samples
n s // S .. n (s + 1) // S - 1.
"""

import concurrent.futures
import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from etils import epath

from var_jax import files
from var_jax.data.token_manifest import Manifest, Settings, Shard


class Writer:
  """Fills a folder shard by shard, where it has none or not what was written.

  Args:
    name_of: what to call sample i of the source if it is broken.

  Raises:
    ValueError: the folder holds something else, or a cache of other settings.
  """

  def __init__(
    self,
    folder: epath.PathLike,
    settings: Settings,
    name_of: Callable[[int], str] = "sample {}".format,
  ):
    self._folder = files.absolute(folder, buckets=())
    self._progress = self._folder / "progress"
    self._settings, self._name_of = settings, name_of
    self._manifest = None  # of a cache that was finished before
    path = self._progress / "settings.json"
    if (self._folder / "manifest.json").exists():
      self._manifest = Manifest.read(self._folder)
      there = self._manifest.settings
    elif path.exists():
      there = Settings.read(path)
    else:
      self._check_empty()
      there = settings
      files.write_json(path, dataclasses.asdict(settings))
    for name, value in dataclasses.asdict(settings).items():
      if getattr(there, name) != value:
        raise ValueError(
          f"{self._folder} holds a token cache of other settings: {name} is "
          f"{_short(getattr(there, name))} there and {_short(value)} here; "
          "give a new folder."
        )

  def has(self, s: int) -> bool:
    """Return whether shard s is finished, and is what was written."""
    shard = self._recorded(s)
    return shard is not None and _fault(self._folder, shard, True) is None

  @contextlib.contextmanager
  def shard(self, s: int) -> Iterator[Callable[[int, int, np.ndarray], None]]:
    """Give write(label, index, tokens_CL), to be called for each sample.

    Raises:
      OSError: it cannot be written. What was written of it is removed.
    """
    from array_record.python import array_record_module

    name, places = self._settings.shard_name(s), self._settings.samples_of(s)
    aside = self._folder / f".{name}.partial"
    broken, left = [], iter(places)

    def write(label: int, index: int, tokens_CL: np.ndarray) -> None:
      place = next(left)
      if index != place:
        broken.append(self._name_of(place))
      record = np.array((label, index, tokens_CL), self._settings.record)
      with _disk_errors(aside):
        writer.write(record.tobytes())

    with _disk_errors(aside):
      writer = array_record_module.ArrayRecordWriter(str(aside), "group_size:1")
    try:
      try:
        yield write
      finally:
        with _disk_errors(aside):
          writer.close()
      assert next(left, None) is None, f"{name} is not full"
      size, sha256 = aside.stat().length, files.sha256(aside)
      aside.replace(self._folder / name)
    finally:
      aside.unlink(missing_ok=True)
    shard = Shard(name, len(places), size, sha256, tuple(broken))
    files.write_json(self._record_path(s), dataclasses.asdict(shard))

  def finish(self) -> Manifest | None:
    """Return the manifest, written now, or None while shards are missing."""
    shards = [self._recorded(s) for s in range(self._settings.num_shards)]
    if None in shards:
      return None
    manifest = Manifest(self._settings, tuple(shards))
    manifest.write(self._folder)
    self._progress.rmtree(missing_ok=True)
    return manifest

  def _record_path(self, s: int) -> epath.Path:
    return self._progress / f"{s:05}.json"

  def _recorded(self, s: int) -> Shard | None:
    path = self._record_path(s)
    if path.exists():
      return Shard(**files.read_json(path))
    return self._manifest and self._manifest.shards[s]

  def _check_empty(self) -> None:
    there = self._folder.iterdir() if self._folder.exists() else ()
    names = sorted(path.name for path in there if path != self._progress)
    if names:
      raise ValueError(
        f"{self._folder} holds {names[0]}, which is no part of a token cache; "
        "give a new folder."
      )


class TokenSource:
  """A finished cache as a source of {"tokens", "label"}.

  Tokens are uint16 [crops, L] of one sample, labels int.

  Files are opened by the process that first reads from them.

  Args:
    verify: hash all shards too; their sizes are always compared.

  Raises:
    ValueError: the cache is not finished, or a shard is not what was written.
  """

  def __init__(self, folder: epath.PathLike, *, verify: bool = False):
    self.folder = files.absolute(folder, buckets=())
    self.manifest = Manifest.read(self.folder)
    self.class_names = self.manifest.settings.class_names
    with concurrent.futures.ThreadPoolExecutor() as pool:
      check = functools.partial(_fault, self.folder, hashes=verify)
      for fault in pool.map(check, self.manifest.shards):
        if fault:
          raise ValueError(f"{fault}; restore it or write the cache again.")

  def __len__(self) -> int:
    return self.manifest.settings.samples

  def __getitem__(self, i: int) -> dict:
    record_type = self.manifest.settings.record
    try:
      record = np.frombuffer(self._records[i], record_type)[0]
    except (RuntimeError, ValueError, IndexError) as error:
      # No broken image, which a policy may pass over: this can be mended.
      raise OSError(
        f"{self.name_of(i)} cannot be read ({error}); restore it or write the "
        "cache again."
      ) from error
    return {"tokens": record["tokens"], "label": int(record["label"])}

  def name_of(self, i: int) -> str:
    """Return where sample i lies."""
    settings = self.manifest.settings
    s = (i * settings.num_shards + settings.num_shards - 1) // settings.samples
    return f"{self.folder / settings.shard_name(s)}, sample {i}"

  @functools.cached_property
  def _records(self):
    from array_record.python import array_record_data_source

    return array_record_data_source.ArrayRecordDataSource(
      [
        f"{self.folder / shard.name}[0:{shard.samples}]"
        for shard in self.manifest.shards
      ]
    )


@contextlib.contextmanager
def _disk_errors(path: epath.Path) -> Iterator[None]:
  """Make an OSError of what ArrayRecord raises, of a full disk for example."""
  try:
    yield
  except RuntimeError as error:
    raise OSError(
      f"{path} cannot be written ({error}); make room or give another folder."
    ) from error


def _fault(folder: epath.Path, shard: Shard, hashes: bool) -> str | None:
  """Return what is wrong with a shard, if anything is."""
  path = folder / shard.name
  if not path.exists():
    return f"{path} is missing"
  size = path.stat().length
  if size != shard.bytes:
    return f"{path} has {size} bytes of the {shard.bytes} that were written"
  if hashes and files.sha256(path) != shard.sha256:
    return f"{path} is not what was written (SHA-256 {shard.sha256[:12]}..)"
  return None


def _short(value: Any) -> str:
  text = repr(value)
  return text if len(text) <= 60 else f"{text[:57]}..."
