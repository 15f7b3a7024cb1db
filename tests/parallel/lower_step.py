"""Write a sharded step as lowered and as compiled: `lower_step.py FOLDER`.

FOLDER/lowered.mlir is what JAX asks for, FOLDER/compiled.hlo what one of 8
devices gets, FOLDER/state.json the shapes of the state.
"""

import json
import pathlib
import sys

import jax

from configs import tokenizer as tokenizer_presets
from configs import var as var_presets
from var_jax.models.tokenizer import TokenizerConfig
from var_jax.parallel import mesh as mesh_lib
from var_jax.planning import compiling
from var_jax.training.var_training import VARTraining


def main(folder):
  folder = pathlib.Path(folder)
  config = var_presets.get_config("tiny")
  # Sizes that tell apart what has them: see test_lowered.py.
  config.model.update(depth=5, width=96, heads=6, dtype="bfloat16")
  config.model.remat = "full"
  config.ema_decay = 0.9
  config.data.batch_size = 24
  mesh = mesh_lib.make_mesh(mesh_lib.parse("data=2,fsdp=2,model=2"))
  sizes = dict(tokenizer_presets.get_config("tiny").model)
  tokenizer = TokenizerConfig(**sizes | {"dtype": "bfloat16"})
  training = VARTraining.of(config, mesh, tokenizer, 10)
  lowered = compiling.train_step(training)
  (folder / "lowered.mlir").write_text(lowered.as_text())
  (folder / "compiled.hlo").write_text(lowered.compile().as_text())
  shapes = [list(x.shape) for x in jax.tree.leaves(training.like)]
  (folder / "state.json").write_text(json.dumps(shapes))


if __name__ == "__main__":
  main(*sys.argv[1:])
