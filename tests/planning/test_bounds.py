"""Traffic against collectives that are written out, products by their kind."""

import pytest

from var_jax.models.blocks import VARConfig
from var_jax.models.tokenizer import TokenizerConfig
from var_jax.planning import bounds
from var_jax.training import flops

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
  # A sum is a scatter and a gather.
  assert traffic.ici == pytest.approx(3 * ring(4, held) + 2 * ring(3, shard))
  assert traffic.dcn == pytest.approx(2 * ring(2, shard))


def test_what_is_whole_on_all_chips_is_only_summed():
  shapes = {"head/bias": (32,)}
  traffic = bounds.gradients(shapes, SIZES, "bfloat16", parts=1)
  held = 4 * 32  # the head is float32
  assert traffic.ici == pytest.approx(2 * ring(4, held) + 2 * ring(3, held))
  assert traffic.dcn == pytest.approx(2 * ring(2, held))


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


def test_a_gathering_of_all_is_a_third_of_what_training_moves_of_it():
  shapes = {"blocks/ffn/fc1/kernel": (8, 16, 64), "head/bias": (32,)}
  only = dict.fromkeys(SIZES, 1) | {"fsdp": 4, "model": 2}
  once = bounds.gathered(shapes, only, "bfloat16")
  assert once == pytest.approx(ring(4, 2 * 8 * 16 * 64 / 2))
  trained = bounds.gradients(
    {"blocks/ffn/fc1/kernel": (8, 16, 64)}, only, "bfloat16", parts=1
  )
  assert trained.ici == pytest.approx(3 * once)


def test_float32_products_count_sixfold():
  cfg, tokenizer = VARConfig.official(2), TokenizerConfig()
  counts = flops.tokenizer_forward(tokenizer)
  forward = flops.var_forward(cfg)
  assert bounds.var_products(cfg, None, 680) == pytest.approx(18 * forward)
  half = VARConfig.official(2, dtype="bfloat16")
  ends = flops.var_ends(half, 680)
  assert bounds.var_products(half, tokenizer, 680) == pytest.approx(
    3 * (forward - ends) + 18 * ends + 6 * counts.encode
  )
  assert bounds.tokenizer_products(tokenizer) == pytest.approx(
    6 * flops.tokenizer_step(tokenizer)
  )
