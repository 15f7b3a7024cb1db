"""The compiled programs of a tokenizer's training, without any file.

What a config and a mesh decide. `tokenizer_program` adds weights and workdir; a
plan compiles the same for devices that are not there.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections

from var_jax.models.tokenizer import Tokenizer, TokenizerConfig
from var_jax.parallel import rules
from var_jax.training import flops, programs, tokenizer_step
from var_jax.training.state import TrainState


@dataclasses.dataclass(frozen=True, eq=False)
class TokenizerTraining:
  """Programs of a config, each compiled when it is first used.

  Raises:
    ValueError: the config makes no sense, or does not fit the mesh.
  """

  config: ml_collections.ConfigDict
  mesh: jax.sharding.Mesh
  cfg: TokenizerConfig

  @classmethod
  def of(cls, config, mesh) -> "TokenizerTraining":
    cfg = programs.build(TokenizerConfig, config.model)
    made = cls(config, mesh, programs.with_dtype(cfg, mesh))
    # What makes no sense is said before anything is written.
    made._loss, made.like  # noqa: B018
    return made

  @property
  def tokenizer(self) -> Tokenizer:
    return Tokenizer(self.cfg)

  @functools.cached_property
  def _optimizer(self):
    return programs.optimizer(self.config)

  @functools.cached_property
  def _loss(self) -> tokenizer_step.TokenizerLossConfig:
    cls = tokenizer_step.TokenizerLossConfig
    return programs.build(cls, self.config.loss)

  @functools.cached_property
  def like(self) -> TrainState:
    """The state's shapes and shardings."""
    return programs.abstract(self.fresh, self.mesh)

  def fresh(self) -> TrainState:
    """Return the state of new parameters; for jit or eval_shape."""
    key = programs.init_key(self.config)
    return self.create(tokenizer_step.init_params(self.tokenizer, key))

  def create(self, params: Any) -> TrainState:
    """Return the state before the first step."""
    optimizer, _ = self._optimizer
    hits_SV = jnp.zeros((len(self.cfg.schedule), self.cfg.vocab_size))
    return TrainState.create(
      params,
      optimizer,
      use_ema=self.config.ema_decay > 0,
      code_hits_SV=hits_SV,
    )

  def placed(self, create, *args) -> TrainState:
    """Return create(*args), each device making its own part."""
    return programs.created(create, self.mesh, self.like, *args)

  @functools.cached_property
  def step(self) -> rules.Jit:
    """The program (state, None, batch)."""
    optimizer, settings = self._optimizer
    step = tokenizer_step.make_step(
      self.tokenizer, optimizer, self._loss, **settings
    )
    return programs.compiled_step(
      lambda state, nothing, batch: step(state, batch), self.mesh, self.like
    )

  @functools.cached_property
  def evaluate(self) -> rules.Jit:
    """The program (parameters, None, batch) of sums."""
    sums = tokenizer_step.make_eval_step(self.tokenizer)
    return programs.compiled_sums(
      lambda params, nothing, batch: sums(params, batch), self.mesh, self.like
    )

  def stage_of(self, step: int) -> None:
    """Return None: a tokenizer's training has no stages."""

  def work(self, stage: None) -> programs.Work:
    each = flops.tokenizer_step(self.cfg)
    return programs.Work(
      self.cfg.schedule.num_tokens, self.config.data.batch_size * each
    )
