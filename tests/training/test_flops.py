"""Analytic FLOPs against the programs that are really run."""

import functools
import math

import jax
import jax.numpy as jnp
import pytest
from jax.extend import core

from var_jax.models.tokenizer import Tokenizer, TokenizerConfig
from var_jax.models.transformer import VAR, KVCache, VARConfig
from var_jax.training import flops

D16, RELEASED = VARConfig(), TokenizerConfig()
SMALL_VAR = VARConfig(
  depth=3,
  width=24,
  heads=2,
  mlp_ratio=3.0,
  num_classes=5,
  vocab_size=40,
  latent_channels=6,
  scales=((1, 2), (2, 2), (3, 4)),
)
SMALL_TOKENIZER = TokenizerConfig(
  vocab_size=40,
  latent_channels=6,
  channels=8,
  channel_mults=(1, 2, 2),
  encoder_blocks=1,
  decoder_blocks=2,
  norm_groups=4,
  scales=((1, 2), (2, 2), (3, 4)),
  num_phis=2,
)


def products(jaxpr):
  """Return 2 m n k, summed over the matrix products of a traced program."""
  total = 0
  for equation in jaxpr.eqns:
    name, params = equation.primitive.name, equation.params
    times = params["length"] if name == "scan" else 1
    inside = list(core.jaxprs_in_params(params))
    if name == "cond":  # by platform; the last is of those without their own
      inside = inside[-1:]
    for inner in inside:
      total += times * products(inner)
    if name in ("dot_general", "conv_general_dilated"):
      left, right = (v.aval.shape for v in equation.invars)
      numbers = params["dimension_numbers"]
      if name == "dot_general":
        summed = math.prod(left[i] for i in numbers[0][0])
      else:
        summed = math.prod(right) // right[numbers.rhs_spec[0]]
      total += 2 * math.prod(equation.outvars[0].aval.shape) * summed
  return total


def traced(module, method, *arrays):
  """Return the products of a method, of parameters without values."""
  variables = jax.eval_shape(
    functools.partial(module.init, method=method), jax.random.key(0), *arrays
  )
  apply = functools.partial(module.apply, method=method)
  return products(jax.make_jaxpr(apply)(variables, *arrays).jaxpr)


def spec(*shape, dtype=jnp.float32):
  return jax.ShapeDtypeStruct(shape, dtype)


def var_inputs(cfg, tokens):
  inputs = tokens - cfg.schedule.end(0)
  return spec(1, dtype=jnp.int32), spec(1, inputs, cfg.latent_channels)


@pytest.mark.parametrize(
  "cfg",
  [SMALL_VAR, VARConfig(**{**vars(SMALL_VAR), "shared_adaln": True}), D16],
  ids=["small", "shared", "d16"],
)
def test_the_transformer_counts_as_many_as_the_traced_program(cfg):
  for tokens in (cfg.schedule.end(1), cfg.schedule.num_tokens):
    want = traced(VAR(cfg), "__call__", *var_inputs(cfg, tokens))
    assert flops.var_forward(cfg, tokens) == want
  assert flops.var_forward(cfg) == want


@pytest.mark.parametrize(
  "cfg",
  [
    SMALL_TOKENIZER,
    TokenizerConfig(**{**vars(SMALL_TOKENIZER), "quant_resi": 0.0}),
    RELEASED,
  ],
  ids=["small", "no phi", "released"],
)
def test_the_tokenizer_counts_as_many_as_the_traced_program(cfg):
  tokenizer, counts = Tokenizer(cfg), flops.tokenizer_forward(cfg)
  (H, W), (h, w) = cfg.image_shape, cfg.schedule.grid
  image, latent = spec(1, H, W, 3), spec(1, h, w, cfg.latent_channels)
  tokens = spec(1, cfg.schedule.num_tokens, dtype=jnp.int32)
  assert counts.encoder == traced(tokenizer, "to_latent", image)
  assert counts.encode == traced(tokenizer, "encode", image)
  assert counts.accumulate == traced(tokenizer, "accumulate", tokens)
  assert counts.decoder == traced(tokenizer, "to_image", latent)


