"""What options do to the distribution of tokens, along the draws without them.

    python benchmarks/options.py --checkpoint runs/demo --images 64

Every token is drawn at the default options; at each scale, from the same
state, the filtered distribution under an option is compared with the default
one. Prints a JSON line for each option: the total variation distance, mean over
tokens, at each scale; and the share of tokens, at each scale, that the same
noise draws differently when the whole image is drawn with the option, which
counts what follows from other tokens before.
"""

import argparse
import json

import jax
import jax.numpy as jnp
import numpy as np

import var_jax
from var_jax.generation import sampler, step
from var_jax.generation.sampler import Options


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--checkpoint", required=True)
  parser.add_argument("--images", type=int, default=64)
  parser.add_argument("--guidance", type=float, default=1.5)
  parser.add_argument("--top-k", type=int, default=0)
  parser.add_argument("--top-p", type=float, default=0.95)
  args = parser.parse_args()
  model = var_jax.load(args.checkpoint)
  schedule = model.config.tokenizer.schedule
  S = len(schedule)
  base = Options(args.guidance, args.top_k, args.top_p)
  labels_B = jnp.arange(args.images) % model.config.transformer.num_classes
  settings = {
    f"guidance in scales {a} to {b - 1} of {S}": (base, (a, b))
    for a, b in [(0, S - 1), (0, S - 2), (0, S // 2), (S // 2, S)]
  }
  for temperature in (0.8, 0.9, 1.1):
    changed = base._replace(temperature=temperature)
    settings[f"temperature {temperature}"] = (changed, (0, S))
  distances = variation(model, labels_B, base, settings)
  tokens_BL = drawn(model, labels_B, base, (0, S))
  for name, (options, guided) in settings.items():
    other_BL = drawn(model, labels_B, options, guided)
    different_L = np.mean(np.asarray(tokens_BL != other_BL), axis=0)
    changed = [
      different_L[schedule.start(s) : schedule.end(s)].mean() for s in range(S)
    ]
    record = {
      "option": name,
      "total_variation": [round(float(x), 4) for x in distances[name]],
      "tokens_changed": [round(float(x), 4) for x in changed],
    }
    print(json.dumps(record))


def drawn(model, labels_B, options, guided) -> jax.Array:
  keys_B = sampler.image_keys(jax.random.key(0), len(labels_B))
  return sampler.generate(
    model.models, model.params, labels_B, keys_B, options, guided=guided
  ).tokens_BL


def variation(model, labels_B, base, settings) -> dict[str, list[float]]:
  """Return the distances of each setting, a scale each."""
  models, params = model.models, model.params
  scales = models.var.cfg.schedule
  take = jax.jit(step.scale_step, static_argnums=(0, 1, 7))
  state, modulation = sampler.start_program(models, params, labels_B, True)
  found = {name: [] for name in settings}
  for s in range(len(scales)):
    l = scales.end(s) - scales.start(s)
    noise_BlV = jax.random.gumbel(
      jax.random.key(s), (len(labels_B), l, models.var.cfg.vocab_size)
    )
    noise = step.Noise(noise_BlV, None)

    def filtered(options, guided, s=s, state=state, noise=noise):
      return take(
        models, s, params, state, modulation, options, noise, guided, None
      )

    after, _, base_BlV = filtered(base, True)
    for name, (options, (first, stop)) in settings.items():
      _, _, other_BlV = filtered(options, first <= s < stop)
      apart_BlV = jnp.abs(jax.nn.softmax(base_BlV) - jax.nn.softmax(other_BlV))
      found[name].append(0.5 * apart_BlV.sum(-1).mean())
    state = after
  return found


if __name__ == "__main__":
  main()
