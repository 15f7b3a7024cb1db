"""Masks and editing against the recorded runs of the official demo."""

import golden_files
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from var_jax.generation import edit, sampler
from var_jax.generation.sampler import Options
from var_jax.models.scales import SCALES, ScaleSchedule

BOXES = {
  0: ((0.1, 0.1, 0.8, 0.8), "inpaint"),
  1: ((0.1, 0.1, 0.8, 0.8), "outpaint"),
  2: ((0.0, 0.5, 1.0, 1.0), "inpaint"),
  3: ((0.3, 0.33, 0.71, 0.66), "outpaint"),
}
LISTS = {"256": SCALES[256], "512": SCALES[512], "tiny": (1, 2, 3, 4)}
RUNS = {
  "inpaint": (0.1, 0.1, 0.8, 0.8),
  "outpaint": (0.25, 0.0, 0.75, 0.5),
}


@pytest.mark.parametrize("name", LISTS)
@pytest.mark.parametrize("box", BOXES)
def test_masks_equal_the_recorded_ones(name, box):
  recorded = golden_files.arrays("edit_masks.npz")
  scales = ScaleSchedule(LISTS[name])
  keep_hw = edit.box_mask(BOXES[box][0], scales.grid, BOXES[box][1])
  np.testing.assert_array_equal(keep_hw, recorded[f"{name}_box{box}_full"])
  for n, mask_l in zip(
    scales.sizes, edit.scale_masks(keep_hw, scales), strict=True
  ):
    expected = recorded[f"{name}_box{box}_pn{n}"]
    np.testing.assert_array_equal(mask_l.reshape(n, n), expected)


@pytest.mark.parametrize("mode", RUNS)
def test_greedy_edit_equals_the_recorded_one(mode):
  recorded = golden_files.arrays("var_A_ar.npz")
  models, params = golden_files.pair("A")
  scales = golden_files.TOKENIZER.schedule
  keep_hw = edit.box_mask(RUNS[mode], scales.grid, mode)
  np.testing.assert_array_equal(keep_hw, recorded[f"edit_{mode}_mask"])

  image = golden_files.nhwc(golden_files.arrays("vae_share4_znorm0.npz")["img"])
  given_BL = models.tokenizer.apply(
    params.tokenizer, image[:2], method="encode"
  )
  sample = sampler.generate(
    models,
    params,
    jnp.array([3, -1]),
    sampler.image_keys(jax.random.key(0), 2),
    Options(1.5, top_k=1, top_p=0.0),
    given=edit.given_tokens(given_BL, keep_hw, scales),
  )
  keep_L = np.concatenate(edit.scale_masks(keep_hw, scales))
  # The recorded ids are those drawn, before the given ones replace them.
  expected = np.where(keep_L, given_BL, recorded[f"edit_{mode}_ids"])
  np.testing.assert_array_equal(sample.tokens_BL, expected)
  h_BLZ = models.tokenizer.apply(
    params.tokenizer, sample.tokens_BL, method="lookup"
  )
  golden_files.assert_close(h_BLZ, recorded[f"edit_{mode}_h"])
  f_hat = models.tokenizer.apply(
    params.tokenizer, sample.tokens_BL, method="accumulate"
  )[-1]
  golden_files.assert_close(
    f_hat, golden_files.nhwc(recorded[f"edit_{mode}_fhat"])
  )
  golden_files.assert_close(
    sample.images_BHW3[:1],
    golden_files.to_ours(recorded[f"edit_{mode}_image"]),
  )


def test_keeping_everything_gives_the_reconstruction():
  models, params = golden_files.pair("A")
  scales = golden_files.TOKENIZER.schedule
  tokens_BL = jax.random.randint(jax.random.key(0), (2, 30), 0, 128)
  sample = sampler.generate(
    models,
    params,
    jnp.array([3, -1]),
    sampler.image_keys(jax.random.key(0), 2),
    Options(),
    given=edit.given_tokens(tokens_BL, np.ones(scales.grid, bool), scales),
  )
  np.testing.assert_array_equal(sample.tokens_BL, tokens_BL)
  decoded = models.tokenizer.apply(params.tokenizer, tokens_BL, method="decode")
  golden_files.assert_close(sample.images_BHW3, decoded)


@pytest.mark.parametrize(
  "box, mode, message",
  [
    ((0.5, 0.1, 0.2, 0.8), "inpaint", "is not y0,x0,y1,x1"),
    ((0.0, 0.0, 1.5, 1.0), "inpaint", "is not y0,x0,y1,x1"),
    ((0.0, float("nan"), 1.0, 1.0), "inpaint", "is not y0,x0,y1,x1"),
    ((0.0, 0.0, 1.0, 1.0), "inside", "use inpaint or outpaint"),
    ((0.0, 0.0, 0.05, 0.05), "inpaint", "covers no cell of the 4x4"),
  ],
)
def test_impossible_boxes_and_modes_are_errors(box, mode, message):
  with pytest.raises(ValueError, match=message):
    edit.box_mask(box, (4, 4), mode)
