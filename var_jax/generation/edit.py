"""In- and out-painting, class editing: sampling with some tokens given.

The official algorithm (demo_zero_shot_edit): the image is tokenised, a mask on
the finest grid is brought to every scale, and where it says keep, the given
token's code replaces the drawn one before it enters f_hat. Nothing is
re-quantised and no pixels are composited.
"""

import jax
import jax.numpy as jnp
import numpy as np

from var_jax.generation.sampler import Given
from var_jax.models import resize
from var_jax.models.scales import ScaleSchedule

METHODS = ("official",)


def box_mask(
  box: tuple[float, float, float, float], grid: tuple[int, int], mode: str
) -> np.ndarray:
  """Return keep_hw, bool [h, w], of a box on the token grid.

  Args:
    box: y0, x0, y1, x1 in fractions of the image.
    mode: "inpaint" draws the inside anew, "outpaint" the outside.
  """
  y0, x0, y1, x1 = box
  inside = (0.0 <= y0 < y1 <= 1.0) and (0.0 <= x0 < x1 <= 1.0)
  if not inside:
    raise ValueError(
      f"box {box} is not y0,x0,y1,x1 with 0 <= y0 < y1 <= 1 and "
      "0 <= x0 < x1 <= 1; give fractions of the image."
    )
  if mode not in ("inpaint", "outpaint"):
    raise ValueError(f"mode {mode!r} is not known; use inpaint or outpaint.")
  h, w = grid
  # VAR: Python's round, half to even.
  keep_hw = np.zeros(grid, bool)
  keep_hw[round(y0 * h) : round(y1 * h), round(x0 * w) : round(x1 * w)] = True
  if not keep_hw.any():
    raise ValueError(
      f"box {box} covers no cell of the {h}x{w} token grid; make it larger."
    )
  return ~keep_hw if mode == "inpaint" else keep_hw


def scale_masks(
  keep_hw: np.ndarray, scales: ScaleSchedule
) -> tuple[np.ndarray, ...]:
  """Return bool [l] a scale: True where the given token is kept."""
  masks = []
  for h, w in scales.shapes:
    # VAR: one token speaks for the whole image and is always kept.
    if h * w <= 3:
      masks.append(np.ones(h * w, bool))
      continue
    rows = resize.bilinear_matrix(h, keep_hw.shape[0])
    columns = resize.bilinear_matrix(w, keep_hw.shape[1])
    # float32, as the official threshold sees it.
    soft = (rows @ keep_hw @ columns.T).astype(np.float32)
    masks.append((soft > 0.5).ravel())
  return tuple(masks)


def given_tokens(
  tokens_BL: jax.Array, keep_hw: np.ndarray, scales: ScaleSchedule
) -> tuple[Given, ...]:
  """Return what the sampler is to keep at each scale."""
  masks = scale_masks(keep_hw, scales)
  return tuple(
    Given(tokens_BL[:, scales.start(s) : scales.end(s)], jnp.asarray(mask_l))
    for s, mask_l in enumerate(masks)
  )
