"""Who may import whom, and what an import may pull in."""

import ast
import pathlib
import subprocess
import sys

import pytest

PACKAGE = pathlib.Path(__file__).parents[1] / "var_jax"
FILES = sorted(PACKAGE.rglob("*.py"))

# What a room may import from: itself and these.
ALLOWED = {
  "models": set(),
  "generation": {"models"},
  "data": {"files"},
  "parallel": {"models", "files"},  # attention; a compile cache
  "ledger": {"files", "appended"},
  "checkpoints": {"models", "files"},
  "training": {
    "models",
    "generation",  # pictures of a run
    "checkpoints",
    "data",
    "evaluation",  # rFID and the like at evaluations
    "api",  # the model that draws for them
    "ledger",
    "parallel",
    "files",
    "appended",
    "images",
  },
  "evaluation": {
    "models",
    "generation",  # the keys of images
    "checks",  # of options
    "checkpoints",
    "data",
    "ledger",  # where numbers come from
    "parallel",
    "files",
    "images",
  },
  "files": set(),
  "appended": {"files"},
  "images": {"files"},
  "checks": {"models", "generation", "parallel"},
  "stablehlo": {"api", "generation", "checkpoints", "files", "loading"},
  "api": {"models", "generation", "checks", "parallel"},
  "loading": {"api", "models", "generation", "checkpoints", "parallel"},
  "demo": {"loading", "data", "models", "training", "files", "images"},
  "doctor": {"data", "ledger", "parallel", "files"},
  "planning": {"checkpoints", "generation", "models", "parallel", "training"},
  "bench": {
    "generation",
    "loading",
    "models",
    "parallel",
    "planning",
    "training",
  },
  "commands": {
    "bench",
    "checks",
    "compile_cache",
    "loading",
    "models",
    "demo",
    "training",
    "generation",
    "parallel",
    "images",
    "checkpoints",
    "files",
    "stablehlo",
    "doctor",
    "planning",
    "evaluation",
  },
  "compile_cache": set(),
  "cli": {"commands"},
  "__init__": {"api", "generation", "images", "loading", "models", "training"},
}
HEAVY = {
  "tensorflow_datasets": {"data"},
  "grain": {"data"},
  "array_record": {"data"},
  "tensorboardX": {"training", "evaluation"},  # writes, reads a graph
  "tensorflow": set(),
  "torch": {"checkpoints"},
  "gradio": {"app"},
}


def room_of(path):
  return path.relative_to(PACKAGE).with_suffix("").parts[0]


def imports_of(path):
  """Yield (module, at the top of the file?)."""
  tree = ast.parse(path.read_text())
  for node in ast.walk(tree):
    if isinstance(node, ast.Import):
      for alias in node.names:
        yield alias.name, node in tree.body
    elif isinstance(node, ast.ImportFrom):
      for alias in node.names:
        yield f"{node.module}.{alias.name}", node in tree.body


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.name))
def test_imports_go_one_way(path):
  room = room_of(path)
  for module, _ in imports_of(path):
    parts = module.split(".")
    if parts[0] == "var_jax" and parts[1] != room:
      assert parts[1] in ALLOWED[room], f"{path} imports {module}"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.name))
def test_heavy_packages_stay_in_their_room_and_inside_functions(path):
  for module, at_the_top in imports_of(path):
    top = module.split(".")[0]
    if top in HEAVY:
      assert room_of(path) in HEAVY[top], f"{path} imports {module}"
      assert not at_the_top, f"{path} imports {module} at the top"


def test_importing_and_sampling_need_only_jax_flax_numpy():
  code = """
import sys
import var_jax
import jax
from var_jax.generation import sampler
from var_jax.training import tokenizer_step, var_step

cfg = var_jax.TokenizerConfig(
  vocab_size=8, latent_channels=4, channels=8, norm_groups=4,
  channel_mults=(1, 1), encoder_blocks=1, decoder_blocks=1, scales=(1, 2))
tokenizer = var_jax.Tokenizer(cfg)
var = var_jax.VAR(var_jax.VARConfig(
  depth=1, width=8, heads=1, num_classes=3, vocab_size=8, latent_channels=4,
  scales=(1, 2)))
key = jax.random.key(0, impl="rbg")
params = sampler.ModelParams(
  tokenizer_step.init_params(tokenizer, key), var_step.init_params(var, key))
for name in ("tensorflow", "tensorflow_datasets", "grain", "torch", "orbax",
             "sklearn", "PIL", "clu", "ml_collections"):
  assert name not in sys.modules, name
model = var_jax.Model(sampler.Models(tokenizer, var), params)
assert model.sample([0, -1], key).images_BHW3.shape == (2, 4, 4, 3)
for name in ("tensorflow", "tensorflow_datasets", "grain", "torch", "orbax"):
  assert name not in sys.modules, name
"""
  subprocess.run([sys.executable, "-c", code], check=True)
