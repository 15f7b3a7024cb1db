"""Paths on a disk and in buckets, and the folders that are filled there."""

import importlib.util
import subprocess
import sys

import numpy as np
import pytest

from var_jax import files, images, loading
from var_jax.checkpoints import hub
from var_jax.data import sources, token_cache
from var_jax.parallel import multihost


def test_a_path_in_a_bucket_is_absolute(bucket, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  assert files.absolute("run") == files.absolute(tmp_path / "run")
  assert str(files.absolute("gs://bucket/run")) == "gs://bucket/run"
  assert str(files.absolute("gs://bucket/run/")) == "gs://bucket/run"


@pytest.mark.parametrize("path", ["s3://bucket/run", "http://host/run"])
def test_a_checkpoint_elsewhere_is_refused(path):
  with pytest.raises(ValueError, match=f"'{path}' is no place .* or gs://"):
    loading.load(path)


def test_a_missing_package_is_named(monkeypatch):
  monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
  with pytest.raises(ValueError, match=r"pip install gcsfs"):
    files.absolute("gs://bucket/run")
  with pytest.raises(ValueError, match=r"pip install s3fs"):
    images.check_output("s3://bucket/3.png")


@pytest.mark.parametrize(
  "read",
  [
    lambda path: sources.open_source(f"npz:{path}", "train"),
    lambda path: sources.open_source(f"folder:{path}", "train"),
    token_cache.TokenSource,
    hub.find,
    lambda path: files.new_folder(path).__enter__(),
  ],
  ids=["npz", "folder", "cache", "convert", "folder of a model"],
)
def test_what_cannot_be_in_a_bucket_says_so(read):
  with pytest.raises(ValueError, match="give a folder, or mount the bucket"):
    read("gs://bucket/x")


def test_a_folder_in_a_bucket_is_gone_when_filling_it_fails(bucket, tmp_path):
  folder = files.absolute(bucket) / tmp_path.name
  with pytest.raises(KeyError):
    with files.new_folder(folder, buckets=("gs",)) as aside:
      (aside / "part").write_text("x")
      assert folder.exists()
      raise KeyError
  assert not folder.exists()
  with files.new_folder(folder, buckets=("gs",)) as aside:
    (aside / "part").write_text("x")
  assert (folder / "part").read_text() == "x"
  with pytest.raises(ValueError, match="exists already"):
    with files.new_folder(folder, buckets=("gs",)):
      pass


COMPILE = """
import sys
import jax
from var_jax.parallel import multihost
multihost.enable_compile_cache(sys.argv[1])
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
print(jax.jit(lambda x: x * 2 + 1)(3))
"""


def test_compiled_programs_are_kept_in_a_bucket(bucket, tmp_path):
  folder = files.absolute(bucket) / tmp_path.name
  subprocess.run([sys.executable, "-c", COMPILE, folder], check=True)
  assert any(path.name.endswith("-cache") for path in folder.iterdir())


def test_a_compile_cache_that_cannot_be_written_is_one_line(bucket):
  with pytest.raises(ValueError, match="cache gs://none/c cannot be wr"):
    multihost.enable_compile_cache("gs://none/c")


@pytest.fixture
def shelf(monkeypatch):
  """Return "s3://shelf", which moto serves over loopback."""
  import s3fs
  from moto.server import ThreadedMotoServer

  server = ThreadedMotoServer("127.0.0.1", port=0)
  server.start()
  host, port = server.get_host_and_port()
  monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
  monkeypatch.setenv("AWS_ACCESS_KEY_ID", "none")
  monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "none")
  monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
  s3fs.S3FileSystem().mkdir("shelf")
  yield "s3://shelf"
  server.stop()


def test_a_picture_in_s3_comes_back(shelf):
  path, pixels_HW3 = f"{shelf}/sub/3.png", np.arange(48, dtype=np.uint8)
  pixels_HW3 = pixels_HW3.reshape(4, 4, 3)
  for wanted in (pixels_HW3[:2], pixels_HW3):
    images.write_image(path, wanted)
    found = images.to_uint8(images.read_image(path))
    np.testing.assert_array_equal(found, wanted)
