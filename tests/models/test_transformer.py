"""The transformer against the recorded official one, and its laws."""

import dataclasses
import fnmatch
import functools
import math
import re

import flax.linen as nn
import golden_files
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from var_jax.checkpoints import torch_format
from var_jax.models import layers
from var_jax.models.blocks import Block, LayerNoise, VARConfig
from var_jax.models.scales import SCALES
from var_jax.models.transformer import VAR, KVCache
from var_jax.training import losses

# float32 needs less than half of this here; 1e-4 is what all goldens may take.
assert_close = functools.partial(golden_files.assert_close, tolerance=2e-5)
every_variant = pytest.mark.parametrize("variant", "ABC")


def recorded(variant):
  return golden_files.arrays(f"var_{variant}_train.npz")


def labels_of(variant):
  """Return the recorded labels; -1 is unconditional, 10 was there."""
  labels_B = recorded(variant)["labels"]
  return np.where(labels_B == 10, -1, labels_B)


@functools.cache
def arguments(variant):
  """Return (parameters, labels_B, inputs_BlZ) of the recorded forward."""
  params = jax.tree.map(jnp.asarray, golden_files.var_params(variant))
  return params, labels_of(variant), jnp.asarray(recorded(variant)["x_in"])


def changed(variant, **fields):
  return VAR(dataclasses.replace(golden_files.VARIANTS[variant], **fields))


@functools.partial(jax.jit, static_argnums=0)
def watch(var, params, labels_B, inputs_BlZ, key=None):
  """Return logits and what passes between the parts of the model."""
  seen = {}

  def note(next_method, args, kwargs, context):
    out = next_method(*args, **kwargs)
    if context.method_name == "modulate" and not context.module.path:
      seen["modulation"] = out
    elif context.method_name == "run_blocks":
      seen["x0"], seen["last"] = args[0], out[0]
    elif context.module.path == ("head",):
      seen["head_nm"] = args[0]
    return out

  with nn.intercept_methods(note):
    seen["logits"] = var.apply(params, labels_B, inputs_BlZ, key)
  return seen


def observed(variant, key=None, **fields):
  return watch(changed(variant, **fields), *arguments(variant), key)


def one_layer_each(variant, x_BlD, noises):
  """Yield the output of each layer, applied in a plain loop."""
  params = arguments(variant)[0]["params"]["blocks"]
  modulation_RB6D = observed(variant)["modulation"].blocks_RB6D
  # The layer's own rate decides; this one only turns dropping on.
  cfg = dataclasses.replace(golden_files.VARIANTS[variant], drop_path=0.5)
  apply = jax.jit(Block(cfg, layers.attend).apply)
  for r, noise in enumerate(noises):
    layer = {"params": jax.tree.map(lambda p, r=r: p[r], params)}
    x_BlD, _ = apply(layer, x_BlD, modulation_RB6D[r], None, noise)
    yield x_BlD


@functools.cache
def gradients(variant):
  """Return {smoothing: (loss, gradients by official name)}."""
  cfg = golden_files.VARIANTS[variant]
  tokens_BL = recorded(variant)["gt_ids"]

  def losses_of(params, labels_B, inputs_BlZ):
    logits_BLV = VAR(cfg).apply(params, labels_B, inputs_BlZ)
    return jnp.stack(
      [
        losses.cross_entropy(logits_BLV, tokens_BL, smoothing=smoothing)
        for smoothing in (0.0, 0.1)
      ]
    )

  @jax.jit
  def differentiate(params, *args):
    losses_2, pull_back = jax.vjp(lambda p: losses_of(p, *args), params)
    return losses_2, *(pull_back(one_2)[0]["params"] for one_2 in jnp.eye(2))

  losses_2, plain, smooth = differentiate(*arguments(variant))
  entries = list(torch_format.var_entries(cfg))
  named = [golden_files.to_official(g, entries) for g in (plain, smooth)]
  return dict(zip((0.0, 0.1), zip(losses_2, named, strict=True), strict=True))


@every_variant
def test_logits_equal_the_recorded_ones(variant):
  assert_close(observed(variant)["logits"], recorded(variant)["logits"])


