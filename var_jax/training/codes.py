"""Living codes: counted, started from data, moved where they die.

A scale collapses when its tokens say nothing: one code for all of them, or
codes that leave the residual as it came. What a run does about it is decided on
the device from the state alone, so that a resumed run decides the same.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp

from var_jax.models import quantizer
from var_jax.models.scales import ScaleSchedule
from var_jax.models.tokenizer import Tokenizer
from var_jax.training.state import TrainState

POLICIES = ("report", "revive", "lower", "stop")
_LEAST_RATE = 1 / 64  # that lowering ends at
_MOVED = 1 / 8  # of the codes, at least, for a scale that collapses


@dataclasses.dataclass(frozen=True)
class CollapseConfig:
  """Args:
  policy: where a scale collapses, only report it, or also move the least used
    codes to what that scale wants, halve the learning rate, or stop the run.
  every: steps between looks; 0 never looks.
  min_explained: share of the residual energy that reaches a scale, below which
    it collapses.
  min_perplexity: of its codes, likewise.
  """

  policy: str = "report"
  every: int = 100
  min_explained: float = 0.01
  min_perplexity: float = 2.0

  def __post_init__(self):
    if self.policy not in POLICIES:
      raise ValueError(
        f"policy {self.policy!r} is not known; use one of "
        f"{', '.join(POLICIES)}."
      )
    if self.every < 0:
      raise ValueError(f"every {self.every} is negative; 0 never looks.")
    if not self.min_explained < 1.0:
      raise ValueError(
        f"min_explained {self.min_explained} is not below 1; it is a share."
      )
    if not 0 <= self.min_perplexity < math.inf:
      raise ValueError(
        f"min_perplexity {self.min_perplexity} is not in [0, inf); 0 asks for "
        "none."
      )


def count_codes(
  tokens_BL: jax.Array, scales: ScaleSchedule, vocab_size: int
) -> jax.Array:
  """Return how often each scale drew each code, float32 [S, V]."""
  counts = [
    jnp.bincount(
      tokens_BL[:, scales.start(s) : scales.end(s)].ravel(), length=vocab_size
    )
    for s in range(len(scales))
  ]
  return jnp.stack(counts).astype(jnp.float32)


def code_usage(hits_SV: jax.Array, cells: int) -> jax.Array:
  """Return the share of codes in use at each scale, percent [S].

  VAR: a code counts from 8% of an even use of the finest scale on.

  Args:
    cells: latent cells of a batch, B h w.
  """
  enough = cells / hits_SV.shape[1] * 0.08
  return 100.0 * jnp.mean(hits_SV >= enough, axis=1)


def perplexity(hits_SV: jax.Array) -> jax.Array:
  """Return exp of the entropy of each scale's codes, [S]; 1: a single one."""
  share_SV = hits_SV / jnp.maximum(jnp.sum(hits_SV, axis=1, keepdims=True), 1)
  return jnp.exp(jnp.sum(jax.scipy.special.entr(share_SV), axis=1))


def explained(latent_energy: jax.Array, residual_S: jax.Array) -> jax.Array:
  """Return the share of the energy that reaches a scale which it explains.

  It is negative where a scale does harm, and not below -1.

  Args:
    latent_energy: mean square of f.
    residual_S: of what each scale leaves of it.
  """
  reaches_S = jnp.concatenate([latent_energy[None], residual_S[:-1]])
  share_S = 1.0 - residual_S / jnp.maximum(reaches_S, 1e-12)
  # Codes far away have any number; a running mean must forget it soon.
  return jnp.maximum(share_S, -1.0)


def is_new(state: TrainState) -> jax.Array:
  """Return whether nothing was drawn yet.

  The clock does not say so: it goes on over refused steps and rollbacks.
  """
  return jnp.sum(state.code_hits_SV) == 0


def counted(
  state: TrainState, before: TrainState, hits_SV, explained_S
) -> TrainState:
  """Return the state with a batch's counts in its running ones.

  Args:
    before: as the step found it.
  """
  # VAR: the first count as it is, then a short memory, then a long one.
  decay = jnp.where(before.step < 100, 0.9, 0.99)
  decay = jnp.where(is_new(before), 0.0, decay)

  def running(mean, new):
    return decay * mean + (1.0 - decay) * new

  return state.replace(
    code_hits_SV=running(state.code_hits_SV, hits_SV),
    explained_S=running(state.explained_S, explained_S),
    grace_V=decay * state.grace_V,
  )


def collapsed(cfg: CollapseConfig, state: TrainState) -> jax.Array:
  """Return which scales collapse, bool [S]; none where it is not time."""
  if not cfg.every:
    return jnp.zeros(state.explained_S.shape, bool)
  time = (state.step % cfg.every == 0) & ~is_new(state)
  return time & (
    (state.explained_S < cfg.min_explained)
    | (perplexity(state.code_hits_SV) < cfg.min_perplexity)
  )