def test_xla_counts_the_transformer_within_two_percent():
  # One layer, since XLA counts the body of a scan once; wide, since it also
  # counts norms and the like.
  cfg = VARConfig(depth=1, width=768, heads=12, scales=(1, 2, 4, 8))
  var, inputs = VAR(cfg), var_inputs(cfg, cfg.schedule.num_tokens)
  variables = jax.eval_shape(var.init, jax.random.key(0), *inputs)
  counted = jax.jit(var.apply).lower(variables, *inputs).cost_analysis()
  assert flops.var_forward(cfg) == pytest.approx(counted["flops"], rel=0.02)


def test_xla_counts_the_tokenizer_within_two_percent():
  # Large maps, since XLA does not count the products with padding.
  cfg = TokenizerConfig(
    channels=64, channel_mults=(1, 1), scales=(1, 64), vocab_size=256
  )
  tokenizer, counts = Tokenizer(cfg), flops.tokenizer_forward(cfg)
  image = spec(1, *cfg.image_shape, 3)
  variables = jax.eval_shape(tokenizer.init, jax.random.key(0), image)

  def both(variables, image):
    return tokenizer.apply(variables, image)[0]

  counted = jax.jit(both).lower(variables, image).cost_analysis()
  want = counts.encode + counts.decoder
  assert want == pytest.approx(counted["flops"], rel=0.02)


def test_a_step_costs_three_forward_passes_of_what_learns():
  counts = flops.tokenizer_forward(RELEASED)
  forward = flops.var_forward(D16)
  assert flops.var_step(D16, None) == 3 * forward
  assert flops.var_step(D16, RELEASED) == (
    3 * forward + counts.encode + counts.accumulate
  )
  assert flops.tokenizer_step(RELEASED) == (
    3 * (counts.encoder + counts.accumulate + counts.decoder) + counts.search
  )
  assert flops.var_step(D16, None, tokens=5) == 3 * flops.var_forward(D16, 5)
  # What the docstring says of the part that the cache leaves out.
  assert counts.accumulate < 1e-3 * flops.var_step(D16, None)


@pytest.mark.parametrize(
  ("kind", "want"),
  [
    ("TPU v4", 275e12),
    ("TPU v5 lite", 197e12),
    ("TPU v5", 459e12),
    ("TPU v5p", 459e12),
    ("TPU v6 lite", 918e12),
    ("NVIDIA A100-SXM4-80GB", 312e12),
    ("NVIDIA H100 80GB HBM3", 989e12),
    ("NVIDIA H100 PCIe", 756e12),
    ("NVIDIA H200", 989e12),
    ("NVIDIA L4", 121e12),
    ("NVIDIA L40S", 362e12),
    ("NVIDIA A10G", None),
    ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
    ("cpu", None),
  ],
)
def test_peaks_go_by_the_longest_name_that_fits(kind, want):
  assert flops.peak(kind) == want


def test_drawing_counts_as_many_as_the_sampler_s_steps():
  var, rows = VAR(SMALL_VAR), 2

  def draw(variables, labels_B):
    apply = functools.partial(var.apply, variables)
    modulation = apply(labels_B, method="modulate")
    cache = KVCache.create(SMALL_VAR, rows)
    for s, (i, j) in enumerate(SMALL_VAR.schedule.shapes):
      inputs_BlZ = jnp.zeros((rows, i * j, SMALL_VAR.latent_channels))
      _, cache = apply(s, inputs_BlZ, modulation, cache, method="step")
    return cache

  variables = jax.eval_shape(
    var.init, jax.random.key(0), *var_inputs(SMALL_VAR, 18)
  )
  labels_B = spec(rows, dtype=jnp.int32)
  want = products(jax.make_jaxpr(draw)(variables, labels_B).jaxpr)
  assert flops.var_sample(SMALL_VAR, rows) == want