@every_variant
def test_what_enters_the_layers_equals_the_recorded_array(variant):
  assert_close(observed(variant)["x0"], recorded(variant)["x0"])


@every_variant
def test_what_enters_the_head_equals_the_recorded_array(variant):
  assert_close(observed(variant)["head_nm"], recorded(variant)["head_nm"])


@every_variant
def test_the_condition_is_the_class_embedding(variant):
  cond_BD = observed(variant)["modulation"].cond_BD
  np.testing.assert_array_equal(cond_BD, recorded(variant)["cond"])


@every_variant
def test_layers_in_a_loop_equal_the_recorded_ones_and_the_scan(variant):
  seen = observed(variant)
  for r, x_BlD in enumerate(one_layer_each(variant, seen["x0"], [None] * 3)):
    assert_close(x_BlD, recorded(variant)[f"hidden_{r}"])
  assert_close(x_BlD, seen["last"], tolerance=2e-6)


@every_variant
def test_dropped_labels_give_the_recorded_logits(variant):
  params, labels_B, inputs_BlZ = arguments(variant)
  dropped_B = losses.drop_labels(labels_B, recorded(variant)["rand_drop"] < 0.1)
  np.testing.assert_array_equal(dropped_B, [-1, 7, -1])
  seen = watch(changed(variant), params, dropped_B, inputs_BlZ)
  assert_close(seen["logits"], recorded(variant)["logits_drop"])


@every_variant
def test_metrics_equal_the_recorded_ones(variant):
  arrays, cfg = recorded(variant), golden_files.VARIANTS[variant]
  metrics = losses.token_metrics(
    observed(variant)["logits"], arrays["gt_ids"], cfg.schedule
  )
  assert_close(metrics["loss_mean"], arrays["val_Lmean"][0])
  assert_close(metrics["loss_tail"], arrays["val_Ltail"][0])
  assert_close(100 * metrics["accuracy_mean"], arrays["acc_mean"][0])
  assert_close(100 * metrics["accuracy_tail"], arrays["acc_tail"][0])


@every_variant
def test_metrics_of_a_pass_over_data_equal_the_recorded_ones(variant):
  """Two batches of two, as the official evaluation sees them."""
  var, params = changed(variant), arguments(variant)[0]
  images = golden_files.arrays("vae_share4_znorm0.npz")
  tokens_BL = np.concatenate([images[f"ids_{s}"] for s in range(4)], axis=1)
  labels_B, inputs_BLZ = np.array([3, 7, -1, 0]), images["var_input"]
  batches = []
  for pair in ([0, 1], [2, 3]):
    rows = [*pair, 0]  # three at a time are compiled already
    logits_BLV = watch(var, params, labels_B[rows], inputs_BLZ[rows])["logits"]
    batches.append(
      losses.token_metrics(logits_BLV[:2], tokens_BL[pair], var.cfg.schedule)
    )
  mean = jax.tree.map(lambda *batch: sum(batch) / 2, *batches)
  expected = golden_files.table("optim.json")["eval_ep"][variant]
  assert expected["tot"] == len(labels_B)
  assert_close(mean["loss_mean"], expected["L_mean"])
  assert_close(mean["loss_tail"], expected["L_tail"])
  assert_close(100 * mean["accuracy_mean"], expected["acc_mean"])
  assert_close(100 * mean["accuracy_tail"], expected["acc_tail"])


@every_variant
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_loss_equals_the_recorded_one(variant, smoothing):
  loss, _ = gradients(variant)[smoothing]
  assert_close(loss, recorded(variant)[f"loss_ls{smoothing}"][0])


@every_variant
def test_gradients_equal_the_recorded_ones(variant):
  arrays = recorded(variant)
  checked = set()
  for name, grad in arrays.items():
    if match := re.fullmatch(r"grad([01])\.(.*)", name):
      _, grads = gradients(variant)[0.1 if match[1] == "1" else 0.0]
      assert_close(grads[match[2]], grad)
      checked.add(match[2])
  assert checked == set(grads)


@every_variant
def test_gradient_norms_equal_the_recorded_ones(variant):
  arrays, (_, grads) = recorded(variant), gradients(variant)[0.1]
  assert sorted(arrays["gradnorm1_names"]) == sorted(grads)
  norms = [np.linalg.norm(grads[name]) for name in arrays["gradnorm1_names"]]
  np.testing.assert_allclose(norms, arrays["gradnorm1_values"], rtol=2e-5)