def start_from_data(
  tokenizer: Tokenizer,
  state: TrainState,
  f_BhwZ: jax.Array,
  key: jax.Array,
  rounds: int,
) -> TrainState:
  """Return the state with codes that images ask for, as k-means finds them.

  A round quantises with the codes of the round before, moves each code to the
  mean of the residuals that chose it, and draws anew those that none chose.

  Args:
    f_BhwZ: latents of a batch.
    rounds: 0 leaves the codes on vectors drawn at random.
  """
  V = tokenizer.cfg.vocab_size

  def take_round(number, codebook_VZ):
    tokens_M, wanted_MZ = _wanted(tokenizer, state.params, codebook_VZ, f_BhwZ)
    hits_V = jax.ops.segment_sum(jnp.ones(len(tokens_M)), tokens_M, V)
    sum_VZ = jax.ops.segment_sum(wanted_MZ, tokens_M, V)
    mean_VZ = sum_VZ / jnp.maximum(hits_V, 1)[:, None]
    drawn_VZ = _drawn(jax.random.fold_in(key, number), wanted_MZ, V)
    # Round 0 draws them all.
    moved_V = (number > 0) & (hits_V > 0)
    return jnp.where(moved_V[:, None], mean_VZ, drawn_VZ)

  codebook_VZ = state.params["params"]["codebook"]
  codebook_VZ = jax.lax.fori_loop(0, rounds + 1, take_round, codebook_VZ)
  return _with_codes(state, codebook_VZ, jnp.ones(V, bool))


def move_dead(
  tokenizer: Tokenizer,
  state: TrainState,
  f_BhwZ: jax.Array,
  key: jax.Array,
  dead_V: jax.Array,
  wanted_by_S: jax.Array | None = None,
) -> TrainState:
  """Return the state with dead codes on vectors that a batch asks for.

  Args:
    f_BhwZ: latents of the batch.
    wanted_by_S: bool, the scales whose vectors count; all of them if None.
  """
  scales = tokenizer.cfg.schedule
  codebook_VZ = state.params["params"]["codebook"]
  _, wanted_MZ = _wanted(tokenizer, state.params, codebook_VZ, f_BhwZ)
  odds_M = None
  if wanted_by_S is not None:
    odds_L = wanted_by_S[scales.level_ids()].astype(jnp.float32)
    odds_M = jnp.tile(odds_L, len(f_BhwZ))
    odds_M /= jnp.maximum(jnp.sum(odds_M), 1.0)
  drawn_VZ = _drawn(key, wanted_MZ, len(codebook_VZ), odds_M)
  # Moved codes count as in even use, or they would be dead next time too.
  even = jnp.sum(state.code_hits_SV) / len(codebook_VZ)
  state = _with_codes(state, drawn_VZ, dead_V)
  return state.replace(grace_V=jnp.where(dead_V, even, state.grace_V))


def dead(state: TrainState, below: float) -> jax.Array:
  """Return which codes are drawn less than `below` of an even use, [V]."""
  hits_V = jnp.sum(state.code_hits_SV, axis=0)
  return hits_V + state.grace_V < below * jnp.mean(hits_V)


def least_used(state: TrainState, below: float) -> jax.Array:
  """Return the dead codes, or more if those are less than an eighth, [V]."""
  hits_V = jnp.sum(state.code_hits_SV, axis=0) + state.grace_V
  rank_V = jnp.argsort(jnp.argsort(hits_V))
  return dead(state, below) | (rank_V < max(1, round(len(hits_V) * _MOVED)))


def lowered(rate: jax.Array) -> jax.Array:
  """Return half the factor of the learning rate, in bounds."""
  return jnp.maximum(rate / 2, _LEAST_RATE)


def _wanted(tokenizer, variables, codebook_VZ, f_BhwZ):
  """Return all tokens [M] of f and the residuals they were chosen for."""
  params = {**variables["params"], "codebook": codebook_VZ}
  tokens_BL, f_hats = tokenizer.apply(
    {"params": params}, f_BhwZ, method="quantize_latent"
  )
  wanted_BLZ = quantizer.wanted_vectors(f_BhwZ, f_hats, tokenizer.cfg.schedule)
  return tokens_BL.ravel(), wanted_BLZ.reshape(-1, wanted_BLZ.shape[-1])


def _drawn(key, wanted_MZ, count: int, odds_M=None) -> jax.Array:
  """Return vectors drawn at random, each a little beside."""
  pick_key, noise_key = jax.random.split(key)
  picks_VZ = jax.random.choice(
    pick_key, wanted_MZ, (count,), replace=True, p=odds_M
  )
  # Two codes that land on one vector must be able to part.
  spread_Z = 0.01 * jnp.std(wanted_MZ, axis=0)
  return picks_VZ + spread_Z * jax.random.normal(noise_key, picks_VZ.shape)


def _with_codes(state: TrainState, codebook_VZ, moved_V) -> TrainState:
  """Return the state with other codes where they moved, the average too."""

  def changed(variables):
    params = variables["params"]
    codes_VZ = jnp.where(moved_V[:, None], codebook_VZ, params["codebook"])
    return {**variables, "params": {**params, "codebook": codes_VZ}}

  ema = state.ema if state.ema is None else changed(state.ema)
  return state.replace(params=changed(state.params), ema=ema)
