"""The training of a transformer on a frozen tokenizer."""

import functools
from collections.abc import Mapping

import numpy as np
from etils import epath

from var_jax.api import Model, ModelConfig
from var_jax.checkpoints import weights
from var_jax.generation import sampler
from var_jax.parallel import mesh as mesh_lib
from var_jax.parallel import rules
from var_jax.training import caching, pictures, programs, warm_start
from var_jax.training.drawn_eval import Draws, DrawsConfig
from var_jax.training.state import TrainState
from var_jax.training.var_training import VARTraining


def make(
  config, mesh, source, held_out, workdir: epath.Path
) -> programs.Program:
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
  training = VARTraining.of(
    config, mesh, described.tokenizer, len(source.class_names)
  )

  def start() -> TrainState:
    if not config.init_from:
      return training.placed(training.fresh)
    there, variables = weights.read_transformer(
      config.init_from, sharding=functools.partial(rules.sharding, mesh)
    )
    params, changes = warm_start.start_var(
      variables, there.transformer, training.cfg, training.fresh_class_emb
    )
    for change in changes:
      print(f"from {config.init_from}: {change}")
    return training.placed(training.create, params)

  def prepare() -> None:
    if not copied:
      step = weights.newest(weights.tokenizer_folder(path))
      hits_SV = weights.read_code_hits(step, described.tokenizer)
      weights.write_tokenizer(workdir, described, frozen, hits_SV)

  models = sampler.Models(training.tokenizer, training.var, rules.Context(mesh))

  def params_of(state) -> sampler.ModelParams:
    return sampler.ModelParams(frozen, programs.averaged(state))

  def draw(run, state) -> Mapping[str, np.ndarray]:
    if not config.pictures:
      return {}
    return pictures.samples(models, params_of(state), config.pictures, mesh)

  draws = programs.build(DrawsConfig, config, "draws")
  if draws.count and held_out is None:
    raise ValueError(
      f"draws.count {draws.count} is for evaluations, and there are none; set "
      "eval_every."
    )
  if draws.count and min(len(held_out), config.eval_samples or 2) < 2:
    raise ValueError(
      "draws.count compares with held-out images, and one has no spread; give "
      "eval_source two or more, and eval_samples 0."
    )
  measure = None
  if draws.count:
    of_model = ModelConfig(training.tokenizer.cfg, training.var.cfg)
    try:
      measure = Draws(draws, of_model, mesh, config.data.batch_size)
    except ValueError as error:
      raise ValueError(f"config.draws: {error}") from None

  def drawn(run, state, stopped) -> Mapping[str, float] | None:
    if not measure:
      return {}
    model = Model(models, params_of(state), mesh=mesh)
    return measure(run, model, stopped)

  return programs.Program(
    description=programs.describe(
      config, source, workdir, described.tokenizer, training.cfg
    ),
    init=start,
    like=training.like,
    step=lambda state, batch, stage: training.step(stage)(state, frozen, batch),
    stage=training.stage_of,
    evaluate=lambda params, batch: training.evaluate(params, frozen, batch),
    summary=lambda means, moments: means,
    drawn=drawn,
    pictures=draw,
    prepare=prepare,
    tokenizer_checksum=lambda: caching.tokenizer_checksum(
      frozen, described.tokenizer
    ),
    held_out_loss="loss_mean",
    work=training.work,
  )
