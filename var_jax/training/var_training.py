"""The compiled programs of a transformer's training, without any file.

What a config, a mesh and a tokenizer's architecture decide. `var_program` adds
weights and workdir; a plan compiles the same for devices that are not there.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import ml_collections

from var_jax.models import cpu
from var_jax.models.tokenizer import Tokenizer, TokenizerConfig
from var_jax.models.transformer import VAR, VARConfig
from var_jax.parallel import attention, rules
from var_jax.parallel import mesh as mesh_lib
from var_jax.training import flops, programs, progressive, var_step
from var_jax.training.state import TrainState


def make_var(cfg: VARConfig, mesh, attention_name: str = "auto") -> VAR:
  """Return the model with what suits the mesh in training."""
  attend = attention.choose(attention_name, mesh, cfg.schedule, cfg.dtype)
  if mesh_lib.is_one_cpu(mesh):
    return VAR(cfg, attend, cpu.dot_general)
  return VAR(cfg, attend)


@dataclasses.dataclass(frozen=True, eq=False)
class VARTraining:
  """Programs of a config, each compiled when it is first used.

  Raises:
    ValueError: the config makes no sense, or does not fit the mesh.
  """

  config: ml_collections.ConfigDict
  mesh: jax.sharding.Mesh
  tokenizer: Tokenizer
  cfg: VARConfig

  @classmethod
  def of(
    cls, config, mesh, tokenizer: TokenizerConfig, num_classes: int
  ) -> "VARTraining":
    cfg = programs.build(
      VARConfig,
      config,
      "model",
      num_classes=num_classes,
      vocab_size=tokenizer.vocab_size,
      latent_channels=tokenizer.latent_channels,
      scales=tokenizer.scales,
    )
    cfg = programs.with_dtype(cfg, mesh)
    _check_fits(config, mesh, tokenizer, cfg)
    made = cls(config, mesh, Tokenizer(tokenizer), cfg)
    # What makes no sense is said before anything is written.
    made.stage_of(0), made.var, made._loss, made.like  # noqa: B018
    return made

  @functools.cached_property
  def var(self) -> VAR:
    return make_var(self.cfg, self.mesh, self.config.attention)

  @functools.cached_property
  def _optimizer(self):
    return programs.optimizer(self.config)

  @functools.cached_property
  def _loss(self) -> var_step.VARLossConfig:
    return programs.build(var_step.VARLossConfig, self.config, "loss")

  @functools.cached_property
  def _growth(self):
    config = self.config
    growth = programs.build(
      progressive.ProgressiveConfig, config, "progressive"
    )
    warmup = round(config.optimizer.warmup_fraction * config.steps)
    return growth, (config.steps, warmup, len(self.cfg.schedule))

  @functools.cached_property
  def like(self) -> TrainState:
    """The state's shapes and shardings."""
    return programs.abstract(self.fresh, self.mesh)

  def fresh(self) -> TrainState:
    """Return the state of new parameters; for jit or eval_shape."""
    # The plain one: a batch of one, as they are made with, is not split.
    key = programs.init_key(self.config)
    return self.create(var_step.init_params(VAR(self.cfg), key))

  def fresh_class_emb(self) -> jax.Array:
    key = programs.init_key(self.config)
    return var_step.init_class_emb(VAR(self.cfg), key)

  def create(self, params: Any) -> TrainState:
    """Return the state before the first step."""
    optimizer, _ = self._optimizer
    use_ema = self.config.ema_decay > 0
    return TrainState.create(params, optimizer, use_ema=use_ema)

  def placed(self, create, *args) -> TrainState:
    """Return create(*args), each device making its own part."""
    return programs.created(create, self.mesh, self.like, *args)

  def stage_of(self, step: int) -> int | None:
    """Return the stage of progressive training; None trains all scales."""
    growth, when = self._growth
    return progressive.stage(growth, step, *when) if growth.until else None

  @functools.cached_property
  def step(self) -> Callable[[int | None], rules.Jit]:
    """By stage, the program (state, tokenizer variables, batch)."""
    return functools.cache(self._step)

  def _step(self, stage: int | None) -> rules.Jit:
    growth, when = self._growth
    optimizer, settings = self._optimizer
    weight = None
    if stage is not None:
      weight = lambda step: progressive.newest_scale_weight(  # noqa: E731
        growth, step, stage, *when
      )
    step = var_step.make_step(
      self.var,
      self.tokenizer,
      optimizer,
      self._loss,
      stage=stage,
      newest_weight=weight,
      **settings,
    )
    return programs.compiled_step(step, self.mesh, self.like)

  @functools.cached_property
  def evaluate(self) -> rules.Jit:
    """The program (parameters, tokenizer variables, batch) of sums."""
    sums = var_step.make_eval_step(self.var, self.tokenizer)
    return programs.compiled_sums(sums, self.mesh, self.like)

  def work(self, stage: int | None) -> programs.Work:
    finest = len(self.cfg.schedule) - 1 if stage is None else stage
    tokens = self.cfg.schedule.end(finest)
    cached = self.config.data.token_cache
    encoded = None if cached else self.tokenizer.cfg
    each = flops.var_step(self.cfg, encoded, tokens)
    return programs.Work(tokens, self.config.data.batch_size * each)


def _check_fits(config, mesh, tokenizer: TokenizerConfig, cfg: VARConfig):
  """Raise ValueError unless the images are as asked and the heads divide."""
  size = config.data.image_size
  if size and tokenizer.image_shape != (size, size):
    raise ValueError(
      f"data.image_size {size} is not that of the tokenizer, "
      f"{tokenizer.image_shape}; use another tokenizer, or data.image_size=0."
    )
  model = mesh.shape["model"]
  if cfg.heads % model:
    raise ValueError(
      f"{cfg.heads} heads do not split over model={model}; use a divisor."
    )
