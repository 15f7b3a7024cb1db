"""The training loop: resume, step, log, save. One loop for both models.

Step k is a pure function of (config, seed, k): it takes sample positions
kB .. kB+B-1, and every random choice follows from the seed and a position or
a step. So a run that was interrupted ends where it would have ended.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from etils import epath

from var_jax.checkpoints import store, weights
from var_jax.checkpoints.description import Description
from var_jax.data import pipeline, sources, transforms
from var_jax.models.layers import resolve_dtype
from var_jax.models.tokenizer import Tokenizer, TokenizerConfig
from var_jax.models.transformer import VAR, VARConfig
from var_jax.training import checks, optim, tokenizer_step, var_step, warm_start
from var_jax.training.report import Report
from var_jax.training.state import TrainState


class Program(NamedTuple):
  """What the loop needs to know of the thing it trains."""

  description: Description
  init: Callable[[], TrainState]  # of a new run, warm or not
  like: Callable[[], TrainState]  # the same shapes, for eval_shape
  step: Callable[[TrainState, Mapping], tuple[TrainState, Mapping]]
  prepare: Callable[[], None]  # writes what a new workdir needs


def train(config: ml_collections.ConfigDict, workdir: epath.PathLike) -> None:
  """Train what `config` describes, from the newest checkpoint if there is one.

  Args:
    config: as `configs/var.py` or `configs/tokenizer.py` returns it.
    workdir: created if missing; `checkpoints/store.py` shows its layout.

  Raises:
    ValueError: the config makes no sense, or differs from the workdir's.
  """
  workdir = epath.Path(workdir).absolute()
  checks.check_config(config)
  checks.check_workdir(config, workdir)
  source = sources.open_source(config.data.source, "train")
  if config.kind == "tokenizer":
    program = tokenizer_program(config, source)
  else:
    program = var_program(config, source, workdir)
  transform = transforms.make_transform(
    config.data.transform,
    program.description.tokenizer.image_shape,
    train=True,
    flip=config.data.flip,
  )
  transform(source[0]["image"], np.random.default_rng(0))  # can be read
  start = store.latest_step(workdir) or 0
  state = None if start else program.init()  # reads init_from
  if not (workdir / "config.json").exists():  # the last file of a new workdir
    program.prepare()
    description = dataclasses.replace(
      program.description, origin=_origin(config, source)
    )
    description.write(workdir)
  checkpoints = store.Store(workdir, config.keep_checkpoints)
  try:
    if start >= config.steps:
      print(f"{workdir} is already at step {start} of {config.steps}")
      return
    if start:
      state = _restore(checkpoints, start, program, config.data.batch_size)
    batches = pipeline.training_batches(
      source,
      transform,
      batch_size=config.data.batch_size,
      seed=config.seed,
      start_step=start,
    )
    _run(config, workdir, program, checkpoints, state, start, batches)
  finally:
    checkpoints.close()


def tokenizer_program(config, source) -> Program:
  """Return the training of a tokenizer."""
  cfg = _build(TokenizerConfig, config.model)
  cfg = _with_dtype(cfg)
  tokenizer = Tokenizer(cfg)
  optimizer = _optimizer(config)
  step = tokenizer_step.make_step(
    tokenizer,
    optimizer,
    _build(tokenizer_step.TokenizerLossConfig, config.loss),
    ema_decay=config.ema_decay,
    seed=config.seed,
  )

  def fresh() -> Any:
    return tokenizer_step.init_params(tokenizer, _init_key(config))

  def start() -> Any:
    if not config.init_from:
      return fresh()
    described, variables = weights.read_tokenizer(config.init_from)
    return warm_start.start_tokenizer(variables, described.tokenizer, cfg)

  def create(params) -> TrainState:
    hits_SV = jnp.zeros((len(cfg.schedule), cfg.vocab_size))
    return TrainState.create(
      params, optimizer, use_ema=config.ema_decay > 0, code_hits_SV=hits_SV
    )

  description = Description(
    cfg, None, source.class_names, checks.to_json(config)
  )
  return Program(
    description,
    lambda: create(start()),
    lambda: create(fresh()),
    jax.jit(step, donate_argnums=0),
    lambda: None,
  )


def var_program(config, source, workdir: epath.Path) -> Program:
  """Return the training of a transformer on a frozen tokenizer.

  The tokenizer is read from config.tokenizer_path once, or is that of
  config.init_from, and copied into the workdir, which then stands alone.
  """
  # Without config.json the copy may be one that an interrupted start left.
  copied = (workdir / "config.json").exists()
  path = config.tokenizer_path or config.init_from
  path = workdir / "tokenizer" if copied else path
  if not path:
    raise ValueError(
      "tokenizer_path is empty; set config.tokenizer_path to the workdir of a "
      "trained tokenizer."
    )
  described, tokenizer_params = weights.read_tokenizer(path)
  tokenizer = Tokenizer(described.tokenizer)
  cfg = _build(
    VARConfig,
    config.model,
    num_classes=len(source.class_names),
    vocab_size=tokenizer.cfg.vocab_size,
    latent_channels=tokenizer.cfg.latent_channels,
    scales=tokenizer.cfg.scales,
  )
  var = VAR(_with_dtype(cfg))
  optimizer = _optimizer(config)
  step = var_step.make_step(
    var,
    tokenizer,
    optimizer,
    _build(var_step.VARLossConfig, config.loss),
    ema_decay=config.ema_decay,
    seed=config.seed,
  )
  jitted = jax.jit(step, donate_argnums=0)

  def fresh() -> Any:
    return var_step.init_params(var, _init_key(config))

  def start() -> Any:
    if not config.init_from:
      return fresh()
    there, variables = weights.read_transformer(config.init_from)
    params, changes = warm_start.start_var(
      variables,
      there.transformer,
      var.cfg,
      lambda: var_step.init_class_emb(var, _init_key(config)),
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
      weights.write_tokenizer(workdir, described, tokenizer_params, hits_SV)

  description = Description(
    tokenizer.cfg, var.cfg, source.class_names, checks.to_json(config)
  )
  return Program(
    description,
    lambda: create(start()),
    lambda: create(fresh()),
    lambda state, batch: jitted(state, tokenizer_params, batch),
    prepare,
  )


def _origin(config, source) -> dict[str, Any]:
  """Return what the model card says of how the weights were made."""
  made_by = (
    f"Trained by `var-jax train` on `{config.data.source}`, {len(source)} "
    f"images, for {config.steps} steps of {config.data.batch_size}."
  )
  if not config.init_from:
    return {"made_by": made_by}
  licence = Description.read(config.init_from).origin.get("licence")
  made_by += f" It started from the weights in `{config.init_from}`."
  return {"made_by": made_by, "licence": licence}


def _init_key(config) -> jax.Array:
  # rbg: a hundred draws of the default generator take a minute to compile.
  return jax.random.key(config.seed, impl="rbg")


def _run(config, workdir, program, checkpoints, state, start, batches):
  """Take the steps start + 1 .. config.steps."""
  steps, batch_size = config.steps, config.data.batch_size
  report = Report(workdir, start, steps, batch_size)
  pending = None
  try:
    ahead = _to_device(next(batches))
    for step in range(start + 1, steps + 1):
      state, metrics = program.step(state, ahead)
      # While the device works: the next batch, and the metrics of the step
      # before. It never waits for the host.
      if step < steps:
        ahead = _to_device(next(batches))
      if pending:
        report.write(*pending)
      last = step == steps
      pending = (
        (step, metrics) if step % config.log_every == 0 or last else None
      )
      report.advance(step)
      if step % config.checkpoint_every == 0 or last:
        # Logged first: a run that resumes here will not log this step again.
        if pending:
          report.write(*pending)
          pending = None
        checkpoints.save(step, _trees(state), position=step * batch_size)
  finally:
    report.close()
    batches.close()


def _to_device(batch: Mapping[str, np.ndarray]):
  # Keys are folded with 32 bits; a run sees fewer than 2^32 samples.
  position_B = batch["position"].astype(np.uint32)
  return jax.device_put({**batch, "position": position_B})


def _trees(state: TrainState) -> dict[str, Any]:
  training = {
    "opt_state": state.opt_state,
    "step": state.step,
    "code_hits_SV": state.code_hits_SV,
  }
  return {"params": state.params, "ema": state.ema, "training": training}


def _restore(checkpoints, step: int, program, batch_size: int) -> TrainState:
  """Return the state of `step`, without a fresh one beside it."""
  device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
  like = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device),
    jax.eval_shape(program.like),
  )
  trees, position = checkpoints.restore(step, _trees(like))
  assert position == step * batch_size
  training = trees["training"]
  return like.replace(params=trees["params"], ema=trees["ema"], **training)


def _optimizer(config):
  cfg = _build(optim.OptimizerConfig, config.optimizer)
  return optim.make_optimizer(
    cfg, steps=config.steps, batch_size=config.data.batch_size
  )


def _with_dtype(cfg):
  return type(cfg)(**{**vars(cfg), "dtype": resolve_dtype(cfg.dtype)})


def _build(cls, section: ml_collections.ConfigDict, **derived):
  """Return the dataclass of a config section and what follows from others."""
  try:
    return cls(**section, **derived)
  except TypeError as error:
    raise ValueError(
      f"{cls.__name__} cannot be built from the config ({error}); compare with "
      "the presets in configs/."
    ) from None
