"""Schedules, decay groups and whole steps against the official trainer."""

import functools
import math

import golden_files
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from var_jax.checkpoints import torch_format
from var_jax.models.scales import SCALES
from var_jax.models.transformer import VAR, VARConfig
from var_jax.training import losses, optim
from var_jax.training.accumulation import mean_over_parts
from var_jax.training.state import TrainState

assert_close = golden_files.assert_close

RUNS = ("A", "A_nofuse", "A_clip4.5", "A_noclip", "B")


def recorded_schedules():
  """Return {settings: rows}."""
  recorded = golden_files.table("lr_schedule.json")
  schedules = {}
  for values in recorded["rows"]:
    row = dict(zip(recorded["columns"], values, strict=True))
    name = f"{row['sche']}-{row['max_it']}-{row['wp_it']}"
    schedules.setdefault(name, []).append(row)
  return schedules


@pytest.mark.parametrize("name", recorded_schedules())
def test_schedules_equal_the_recorded_ones(name):
  rows = recorded_schedules()[name]
  first = rows[0]
  cfg = optim.OptimizerConfig(
    learning_rate=first["peak_lr"],
    schedule=first["sche"],
    # The official warm-up need not be a whole number of steps, but is
    # rounded before use.
    warmup_fraction=round(first["wp_it"]) / first["max_it"],
    warmup_start=first["wp0"],
    final_factor=first["wpe"],
    weight_decay=first["wd"],
    weight_decay_end=first["wd_end"],
  )
  rate, decay = optim.schedules(cfg, steps=first["max_it"], batch_size=256)
  steps = jnp.array([row["cur_it"] for row in rows])
  for column in ("min_lr", "max_lr"):
    expected = [row[column] for row in rows]
    assert_close(rate(steps), expected, tolerance=1e-6)
  expected = [row["max_wd"] for row in rows]
  assert_close(decay(steps), expected, tolerance=1e-6)
  for row in rows:
    # The least decay of the groups that have one; -1 where none has.
    assert row["min_wd"] == (row["max_wd"] or -1)
    assert row["nd_group_wd"] == 0


@pytest.mark.parametrize("name", ["linear", "lin1.5", "lin0.", "", "cos0.5"])
def test_an_unknown_schedule_is_refused(name):
  with pytest.raises(ValueError, match="schedule .* is not known; use one of"):
    optim.OptimizerConfig(schedule=name)


@pytest.mark.parametrize(
  "name", ["cos", "lin", "lin0", "lin00", "lin0.5", "exp"]
)
@pytest.mark.parametrize("steps, warmup", [(1, 0), (5, 4), (3, 2)])
def test_short_runs_have_a_rate(name, steps, warmup):
  cfg = optim.OptimizerConfig(schedule=name, warmup_fraction=warmup / steps)
  rate, decay = optim.schedules(cfg, steps=steps, batch_size=256)
  rates = rate(jnp.arange(steps))
  assert np.all(np.isfinite(rates)) and np.all(rates > 0)
  assert np.all(rates <= cfg.learning_rate * (1 + 1e-6))
  assert np.all(np.isfinite(decay(jnp.arange(steps))))


def test_the_rate_grows_with_the_batch():
  small, large = (
    optim.schedules(optim.OptimizerConfig(), steps=10, batch_size=size)[0](0)
    for size in (256, 768)
  )
  np.testing.assert_allclose(large, 3 * small, rtol=1e-6)


GROUPS = golden_files.table("weight_decay_groups.json")
CONFIGS = {
  f"var_d{depth}": VARConfig.official(depth) for depth in (16, 20, 24, 30)
} | {"var_d36": VARConfig.official(36, shared_adaln=True, scales=SCALES[512])}


@pytest.mark.parametrize("name", GROUPS)
def test_the_same_tensors_decay_as_in_the_official_trainer(name):
  cfg, expected = CONFIGS[name], GROUPS[name]
  abstract = torch_format.abstract_var(cfg)
  decays = decaying_tensors(abstract, torch_format.var_entries(cfg))
  assert sorted(n for n, d in decays.items() if d) == sorted(expected["decay"])
  assert sorted(n for n, d in decays.items() if not d) == sorted(
    expected["no_decay"]
  )


def decaying_tensors(params, entries):
  """Return {official name: whether it decays}."""
  mask = jax.tree.leaves_with_path(optim.decay_mask(params))
  by_path = {"/".join(k.key for k in path): decays for path, decays in mask}
  return {entry.official: by_path[entry.path] for entry in entries}


def test_norms_codes_and_phis_of_the_tokenizer():
  cfg, params = golden_files.tokenizer()
  decays = decaying_tensors(
    params["params"], torch_format.tokenizer_entries(cfg)
  )
  assert decays["encoder.conv_in.weight"]
  assert decays["quantize.quant_resi.qresi_ls.0.weight"]
  assert not decays["quantize.embedding.weight"]
  assert not decays["encoder.norm_out.weight"]
  assert not any(d for name, d in decays.items() if name.endswith("bias"))


@functools.cache
def tokens_and_inputs():
  images = golden_files.arrays("vae_share4_znorm0.npz")
  tokens_BL = np.concatenate([images[f"ids_{s}"] for s in range(4)], axis=1)
  return tokens_BL, images["var_input"]


@functools.partial(jax.jit, static_argnums=0)
def loss_and_grads(var, params, labels_B, inputs_BLZ, tokens_BL):
  def loss_fn(params):
    logits_BLV = var.apply(params, labels_B, inputs_BLZ)
    return losses.cross_entropy(logits_BLV, tokens_BL)

  return jax.value_and_grad(loss_fn)(params)


