"""Start from another model's weights: `config.init_from`.

Everything is kept but what the new model cannot use: the class embedding where
the classes differ in number, and position and level embeddings where the scale
list differs. Those are interpolated. A scale of the new list takes after the
one at the nearest ratio s / (S-1) of the old list, its positions resampled as
a map of that scale's size; a scale that both lists have at the same place is
kept as it is.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from var_jax.models import resize
from var_jax.models.scales import ScaleSchedule
from var_jax.models.tokenizer import TokenizerConfig
from var_jax.models.transformer import VARConfig

Params = Mapping[str, Any]

# What may differ between the two; the rest shapes parameters or their use.
_FREE = {
  "num_classes", "scales", "drop_path", "dropout", "remat", "dtype",
  "init_head", "init_adaln", "init_adaln_gamma",
}  # fmt: skip
_FREE_OF_TOKENIZER = {"scales", "beta", "dtype"}


def start_var(
  variables: Params,
  old: VARConfig,
  new: VARConfig,
  class_emb: Callable[[], jax.Array],
) -> tuple[Params, list[str]]:
  """Return the variables of a transformer, and a line on each change.

  Args:
    variables: of the architecture `old`, in float32.
    class_emb: makes the new one, [C + 1, D]; called where it is needed.

  Raises:
    ValueError: another setting than classes and scales shapes them apart.
  """
  _check_same(old, new, _FREE)
  params, changes = dict(variables["params"]), []
  if old.num_classes != new.num_classes:
    params["class_emb"] = class_emb()
    changes.append(
      f"class embedding: new, {old.num_classes} classes there and "
      f"{new.num_classes} here; all else is kept"
    )
  if old.scales != new.scales:
    params |= _resample(params, old.schedule, new.schedule)
    changes.append(
      f"position and level embeddings: interpolated from scales {old.scales} "
      f"to {new.scales}"
    )
  return {"params": params}, changes


def start_tokenizer(
  variables: Params, old: TokenizerConfig, new: TokenizerConfig
) -> Params:
  """Return the variables of a tokenizer.

  Raises:
    ValueError: another setting than the scale list shapes them apart.
  """
  free = set(_FREE_OF_TOKENIZER)
  if new.num_phis == 0:  # one phi a scale
    free.remove("scales")
  _check_same(old, new, free)
  return variables


def _check_same(old, new, free: set[str]) -> None:
  for field in dataclasses.fields(new):
    there, here = getattr(old, field.name), getattr(new, field.name)
    if field.name not in free and there != here:
      raise ValueError(
        f"init_from holds a model with {field.name} {there}, the config says "
        f"{here}; set both alike."
      )


def _resample(
  params: Params, old: ScaleSchedule, new: ScaleSchedule
) -> dict[str, jax.Array]:
  positions, levels = [], []
  for s in range(len(new)):
    position_lD, level_D = 0.0, 0.0
    for source, weight in _neighbours(old, new, s):
      pos_lD = params["pos"][old.start(source) : old.end(source)]
      resized_lD = _resize_map(pos_lD, old.shapes[source], new.shapes[s])
      position_lD += weight * resized_lD
      level_D += weight * params["lvl_emb"][source]
    positions.append(position_lD)
    levels.append(level_D)
  return {
    "pos": jnp.concatenate(positions),
    "pos_start": _resize_map(params["pos_start"], old.shapes[0], new.shapes[0]),
    "lvl_emb": jnp.stack(levels),
  }


def _neighbours(
  old: ScaleSchedule, new: ScaleSchedule, s: int
) -> list[tuple[int, float]]:
  """Return the scales of `old` around scale s of `new`, and their weights."""
  # In whole numbers: a scale at the same place must have all the weight.
  steps = max(len(new) - 1, 1)
  below, rest = divmod(s * (len(old) - 1), steps)
  if not rest:
    return [(below, 1.0)]
  return [(below, 1.0 - rest / steps), (below + 1, rest / steps)]


def _resize_map(pos_lD, old_shape, new_shape) -> jax.Array:
  i, j = old_shape
  pos_1ijD = jnp.asarray(pos_lD).reshape(1, i, j, -1)
  resized_1ijD = resize.bicubic(pos_1ijD, new_shape)
  return resized_1ijD.reshape(new_shape[0] * new_shape[1], -1)
