"""Measures on held-out samples: each counted once, nothing dropped."""

from collections.abc import Callable

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from var_jax.data import pipeline
from var_jax.evaluation.statistics import Moments
from var_jax.parallel import mesh as mesh_lib
from var_jax.training import programs


def evaluate(
  run, state, stopped: Callable[[], bool] = lambda: False
) -> dict | None:
  """Return the means over the held-out split, a number a measure.

  The averaged weights are measured where there are any: those are what `load`
  gives. The last batch is filled up, so that one program serves all; what
  fills it is not counted.

  Args:
    run: a `setup.Run` with a held-out source.
    stopped: asked before each batch; if it says so, None is returned.

  Raises:
    ValueError: every sample is broken.
  """
  config, mesh = run.config, run.mesh
  params = programs.averaged(state)
  totals, count, moments = {}, 0.0, {}
  batches = pipeline.evaluation_batches(
    run.held_out,
    run.plain,
    batch_size=config.data.batch_size,
    rows=mesh_lib.rows(mesh, config.data.batch_size),
    limit=config.eval_samples or None,
    on_broken=config.data.on_broken,
  )
  for batch in batches:
    if stopped():
      return None
    wanted = {name: batch[name] for name in ("image", "label", "real")}
    sums = dict(run.program.evaluate(params, mesh_lib.to_devices(mesh, wanted)))
    _add(moments, sums.pop("features", {}), sums.pop("real", None))
    flat = flatten_dict(sums, sep="/")
    count += float(flat.pop("count"))
    for name, value in flat.items():
      totals[name] = totals.get(name, 0.0) + np.asarray(value, np.float64)
  if not count:
    raise ValueError(
      "all held-out samples are broken, so nothing is measured; repair "
      "data.eval_source, or set eval_every=0."
    )
  means = {name: total / count for name, total in totals.items()}
  return run.program.summary(unflatten_dict(means, sep="/"), moments)


def _add(moments: dict[str, Moments], features, real_B) -> None:
  """Merge the features of the real rows of a batch into the moments."""
  for name, features_BD in features.items():
    features_nD = np.asarray(features_BD)[np.asarray(real_B)]
    if len(features_nD):
      new = Moments.of(features_nD)
      moments[name] = moments[name].merged(new) if name in moments else new
