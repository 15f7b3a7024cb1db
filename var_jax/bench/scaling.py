"""Power laws of loss and error over size and compute, of runs of one's own.

    y = (a x)^b   a straight line in logarithms          (paper section 4.2)

Loss is cross-entropy in nats a token, error the share of tokens that are not
the likeliest: of the last scale and of all of them, on held-out samples. x is
the number of the transformer's parameters, or the FLOPs spent on training:
there, of all evaluations of all runs, those count that no cheaper one beats.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import ml_collections
import numpy as np
from etils import epath

from var_jax.training import checks, loop, setup

_DRAWS = 1000  # of the bootstrap
_INTERVAL = (2.5, 97.5)  # percent

# What is fitted, and its name in an evaluation.
MEASURES = {
  "loss, last scale": "loss_tail",
  "loss, all scales": "loss_mean",
  "error, last scale": "accuracy_tail",
  "error, all scales": "accuracy_mean",
}

# The paper's b, of 18M to 2B parameters on ImageNet.
PUBLISHED = {
  "parameters": {
    "loss, last scale": -0.23,
    "loss, all scales": -0.20,
    "error, last scale": -0.016,
    "error, all scales": -0.010,
  },
  "flops": {
    "loss, last scale": -0.13,
    "loss, all scales": -0.16,
    "error, last scale": -0.0067,
    "error, all scales": -0.011,
  },
}


class Point(NamedTuple):
  """An evaluation of a run."""

  parameters: int
  step: int
  flops: float
  measures: Mapping[str, float]  # by the names of MEASURES


def rungs(
  config: ml_collections.ConfigDict,
) -> Iterator[tuple[str, ml_collections.ConfigDict]]:
  """Yield the name and the config of each run of a ladder."""
  for depth in config.ladder.depths:
    rung = config.copy_and_resolve_references()
    rung.unlock()
    del rung.ladder
    rung.model.depth = rung.model.heads = depth
    rung.model.width = config.ladder.width * depth
    yield f"d{depth}", rung


def check(config: ml_collections.ConfigDict) -> None:
  """Raise ValueError unless a config is of a ladder that can be fitted."""
  if "ladder" not in config:
    raise ValueError(
      "the config has no ladder of depths; use configs/scaling.py, or add "
      "config.ladder.depths and .width."
    )
  depths = config.ladder.depths
  if any(not isinstance(d, int) or d < 1 for d in depths):
    raise ValueError(f"depths {depths} are to be whole numbers from 1.")
  if len(set(depths)) < max(3, len(depths)):
    raise ValueError(
      f"depths {depths} are too few for a law; use 3 or more, each once."
    )
  if not 0 < config.eval_every <= config.steps:
    raise ValueError(
      f"eval_every {config.eval_every} measures nothing in {config.steps} "
      "steps; set it from 1 to that."
    )
  if config.progressive.until:
    raise ValueError(
      f"progressive.until {config.progressive.until} makes early steps "
      "cheaper, which a law over FLOPs does not know; set 0."
    )


def run(config: ml_collections.ConfigDict, folder: epath.Path) -> list[Point]:
  """Train the runs of a ladder into FOLDER/dN, and return their points.

  Runs that are finished are read; those that were interrupted go on.
  """
  check(config)
  points = []
  for name, rung in rungs(config):
    workdir = checks.folder(folder / name)
    loop.train(rung, workdir)
    program = setup.open_run(rung, workdir).program
    shapes = jax.tree.leaves(program.like.params)
    parameters = sum(int(np.prod(x.shape)) for x in shapes)
    work = program.work(program.stage(rung.steps - 1))
    points += points_of(workdir, parameters, work.flops_per_step)
  return points


def points_of(
  workdir: epath.Path, parameters: int, flops_per_step: float
) -> list[Point]:
  """Return the evaluations in a workdir's metrics.jsonl."""
  points = {}
  for line in (workdir / "metrics.jsonl").read_text().splitlines():
    record = json.loads(line)
    if "eval/loss_mean" not in record:
      continue
    found = {
      name: 1.0 - record[f"eval/{key}"]
      if key.startswith("accuracy")
      else record[f"eval/{key}"]
      for name, key in MEASURES.items()
    }
    step = record["step"]
    # Of a step that was evaluated again after a kill, the later counts.
    points[step] = Point(parameters, step, step * flops_per_step, found)
  return list(points.values())


