"""Sampling and a training step beside PyTorch, turn by turn in one run.

    python benchmarks/against_torch.py sample --depth 16 --batch 1 --turns 7
    python benchmarks/against_torch.py train --depth 8 --batch 4 --turns 3

Random weights of the released sizes in float32 on CPU, all cores for both;
compile time apart. Each side has a process of its own, which waits while the
other works. `sample` takes the transformer with the decoder, as users call it,
and both alone; `train` takes a step from images, and one from cached tokens.
The PyTorch side is eager: `torch_sampler.py`, and the reference of the tests
under AdamW. Prints a JSON line: medians, all seconds, and ratios of ours to
theirs, from cached tokens to theirs from images.
"""

import argparse
import dataclasses
import functools
import json
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable
from importlib import metadata

import jax
import numpy as np
import token_cache

from var_jax import compile_cache, loading
from var_jax.bench import sampling
from var_jax.generation import sampler
from var_jax.generation.sampler import Models
from var_jax.models import cpu
from var_jax.models.scales import SCALES
from var_jax.models.tokenizer import Tokenizer, TokenizerConfig
from var_jax.models.transformer import VARConfig
from var_jax.parallel import mesh
from var_jax.training import optim, tokenizer_step, var_step, var_training
from var_jax.training.state import TrainState

_SAME_PARTS = {name: name for name in ("image", "transformer", "decoder")}


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("what", choices=("sample", "train"))
  parser.add_argument("--depth", type=int, default=16)
  parser.add_argument("--batch", type=int, default=1)
  parser.add_argument("--turns", type=int, default=5)
  args = parser.parse_args()
  ours, theirs, beside = {
    "sample": (our_samplers, torch_samplers, _SAME_PARTS),
    "train": (our_steps, torch_steps, {"images": "images", "tokens": "images"}),
  }[args.what]
  with Side(ours, args) as us, Side(theirs, args) as them:
    times = in_turns({"ours": us, "torch": them}, args.turns)
  median = {name: statistics.median(values) for name, values in times.items()}
  record = {
    "what": args.what,
    "depth": args.depth,
    "batch": args.batch,
    "versions": {of: metadata.version(of) for of in ("jax", "torch")},
    "median_s": median,
    "ratios": {
      one: median[f"ours, {one}"] / median[f"torch, {other}"]
      for one, other in beside.items()
    },
    "all_s": times,
  }
  print(json.dumps(record))


class Side:
  """A process that has calls by name and takes the time of one when asked."""

  def __init__(self, make: Callable[..., dict], args):
    context = multiprocessing.get_context("spawn")
    self.pipe, self.there = context.Pipe()
    self.process = context.Process(target=_serve, args=(self.there, make, args))

  def __enter__(self) -> "Side":
    self.process.start()
    self.there.close()  # else its end would not be noticed
    self.names = self.pipe.recv()
    return self

  def __exit__(self, *exception) -> None:
    self.process.kill()

  def seconds(self, name: str) -> float:
    self.pipe.send(name)
    return self.pipe.recv()


def _serve(pipe, make, args) -> None:
  cfg = VARConfig.official(args.depth, dtype="float32")
  calls = make(TokenizerConfig(scales=SCALES[256]), cfg, args.batch)
  for call in calls.values():
    call()
  pipe.send(list(calls))
  while True:
    call = calls[pipe.recv()]
    begin = time.perf_counter()
    call()
    pipe.send(time.perf_counter() - begin)


def in_turns(sides: dict[str, Side], turns: int) -> dict[str, list[float]]:
  """Return the seconds of each call of each side."""
  times = {}
  for _ in range(turns):
    for title, side in sides.items():
      for name in side.names:
        times.setdefault(f"{title}, {name}", []).append(side.seconds(name))
  return times


def our_samplers(tokenizer_cfg, cfg, batch: int):
  compile_cache.enable()
  models = Models(
    Tokenizer(tokenizer_cfg),
    loading.sampling_var(cfg),
    decode_rows=loading.decode_rows(tokenizer_cfg),
  )
  params = sampling.random_params(models)
  labels_B = np.arange(batch)
  keys_B = sampler.image_keys(jax.random.key(0), batch)
  options = sampler.Options(
    np.float32(1.5), np.int32(900), np.float32(0.96), np.float32(1.0)
  )
  of_draw = (models, params, labels_B, keys_B, options)
  f_hat_BhwZ = _f_hat(cfg, batch)

  def transformer():
    return [scale.tokens_Bl for scale in sampler.draw_scales(*of_draw)]

  parts = {
    "image": lambda: sampler.generate(*of_draw),
    "transformer": transformer,
    "decoder": lambda: sampler.decode(models, params, f_hat_BhwZ),
  }
  return {
    name: lambda part=part: jax.block_until_ready(part())
    for name, part in parts.items()
  }


def torch_samplers(tokenizer_cfg, cfg, batch: int):
  import torch
  import torch_sampler

  torch.set_num_threads(os.cpu_count())
  theirs = torch_sampler.Sampler(tokenizer_cfg, cfg, "cpu", "float32")
  labels_B = torch.arange(batch)
  f_hat_BZhw = torch.tensor(_f_hat(cfg, batch).transpose(0, 3, 1, 2).copy())
  return {
    "image": lambda: theirs.sample(labels_B),
    "transformer": lambda: theirs.sample(labels_B, decode=False),
    "decoder": lambda: theirs.decode(f_hat_BZhw),
  }


def _f_hat(cfg, batch: int) -> np.ndarray:
  shape = (batch, *cfg.schedule.grid, cfg.latent_channels)
  return np.random.default_rng(0).normal(size=shape).astype(np.float32)


def our_steps(tokenizer_cfg, cfg, batch: int):
  compile_cache.enable()
  cfg = dataclasses.replace(cfg, drop_path=0.0)  # the reference has none
  batches = token_cache.synthetic(batch, tokenizer_cfg)
  var = var_training.make_var(cfg, mesh.make_mesh())
  tokenizer = Tokenizer(tokenizer_cfg)
  key = jax.random.key(0, impl="rbg")  # quick to compile
  frozen = tokenizer_step.init_params(tokenizer, key)
  optimizer = optim.make_optimizer(
    optim.OptimizerConfig(), steps=1000, batch_size=batch
  )
  step = var_step.make_step(
    var, tokenizer, optimizer, var_step.VARLossConfig(), ema_decay=0.0, seed=0
  )
  step = cpu.Jit(step, donate_argnums=0)
  params = var_step.init_params(var, key)
  held = [TrainState.create(params, optimizer, use_ema=False)]

  def take(name):
    held[0], _ = jax.block_until_ready(step(held[0], frozen, batches[name]))

  return {name: functools.partial(take, name) for name in batches}


def torch_steps(tokenizer_cfg, cfg, batch: int):
  import torch
  import torch.nn.functional as F
  from torch_sampler import torch_reference

  torch.set_num_threads(os.cpu_count())
  torch.manual_seed(0)
  images = token_cache.synthetic(batch, tokenizer_cfg)["images"]
  tokenizer = torch_reference.Tokenizer(tokenizer_cfg).eval()
  var = torch_reference.VAR(cfg)
  optimizer = torch.optim.AdamW(
    var.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.05
  )
  image_BHW3 = torch.tensor(np.array(images["image"], np.float32)) / 127.5 - 1
  image_B3HW = image_BHW3.permute(0, 3, 1, 2).contiguous()
  labels_B = torch.tensor(np.array(images["label"])).long()

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

  return {"images": take}


if __name__ == "__main__":
  main()
