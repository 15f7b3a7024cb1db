"""What every training config has, and sections that follow dataclasses."""

import dataclasses

import ml_collections
from ml_collections import config_dict

from var_jax.parallel.mesh import MeshConfig
from var_jax.training.adversary import AdversaryConfig
from var_jax.training.codes import CollapseConfig
from var_jax.training.drawn_eval import DrawsConfig
from var_jax.training.guard import GuardConfig
from var_jax.training.optim import OptimizerConfig
from var_jax.training.progressive import ProgressiveConfig


def run_config(kind: str) -> ml_collections.ConfigDict:
  """Return the settings that both kinds of training share.

  `model`, `loss` and `optimizer` are the caller's to add.
  """
  config = ml_collections.ConfigDict()
  config.kind = kind
  config.seed = 0
  config.steps = 0
  config.init_from = ""  # a workdir to start from
  config.ema_decay = 0.0  # of an average of the weights; 0 is off
  config.accumulate = 1  # parts that a batch is taken in, one after another

  config.data = ml_collections.ConfigDict()
  config.data.source = ""
  config.data.eval_source = ""  # the source's own val split, unless said
  config.data.batch_size = 0
  config.data.transform = "crop"  # crop | jitter | resize
  config.data.flip = False
  config.data.workers = 0  # processes that read images; 0 reads in threads
  config.data.on_broken = "fail"  # or skip: take the next image instead

  config.mesh = section(MeshConfig)
  config.guard = section(GuardConfig)

  config.log_every = 50
  config.ledger_every = 100  # steps between checksums of the parameters
  config.eval_every = 0  # steps; 0 never evaluates
  config.eval_samples = 0  # the first ones of the held-out split; 0 takes all
  config.pictures = 8  # columns of the pictures that an evaluation draws
  config.checkpoint_every = 2000
  config.keep_checkpoints = 2  # the newest ones
  config.keep_best = 0  # those of the lowest held-out loss
  config.keep_every = 0  # steps; 0 keeps no others
  if kind == "tokenizer":
    config.train_only = "all"  # or decoder, quantizer: to fine-tune a part
    config.lpips_path = ""  # what `var-jax convert --lpips` wrote
    config.inception_path = ""  # and --inception: evaluations measure rFID
    config.collapse = section(CollapseConfig)
    config.adversary = section(AdversaryConfig)
    config.adversary_optimizer = section(
      OptimizerConfig, b1=0.5, b2=0.9, weight_decay=0.0
    )
  if kind == "var":
    config.attention = "auto"  # or plain, splash (TPU), cudnn (GPU), cpu
    config.tokenizer_path = ""  # the workdir of a trained tokenizer
    config.data.image_size = 0  # pixels; 0 is that of any tokenizer
    config.data.token_cache = ""  # a folder; train from the tokens in it
    config.data.cache_crops = 1  # an image, of a cache that is written
    config.progressive = section(ProgressiveConfig)
    config.draws = section(DrawsConfig)
  return config


def section(cls, *, without: tuple[str, ...] = (), **values):
  """Return a ConfigDict of all fields of a dataclass, `values` over defaults.

  So every hyper-parameter can be set from the command line.

  Args:
    without: fields that follow from other settings.
  """
  defaults = {
    field.name: field.default
    for field in dataclasses.fields(cls)
    if field.name not in without
  }
  optional = {name for name, value in defaults.items() if value is None}
  config = ml_collections.ConfigDict(
    {**defaults, **{name: config_dict.placeholder(float) for name in optional}}
  )
  config.update(values)
  return config