def fit(x_N: np.ndarray, y_N: np.ndarray, seed: int = 0) -> dict[str, Any]:
  """Return a, b of y = (a x)^b with intervals, and Pearson's r.

  Intervals are of a bootstrap over points; draws of fewer than three different
  x have no line and are drawn again.
  """
  log_x_N, log_y_N = np.log(x_N), np.log(y_N)
  slope, offset = np.polyfit(log_x_N, log_y_N, 1)
  rng, found = np.random.default_rng(seed), []
  while len(found) < _DRAWS:
    rows = rng.integers(0, len(x_N), len(x_N))
    if len(np.unique(log_x_N[rows])) >= min(3, len(np.unique(log_x_N))):
      found.append(np.polyfit(log_x_N[rows], log_y_N[rows], 1))
  slopes = np.array(found)[:, 0]
  return {
    "a": float(np.exp(offset / slope)),
    "b": float(slope),
    "b_interval": np.percentile(slopes, _INTERVAL).tolist(),
    "correlation": float(np.corrcoef(log_x_N, log_y_N)[0, 1]),
    "points": len(x_N),
  }


def frontier(points: Sequence[Point], measure: str) -> list[Point]:
  """Return the points that none of less compute beats, by compute."""
  best, kept = np.inf, []
  for point in sorted(points, key=lambda p: (p.flops, p.measures[measure])):
    if point.measures[measure] < best:
      best = point.measures[measure]
      kept.append(point)
  return kept


def laws(points: Sequence[Point]) -> dict[str, Any]:
  """Return the fits, by x and measure; over size of the last evaluations."""
  in_order = sorted(points, key=lambda point: point.step)
  last = {point.parameters: point for point in in_order}
  found = {"parameters": {}, "flops": {}}
  for name in MEASURES:
    chosen = {
      "parameters": list(last.values()),
      "flops": frontier(points, name),
    }
    for x, some in chosen.items():
      if len(some) < 3:
        raise ValueError(
          f"{len(some)} points of {name} over {x} are too few for a law; train "
          "more sizes, or evaluate more often."
        )
      found[x][name] = fit(
        np.array([getattr(p, x) for p in some], np.float64),
        np.array([p.measures[name] for p in some]),
      )
  return found


def plot(points: Sequence[Point], found: Mapping, path: str) -> None:
  """Draw measures over size and compute, their fits, and published slopes.

  A published law is of other data and another tokenizer: its slope is drawn
  through the middle of ours.
  """
  import matplotlib

  matplotlib.use("agg")
  import matplotlib.pyplot as plt

  figure, rows = plt.subplots(2, len(MEASURES), figsize=(15, 7))
  for axes_row, x in zip(rows, ("parameters", "flops"), strict=True):
    for axes, name in zip(axes_row, MEASURES, strict=True):
      xs = np.array([getattr(p, x) for p in points])
      ys = np.array([p.measures[name] for p in points])
      for size in sorted({p.parameters for p in points}):
        rows_of = [i for i, p in enumerate(points) if p.parameters == size]
        if x == "parameters":
          rows_of = rows_of[-1:]
        label = f"{size / 1e6:.2g}M"
        axes.loglog(xs[rows_of], ys[rows_of], "o-", markersize=3, label=label)
      law = found[x][name]
      line = np.geomspace(xs.min(), xs.max(), 50)
      drawn = (law["a"] * line) ** law["b"]
      axes.loglog(line, drawn, "k-", label=f"ours, {law['b']:.3f}")
      slope = PUBLISHED[x][name]
      published = np.median(drawn) * (line / np.median(line)) ** slope
      axes.loglog(line, published, "k:", label=f"published, {slope}")
      axes.set(xlabel=x, title=name)
      axes.legend(fontsize=6)
  figure.tight_layout()
  figure.savefig(path, dpi=100)
  plt.close(figure)
