"""Names and layouts of official checkpoints, and the way back."""

import hashlib

import golden_files
import jax
import numpy as np
import pytest

from var_jax.checkpoints import torch_format
from var_jax.models.scales import SCALES
from var_jax.models.tokenizer import TokenizerConfig
from var_jax.models.transformer import VARConfig

VAR_FILES = golden_files.VAR_FILES
BUFFER_NAMES = (
  "lvl_1L",
  "attn_bias_for_masking",
  "zero_k_bias",
  "ema_vocab_hit_SV",
)
HASHES = golden_files.table("weights_sha256.json")


def is_buffer(name):
  return name.rpartition(".")[-1] in BUFFER_NAMES


@pytest.mark.parametrize("file", HASHES)
def test_the_reader_of_these_tests_reads_every_byte(file):
  stored = file.replace("vae_tiny.pth", "vae_tiny.pth.xz")
  tensors = golden_files.state_dict(stored)
  assert list(tensors) == list(HASHES[file])
  for name, expected in HASHES[file].items():
    tensor = tensors[name]
    data = np.ascontiguousarray(tensor).tobytes()
    assert list(tensor.shape) == expected["shape"]
    assert str(tensor.dtype) == expected["dtype"]
    assert hashlib.sha256(data).hexdigest() == expected["sha256"], name


def shapes(abstract, entries):
  """Return {official name: shape there}, and check that none comes twice."""
  entries = list(entries)
  # Zeros without memory of their own: the largest model fits too.
  zeros = jax.tree.map(lambda x: np.broadcast_to(np.int8(0), x.shape), abstract)
  tensors = golden_files.to_official(zeros, entries)
  assert len(tensors) == len(entries)
  assert len({(entry.path, entry.index) for entry in entries}) == len(entries)
  return {name: tensor.shape for name, tensor in tensors.items()}


def var_shapes(cfg):
  return shapes(torch_format.abstract_var(cfg), torch_format.var_entries(cfg))


def tokenizer_shapes(cfg):
  return shapes(
    torch_format.abstract_tokenizer(cfg), torch_format.tokenizer_entries(cfg)
  )


def recorded_shapes(tensors):
  return {
    name: tuple(shape) for name, shape in tensors.items() if not is_buffer(name)
  }


def manifest(name):
  return recorded_shapes(
    {k: shape for k, (shape, _) in golden_files.table(name).items()}
  )


def test_the_released_tokenizer_has_the_names_and_shapes_of_its_file():
  expected = manifest("manifest_vae_ch160v4096z32.json")
  assert tokenizer_shapes(TokenizerConfig()) == expected


def test_the_largest_transformer_has_the_names_and_shapes_of_its_file():
  cfg = VARConfig.official(36, shared_adaln=True, scales=SCALES[512])
  assert var_shapes(cfg) == manifest("manifest_var_d36.json")


@pytest.mark.parametrize("variant", VAR_FILES)
def test_tiny_transformers_have_the_names_and_shapes_of_their_files(variant):
  tensors = golden_files.state_dict(VAR_FILES[variant])
  expected = recorded_shapes({k: t.shape for k, t in tensors.items()})
  assert var_shapes(golden_files.VARIANTS[variant]) == expected


@pytest.mark.parametrize("share", [0, 1, 4])
def test_tiny_tokenizers_have_the_names_and_shapes_of_their_files(share):
  cfg, _ = golden_files.tokenizer(share)
  tensors = golden_files.tokenizer_tensors(share)
  expected = recorded_shapes({k: t.shape for k, t in tensors.items()})
  assert tokenizer_shapes(cfg) == expected


def model(name):
  """Return (official state dict, function that makes the entries)."""
  if name in VAR_FILES:
    cfg = golden_files.VARIANTS[name]
    tensors = golden_files.state_dict(VAR_FILES[name])
    return tensors, lambda: torch_format.var_entries(cfg)
  share = int(name.removeprefix("share"))
  cfg, _ = golden_files.tokenizer(share)
  tensors = golden_files.tokenizer_tensors(share)
  return tensors, lambda: torch_format.tokenizer_entries(cfg)


