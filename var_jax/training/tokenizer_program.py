"""The training of a tokenizer."""

from collections.abc import Mapping

import jax.numpy as jnp
import numpy as np
from etils import epath

from var_jax.checkpoints import weights
from var_jax.data import pipeline
from var_jax.models.tokenizer import Tokenizer, TokenizerConfig
from var_jax.parallel import mesh as mesh_lib
from var_jax.training import (
  flops,
  pictures,
  programs,
  tokenizer_step,
  warm_start,
)
from var_jax.training.state import TrainState


def make(config, mesh, source, workdir: epath.Path) -> programs.Program:
  """Return the program of a config."""
  cfg = programs.build(TokenizerConfig, config.model)
  cfg = programs.with_dtype(cfg, mesh)
  tokenizer = Tokenizer(cfg)
  optimizer, settings = programs.optimizer(config)
  step = tokenizer_step.make_step(
    tokenizer,
    optimizer,
    programs.build(tokenizer_step.TokenizerLossConfig, config.loss),
    **settings,
  )

  def create(params) -> TrainState:
    hits_SV = jnp.zeros((len(cfg.schedule), cfg.vocab_size))
    return TrainState.create(
      params, optimizer, use_ema=config.ema_decay > 0, code_hits_SV=hits_SV
    )

  def fresh() -> TrainState:
    key = programs.init_key(config)
    return create(tokenizer_step.init_params(tokenizer, key))

  like = programs.abstract(fresh, mesh)
  take = programs.compiled_step(
    lambda state, nothing, batch: step(state, batch), mesh, like
  )
  sums = tokenizer_step.make_eval_step(tokenizer)
  evaluate = programs.compiled_sums(
    lambda params, nothing, batch: sums(params, batch), mesh, like
  )

  def start() -> TrainState:
    if not config.init_from:
      return programs.created(fresh, mesh, like)
    described, variables = weights.read_tokenizer(
      config.init_from, sharding=mesh_lib.replicated(mesh)
    )
    params = warm_start.start_tokenizer(variables, described.tokenizer, cfg)
    return programs.created(create, mesh, like, params)

  def draw(run, state) -> Mapping[str, np.ndarray]:
    n = min(config.pictures, len(run.held_out))
    if not n:
      return {}
    batches = pipeline.evaluation_batches(
      run.held_out,
      run.plain,
      batch_size=n,
      limit=n,
      on_broken=config.data.on_broken,
    )
    return pictures.reconstructions(
      tokenizer, programs.averaged(state), next(batches)["image"], mesh
    )

  return programs.Program(
    description=programs.describe(config, source, workdir, cfg, None),
    init=start,
    like=like,
    step=lambda state, batch, stage: take(state, None, batch),
    stage=lambda step: None,
    evaluate=lambda params, batch: evaluate(params, None, batch),
    pictures=draw,
    prepare=lambda: None,
    tokenizer_checksum=lambda: "",
    held_out_loss="l2",
    work=lambda stage: programs.Work(
      cfg.schedule.num_tokens,
      config.data.batch_size * flops.tokenizer_step(cfg),
    ),
  )