@pytest.mark.parametrize("newest", [1, 2])
def test_the_first_scales_alone_equal_the_recorded_run(newest):
  arrays, var = recorded("A"), changed("A")
  params, labels_B, inputs_BlZ = arguments("A")
  start, end = var.cfg.schedule.start(newest), var.cfg.schedule.end(newest)
  first_BlZ = inputs_BlZ[:, : end - 1]
  np.testing.assert_array_equal(arrays[f"prog{newest}_x_in"], first_BlZ)
  logits_BlV = watch(var, params, labels_B, first_BlZ)["logits"]
  assert_close(logits_BlV, arrays[f"prog{newest}_logits"])
  # Weights stay those of all L tokens; the newest scale is faded in.
  weights_l = np.full(end, 1 / var.cfg.schedule.num_tokens)
  weights_l[start:] *= 0.3
  tokens_Bl = arrays["gt_ids"][:, :end]
  loss = losses.cross_entropy(logits_BlV, tokens_Bl, weights_l)
  assert_close(loss, arrays[f"prog{newest}_loss_wp0.3"][0])


COVERED = {
  "arguments": ("labels", "x_in"),
  "gradients": ("gt_ids",),
  "test_logits_equal_the_recorded_ones": ("logits",),
  "test_what_enters_the_layers_equals_the_recorded_array": ("x0",),
  "test_what_enters_the_head_equals_the_recorded_array": ("head_nm",),
  "test_the_condition_is_the_class_embedding": ("cond",),
  "test_layers_in_a_loop_equal_the_recorded_ones_and_the_scan": ("hidden_?",),
  "test_dropped_labels_give_the_recorded_logits": ("rand_drop", "logits_drop"),
  "test_metrics_equal_the_recorded_ones": ("val_L*", "acc_*"),
  "test_the_loss_equals_the_recorded_one": ("loss_ls*",),
  "test_gradients_equal_the_recorded_ones": ("grad0.*", "grad1.*"),
  "test_gradient_norms_equal_the_recorded_ones": ("gradnorm1_*",),
  "test_the_first_scales_alone_equal_the_recorded_run": ("prog[12]_*",),
}


@every_variant
def test_every_recorded_array_is_tested(variant):
  assert all(callable(globals()[test]) for test in COVERED)
  patterns = [p for patterns in COVERED.values() for p in patterns]
  for name in recorded(variant):
    matches = [p for p in patterns if fnmatch.fnmatchcase(name, p)]
    assert len(matches) == 1, (name, matches)


@every_variant
def test_scales_one_by_one_equal_all_at_once(variant):
  """Cached decoding is teacher-forcing, scale by scale."""
  params, labels_B, inputs_BlZ = arguments(variant)
  var, logits_BLV = changed(variant), observed(variant)["logits"]
  schedule = var.cfg.schedule
  step = jax.jit(functools.partial(var.apply, method="step"), static_argnums=1)
  modulation = observed(variant)["modulation"]
  cache = KVCache.create(var.cfg, len(labels_B))
  for s in range(len(schedule)):
    start, end = schedule.start(s), schedule.end(s)
    # Scale 0 has no input, so inputs are one token behind.
    inputs = inputs_BlZ[:, start - 1 : end - 1] if s else None
    logits_BlV, cache = step(params, s, inputs, modulation, cache)
    assert_close(logits_BlV, logits_BLV[:, start:end], tolerance=5e-6)
    for later in jax.tree.map(lambda c, end=end: c[:, :, end:], cache):
      assert not np.any(later)


