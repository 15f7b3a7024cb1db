"""Traffic against collectives that are written out, products by their kind."""

import dataclasses
import math

import jax
import pytest

from configs import tokenizer as tokenizer_presets
from configs import var as var_presets
from var_jax.models.blocks import VARConfig
from var_jax.models.tokenizer import TokenizerConfig
from var_jax.parallel import mesh as mesh_lib
from var_jax.planning import bounds, memory
from var_jax.planning.topology import Chip
from var_jax.training import flops
from var_jax.training.var_training import VARTraining

SIZES = {"slice": 2, "data": 3, "fsdp": 4, "model": 2}


def ring(parts, size):
  """Bytes that a member sends to gather, or to scatter the sum of, an array."""
  piece = size / parts
  return sum(piece for _ in range(parts - 1))


def test_a_matrix_is_gathered_twice_and_its_gradient_scattered_and_summed():
  shapes = {"blocks/ffn/fc1/kernel": (8, 16, 64)}
  held = 2 * 8 * 16 * 64 / SIZES["model"]
  shard = held / SIZES["fsdp"]
  traffic = bounds.gradients(shapes, SIZES, "bfloat16", parts=1)
  # A sum is a scatter and a gather; slices are joined between the two.
  assert traffic.ici == pytest.approx(3 * ring(4, held) + 2 * ring(3, shard))
  assert traffic.dcn == pytest.approx(2 * ring(2, shard / 3))


def test_what_is_whole_on_all_chips_is_only_summed():
  shapes = {"head/bias": (32,)}
  traffic = bounds.gradients(shapes, SIZES, "bfloat16", parts=1)
  held = 4 * 32  # the head is float32
  assert traffic.ici == pytest.approx(2 * ring(12, held))
  assert traffic.dcn == pytest.approx(2 * ring(2, held / 12))


def test_every_part_of_a_batch_gathers_again():
  shapes = {"blocks/attn/proj/kernel": (8, 16, 16)}
  once = bounds.gradients(shapes, SIZES, "float32", parts=1)
  twice = bounds.gradients(shapes, SIZES, "float32", parts=2)
  assert twice.ici == 2 * once.ici > 0 and twice.dcn == 2 * once.dcn > 0


def test_one_chip_sends_nothing():
  alone = dict.fromkeys(SIZES, 1)
  shapes = {"blocks/ffn/fc1/kernel": (8, 16, 64), "head/bias": (32,)}
  assert bounds.gradients(shapes, alone, "float32", parts=1) == (0.0, 0.0)
  cfg = VARConfig.official(2)
  assert bounds.train_sums(cfg, 680, 4, alone) == 0.0


def test_heads_and_mlp_parts_are_added_up_once_more_with_remat():
  sizes = dict.fromkeys(SIZES, 1) | {"model": 2}
  cfg = VARConfig.official(3, remat="full", dtype="bfloat16")
  stream = 2 * 5 * 100 * cfg.width  # of 5 rows and 100 tokens
  expected = 3 * 5 * 2 * ring(2, stream)
  assert bounds.train_sums(cfg, 100, 5, sizes) == pytest.approx(expected)


def test_float32_products_count_sixfold():
  cfg, tokenizer = VARConfig.official(2), TokenizerConfig()
  counts = flops.tokenizer_forward(tokenizer)
  layers, ends = flops.var_seen(cfg, 680), flops.var_ends(cfg, 680)
  assert bounds.var_products(cfg, None, 680) == 18 * (layers + ends)
  half = dataclasses.replace(cfg, dtype="bfloat16")
  assert bounds.var_products(half, tokenizer, 680) == pytest.approx(
    3 * layers + 18 * ends + 6 * counts.encode
  )
  assert bounds.tokenizer_products(tokenizer) == pytest.approx(
    6 * flops.tokenizer_step(tokenizer)
  )
  assert bounds.sample_products(half, tokenizer) == pytest.approx(
    2 * layers + 12 * ends + 6 * counts.accumulate + counts.decoder
  )


def test_drawing_reads_the_modulation_once_and_the_rest_at_every_scale():
  config = var_presets.get_config("tiny")
  config.model.update(width=64, heads=2, depth=3, dtype="float32")
  sizes = {**tokenizer_presets.get_config("tiny").model, "dtype": "float32"}
  mesh = mesh_lib.make_mesh(devices=jax.devices()[:1])
  made = VARTraining.of(config, mesh, TokenizerConfig(**sizes), 10)
  chip = Chip(
    "none", flops=1e3, hbm_bytes=0, hbm_rate=7, ici_rate=5, dcn_rate=3
  )
  found = bounds.of_draw(made, mesh, images=4, chip=chip)
  once = at_every_scale = 0
  for path, shape in memory.parameter_shapes(made).items():
    if path.startswith(("ada", "head_ada", "class_emb")):
      once += math.prod(shape)
    else:
      at_every_scale += math.prod(shape)
  assert once > at_every_scale / 4
  # Scales 1, 2, 4; float32; one chip sends nothing.
  assert found.memory == pytest.approx(4 * (once + 3 * at_every_scale) / 7)
  assert found.ici == found.dcn == 0
  products = bounds.sample_products(made.cfg, made.tokenizer.cfg)
  assert found.compute == pytest.approx(4 * products / 1e3)
