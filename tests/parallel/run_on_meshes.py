"""What a run's programs give on each mesh: `run_on_meshes.py FOLDER MESH ..`.

FOLDER/config.json is a run's config. Writes FOLDER/MESH.npz: parameters before
and gradients of the first step, its metrics, sums of an evaluation, samples.
"""

import json
import pathlib
import sys

import jax
import ml_collections
import numpy as np
from flax.traverse_util import flatten_dict

import var_jax
from var_jax.parallel import mesh as mesh_lib
from var_jax.training import evaluation, setup


def main(folder, *meshes):
  folder = pathlib.Path(folder)
  for words in meshes:
    text = (folder / "config.json").read_text()
    config = ml_collections.ConfigDict(json.loads(text))
    config.mesh.update(vars(mesh_lib.parse(words)))
    found = measure(config, folder / "nothing_here")
    if config.kind == "var":
      found |= draw(folder / "trained", mesh_lib.parse(words))
    np.savez(folder / f"{words}.npz", **found)


def measure(config, workdir) -> dict[str, np.ndarray]:
  run = setup.open_run(config, workdir)
  state = run.fresh()
  found = {"params": jax.device_get(state.params)}
  found["evaluation"] = evaluation.evaluate(run, state)
  feed = run.feed(0)
  state, metrics = run.take(state, feed.take(), 1)
  feed.close()
  _, (adam, _) = state.opt_state
  # Of the clipped gradients; their norm is among the metrics.
  found["grads"] = jax.tree.map(
    lambda m: m / (1.0 - config.optimizer.b1), adam.mu
  )
  found["metrics"] = {k: v for k, v in metrics.items() if k != "record"}
  for name, value in metrics["record"].items():
    found[f"record/{name}"] = value
  return {
    name: np.asarray(leaf)
    for name, leaf in flatten_dict(found, sep="/").items()
  }


def draw(workdir, cfg: mesh_lib.MeshConfig) -> dict[str, np.ndarray]:
  model = var_jax.load(workdir, mesh=mesh_lib.make_mesh(cfg))
  # Five rows divide on none of the meshes.
  labels_B = np.array([0, 3, 9, -1, 3])
  sample = model.sample(labels_B, jax.random.key(7), top_k=10)
  keep_hw = np.zeros(model.config.tokenizer.schedule.grid, bool)
  keep_hw[:, 0] = True
  edited = model.edit(
    sample.images_BHW3, keep_hw, labels_B, jax.random.key(8), top_k=10
  )
  return {
    "tokens": np.asarray(sample.tokens_BL),
    "images": np.asarray(sample.images_BHW3),
    "edited": np.asarray(edited.tokens_BL),
    "logits": np.asarray(model.logits(labels_B, sample.tokens_BL)),
  }


if __name__ == "__main__":
  main(*sys.argv[1:])