@every_variant
def test_future_scales_get_no_gradient(variant):
  params, labels_B, inputs_BlZ = arguments(variant)
  schedule = golden_files.VARIANTS[variant].schedule
  level_L = schedule.level_ids()
  random_BLV = jax.random.normal(jax.random.key(0), (3, 30, 128))
  of_scale_S1L1 = (np.arange(4)[:, None] == level_L)[:, None, :, None]

  @jax.jit
  def pull_back(cotangents_SBLV):
    forward = functools.partial(changed(variant).apply, params, labels_B)
    return jax.vmap(jax.vjp(forward, inputs_BlZ)[1])(cotangents_SBLV)[0]

  grads_SBlZ = pull_back(random_BLV * of_scale_S1L1)
  reached_SBl = np.any(np.asarray(grads_SBlZ) != 0, axis=-1)
  sees_Sl = np.arange(4)[:, None] >= level_L[1:]
  np.testing.assert_array_equal(
    reached_SBl, np.broadcast_to(sees_Sl[:, None], reached_SBl.shape)
  )


REMATS = ("none", "dots", "full")


def total_of(remat, params, key):
  _, labels_B, inputs_BlZ = arguments("A")
  var = changed("A", remat=remat, drop_path=0.4)
  return jnp.sum(var.apply(params, labels_B, inputs_BlZ, key) ** 2)


def test_remat_changes_neither_values_nor_gradients():
  plain, *others = (
    jax.jit(jax.value_and_grad(functools.partial(total_of, remat)))(
      arguments("A")[0], jax.random.key(0)
    )
    for remat in REMATS
  )
  for other in others:
    jax.tree.map(functools.partial(assert_close, tolerance=1e-6), other, plain)


def test_remat_keeps_less_for_the_backward_pass():
  def bytes_kept(remat):
    """Return the size of what a backward pass is called with."""
    backward = jax.eval_shape(
      lambda params, key: jax.vjp(
        lambda params: total_of(remat, params, key), params
      )[1],
      arguments("A")[0],
      jax.random.key(0),
    )
    return sum(
      leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(backward)
    )

  kept, kept_dots, kept_full = map(bytes_kept, REMATS)
  assert kept_dots < kept / 2
  assert kept_full < 0.6 * kept_dots


@pytest.mark.parametrize("old, new", [(True, "full"), (False, "none")])
def test_remat_was_a_switch_once(old, new):
  assert VARConfig(remat=old) == VARConfig(remat=new)


def test_an_unknown_remat_is_refused():
  with pytest.raises(ValueError, match="remat 'all' is not known; use one of"):
    VARConfig(remat="all")


def test_without_a_key_nothing_is_dropped():
  logits_BLV = observed("A", dropout=0.5, drop_path=0.5)["logits"]
  assert_close(logits_BLV, recorded("A")["logits"])


def test_rates_of_zero_drop_nothing():
  seen = observed("A", jax.random.key(0), dropout=0.0, drop_path=0.0)
  np.testing.assert_array_equal(seen["logits"], observed("A")["logits"])


@pytest.mark.parametrize("rates", [dict(dropout=0.3), dict(drop_path=0.4)])
def test_the_key_decides_what_is_dropped(rates):
  once, again, other = (
    observed("A", jax.random.key(seed), **rates)["logits"] for seed in (0, 0, 1)
  )
  np.testing.assert_array_equal(once, again)
  assert not np.array_equal(once, other)
  assert not np.array_equal(once, observed("A")["logits"])


def test_the_rate_of_dropped_paths_grows_linearly_with_depth():
  key = jax.random.key(3)
  rates, keys = (0.0, 0.2, 0.4), jax.random.split(key, 3)
  noises = map(LayerNoise, rates, keys)
  seen = observed("A", key, drop_path=0.4)
  *_, expected_BlD = one_layer_each("A", seen["x0"], noises)
  assert_close(seen["last"], expected_BlD, tolerance=2e-6)


def test_a_dropped_path_is_dropped_for_the_whole_sample():
  x_BlD = 1.0 + jax.random.uniform(jax.random.key(0), (4, 5, 6))
  rate, draws = 0.3, 4000
  keys = jax.random.split(jax.random.key(1), draws)
  dropped_nBlD = jax.jit(
    jax.vmap(functools.partial(layers.drop_path, x_BlD, rate))
  )(keys)
  kept_nBlD = np.asarray(dropped_nBlD != 0)
  kept_nB = kept_nBlD.all(axis=(2, 3))
  np.testing.assert_array_equal(kept_nB, kept_nBlD.any(axis=(2, 3)))
  expected_nBlD = kept_nB[:, :, None, None] * (x_BlD / (1 - rate))
  np.testing.assert_allclose(dropped_nBlD, expected_nBlD, rtol=1e-6)
  assert 0 < np.mean(kept_nB[:, 0] & ~kept_nB[:, 1])  # samples on their own
  # A kept path counts 1 / 0.7: the mean has a deviation of sqrt(0.3/0.7/n).
  deviation = math.sqrt(rate / (1 - rate) / draws)
  np.testing.assert_allclose(dropped_nBlD.mean(0), x_BlD, rtol=5 * deviation)


