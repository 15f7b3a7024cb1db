"""Ladders of sizes: `var-jax bench scaling --config configs/scaling.py:PRESET`.

All rungs of a ladder share one recipe; depth, and with it width and heads, is
what differs, so that loss over size is a law and not a mixture of recipes.
"""

import pathlib
import runpy

import ml_collections

# A config file is a script: its neighbours are no package.
_VAR = runpy.run_path(str(pathlib.Path(__file__).with_name("var.py")))

# The recipe, depths, and width a layer of depth.
PRESETS = {
  # The sizes between which the paper has 12 models (section 4.2).
  "imagenet": ("d16", (6, 8, 10, 12, 16, 20, 24, 30), 64),
  # Five sizes for two CPU cores, on tokens of Fashion-MNIST.
  "fashion32": ("fashion32", (1, 2, 3, 4, 6), 32),
  "tiny": ("tiny", (1, 2, 3), 16),  # for tests
}


def get_config(preset: str = "imagenet") -> ml_collections.ConfigDict:
  """Return the config of a ladder: that of a rung, and `depths`.

  `PRESET,cached` trains from cached tokens, as in configs/var.py.
  """
  name, *suffixes = preset.split(",")
  if name not in PRESETS:
    raise ValueError(
      f"preset {preset!r} is not known; use one of {', '.join(PRESETS)}, and "
      "one,cached to train from cached tokens."
    )
  recipe, depths, width = PRESETS[name]
  config = _VAR["get_config"](",".join([recipe, *suffixes]))
  config.ladder = ml_collections.ConfigDict()
  config.ladder.depths = depths
  config.ladder.width = width  # a layer of depth
  if name == "fashion32":
    config.steps = 1250
  # Drop path grows with size in the recipe: a law is of one recipe.
  config.model.drop_path = 0.0
  config.eval_every = max(1, config.steps // 5)
  return config
