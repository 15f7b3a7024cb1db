"""The compiled programs of a tokenizer's training, without any file.

What a config and a mesh decide. `tokenizer_program` adds weights and workdir; a
plan compiles the same for devices that are not there.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections

from var_jax.evaluation import inception
from var_jax.models import perceptual
from var_jax.models.tokenizer import Tokenizer, TokenizerConfig
from var_jax.parallel import mesh as mesh_lib
from var_jax.parallel import rules
from var_jax.training import (
  adversary,
  adversary_step,
  codes,
  flops,
  optim,
  programs,
  tokenizer_eval,
  tokenizer_step,
)
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
    cfg = programs.build(TokenizerConfig, config, "model")
    made = cls(config, mesh, programs.with_dtype(cfg, mesh))
    # What makes no sense is said before anything is written.
    made._check()
    made.like  # noqa: B018
    return made

  def _check(self) -> None:
    config, loss, against = self.config, self._loss, self._against
    collapse = self._collapse
    part = config.train_only
    if part not in optim.PARTS:
      raise ValueError(
        f"train_only {part!r} is not known; use one of "
        f"{', '.join(optim.PARTS)}."
      )
    if part != "all" and not config.init_from:
      raise ValueError(
        f"train_only {part!r} needs a trained tokenizer to start from; set "
        "init_from."
      )
    if part == "decoder" and (loss.revive_every or collapse.policy == "revive"):
      raise ValueError(
        "train_only 'decoder' keeps the codes, and they are to be revived; set "
        "loss.revive_every=0 and collapse.policy=report."
      )
    if loss.lpips_weight and not config.lpips_path:
      raise ValueError(
        f"loss.lpips_weight {loss.lpips_weight} needs weights; convert the "
        "public files of VGG16 and lpips with `var-jax convert --lpips` "
        "(docs/tokenizer.md says where they are) and set lpips_path."
      )
    side = min(self.cfg.image_shape)
    if config.lpips_path and side < perceptual.MIN_SIDE:
      raise ValueError(
        f"images of {side} pixels are too small for LPIPS, which needs "
        f"{perceptual.MIN_SIDE}; leave lpips_path empty."
      )
    if config.inception_path and not config.eval_every:
      raise ValueError(
        "inception_path is for the rFID of evaluations, and there are none; "
        "set eval_every, or leave inception_path empty."
      )
    if against and side < 2**against.cfg.layers:
      raise ValueError(
        f"adversary.layers {against.cfg.layers} halve images of {side} pixels "
        "to nothing; use fewer."
      )

  @property
  def tokenizer(self) -> Tokenizer:
    return Tokenizer(self.cfg)

  @functools.cached_property
  def _optimizer(self):
    return programs.optimizer(self.config, self.config.train_only)

  @functools.cached_property
  def _loss(self) -> tokenizer_step.TokenizerLossConfig:
    cls = tokenizer_step.TokenizerLossConfig
    return programs.build(cls, self.config, "loss")

  @functools.cached_property
  def _collapse(self) -> codes.CollapseConfig:
    return programs.build(codes.CollapseConfig, self.config, "collapse")

  @functools.cached_property
  def _against(self) -> adversary_step.Against | None:
    cfg = programs.build(adversary.AdversaryConfig, self.config, "adversary")
    optimizer = programs.build(
      optim.OptimizerConfig, self.config, "adversary_optimizer"
    )
    if not cfg.weight:
      return None
    return adversary_step.Against(
      cfg,
      adversary.make_discriminator(cfg, self.cfg.dtype),
      optim.make_optimizer(
        optimizer,
        steps=self.config.steps,
        batch_size=self.config.data.batch_size,
      ),
    )

  @functools.cached_property
  def like(self) -> TrainState:
    """The state's shapes and shardings."""
    return programs.abstract(self.fresh, self.mesh)

  def fresh(self) -> TrainState:
    """Return the state of new parameters; for jit or eval_shape."""
    key = programs.init_key(self.config)
    return self.create(tokenizer_step.init_params(self.tokenizer, key))

  def create(self, params: Any, hits_SV: Any = None) -> TrainState:
    """Return the state before the first step.

    Args:
      hits_SV: how often codes that are kept were drawn; without it, none was,
        and codes may start from data.
    """
    optimizer, _ = self._optimizer
    S, V = len(self.cfg.schedule), self.cfg.vocab_size
    against = None
    if self._against:
      key = jax.random.fold_in(programs.init_key(self.config), 1)
      against = adversary_step.init(self._against, self.tokenizer, key)
    return TrainState.create(
      params,
      optimizer,
      use_ema=self.config.ema_decay > 0,
      code_hits_SV=jnp.zeros((S, V)) if hits_SV is None else hits_SV,
      grace_V=jnp.zeros(V),
      explained_S=jnp.ones(S),
      rate=jnp.ones(()),
      adversary=against,
    )

  def placed(self, create, *args) -> TrainState:
    """Return create(*args), each device making its own part."""
    return programs.created(create, self.mesh, self.like, *args)

  @functools.cached_property
  def step(self) -> Callable[[int | None], rules.Jit]:
    """By stage, the program (state, frozen, batch), frozen as `frozen_like`."""
    return functools.cache(self._step)

  def _step(self, stage: int | None) -> rules.Jit:
    optimizer, settings = self._optimizer
    step = tokenizer_step.make_step(
      self.tokenizer,
      optimizer,
      self._loss,
      collapse=self._collapse,
      against=self._against if stage else None,
      trained=self.config.train_only,
      **settings,
    )
    return programs.compiled_step(step, self.mesh, self.like)

  @property
  def frozen_like(self) -> dict[str, Any]:
    """The shapes of what is not trained: networks that have a path."""
    where = mesh_lib.replicated(self.mesh)
    networks = {
      "lpips": (self.config.lpips_path, perceptual.shapes),
      "inception": (self.config.inception_path, inception.shapes),
    }
    return {
      network: {
        name: jax.ShapeDtypeStruct(shape, jnp.float32, sharding=where)
        for name, shape in shapes().items()
      }
      for network, (path, shapes) in networks.items()
      if path
    }

  @functools.cached_property
  def evaluate(self) -> rules.Jit:
    """The program (parameters, frozen, batch) of sums."""
    sums = tokenizer_eval.make_eval_step(
      self.tokenizer,
      with_lpips=bool(self.config.lpips_path),
      with_rfid=bool(self.config.inception_path),
    )
    return programs.compiled_sums(sums, self.mesh, self.like)

  def stage_of(self, step: int) -> int | None:
    """Return whether the discriminator plays yet, 0 or 1; None: there is none.

    A program each: in a branch of one, XLA for CPUs does not find the fast
    forms of convolutions' gradients.
    """
    against = self._against
    return int(step >= against.cfg.start) if against else None

  def work(self, stage: int | None) -> programs.Work:
    each = flops.tokenizer_step(self.cfg)
    return programs.Work(
      self.cfg.schedule.num_tokens, self.config.data.batch_size * each
    )
