"""The training of a transformer on a frozen tokenizer."""

import functools
from collections.abc import Mapping
from typing import Any

import numpy as np
from etils import epath

from var_jax.checkpoints import weights
from var_jax.generation import sampler
from var_jax.models.tokenizer import Tokenizer
from var_jax.models.transformer import VAR, VARConfig
from var_jax.parallel import mesh as mesh_lib
from var_jax.training import (
  caching,
  flops,
  pictures,
  programs,
  progressive,
  var_step,
  warm_start,
)
from var_jax.training.state import TrainState


def make(config, mesh, source, workdir: epath.Path) -> programs.Program:
  """Return the program of a config.

  The tokenizer is read from config.tokenizer_path once, or is that of
  config.init_from, and copied into the workdir, which then stands alone.
  """
  # Without config.json the copy may be one that an interrupted start left.
  copied = (workdir / "config.json").exists()
  path = config.tokenizer_path or config.init_from
  path = weights.tokenizer_folder(workdir) if copied else path
  if not path:
    raise ValueError(
      "tokenizer_path is empty; set config.tokenizer_path to the workdir of a "
      "trained tokenizer."
    )
  described, frozen = weights.read_tokenizer(
    path, sharding=mesh_lib.replicated(mesh)
  )
  tokenizer = Tokenizer(described.tokenizer)
  cfg = programs.build(
    VARConfig,
    config.model,
    num_classes=len(source.class_names),
    vocab_size=tokenizer.cfg.vocab_size,
    latent_channels=tokenizer.cfg.latent_channels,
    scales=tokenizer.cfg.scales,
  )
  var = VAR(programs.with_dtype(cfg))
  optimizer, settings = programs.optimizer(config)
  growth = programs.build(progressive.ProgressiveConfig, config.progressive)
  make_step = functools.partial(
    var_step.make_step,
    var,
    tokenizer,
    optimizer,
    programs.build(var_step.VARLossConfig, config.loss),
    **settings,
  )

  growing = (
    config.steps,
    round(config.optimizer.warmup_fraction * config.steps),
    len(cfg.schedule),
  )

  if growth.until:
    progressive.stage(growth, 0, *growing)  # there is such a first scale

  @functools.cache  # each stage has shapes of its own: a program each
  def take(stage: int | None):
    weight = None
    if stage is not None:
      weight = lambda step: progressive.newest_scale_weight(  # noqa: E731
        growth, step, stage, *growing
      )
    return programs.compiled_step(
      make_step(stage=stage, newest_weight=weight), mesh
    )

  def stage_of(step: int) -> int | None:
    if growth.until:
      return progressive.stage(growth, step, *growing)
    return None

  def fresh() -> Any:
    return var_step.init_params(var, programs.init_key(config))

  def start() -> Any:
    if not config.init_from:
      return fresh()
    there, variables = weights.read_transformer(config.init_from)
    params, changes = warm_start.start_var(
      variables,
      there.transformer,
      var.cfg,
      lambda: var_step.init_class_emb(var, programs.init_key(config)),
    )
    for change in changes:
      print(f"from {config.init_from}: {change}")
    return params

  def create(params) -> TrainState:
    return TrainState.create(params, optimizer, use_ema=config.ema_decay > 0)

  def prepare() -> None:
    if not copied:
      step = weights.newest(weights.tokenizer_folder(path))
      hits_SV = weights.read_code_hits(step, described.tokenizer)
      weights.write_tokenizer(workdir, described, frozen, hits_SV)

  def draw(run, state) -> Mapping[str, np.ndarray]:
    if not config.pictures:
      return {}
    models = sampler.Models(tokenizer, var)
    params = sampler.ModelParams(frozen, programs.averaged(state))
    return pictures.samples(models, params, config.pictures)

  evaluate = programs.compiled_sums(
    lambda both, batch: var_step.make_eval_step(var, tokenizer)(*both, batch),
    mesh,
  )

  def work(stage: int | None) -> programs.Work:
    finest = len(cfg.schedule) - 1 if stage is None else stage
    tokens = cfg.schedule.end(finest)
    encoded = None if config.data.token_cache else tokenizer.cfg
    each = flops.var_step(cfg, encoded, tokens)
    return programs.Work(tokens, config.data.batch_size * each)

  return programs.Program(
    description=programs.describe(
      config, source, workdir, tokenizer.cfg, var.cfg
    ),
    init=lambda: create(start()),
    like=lambda: create(fresh()),
    step=lambda state, batch, stage: take(stage)(state, frozen, batch),
    stage=stage_of,
    evaluate=lambda params, batch: evaluate((params, frozen), batch),
    pictures=draw,
    prepare=prepare,
    tokenizer_checksum=lambda: caching.tokenizer_checksum(
      frozen, tokenizer.cfg
    ),
    held_out_loss="loss_mean",
    work=work,
  )