def start(recorded):
  """Return (VAR, its first state, the recorded run's optimiser settings)."""
  var = VAR(golden_files.VARIANTS[recorded["variant"]])
  params = jax.tree.map(
    jnp.asarray, golden_files.var_params(recorded["variant"])
  )
  cfg = optim.OptimizerConfig(
    learning_rate=3e-3,
    schedule="lin0",
    warmup_fraction=0.2,
    warmup_start=0.005,
    final_factor=0.1,
    weight_decay=0.05,
    weight_decay_end=0.08,
    clip_norm=recorded["grad_clip"],
  )
  optimizer = optim.make_optimizer(cfg, steps=10, batch_size=256)
  return var, TrainState.create(params, optimizer, use_ema=False), cfg


def batch_of(step):
  """Return what the transformer sees at a recorded step."""
  tokens_BL, inputs_BLZ = tokens_and_inputs()
  dropped_B = np.array(step["rand"]) < 0.1
  return {
    "labels": losses.drop_labels(jnp.array(step["labels"]), dropped_B),
    "inputs": inputs_BLZ[np.array(step["images"])],
    "tokens": tokens_BL[np.array(step["images"])],
  }


def updating(cfg):
  optimizer = optim.make_optimizer(cfg, steps=10, batch_size=256)
  return jax.jit(
    lambda state, grads: state.apply_gradients(grads, optimizer, 0.0)[0]
  )


def assert_weights_after(run, var, state):
  tensors = golden_files.to_official(
    state.params["params"], torch_format.var_entries(var.cfg)
  )
  norms = golden_files.table("optim.json")[run]["param_norms_after"]
  assert sorted(norms) == sorted(tensors)
  for name, norm in norms.items():
    ours = np.linalg.norm(tensors[name].astype("f8"))
    assert ours == pytest.approx(norm, rel=1e-4), name
  expected = {
    name.removeprefix(f"{run}."): tensor
    for name, tensor in golden_files.arrays("optim.npz").items()
    if name.startswith(f"{run}.")
  }
  assert expected
  if run == "A":
    assert sorted(expected) == sorted(tensors)
  for name, tensor in expected.items():
    assert_close(tensors[name], tensor)


@pytest.mark.parametrize("run", RUNS)
def test_five_steps_equal_the_recorded_ones(run):
  recorded = golden_files.table("optim.json")[run]
  var, state, cfg = start(recorded)
  rate, decay = optim.schedules(cfg, steps=10, batch_size=256)
  update = updating(cfg)
  for step in recorded["steps"]:
    batch = batch_of(step)
    loss, grads = loss_and_grads(
      var, state.params, batch["labels"], batch["inputs"], batch["tokens"]
    )
    assert_close(rate(step["it"]), step["lr_max"], tolerance=1e-6)
    assert_close(decay(step["it"]), step["wd_max"], tolerance=1e-6)
    assert_close(loss, step["loss"])
    if step["grad_norm"] is not None:
      assert_close(optax.tree.norm(grads), step["grad_norm"])
    state = update(state, grads)

  assert state.step == 5
  assert_weights_after(run, var, state)


def test_accumulated_steps_equal_the_recorded_ones():
  """Two parts of a batch, one update: the mean of the gradients counts.

  The official trainer counts parts and follows the schedules by that count;
  ours counts updates. Update k is its iteration 2k + 1, so the clock is set
  to that here.
  """
  recorded = golden_files.table("optim.json")["A_ac2"]
  assert recorded["accumulation"] == 2
  var, state, cfg = start(recorded)
  update = updating(cfg)

  @jax.jit
  def accumulated(params, batch):
    return mean_over_parts(
      lambda part, number: loss_and_grads(
        var, params, part["labels"], part["inputs"], part["tokens"]
      ),
      batch,
      parts=2,
    )

  for first, second in zip(*[iter(recorded["steps"])] * 2, strict=True):
    assert (first["stepping"], second["stepping"]) == (False, True)
    # Part a holds the rows a, a + 2: rows of the two take turns.
    batch = jax.tree.map(
      lambda *parts: jnp.stack(parts, axis=1).reshape(-1, *parts[0].shape[1:]),
      batch_of(first),
      batch_of(second),
    )
    loss, grads = accumulated(state.params, batch)
    assert_close(loss, (first["loss"] + second["loss"]) / 2)
    assert_close(optax.tree.norm(grads), second["grad_norm"])
    state = update(state.replace(step=jnp.int32(second["it"])), grads)
  assert_weights_after("A_ac2", var, state)


def test_every_recorded_run_is_followed():
  # eval_ep belongs to the tests of the transformer and of its step.
  table = golden_files.table("optim.json")
  assert set(table) == {*RUNS, "A_ac2", "eval_ep"}
  for name in golden_files.arrays("optim.npz"):
    assert any(name.startswith(f"{run}.") for run in (*RUNS, "A_ac2"))


def test_a_gradient_longer_than_the_limit_is_cut_to_it():
  params = {"kernel": jnp.zeros(4)}
  cfg = optim.OptimizerConfig(clip_norm=2.0)
  chain = optim.make_optimizer(cfg, steps=10, batch_size=256)
  grads = {"kernel": jnp.array([3.0, 4.0, 0.0, 0.0])}
  _, state = chain.update(grads, chain.init(params), params, step=0)
  moments = [s for s in jax.tree.leaves(state) if np.shape(s) == (4,)]
  # The first moment is (1 - b1) of the gradient.
  np.testing.assert_allclose(
    math.sqrt(float(np.sum(np.square(moments[0])))), 0.1 * 2.0, rtol=1e-6
  )
