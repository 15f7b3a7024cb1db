"""Sampling and a training step beside PyTorch, turn by turn in one run.

    python benchmarks/against_torch.py sample --depth 16 --batch 1 --turns 7
    python benchmarks/against_torch.py train --depth 8 --batch 4 --turns 3

Random weights of the released sizes in float32 on CPU, all cores for both;
compile time apart. `sample` takes the transformer with the decoder, as users
call it, and both alone; `train` takes a step from images, and one from cached
tokens. The PyTorch side is eager: `torch_sampler.py`, and the reference of the
tests under AdamW. Prints a JSON line: medians, all seconds, and ratios of ours
to theirs, from cached tokens to theirs from images.
"""

import argparse
import dataclasses
import json
import os
import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np
import token_cache
import torch
import torch.nn.functional as F
import torch_sampler
from torch_sampler import torch_reference

from var_jax import compile_cache, loading
from var_jax.bench import sampling
from var_jax.generation import sampler
from var_jax.generation.sampler import Models
from var_jax.models import cpu
from var_jax.models.scales import SCALES
from var_jax.models.tokenizer import Tokenizer, TokenizerConfig
from var_jax.models.transformer import VAR, VARConfig
from var_jax.training import optim, tokenizer_step, var_step
from var_jax.training.state import TrainState


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("what", choices=("sample", "train"))
  parser.add_argument("--depth", type=int, default=16)
  parser.add_argument("--batch", type=int, default=1)
  parser.add_argument("--turns", type=int, default=5)
  args = parser.parse_args()
  compile_cache.enable()
  torch.set_num_threads(os.cpu_count())
  cfg = VARConfig.official(args.depth, dtype="float32")
  tokenizer_cfg = TokenizerConfig(scales=SCALES[256])
  make = {"sample": samplers, "train": steps}[args.what]
  asked = make(tokenizer_cfg, cfg, args.batch)
  times = in_turns(asked.calls, args.turns)
  median = {name: statistics.median(values) for name, values in times.items()}
  record = {
    "what": args.what,
    "depth": args.depth,
    "batch": args.batch,
    "jax": jax.__version__,
    "torch": torch.__version__,
    "median_s": median,
    "ratios": {
      name: median[f"ours, {name}"] / median[f"torch, {beside}"]
      for name, beside in asked.ratios.items()
    },
    "all_s": times,
  }
  print(json.dumps(record))


class Asked(NamedTuple):
  """Calls by name, and for each of ours the name of theirs beside it."""

  calls: dict[str, Callable[[], object]]
  ratios: dict[str, str]


def in_turns(calls, turns: int) -> dict[str, list[float]]:
  """Return the seconds of each call, after one that warms up."""
  for call in calls.values():
    call()
  times = {name: [] for name in calls}
  for _ in range(turns):
    for name, call in calls.items():
      begin = time.perf_counter()
      call()
      times[name].append(time.perf_counter() - begin)
  return times


def samplers(tokenizer_cfg, cfg, batch: int) -> Asked:
  models = Models(
    Tokenizer(tokenizer_cfg),
    loading.sampling_var(cfg),
    decode_rows=loading.decode_rows(tokenizer_cfg),
  )
  params = sampling.random_params(models)
  labels = np.arange(batch)
  keys_B = sampler.image_keys(jax.random.key(0), batch)
  options = sampler.Options(
    np.float32(1.5), np.int32(900), np.float32(0.96), np.float32(1.0)
  )
  theirs = torch_sampler.Sampler(tokenizer_cfg, cfg, "cpu", "float32")

  f_hat_shape = (batch, *cfg.schedule.grid, cfg.latent_channels)
  f_hat_BhwZ = jax.random.normal(jax.random.key(1), f_hat_shape)
  f_hat_BZhw = torch.tensor(np.array(f_hat_BhwZ)).permute(0, 3, 1, 2)
  labels_B = torch.tensor(labels)

  def transformer():
    drawn = sampler.draw_scales(models, params, labels, keys_B, options)
    return [scale.tokens_Bl for scale in drawn]

  ours = {
    "image": lambda: sampler.generate(models, params, labels, keys_B, options),
    "transformer": transformer,
    "decoder": lambda: sampler.decode(models, params, f_hat_BhwZ),
  }
  calls = {
    "torch, image": lambda: theirs.sample(labels_B),
    "torch, transformer": lambda: theirs.sample(labels_B, decode=False),
    "torch, decoder": lambda: theirs.decode(f_hat_BZhw.contiguous()),
  }
  for name, call in ours.items():
    calls[f"ours, {name}"] = lambda call=call: jax.block_until_ready(call())
  return Asked(calls, {name: name for name in ours})


def steps(tokenizer_cfg, cfg, batch: int) -> Asked:
  cfg = dataclasses.replace(cfg, drop_path=0.0)  # the reference has none
  batches = token_cache.synthetic(batch, tokenizer_cfg)
  images_BHW3, labels_B = (batches["images"][k] for k in ("image", "label"))
  var, tokenizer = VAR(cfg), Tokenizer(tokenizer_cfg)
  key = jax.random.key(0, impl="rbg")  # quick to compile
  frozen = tokenizer_step.init_params(tokenizer, key)
  optimizer = optim.make_optimizer(
    optim.OptimizerConfig(), steps=1000, batch_size=batch
  )
  step = var_step.make_step(
    var, tokenizer, optimizer, var_step.VARLossConfig(), ema_decay=0.0, seed=0
  )
  step = jax.jit(
    step, donate_argnums=0, compiler_options=cpu.compiler_options()
  )
  params = var_step.init_params(var, key)
  held = [TrainState.create(params, optimizer, use_ema=False)]

  def take(name):
    held[0], _ = jax.block_until_ready(step(held[0], frozen, batches[name]))

  calls = {
    "ours, images": lambda: take("images"),
    "ours, tokens": lambda: take("tokens"),
    "torch, images": torch_step(tokenizer_cfg, cfg, images_BHW3, labels_B),
  }
  return Asked(calls, {"images": "images", "tokens": "images"})


def torch_step(tokenizer_cfg, cfg, images_BHW3, labels_B):
  torch.manual_seed(0)
  tokenizer = torch_reference.Tokenizer(tokenizer_cfg).eval()
  var = torch_reference.VAR(cfg)
  optimizer = torch.optim.AdamW(
    var.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.05
  )
  image_BHW3 = torch.tensor(np.array(images_BHW3, np.float32)) / 127.5 - 1
  image_B3HW = image_BHW3.permute(0, 3, 1, 2).contiguous()
  labels_B = torch.tensor(np.array(labels_B)).long()

  def take():
    with torch.no_grad():
      tokens_BL = tokenizer.encode(image_B3HW)
      inputs_BLZ = tokenizer.inputs(tokens_BL)
    logits_BLV = var(labels_B, inputs_BLZ)
    loss = F.cross_entropy(logits_BLV.flatten(0, 1), tokens_BL.flatten())
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(var.parameters(), 2.0)
    optimizer.step()
    return loss.item()

  return take


if __name__ == "__main__":
  main()