def test_dropout_drops_single_elements():
  x = jnp.ones((100, 100))
  dropped = np.asarray(layers.dropout(x, 0.3, jax.random.key(0)))
  np.testing.assert_allclose(np.unique(dropped), [0.0, 1 / 0.7], rtol=1e-6)
  deviation = math.sqrt(0.3 / 0.7 / 100)
  np.testing.assert_allclose(dropped.mean(0), 1.0, atol=5 * deviation)
  np.testing.assert_allclose(dropped.mean(1), 1.0, atol=5 * deviation)


@every_variant
def test_bfloat16_gives_nearly_the_same_float32_logits(variant):
  logits_BLV = observed(variant, dtype="bfloat16")["logits"]
  assert logits_BLV.dtype == jnp.float32
  expected_BLV = recorded(variant)["logits"]
  error_BLV = np.abs(logits_BLV - expected_BLV)
  largest = np.abs(expected_BLV).max()
  # bfloat16 has eight bits; three layers in float32 would be at 2^-23.
  assert 2**-14 < error_BLV.mean() / largest < 2**-8
  assert error_BLV.max() / largest < 2**-4


@every_variant
def test_the_cache_holds_what_is_multiplied(variant):
  var = changed(variant, dtype="bfloat16")
  cache = KVCache.create(var.cfg, 2)
  assert {c.dtype for c in cache} == {jnp.dtype("bfloat16")}
  assert {c.shape for c in cache} == {(3, 2, 30, var.cfg.width)}


def test_another_attention_can_be_put_in():
  def attend(q_BlNK, k_BTNK, v_BTNK, mask_lT):
    return jax.nn.dot_product_attention(
      q_BlNK, k_BTNK, v_BTNK, mask=mask_lT[None, None], scale=1.0
    )

  def blind(q_BlNK, k_BTNK, v_BTNK, mask_lT):
    return jnp.zeros_like(q_BlNK)

  cfg, args = golden_files.VARIANTS["A"], arguments("A")
  logits_BLV = watch(VAR(cfg, attend), *args)["logits"]
  assert_close(logits_BLV, recorded("A")["logits"])
  assert not np.allclose(watch(VAR(cfg, blind), *args)["logits"], logits_BLV)


def matmuls_on_tpu(fn, *args):
  """Return (operand types, precisions) of each dot."""
  lowered = jax.jit(fn).trace(*args).lower(lowering_platforms=("tpu",))
  found = []
  for line in lowered.as_text().splitlines():
    if "stablehlo.dot_general" in line:
      operands, _ = line.rsplit(" : (", 1)[1].split(") -> ")
      types = tuple(re.findall(r"tensor<(\S+)>", operands))
      found.append((types, tuple(re.findall("HIGHEST|DEFAULT", line))))
  return found


def forward_and_step(variant, dtype):
  """Return the dots of the training forward and of a cached step."""
  var = changed(variant, dtype=dtype)
  params, labels_B, inputs_BlZ = arguments(variant)
  forward = matmuls_on_tpu(var.apply, params, labels_B, inputs_BlZ)

  def step(params, cache):
    modulation = var.apply(params, labels_B, method="modulate")
    inputs = inputs_BlZ[:, 4:13]
    return var.apply(params, 2, inputs, modulation, cache, method="step")

  return forward, matmuls_on_tpu(step, params, KVCache.create(var.cfg, 3))


@every_variant
def test_float32_means_float32_on_tpu(variant):
  for matmuls in forward_and_step(variant, "float32"):
    # AdaLN of layers and head, word_emb, head, and six in the layer.
    assert len(matmuls) == 10
    for types, precisions in matmuls:
      assert all(t.endswith("xf32") for t in types)
      assert precisions == ("HIGHEST", "HIGHEST")


