"""The training of a tokenizer."""

from collections.abc import Mapping

import jax
import numpy as np
from etils import epath

from var_jax.checkpoints import lpips, weights
from var_jax.data import pipeline
from var_jax.parallel import mesh as mesh_lib
from var_jax.training import pictures, programs, tokenizer_eval, warm_start
from var_jax.training.state import TrainState
from var_jax.training.tokenizer_training import TokenizerTraining


def make(config, mesh, source, workdir: epath.Path) -> programs.Program:
  """Return the program of a config."""
  training = TokenizerTraining.of(config, mesh)
  frozen = {}
  if config.lpips_path:
    where = mesh_lib.replicated(mesh)
    frozen["lpips"] = jax.device_put(lpips.read(config.lpips_path), where)

  def start() -> TrainState:
    if not config.init_from:
      return training.placed(training.fresh)
    described, variables = weights.read_tokenizer(
      config.init_from, sharding=mesh_lib.replicated(mesh)
    )
    params = warm_start.start_tokenizer(
      variables, described.tokenizer, training.cfg
    )
    return training.placed(training.create, params)

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
      training.tokenizer,
      programs.averaged(state),
      next(batches)["image"],
      mesh,
    )

  return programs.Program(
    description=programs.describe(config, source, workdir, training.cfg, None),
    init=start,
    like=training.like,
    step=lambda state, batch, stage: training.step(state, frozen, batch),
    stage=training.stage_of,
    evaluate=lambda params, batch: training.evaluate(params, frozen, batch),
    summary=tokenizer_eval.summary,
    pictures=draw,
    prepare=lambda: None,
    tokenizer_checksum=lambda: "",
    held_out_loss="l2",
    work=training.work,
  )
