"""A model as StableHLO programs that run without this package.

folder/
  decode.stablehlo      (weights, tokens_BL) -> images_BHW3
  sample.stablehlo      (weights, labels_B, key, guidance, top_k, top_p)
                        -> (images_BHW3, tokens_BL); of a transformer only
  weights.safetensors   what both take as their first argument, by name
  README.md             how to run them without var_jax
  checksums.json

The programs hold no weights, so they stay small whatever the model, and the
weights are there once. They are made by `jax.export`, whose files stay
readable for at least six months of jax releases.
"""

from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from var_jax import api, files, loading
from var_jax.checkpoints import checksums, model_card, tensor_files
from var_jax.checkpoints.description import Description
from var_jax.generation import sampler
from var_jax.generation.sampler import ModelParams, Options

PLATFORMS = ("cpu", "cuda", "tpu")
KEY_KIND = "threefry2x32"


def export(
  checkpoint: str, output: str, *, batch: int = 1, weights: str = "ema"
) -> list[str]:
  """Write the programs of a workdir's model; return their names.

  Args:
    output: a new folder.
    batch: rows of tokens, or labels, that the programs take.
    weights: "ema" or "raw", as `loading.load` has them.
  """
  files.check_new(output)
  model = loading.load(checkpoint, dtype="float32", weights=weights)
  arrays = flatten_dict(model.params._asdict(), sep="/")
  arrays = {k: v for k, v in arrays.items() if v is not None}
  like = {k: jax.ShapeDtypeStruct(v.shape, v.dtype) for k, v in arrays.items()}
  programs = {"decode": decode_program(model, like, batch)}
  if model.models.var:
    programs["sample"] = sample_program(model, like, batch)
  with files.new_folder(output) as folder:
    for name, program in programs.items():
      data = bytes(program.serialize())
      (folder / f"{name}.stablehlo").write_bytes(data)
    plain = {name: np.asarray(array) for name, array in arrays.items()}
    tensor_files.write_safetensors(folder / "weights.safetensors", plain)
    origin = Description.read(checkpoint).origin
    text = _readme(model, batch, origin)
    (folder / "README.md").write_text(text)
    checksums.write(folder)
  return list(programs)


def decode_program(
  model: api.Model, like: dict[str, Any], batch: int
) -> jax.export.Exported:
  """Return (weights, tokens_BL) -> images_BHW3."""
  schedule = model.config.tokenizer.schedule

  def decode(weights, tokens_BL):
    params = _params(weights).tokenizer
    return model.models.tokenizer.apply(params, tokens_BL, method="decode")

  tokens_BL = jax.ShapeDtypeStruct((batch, schedule.num_tokens), jnp.int32)
  return _export(decode, like, tokens_BL)


def sample_program(
  model: api.Model, like: dict[str, Any], batch: int
) -> jax.export.Exported:
  """Return (weights, labels_B, key, ..) -> (images_BHW3, tokens_BL).

  `key` is the data of a threefry key, uint32 [2]; image i uses fold_in(key, i)
  as `Model.sample` does.
  """

  def sample(weights, labels_B, key, guidance, top_k, top_p):
    keys_B = sampler.image_keys(
      jax.random.wrap_key_data(key, impl=KEY_KIND), batch
    )
    options = Options(guidance, top_k, top_p)
    drawn = sampler.generate(
      model.models, _params(weights), labels_B, keys_B, options
    )
    return drawn.images_BHW3, drawn.tokens_BL

  number = jax.ShapeDtypeStruct((), jnp.float32)
  return _export(
    sample,
    like,
    jax.ShapeDtypeStruct((batch,), jnp.int32),
    jax.ShapeDtypeStruct((2,), jnp.uint32),
    number,
    jax.ShapeDtypeStruct((), jnp.int32),
    number,
  )


def _export(function, *arguments) -> jax.export.Exported:
  return jax.export.export(jax.jit(function), platforms=PLATFORMS)(*arguments)


def _params(weights: dict[str, jax.Array]) -> ModelParams:
  tree = unflatten_dict(weights, sep="/")
  return ModelParams(tree["tokenizer"], tree.get("var"))


def _readme(model: api.Model, batch: int, origin: dict[str, Any]) -> str:
  H, W = model.config.tokenizer.image_shape
  L = model.config.tokenizer.schedule.num_tokens
  lines = [
    f"# VAR as StableHLO, {H} x {W} px, batch {batch}",
    "",
    f"Made by `var-jax convert --to stablehlo` with jax {jax.__version__} for "
    f"{', '.join(PLATFORMS)}. It needs jax, flatbuffers and "
    "safetensors, nothing else:",
    "",
    "```python",
    "import pathlib",
    "import jax",
    "import jax.export",
    "import numpy as np",
    "from safetensors.numpy import load_file",
    "",
    'weights = load_file("weights.safetensors")',
    "",
    "def program(name):",
    '  data = pathlib.Path(f"{name}.stablehlo").read_bytes()',
    "  return jax.jit(jax.export.deserialize(bytearray(data)).call)",
    "",
  ]
  if model.models.var:
    lines += [
      f"labels = np.zeros({batch}, np.int32)  # -1: unconditional",
      f'key = jax.random.key_data(jax.random.key(0, impl="{KEY_KIND}"))',
      "options = np.float32(1.5), np.int32(900), np.float32(0.96)",
      "# guidance, top-k and top-p as the paper's FID has them; 0 is off",
      'images, tokens = program("sample")(weights, labels, key, *options)',
    ]
  else:
    lines += [f"tokens = np.zeros(({batch}, {L}), np.int32)"]
  lines += [
    'images = program("decode")(weights, tokens)  # float32 in [-1, 1]',
    "```",
    "",
    origin.get("made_by", "How the weights were made is not recorded."),
    "",
    model_card.licence_sentence(origin),
    "",
  ]
  return "\n".join(lines)
