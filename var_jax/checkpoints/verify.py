"""Proof that a conversion lost nothing: the way back, and another's numbers.

Every tensor is read back from what was written and compared bit for bit. Where
torch is installed and the checkout's tests are at hand, our models are run
beside the PyTorch reference in `tests/torch_reference.py`, which was written
from the paper and loads the official state dicts strictly.
"""

import functools
import importlib.util
import pathlib
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from var_jax.checkpoints import (
  convert,
  export,
  tensor_files,
  torch_format,
  weights,
)
from var_jax.checkpoints.architecture import Tensors
from var_jax.checkpoints.description import Description
from var_jax.models.tokenizer import Tokenizer
from var_jax.models.transformer import VAR

REFERENCE = pathlib.Path(__file__).parents[2] / "tests" / "torch_reference.py"

# Of the largest magnitude, between two float32 implementations.
TOLERANCE = 1e-4


class Row(NamedTuple):
  """One line of the table; None where it does not apply."""

  what: str
  tensors: int | None
  parameters: int | None
  difference: str


def imported(folder: pathlib.Path, source: convert.Source) -> list[Row]:
  """Return the table of a workdir that was made from `source`.

  Raises:
    ValueError: a tensor does not come back as it was, or the reference says
      something else.
  """
  folder = pathlib.Path(folder)
  description = source.description
  return _table(folder, description, "raw", source.vae, source.var)


def exported(folder: pathlib.Path, checkpoint: str, which: str) -> list[Row]:
  """Return the table of official files that were made from `checkpoint`.

  Raises:
    ValueError: as `imported`.
  """
  folder, found = pathlib.Path(folder), {}
  for path in sorted((*folder.glob("*.*"), *folder.glob("vae/*.*"))):
    if path.suffix in tensor_files.ENDINGS:
      found |= tensor_files.read(str(path)).state_dicts
  description = Description.read(checkpoint)
  return _table(
    pathlib.Path(checkpoint), description, which, found["vae"], found.get("var")
  )


def _table(workdir, description, which, vae, var) -> list[Row]:
  at = weights.tokenizer_folder(workdir)
  tokenizer = Description.read(at).tokenizer
  ours = export.official_tokenizer(at, tokenizer, which)
  rows = [_compare_tensors("tokenizer", ours, vae)]
  del ours
  if description.transformer:
    ours = export.official_var(workdir, description.transformer, which)
    rows.append(_compare_tensors("transformer", ours, var))
    del ours
  return rows + _compare_models(workdir, which, vae, var)


def _compare_tensors(what: str, ours: Tensors, theirs: Tensors) -> Row:
  # A stripped file may lack buffers, ours has them all.
  names = [name for name in ours if name in theirs]
  for name in names:
    if ours[name].tobytes() != theirs[name].tobytes():
      with np.errstate(invalid="ignore"):
        off = np.abs(ours[name].astype("f8") - theirs[name]).max()
      raise ValueError(
        f"tensor {name} comes back off by up to {off}; this is a defect of "
        "var-jax, please report it."
      )
  count = sum(
    ours[name].size for name in names if not torch_format.is_buffer(name)
  )
  return Row(what, len(names), count, "0")


def _compare_models(workdir, which, vae: Tensors, var) -> list[Row]:
  """Return what our models and the reference make of the same inputs."""
  reference, reason = _reference()
  if reference is None:
    return [Row(f"PyTorch reference: not compared, {reason}", None, None, "")]
  import torch

  description, tokenizer_params, var_params = weights.read_models(
    workdir, weights=which
  )
  cfg = description.tokenizer
  tokenizer = Tokenizer(cfg)
  their_tokenizer = _assigned(reference.Tokenizer, cfg, vae)
  random = np.random.default_rng(0)
  images_BHW3 = random.uniform(-1, 1, (1, *cfg.image_shape, 3)).astype("f4")
  tokens_BL = random.integers(cfg.vocab_size, size=(1, cfg.schedule.num_tokens))

  def ours(method: str, array: np.ndarray) -> np.ndarray:
    apply = jax.jit(functools.partial(tokenizer.apply, method=method))
    return np.asarray(apply(tokenizer_params, jnp.asarray(array)))

  with torch.no_grad():
    image_B3HW = torch.from_numpy(images_BHW3.transpose(0, 3, 1, 2).copy())
    their_tokens_BL = their_tokenizer.encode(image_B3HW).numpy()
    same = np.mean(ours("encode", images_BHW3) == their_tokens_BL)
    rows = [Row("tokens of an image", None, None, f"{same:.2%} the same")]
    theirs = their_tokenizer.decode(torch.from_numpy(tokens_BL))
    decoded = ours("decode", tokens_BL.astype("i4"))
    rows.append(
      _close("reconstruction", decoded, theirs.numpy().transpose(0, 2, 3, 1))
    )
    if var is not None:
      their_var = _assigned(reference.VAR, description.transformer, var)
      inputs_BLZ = ours("inputs", tokens_BL.astype("i4"))
      logits_BLV = jax.jit(VAR(description.transformer).apply)(
        var_params, jnp.zeros(1, jnp.int32), inputs_BLZ
      )
      theirs = their_var(
        torch.zeros(1, dtype=torch.int64),
        their_tokenizer.inputs(torch.from_numpy(tokens_BL)),
      )
      rows.append(_close("logits", logits_BLV, theirs.numpy()))
  return rows


def _close(what: str, ours, theirs: np.ndarray) -> Row:
  ours = np.asarray(ours)
  off = float(np.abs(ours - theirs).max())
  largest = float(np.abs(theirs).max())
  if not off <= TOLERANCE * largest:
    raise ValueError(
      f"{what} differs from the PyTorch reference by {off:.3g} where the "
      f"largest magnitude is {largest:.3g}; the limit is {TOLERANCE} of it."
    )
  return Row(f"{what}, to PyTorch", None, None, f"{off:.1e} of {largest:.3g}")


def _assigned(cls, cfg, tensors: Tensors):
  """Return a module of the reference that uses the tensors where they lie."""
  import torch

  with torch.device("meta"):
    module = cls(cfg)
  state_dict = {name: tensors[name] for name in module.state_dict()}
  module.load_state_dict(
    {
      k: torch.from_numpy(np.require(v, requirements="W"))
      for k, v in state_dict.items()
    },
    strict=True,
    assign=True,
  )
  return module.eval()


def _reference():
  """Return (module, None), or (None, why there is none)."""
  if not REFERENCE.exists():
    return None, "it is in a checkout's tests only"
  try:
    import torch  # noqa: F401
  except ImportError:
    return None, "torch is not installed"
  spec = importlib.util.spec_from_file_location("torch_reference", REFERENCE)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module, None