every_model = pytest.mark.parametrize(
  "name", [*VAR_FILES, "share0", "share1", "share4"]
)


@every_model
def test_official_tensors_come_back_bit_for_bit(name):
  tensors, entries = model(name)
  params = torch_format.from_official(tensors, entries())
  back = golden_files.to_official(params, entries())
  assert sorted(back) == sorted(n for n in tensors if not is_buffer(n))
  for tensor_name, tensor in back.items():
    assert tensor.dtype == tensors[tensor_name].dtype
    np.testing.assert_array_equal(tensor, tensors[tensor_name])


@every_model
def test_our_parameters_come_back_bit_for_bit(name):
  """Every number differs, so that none can have changed places."""
  _, entries = model(name)
  if name in VAR_FILES:
    abstract = torch_format.abstract_var(golden_files.VARIANTS[name])
  else:
    share = int(name.removeprefix("share"))
    abstract = torch_format.abstract_tokenizer(golden_files.tokenizer(share)[0])
  leaves, tree = jax.tree.flatten(abstract)
  ends = np.cumsum([leaf.size for leaf in leaves])
  numbers = np.arange(ends[-1], dtype="f4")
  assert ends[-1] < 2**24  # each is a float32 of its own
  params = tree.unflatten(
    part.reshape(leaf.shape)
    for leaf, part in zip(leaves, np.split(numbers, ends[:-1]), strict=True)
  )
  back = torch_format.from_official(
    golden_files.to_official(params, entries()), entries()
  )
  assert jax.tree.structure(back) == jax.tree.structure(params)
  jax.tree.map(np.testing.assert_array_equal, back, params)


def test_layouts_are_those_of_torch():
  """Linear is [out, in], Conv2d is OIHW, what we stack is counted."""
  params = golden_files.var_params("A")["params"]
  tensors = golden_files.state_dict("var_tiny.pth")
  np.testing.assert_array_equal(
    params["blocks"]["ffn"]["fc1"]["kernel"][2],
    tensors["blocks.2.ffn.fc1.weight"].T,
  )
  _, tree = golden_files.tokenizer()
  tensors = golden_files.state_dict("vae_tiny.pth.xz")
  kernel_33ZZ = tree["params"]["phi_kernel"][1]
  weight_ZZ33 = tensors["quantize.quant_resi.qresi_ls.1.weight"]
  for z_in, z_out, i, j in np.ndindex(8, 8, 3, 3):
    assert kernel_33ZZ[i, j, z_in, z_out] == weight_ZZ33[z_out, z_in, i, j]


BROKEN = [
  ("A", "blocks.1.attn.proj.weight"),
  ("B", "blocks.0.ada_gss"),
  ("share4", "decoder.mid.attn_1.qkv.bias"),
  ("share1", "quantize.quant_resi.qresi.weight"),
]


@pytest.mark.parametrize("name, tensor", BROKEN)
def test_a_missing_tensor_is_named(name, tensor):
  tensors, entries = model(name)
  tensors = {k: v for k, v in tensors.items() if k != tensor}
  with pytest.raises(ValueError, match=f"tensor {tensor} is missing"):
    torch_format.from_official(tensors, entries())


@pytest.mark.parametrize("name, tensor", BROKEN)
def test_a_tensor_of_another_shape_is_named(name, tensor):
  tensors, entries = model(name)
  tensors = tensors | {tensor: tensors[tensor][..., :-1]}
  with pytest.raises(ValueError, match=f"tensor {tensor} has shape"):
    torch_format.from_official(tensors, entries())


@pytest.mark.parametrize("name", ["C", "share0"])
def test_an_unknown_tensor_is_named(name):
  tensors, entries = model(name)
  tensors = tensors | {"blocks.7.extra": np.zeros(3)}
  with pytest.raises(ValueError, match="tensor blocks.7.extra has no place"):
    torch_format.from_official(tensors, entries())


def test_tensors_of_another_architecture_are_refused():
  with pytest.raises(ValueError, match="tensor blocks.0.ada_gss is missing"):
    torch_format.from_official(model("A")[0], model("B")[1]())
