"""A process of a run: elastic_run.py CONFIG WORKDIR [INDEX COUNT PORT]."""

import json
import sys

import jax
import ml_collections


def main(config_path, workdir, index=None, count=None, port=None):
  if index is not None:
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(
      f"127.0.0.1:{port}", num_processes=int(count), process_id=int(index)
    )
  from var_jax.training import loop

  with open(config_path) as file:
    config = ml_collections.ConfigDict(json.load(file))
  loop.train(config, workdir)


if __name__ == "__main__":
  main(*sys.argv[1:])
