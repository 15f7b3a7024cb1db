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

import flax.traverse_util
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
# Two codes may be equally near but for rounding, and one such choice changes
# what the scales after it see; a wrong quantiser changes nearly all.
SAME_TOKENS = 0.9


class Row(NamedTuple):
  """One line of the table; None where it does not apply."""

  what: str
  tensors: int | None
  parameters: int | None
  difference: str


def imported(folder: pathlib.Path, source: convert.Source) -> list[Row]:
  """Return the table of a workdir that was made from `source`.

  Its weights are written back as official tensors and compared.

  Raises:
    ValueError: a tensor does not come back as it was, or the reference says
      something else.
  """
  description = source.description
  vae_step = weights.newest(weights.tokenizer_folder(folder))
  steps = export.Steps(vae_step, None)
  back = export.official_tokenizer(vae_step, description.tokenizer, "raw")
  rows = [_compare_tensors("tokenizer", back, source.vae)]
  del back
  if description.transformer:
    steps = export.Steps(vae_step, weights.newest(folder))
    back = export.official_var(steps.var, description.transformer, "raw")
    rows.append(_compare_tensors("transformer", back, source.var))
    del back
  return rows + _compare_models(steps, "raw", source.vae, source.var)


def exported(
  folder: pathlib.Path, steps: export.Steps, which: str
) -> list[Row]:
  """Return the table of official files that were made from `steps`.

  They are read as any official file is, and compared with the parameters.

  Raises:
    ValueError: as `imported`.
  """
  folder, found = pathlib.Path(folder), {}
  for path in sorted((*folder.glob("*.*"), *folder.glob("vae/*.*"))):
    if path.suffix in tensor_files.ENDINGS:
      found |= tensor_files.read(str(path)).state_dicts
  vae, var = found["vae"], found.get("var")
  cfg = _description(steps.vae).tokenizer
  abstract = torch_format.abstract_tokenizer(cfg)
  entries = torch_format.tokenizer_entries(cfg)
  rows = [_compare("tokenizer", vae, entries, steps.vae, abstract, which)]
  hits_SV = weights.read_code_hits(steps.vae, cfg)
  if hits_SV is not None:
    _must_equal(torch_format.CODE_HITS, vae[torch_format.CODE_HITS], hits_SV)
  if steps.var:
    cfg = _description(steps.var).transformer
    abstract = torch_format.abstract_var(cfg)
    entries = torch_format.var_entries(cfg)
    rows.append(
      _compare("transformer", var, entries, steps.var, abstract, which)
    )
    torch_format.check_var_buffers(var, cfg)
  return rows + _compare_models(steps, which, vae, var)


def _description(step) -> Description:
  return Description.read(step.parent.parent)


def _compare(what, tensors, entries, step, abstract, which) -> Row:
  """Compare official tensors, made ours again, with a step's parameters."""
  entries = list(entries)
  back = torch_format.from_official(tensors, entries)
  back = flax.traverse_util.flatten_dict(back, sep="/")
  for part in weights.read_parts(step, abstract, which):
    for path, array in part.items():
      _must_equal(path, back[path], array)
  return Row(
    what, len(tensors), sum(array.size for array in back.values()), "0"
  )


def _compare_tensors(what: str, back: Tensors, theirs: Tensors) -> Row:
  for name in theirs:
    if name in back:
      _must_equal(name, back[name], theirs[name])
    elif name != torch_format.CODE_HITS:
      raise ValueError(f"tensor {name} does not come back; {_DEFECT}")
  count = sum(
    theirs[name].size for name in theirs if not torch_format.is_buffer(name)
  )
  return Row(what, len(theirs), count, "0")


_DEFECT = "this is a defect of var-jax, please report it."


def _must_equal(name: str, back: np.ndarray, was: np.ndarray) -> None:
  if back.shape != was.shape or back.tobytes() != was.tobytes():
    raise ValueError(f"tensor {name} does not come back as it was; {_DEFECT}")


