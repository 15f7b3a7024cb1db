"""The training of a tokenizer."""

from collections.abc import Mapping

import jax
import numpy as np
from etils import epath

from var_jax.checkpoints import lpips, weights
from var_jax.data import pipeline
from var_jax.evaluation import inception, inception_weights
from var_jax.models.tokenizer import TokenizerConfig
from var_jax.parallel import mesh as mesh_lib
from var_jax.training import pictures, programs, tokenizer_eval, warm_start
from var_jax.training.state import TrainState
from var_jax.training.tokenizer_training import TokenizerTraining

# Below, the data cannot fill a codebook.
_TOKENS_A_CODE = 10


def make(
  config, mesh, source, held_out, workdir: epath.Path
) -> programs.Program:
  """Return the program of a config."""
  training = TokenizerTraining.of(config, mesh)
  networks = {
    "lpips": (config.lpips_path, lpips.read),
    "inception": (config.inception_path, inception_weights.read),
  }
  frozen = {
    name: jax.device_put(read(path), mesh_lib.replicated(mesh))
    for name, (path, read) in networks.items()
    if path
  }

  def start() -> TrainState:
    for remark in remarks(training.cfg, source):
      print(remark)
    if config.inception_path:
      images = min(len(held_out), config.eval_samples or len(held_out))
      if images < inception.POOLED:
        print(
          f"warning: rFID of {images} images, fewer than the "
          f"{inception.POOLED} dimensions of its features, is biased upwards; "
          "compare it with that of as many only"
        )
    if not config.init_from:
      return training.placed(training.fresh)
    described, variables = weights.read_tokenizer(
      config.init_from, sharding=mesh_lib.replicated(mesh)
    )
    params = warm_start.start_tokenizer(
      variables, described.tokenizer, training.cfg
    )
    # As if all codes were drawn alike, until this run has counted.
    shape = (len(training.cfg.schedule), training.cfg.vocab_size)
    return training.placed(training.create, params, np.ones(shape, np.float32))

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
    step=lambda state, batch, stage: training.step(stage)(state, frozen, batch),
    stage=training.stage_of,
    evaluate=lambda params, batch: training.evaluate(params, frozen, batch),
    summary=tokenizer_eval.summary,
    drawn=lambda run, state, stopped: {},
    pictures=draw,
    prepare=lambda: None,
    tokenizer_checksum=lambda: "",
    held_out_loss="l2",
    work=training.work,
  )


def remarks(cfg: TokenizerConfig, source) -> list[str]:
  """Return a line on each thing about the data that one may not expect."""
  lines = []
  if getattr(source, "grey", False):
    lines.append(
      "the images are grey; each is given three equal channels, and so are "
      "the pictures that come back"
    )
  tokens = len(source) * cfg.schedule.num_tokens
  if tokens < _TOKENS_A_CODE * cfg.vocab_size:
    lines.append(
      f"warning: {len(source)} images have {tokens} tokens, "
      f"{tokens / cfg.vocab_size:.1f} for each of {cfg.vocab_size} codes, so "
      "many codes will stay unused; use a vocab_size of "
      f"{max(tokens // _TOKENS_A_CODE, 1)} or less"
    )
  return lines
