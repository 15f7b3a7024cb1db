"""Power laws: of known ones, of frontiers, and of a ladder that is trained."""

import json

import numpy as np
import pytest
import tiny_models

from configs import scaling as ladders
from var_jax import cli
from var_jax.bench import scaling
from var_jax.bench.scaling import MEASURES, Point
from var_jax.training.preemption import Preempted


def points(noise=0.0):
  """Return evaluations of runs that follow laws: 2.5 over size, C too."""
  rng, found = np.random.default_rng(0), []
  for parameters in (1e4, 1e5, 1e6, 1e7):
    for step in (100, 200, 400):
      flops = 6 * parameters * step
      value = (3.0 * parameters) ** -0.2 * np.exp(noise * rng.normal())
      found.append(
        Point(int(parameters), step, flops, dict.fromkeys(MEASURES, value))
      )
  return found


def test_a_known_law_is_found():
  x = np.array([1e4, 1e5, 1e6, 1e7])
  law = scaling.fit(x, (3.0 * x) ** -0.2)
  assert law["a"] == pytest.approx(3.0) and law["b"] == pytest.approx(-0.2)
  assert law["b_interval"] == pytest.approx([-0.2, -0.2])
  assert law["correlation"] == pytest.approx(-1.0)


def test_an_interval_holds_the_truth_as_often_as_it_says():
  x, hits = np.geomspace(1e4, 1e7, 12), 0
  for seed in range(60):
    noise = np.exp(0.05 * np.random.default_rng(seed).normal(size=12))
    law = scaling.fit(x, (3.0 * x) ** -0.2 * noise)
    low, high = law["b_interval"]
    hits += low <= -0.2 <= high
  # A bootstrap over twelve points is a little narrow.
  assert 48 <= hits <= 60


def test_laws_over_size_take_the_last_evaluation_of_each():
  some = [
    point._replace(
      measures={
        name: value * (1 if point.step == 400 else 7)
        for name, value in point.measures.items()
      }
    )
    for point in points()
  ]
  for name in MEASURES:
    law = scaling.laws(some)["parameters"][name]
    assert law["points"] == 4
    assert law["b"] == pytest.approx(-0.2)


def test_a_frontier_has_what_nothing_cheaper_beats():
  def point(flops, value):
    return Point(1, 1, flops, {"y": value})

  some = [point(3, 2.0), point(1, 5.0), point(2, 6.0), point(4, 2.0)]
  some += [point(5, 1.0)]
  kept = [(p.flops, p.measures["y"]) for p in scaling.frontier(some, "y")]
  assert kept == [(1, 5.0), (3, 2.0), (5, 1.0)]


def test_too_few_points_are_refused():
  with pytest.raises(ValueError, match="2 points of loss, last scale over"):
    scaling.laws([p for p in points() if p.parameters < 1e6])


@pytest.mark.parametrize("preset", ladders.PRESETS)
def test_rungs_differ_in_depth_width_and_heads_only(preset):
  config = ladders.get_config(preset)
  rungs = dict(scaling.rungs(config))
  assert len(rungs) >= 3
  for name, rung in rungs.items():
    depth = rung.model.depth
    assert name == f"d{depth}" and rung.model.heads == depth
    assert rung.model.width == config.ladder.width * depth
    assert "ladder" not in rung
    for key in ("depth", "width", "heads"):
      rung.model[key] = 0
  first, *rest = (rung.to_json() for rung in rungs.values())
  assert all(other == first for other in rest)


def test_a_ladder_is_trained_read_again_and_fitted(tmp_path, capsys):
  pytest.importorskip("matplotlib")
  tiny_models.write_var(tmp_path / "tokenizer", (1, 4, 8))
  flags = ["bench", "scaling", "--config", "configs/scaling.py:tiny"]
  flags += ["--output", str(tmp_path / "out"), "--config.steps=4"]
  flags += [f"--config.tokenizer_path={tmp_path / 'tokenizer'}"]
  flags += ["--config.eval_every=2", "--config.eval_samples=32"]
  flags += ["--config.pictures=0"]
  assert cli.main(flags) == 0
  found = json.loads((tmp_path / "out" / "scaling.json").read_text())
  assert len(found["points"]) == 6
  sizes = [p["parameters"] for p in found["points"][::2]]
  assert sizes == sorted(set(sizes))
  for p, expected in zip(found["points"], (2, 4) * 3, strict=True):
    assert p["step"] == expected
    workdir = tmp_path / "out" / f"d{1 + sizes.index(p['parameters'])}"
    lines = workdir / "metrics.jsonl"
    record = next(
      r
      for r in map(json.loads, lines.read_text().splitlines())
      if r["step"] == expected and "eval/loss_mean" in r
    )
    assert p["measures"]["loss, all scales"] == record["eval/loss_mean"]
    error = 1 - record["eval/accuracy_tail"]
    assert p["measures"]["error, last scale"] == pytest.approx(error)
  assert (tmp_path / "out" / "scaling.png").stat().st_size > 1000
  assert "published b" in capsys.readouterr().out
  # All is there: nothing is trained again.
  before = (tmp_path / "out" / "d1" / "metrics.jsonl").read_bytes()
  assert cli.main(flags) == 0
  assert (tmp_path / "out" / "d1" / "metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize(
  "flags, code, message",
  [
    (["--config", "configs/var.py:tiny"], 1, "the config has no ladder"),
    (
      ["--config", "configs/scaling.py:tiny", "--config.ladder.depths=(1,2)"],
      1,
      "depths (1, 2) are too few for a law",
    ),
    (
      [
        *("--config", "configs/scaling.py:tiny"),
        "--config.ladder.depths=(1,2,-3)",
      ],
      1,
      "depths (1, 2, -3) are to be whole numbers from 1",
    ),
    (
      ["--config", "configs/scaling.py:tiny", "--config.steps=1"],
      1,
      "measures nothing in 1 steps",
    ),
    (
      ["--config", "configs/scaling.py:tiny", "--config.eval_every=0"],
      1,
      "eval_every 0 measures nothing",
    ),
    (
      [
        *("--config", "configs/scaling.py:tiny"),
        "--config.progressive.until=0.5",
      ],
      1,
      "progressive.until 0.5 makes early steps cheaper",
    ),
    (["--config", "configs/scaling.py:huge"], 2, "preset 'huge' is not known"),
  ],
)
def test_bad_ladders_are_one_line(flags, code, message, tmp_path, capsys):
  output = ["--output", str(tmp_path / "out")]
  assert cli.main(["bench", "scaling", *flags, *output]) == code
  (line,) = capsys.readouterr().err.splitlines()
  assert message in line and not list(tmp_path.iterdir())


def test_sigterm_ends_a_ladder_with_a_line(tmp_path, capsys, monkeypatch):
  pytest.importorskip("matplotlib")

  def preempted(config, workdir):
    raise Preempted(25, workdir)

  monkeypatch.setattr(scaling.loop, "train", preempted)
  flags = ["bench", "scaling", "--config", "configs/scaling.py:tiny"]
  assert cli.main([*flags, "--output", str(tmp_path / "out")]) == 143
  (line,) = capsys.readouterr().err.splitlines()
  assert "step 25 is saved in" in line and line.endswith("to go on.")
