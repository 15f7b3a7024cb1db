"""Raster order beside VAR on the demo's digits, at equal size and recipe.

    make demo
    python benchmarks/raster.py --demo runs/demo --workdir runs/raster

Both have the demo's blocks, width, dropout, rates, batches, steps and samples,
and are judged by its measures. The tokenizer of raster order has the finest of
the demo's scales only, is trained as the demo's is, and has as many codes.
Prints a JSON line for each order and guidance: the measures, the milliseconds
of one image and of all samples at once, decoded. VAR's guidance grows over the
scales to what is given; that of raster order is the same at every step.
"""

import argparse
import json
import statistics

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

import var_jax
from var_jax import demo
from var_jax.bench import raster, timing
from var_jax.data import pipeline, sources, transforms
from var_jax.generation import sampler
from var_jax.generation.sampler import Options, Sample
from var_jax.models.transformer import VARConfig
from var_jax.training import loop, optim
from var_jax.training.state import TrainState, to_float_images


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--demo", required=True, help="workdir of make demo")
  parser.add_argument(
    "--workdir", required=True, help="of the raster tokenizer"
  )
  parser.add_argument("--guidance", nargs="+", type=float, default=[0.0, 1.0])
  args = parser.parse_args()
  var = var_jax.load(args.demo)
  tokenizer = trained_tokenizer(epath.Path(args.workdir))
  model, params, loss = trained(tokenizer)
  labels = np.repeat(np.arange(10), demo.SAMPLES_A_CLASS)
  real = [demo.all_of(split) for split in ("train", "val")]
  for guidance in args.guidance:
    options = demo.SAMPLING | {"guidance": guidance}

    def by_var(labels_B, options=options):
      return var.sample(labels_B, jax.random.key(0), **options)

    def in_raster_order(labels_B, options=options):
      keys_B = sampler.image_keys(jax.random.key(0), len(labels_B))
      tokens_BL = raster.generate(
        model,
        params,
        labels_B,
        keys_B,
        Options(**options),
        guided=options["guidance"] != 0,
      )
      return Sample(tokenizer.decode(tokens_BL), tokens_BL)

    for name, of, draw in (
      ("VAR", var, by_var),
      ("raster", tokenizer, in_raster_order),
    ):
      sample = draw(labels)
      record = {"order": name, "guidance": guidance}
      record |= demo.judge(of, *real, labels, sample)
      record |= {
        "tokens": sample.tokens_BL.shape[1],
        "ms_one": milliseconds(draw, labels[:1]),
        "ms_all": milliseconds(draw, labels),
      }
      if name == "raster":
        record["loss"] = loss
      print(json.dumps(record), flush=True)


def milliseconds(draw, labels) -> float:
  times = timing.time_calls(lambda: draw(labels), seconds=3.0, repeats=30)
  return 1e3 * statistics.median(times)


def trained_tokenizer(workdir: epath.Path) -> var_jax.Model:
  config = demo.tokenizer_config()
  config.model.scales = config.model.scales[-1:]
  loop.train(config, workdir)
  return var_jax.load(workdir)


def trained(tokenizer: var_jax.Model):
  """Return the model, its averaged parameters and its last losses' mean."""
  config = demo.var_config()
  of_tokens = tokenizer.config.tokenizer
  source = sources.open_source(config.data.source, "train")
  model = raster.Raster(
    VARConfig(
      num_classes=len(source.class_names),
      vocab_size=of_tokens.vocab_size,
      latent_channels=of_tokens.latent_channels,
      scales=of_tokens.scales,
      **config.model,
    )
  )
  batch_size = config.data.batch_size
  optimizer = optim.make_optimizer(
    optim.OptimizerConfig(**config.optimizer),
    steps=config.steps,
    batch_size=batch_size,
  )
  state = TrainState.create(
    raster.init_params(model, jax.random.key(config.seed)),
    optimizer,
    use_ema=True,
  )

  @jax.jit
  def step(state, batch, key):
    tokens_BL = tokenizer.models.tokenizer.apply(
      tokenizer.params.tokenizer,
      to_float_images(batch["image"]),
      method="encode",
    )

    def loss_of(params):
      return raster.loss(
        model,
        params,
        batch["label"],
        tokens_BL,
        key,
        config.loss.label_dropout,
      )

    loss, grads = jax.value_and_grad(loss_of)(state.params)
    state, _ = state.apply_gradients(grads, optimizer, config.ema_decay)
    return state, loss

  transform = transforms.make_transform(
    config.data.transform, of_tokens.image_shape, train=True, flip=False
  )
  batches = pipeline.training_batches(
    source, transform, batch_size=batch_size, seed=config.seed
  )
  losses = []
  for number, batch in zip(range(config.steps), batches, strict=False):
    batch = {name: batch[name] for name in ("image", "label")}
    key = jax.random.fold_in(jax.random.key(config.seed + 1), number)
    state, loss = step(state, batch, key)
    losses.append(loss)
  return model, state.ema, float(jnp.mean(jnp.stack(losses[-100:])))


if __name__ == "__main__":
  main()
