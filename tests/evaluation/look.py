"""What a mesh of all devices sees in images: `look.py FOLDER NAME`.

FOLDER has a classifier and images.npz. Writes FOLDER/NAME.npz, in several
processes FOLDER/NAME@I.npz: features of all images, and the moments of three
parts merged.
"""

import pathlib
import sys

import jax
import numpy as np

from var_jax.evaluation import measure, networks
from var_jax.parallel import mesh as mesh_lib
from var_jax.parallel import multihost


def main(folder, name):
  folder = pathlib.Path(folder)
  with multihost.joined():
    pixels = np.load(folder / "images.npz")["images"]
    network = networks.open_classifier(folder / "classifier")
    batches = np.array_split(pixels, 3)
    mesh = mesh_lib.make_mesh()
    size = max(map(len, batches))
    found = networks.extract(network, batches, size, mesh)
    parts = [features.present() for _, features in found]
    looks = measure.gather(parts)
    if jax.process_count() > 1:
      name = f"{name}@{jax.process_index()}"
    np.savez(
      folder / f"{name}.npz",
      features_ND=looks.pooled_ND,
      mean_D=looks.pooled.mean_D,
      scatter_DD=looks.pooled.scatter_DD,
      devices=jax.device_count(),
    )


if __name__ == "__main__":
  main(*sys.argv[1:])