def _compare_models(steps, which, vae: Tensors, var) -> list[Row]:
  """Return what our models and the reference make of the same inputs."""
  reference, reason = _reference()
  if reference is None:
    return [Row(f"PyTorch reference: not compared, {reason}", None, None, "")]
  import torch

  cfg = _description(steps.vae).tokenizer
  abstract = torch_format.abstract_tokenizer(cfg)
  tokenizer_params = weights.read_step(steps.vae, abstract, which)
  tokenizer = Tokenizer(cfg)
  # The counts have no part in this, and a file's may be of other scales.
  hits_SV = np.zeros((len(cfg.scales), cfg.vocab_size), np.float32)
  parameters = {k: v for k, v in vae.items() if k != torch_format.CODE_HITS}
  their_tokenizer = _assigned(
    reference.Tokenizer, cfg, parameters, {torch_format.CODE_HITS: hits_SV}
  )
  random = np.random.default_rng(0)
  images_BHW3 = random.uniform(-1, 1, (1, *cfg.image_shape, 3)).astype("f4")
  tokens_BL = random.integers(cfg.vocab_size, size=(1, cfg.schedule.num_tokens))

  def ours(method: str, array: np.ndarray) -> np.ndarray:
    apply = jax.jit(functools.partial(tokenizer.apply, method=method))
    return np.asarray(apply(tokenizer_params, jnp.asarray(array)))

  with torch.no_grad():
    image_B3HW = torch.from_numpy(images_BHW3.transpose(0, 3, 1, 2).copy())
    theirs = their_tokenizer.quant_conv(their_tokenizer.encoder(image_B3HW))
    latent = ours("to_latent", images_BHW3)
    rows = [_close("latent", latent, theirs.numpy().transpose(0, 2, 3, 1))]
    their_tokens_BL = their_tokenizer.encode(image_B3HW).numpy()
    same = np.mean(ours("encode", images_BHW3) == their_tokens_BL)
    if same < SAME_TOKENS:
      raise ValueError(
        f"{same:.2%} of an image's tokens are the PyTorch reference's; the "
        f"limit is {SAME_TOKENS:.0%}."
      )
    rows.append(Row("tokens", None, None, f"{same:.2%} the same"))
    theirs = their_tokenizer.decode(torch.from_numpy(tokens_BL))
    decoded = ours("decode", tokens_BL.astype("i4"))
    rows.append(
      _close("reconstruction", decoded, theirs.numpy().transpose(0, 2, 3, 1))
    )
    if steps.var:
      cfg = _description(steps.var).transformer
      abstract = torch_format.abstract_var(cfg)
      var_params = weights.read_step(steps.var, abstract, which)
      buffers = torch_format.var_buffers(cfg)
      their_var = _assigned(reference.VAR, cfg, var, buffers)
      inputs_BLZ = ours("inputs", tokens_BL.astype("i4"))
      logits_BLV = jax.jit(VAR(cfg).apply)(
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


def _assigned(cls, cfg, tensors: Tensors, buffers: Tensors):
  """Return a module of the reference that uses the tensors where they lie."""
  import torch

  with torch.device("meta"):
    module = cls(cfg)
  state_dict = {}
  for name in module.state_dict():  # a stripped file may lack buffers
    tensor = tensors[name] if name in tensors else buffers[name]
    state_dict[name] = torch.from_numpy(np.require(tensor, requirements="W"))
  module.load_state_dict(state_dict, strict=True, assign=True)
  return module.eval()


def _reference():
  """Return (module, None), or (None, why there is none)."""
  if not (REFERENCE.exists() and (REFERENCE.parents[1] / "setup.py").exists()):
    return None, "it is in a checkout's tests only"
  try:
    import torch  # noqa: F401
  except ImportError:
    return None, "torch is not installed"
  spec = importlib.util.spec_from_file_location("torch_reference", REFERENCE)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module, None
