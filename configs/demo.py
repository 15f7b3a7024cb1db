"""What `var-jax demo` trains, to train by hand: digits at 32 px.

    var-jax train --config configs/demo.py:tokenizer --workdir A
    var-jax train --config configs/demo.py:var --workdir B \\
      --config.tokenizer_path=A
"""

import ml_collections

from var_jax import demo

PRESETS = {"tokenizer": demo.tokenizer_config, "var": demo.var_config}


def get_config(preset: str = "var") -> ml_collections.ConfigDict:
  """Return the config of a preset."""
  if preset not in PRESETS:
    raise ValueError(
      f"preset {preset!r} is not known; use one of {', '.join(PRESETS)}."
    )
  return PRESETS[preset]()
