"""What a run's programs give on each mesh: `run_on_meshes.py FOLDER MESH ..`.

FOLDER/config.json is a run's config. Writes FOLDER/MESH.npz: parameters before
and gradients of the first step, its metrics, sums of an evaluation, pictures,
samples. Of several processes each writes what it has, as FOLDER/MESH@I.npz.
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
from var_jax.parallel import multihost
from var_jax.training import evaluation, setup


def main(folder, *meshes):
  folder = pathlib.Path(folder)
  with multihost.joined():
    several = jax.process_count() > 1
    place = f"@{jax.process_index()}" if several else ""
    for words in meshes:
      text = (folder / "config.json").read_text()
      config = ml_collections.ConfigDict(json.loads(text))
      config.mesh.update(vars(mesh_lib.parse(words)))
      found = measure(config, folder / "nothing_here")
      if config.kind == "var":
        found |= draw(folder / "trained", mesh_lib.parse(words))
      found = {name: on_host(array) for name, array in found.items()}
      np.savez(folder / f"{words}{place}.npz", **found)


def on_host(array) -> np.ndarray:
  if isinstance(array, jax.Array):
    return multihost.gathered(array)
  return np.asarray(array)


def measure(config, workdir) -> dict[str, jax.Array]:
  run = setup.open_run(config, workdir)
  state = run.fresh()
  # The step donates the state.
  found = {"params": jax.tree.map(on_host, state.params)}
  found["evaluation"] = evaluation.evaluate(run, state)
  if run.mesh.size == 1 or jax.process_count() > 1:  # they take time
    found["pictures"] = run.program.pictures(run, state)
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
  return flatten_dict(found, sep="/")


def draw(workdir, cfg: mesh_lib.MeshConfig) -> dict[str, jax.Array]:
  """Return what a model gives, each call fed with what another returned."""
  mesh = mesh_lib.make_mesh(cfg)
  model = var_jax.load(workdir, mesh=mesh)
  found = {}
  # Eight rows divide on all meshes, seven are filled up to eight.
  labels_8 = np.array([0, 3, 9, -1, 3, 5, 1, 2])
  for B in (8, 7):
    labels_B = labels_8[:B]
    sample = model.sample(labels_B, jax.random.key(7), top_k=10)
    keep_hw = np.zeros(model.config.tokenizer.schedule.grid, bool)
    keep_hw[:, 0] = True
    edited = model.edit(
      sample.images_BHW3, keep_hw, labels_B, jax.random.key(8), top_k=10
    )
    *_, last = model.stream(labels_B, jax.random.key(7), top_k=10)
    results = {
      "tokens": sample.tokens_BL,
      "images": sample.images_BHW3,
      "edited": edited.tokens_BL,
      "images_edited": edited.images_BHW3,
      "tokens_streamed": last.tokens_Bl,
      "images_streamed": last.preview_BHW3,
      "tokens_again": model.encode(sample.images_BHW3),
      "images_again": model.decode(sample.tokens_BL),
      "logits": model.logits(labels_B, sample.tokens_BL),
    }
    even = B % mesh_lib.row_shards(mesh) == 0
    where = mesh_lib.by_rows(mesh) if even else mesh_lib.replicated(mesh)
    for name, array in results.items():
      assert len(array) == B, name
      assert array.sharding.is_equivalent_to(where, array.ndim), name
      found[f"{name}/{B}"] = array
  return found


if __name__ == "__main__":
  main(*sys.argv[1:])
