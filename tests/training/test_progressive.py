"""Progressive training: stages and weights against the official ones."""

import functools

import golden_files
import jax.numpy as jnp
import numpy as np
import pytest

from var_jax.models.scales import ScaleSchedule
from var_jax.training import progressive
from var_jax.training.progressive import ProgressiveConfig

CFG = ProgressiveConfig(until=0.8, first=4, warmup_fraction=0.05)
RUN = dict(steps=1000, warmup_steps=20, num_scales=10)


def stages(cfg, **run):
  return [progressive.stage(cfg, k, **run) for k in range(run["steps"])]


def weights(cfg, **run):
  """Return the weight of each step's newest scale."""
  return [
    float(progressive.newest_scale_weight(cfg, k, s, **run))
    for k, s in enumerate(stages(cfg, **run))
  ]


def test_every_recorded_step_has_the_recorded_stage():
  recorded = golden_files.table("progressive_schedule.json")
  for values in recorded["rows"]:
    row = dict(zip(recorded["columns"], values, strict=True))
    cfg = ProgressiveConfig(until=row["pg"], first=row["pg0"])
    actual = progressive.stage(
      cfg, row["g_it"], row["max_it"], row["wp_it"], num_scales=10
    )
    assert actual == row["prog_si"], row


def test_a_stage_is_never_left_for_a_coarser_one():
  seen = stages(CFG, **RUN)
  assert seen == sorted(seen)
  assert set(seen) == set(range(4, 10))


def test_without_it_all_scales_are_trained_from_the_start():
  cfg = ProgressiveConfig(first=12)  # which no schedule here has
  assert set(stages(cfg, **RUN)) == {9}
  assert set(weights(cfg, **RUN)) == {1.0}


@pytest.mark.parametrize("warmup_steps", [0, 30])
def test_a_warm_up_longer_than_the_stages_ends_in_the_last(warmup_steps):
  cfg = ProgressiveConfig(until=0.2, first=1)
  seen = stages(cfg, steps=100, warmup_steps=warmup_steps, num_scales=4)
  assert seen[0] == seen[warmup_steps] == 1
  assert seen[max(20, warmup_steps + 1)] == 3


def official_weights(cfg, seen, steps, num_scales):
  """Return what the official trainer's counters give, step by step."""
  expected, previous, count, first = [], -1, 0, True
  for s in seen:
    if s != previous:
      first = first and previous == -1
      previous, count = s, 0
    count += 1
    weight = max(min(count / (cfg.warmup_fraction * steps), 1), 0.01)
    # The last stage is trained as if there were none.
    expected.append(1.0 if first or s == num_scales - 1 else weight)
  return expected


@pytest.mark.parametrize(
  "cfg, run",
  [
    (CFG, RUN),
    (ProgressiveConfig(until=1.0, first=0, warmup_fraction=0.01), RUN),
    # More scales than steps: some stages never come.
    (
      ProgressiveConfig(until=0.9, first=0, warmup_fraction=0.3),
      dict(steps=12, warmup_steps=1, num_scales=10),
    ),
  ],
)
def test_the_newest_scale_gains_its_weight_as_in_the_official_trainer(cfg, run):
  expected = official_weights(
    cfg, stages(cfg, **run), run["steps"], run["num_scales"]
  )
  np.testing.assert_allclose(weights(cfg, **run), expected, rtol=1e-6)
  assert len(set(expected)) > 2


def test_without_a_warm_up_a_scale_has_its_weight_at_once():
  cfg = ProgressiveConfig(until=0.8, warmup_fraction=0.0)
  assert set(weights(cfg, **RUN)) == {1.0}


def test_tokens_weigh_what_they_weigh_when_all_are_trained():
  scales = ScaleSchedule((1, 2, 3, 4))
  weights_l = progressive.token_weights(scales, 2, jnp.float32(0.25))
  expected = np.full(14, 1 / 30)
  expected[5:] *= 0.25
  np.testing.assert_allclose(weights_l, expected, rtol=1e-6)


@pytest.mark.parametrize(
  "fields, message",
  [
    (dict(until=1.5), r"until 1.5 is not in \[0, 1\]"),
    (dict(first=-1), "first -1 is negative"),
    (dict(warmup_fraction=1.0), r"warmup_fraction 1.0 is not in \[0, 1\)"),
  ],
)
def test_what_makes_no_sense_is_refused(fields, message):
  with pytest.raises(ValueError, match=message):
    ProgressiveConfig(**fields)


def test_a_first_stage_that_there_is_not_is_refused():
  start = functools.partial(progressive.stage, CFG, 0, 100, 2)
  assert start(num_scales=5) == 4
  with pytest.raises(ValueError, match="first 4 is not one of 4 scales"):
    start(num_scales=4)