@every_variant
def test_bfloat16_spares_embedding_and_head_on_tpu(variant):
  D = golden_files.VARIANTS[variant].width
  for matmuls in forward_and_step(variant, "bfloat16"):
    assert len(matmuls) == 10
    full = [m for m in matmuls if any("f32" in t for t in m[0])]
    weights = sorted(types[1] for types, _ in full)
    assert weights == sorted([f"8x{D}xf32", f"{D}x128xf32"])
    for types, precisions in full:
      assert all(t.endswith("xf32") for t in types)
      assert precisions == ("HIGHEST", "HIGHEST")
    for types, _ in matmuls:
      if (types, ("HIGHEST", "HIGHEST")) not in full:
        assert all(t.endswith("xbf16") for t in types)


def test_heads_must_divide_the_width():
  with pytest.raises(ValueError, match="width 100 is not divisible by 16"):
    VARConfig(width=100)


COUNTS = golden_files.table("param_counts.json")
PUBLISHED = {
  "var_d8": VARConfig.official(8),
  "var_d12": VARConfig.official(12),
  "var_d16": VARConfig.official(16),
  "var_d20": VARConfig.official(20),
  "var_d24": VARConfig.official(24),
  "var_d30": VARConfig.official(30),
  "var_d36": VARConfig.official(36, shared_adaln=True, scales=SCALES[512]),
  "var_d36_L2240_saln0": VARConfig.official(36, scales=SCALES[512]),
  "var_d36_L680_saln0": VARConfig.official(36),
  "var_d16_L680_saln1": VARConfig.official(16, shared_adaln=True),
  "var_d16_L9451_saln0": VARConfig.official(16, scales=SCALES[1024]),
}


@pytest.mark.parametrize("name", [n for n in COUNTS if n.startswith("var")])
def test_published_sizes_have_the_recorded_parameters(name):
  cfg, expected = PUBLISHED[name], COUNTS[name]
  abstract = torch_format.abstract_var(cfg)
  count = sum(math.prod(p.shape) for p in jax.tree.leaves(abstract))
  assert count == expected["params"]
  if "L" in expected:
    assert cfg.width == expected["embed_dim"]
    assert cfg.heads == expected["heads"]
    assert cfg.schedule.num_tokens == expected["L"]
    assert cfg.drop_path == pytest.approx(expected["drop_path_max"])


def test_the_default_is_the_published_smallest():
  assert VARConfig() == VARConfig.official(16)


@pytest.mark.parametrize("shared_adaln", [False, True])
def test_fresh_parameters_are_distributed_as_the_official_ones(shared_adaln):
  cfg = VARConfig(shared_adaln=shared_adaln)
  inputs_10Z = jnp.zeros((1, 0, cfg.latent_channels))
  params = jax.jit(VAR(cfg).init)(
    jax.random.key(0), jnp.zeros((1,), jnp.int32), inputs_10Z
  )
  tensors = golden_files.to_official(
    params["params"], torch_format.var_entries(cfg)
  )
  stats = golden_files.table("init_stats_d16.json")[
    f"d16_saln{int(shared_adaln)}"
  ]
  assert sorted(tensors) == sorted(stats)
  for name, expected in stats.items():
    tensor = tensors[name]
    assert list(tensor.shape) == expected["shape"]
    if expected["std"] == 0:
      assert np.all(tensor == np.float32(expected["mean"])), name
      continue
    deviation = 5 / math.sqrt(tensor.size)
    mean = tensor.mean(dtype="f8")
    assert abs(mean - expected["mean"]) < deviation * expected["std"], name
    for part, std in parts(tensor, expected):
      error = abs(part.std(dtype="f8") / std - 1)
      assert error < 5 / math.sqrt(2 * part.size), name


def parts(tensor, expected):
  """Yield the parts of a tensor that have one deviation each, and that."""
  gamma, other = (
    next((v for k, v in expected.items() if k.startswith(prefix)), None)
    for prefix in ("std_gamma", "std_other")
  )
  if gamma is None:
    yield tensor, expected["std"]
  else:
    # Two of the six vectors are gammas.
    vectors = tensor.reshape(6, -1)
    yield vectors[:2], gamma
    yield vectors[2:], other
