"""Read the recorded arrays of the official code, without torch."""

import collections
import functools
import io
import json
import lzma
import pathlib
import pickle
import zipfile

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy

from var_jax.checkpoints import torch_format
from var_jax.generation.sampler import ModelParams, Models
from var_jax.models.tokenizer import Tokenizer, TokenizerConfig
from var_jax.models.transformer import VAR, VARConfig

FOLDER = pathlib.Path(__file__).parent / "golden"

TOKENIZER = TokenizerConfig(
  vocab_size=128, latent_channels=8, channels=32, scales=(1, 2, 3, 4)
)
_TINY = dict(
  depth=3,
  num_classes=10,
  vocab_size=128,
  latent_channels=8,
  scales=(1, 2, 3, 4),
  drop_path=0.0,
)
VARIANTS = {
  "A": VARConfig(width=32, heads=4, **_TINY),
  "B": VARConfig(width=32, heads=2, shared_adaln=True, **_TINY),
  "C": VARConfig(width=24, heads=3, qk_norm=False, **_TINY),
}
VAR_FILES = {
  "A": "var_tiny.pth",
  "B": "var_tiny_saln.pth",
  "C": "var_tiny_nol2.pth",
}


@functools.cache
def arrays(name: str) -> dict[str, np.ndarray]:
  """Return the arrays of an .npz file."""
  with np.load(FOLDER / name) as file:
    return dict(file)


@functools.cache
def table(name: str):
  """Return the content of a .json file."""
  return json.loads((FOLDER / name).read_text())


@functools.cache
def state_dict(name: str) -> dict[str, np.ndarray]:
  """Return the tensors of a torch file, read as what it is: a zip of bytes."""
  data = (FOLDER / name).read_bytes()
  if name.endswith(".xz"):
    data = lzma.decompress(data)
  with zipfile.ZipFile(io.BytesIO(data)) as archive:
    return dict(_TensorUnpickler(archive).load())


@functools.cache
def var_params(variant: str):
  """Return the parameter tree of transformer A, B or C."""
  tensors = state_dict(VAR_FILES[variant])
  entries = torch_format.var_entries(VARIANTS[variant])
  return {"params": torch_format.from_official(tensors, entries)}


@functools.cache
def tokenizer(share: int = 4, cosine: bool = False):
  """Return (config, parameter tree) of the tiny tokenizer."""
  distance = "cosine" if cosine else "euclidean"
  cfg = TokenizerConfig(
    **{**vars(TOKENIZER), "num_phis": share, "distance": distance}
  )
  tensors = dict(state_dict("vae_tiny.pth.xz"))
  if share != 4:
    recorded = arrays(f"vae_share{share}_znorm{int(cosine)}.npz")
    tensors = {k: v for k, v in tensors.items() if "qresi_ls" not in k}
    tensors |= {k[2:]: v for k, v in recorded.items() if k.startswith("w.")}
  entries = torch_format.tokenizer_entries(cfg)
  return cfg, {"params": torch_format.from_official(tensors, entries)}


def tokenizer_tensors(share):
  """Return the official state dict that shares its phis in this way."""
  tensors = state_dict("vae_tiny.pth.xz")
  if share == 4:
    return tensors
  phis = arrays(f"vae_share{share}_znorm0.npz")
  others = {k: v for k, v in tensors.items() if "quant_resi" not in k}
  return others | {k[2:]: v for k, v in phis.items() if k.startswith("w.")}


def to_official(params, entries) -> dict[str, np.ndarray]:
  """Return the official state dict of a parameter tree, without buffers."""
  arrays = flax.traverse_util.flatten_dict(params, sep="/")
  return dict(torch_format.official_tensors(arrays, entries))


@functools.cache
def pair(variant: str) -> tuple[Models, ModelParams]:
  """Return transformer A, B or C with the tokenizer it was recorded with."""
  cfg, tokenizer_params = tokenizer()
  models = Models(Tokenizer(cfg), VAR(VARIANTS[variant]))
  params = ModelParams(tokenizer_params, var_params(variant))
  return models, jax.tree.map(jnp.asarray, params)


def write_torch_files(folder: pathlib.Path) -> None:
  """Put the recorded torch files there: vae.pth, A.pth, .., trainer.pth."""
  for name, file in {
    "vae": "vae_tiny.pth.xz",
    "trainer": "ar-ckpt-tiny.pth.xz",
    **VAR_FILES,
  }.items():
    data = (FOLDER / file).read_bytes()
    data = lzma.decompress(data) if file.endswith(".xz") else data
    (folder / f"{name}.pth").write_bytes(data)


def write_safetensors_files(folder: pathlib.Path) -> None:
  """Put the same state dicts there without torch: vae.safetensors, .."""
  files = {"vae": "vae_tiny.pth.xz", **VAR_FILES}
  for name, file in files.items():
    tensors = {k: v.copy() for k, v in state_dict(file).items()}
    safetensors.numpy.save_file(tensors, folder / f"{name}.safetensors")


def nhwc(array: np.ndarray) -> np.ndarray:
  return np.moveaxis(array, -3, -1)


def to_ours(image_B3HW: np.ndarray) -> np.ndarray:
  """Return a sampled image, [0, 1] NCHW, as [-1, 1] NHWC."""
  return nhwc(image_B3HW) * 2.0 - 1.0


def assert_close(actual, expected, tolerance: float = 1e-4):
  """Hold `actual` within `tolerance` of the largest magnitude expected."""
  actual, expected = np.asarray(actual), np.asarray(expected)
  assert actual.shape == expected.shape
  atol = tolerance * max(np.abs(expected).max(), 1e-30)
  np.testing.assert_allclose(actual, expected, rtol=0, atol=atol)


class _TensorUnpickler(pickle.Unpickler):
  """Rebuilds contiguous tensors as arrays, and refuses everything else."""

  _DTYPES = {"FloatStorage": np.float32, "LongStorage": np.int64}

  def __init__(self, archive: zipfile.ZipFile):
    self.archive = archive
    names = archive.namelist()
    pickled = next(name for name in names if name.endswith("/data.pkl"))
    self.folder = pickled.removesuffix("data.pkl") + "data/"
    super().__init__(io.BytesIO(archive.read(pickled)))

  def find_class(self, module, name):
    if (module, name) == ("collections", "OrderedDict"):
      return collections.OrderedDict
    if name == "_rebuild_tensor_v2":
      return lambda storage, offset, shape, stride, *_: (
        np.lib.stride_tricks.as_strided(
          storage[offset:], shape, [n * storage.itemsize for n in stride]
        )
      )
    if module == "torch" and name in self._DTYPES:
      return self._DTYPES[name]
    raise pickle.UnpicklingError(f"{module}.{name} is not a tensor")

  def persistent_load(self, pid):
    _, dtype, key, *_ = pid
    return np.frombuffer(self.archive.read(self.folder + key), dtype)
