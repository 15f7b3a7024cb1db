"""How time grows with the side n of the token grid.

The paper's analysis: O(n^4) for next-scale prediction, O(n^6) for raster order
without a cache (section 3, proposition 4). A raster sampler with a cache is in
O(n^4) too. FLOPs follow the model, seconds the device as well.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

from var_jax import loading
from var_jax.bench import raster, roofline, sampling, timing
from var_jax.generation.step import Models
from var_jax.models.scales import SCALES
from var_jax.models.tokenizer import Tokenizer, TokenizerConfig
from var_jax.models.transformer import VARConfig
from var_jax.training import flops

_OFFICIAL = {sizes[-1]: sizes for sizes in SCALES.values()}


def scales_of(n: int) -> tuple[int, ...]:
  """Return the scales of a grid: published ones, or those of 16 stretched."""
  if n in _OFFICIAL:
    return _OFFICIAL[n]
  return tuple(sorted({1} | {max(1, round(k * n / 16)) for k in _OFFICIAL[16]}))


def measure(
  cfg: VARConfig, grids: Sequence[int], settings: sampling.Settings
) -> dict[str, Any]:
  """Return seconds and FLOPs of one image's transformer, and exponents.

  Args:
    cfg: of the transformer; its scales are replaced.
  """
  rows = []
  for n in grids:
    var_cfg = dataclasses.replace(cfg, scales=scales_of(n))
    tokenizer = TokenizerConfig(scales=scales_of(n), dtype=cfg.dtype)
    models = Models(Tokenizer(tokenizer), loading.sampling_var(var_cfg))
    params = sampling.random_params(models)
    programs = {"var": dict(sampling.whole(models, params, 1))["transformer"]}
    flat = dataclasses.replace(cfg, scales=(n,))
    work = {"var": flops.var_sample(var_cfg, rows=2)}
    for kind in settings.raster:
      cached = kind == "cached"
      programs[f"raster {kind}"] = sampling.raster_program(flat, 1, cached)
      work[f"raster {kind}"] = raster.sample_flops(flat, 2, cached)
    found = timing.measure(programs, settings.seconds, settings.repeats)
    rows.append(
      {
        "grid": n,
        "scales": scales_of(n),
        "median_s": {name: x.median_s for name, x in found.items()},
        "flops": work,
      }
    )
  names = rows[0]["flops"] if rows else ()
  return {
    "rows": rows,
    "exponents": {
      kind: {
        name: roofline.exponent(grids, [row[kind][name] for row in rows])
        for name in names
      }
      for kind in ("median_s", "flops")
    },
  }


def plot(found: dict[str, Any], path: str) -> None:
  """Draw seconds over the grid, with lines of n^4 and n^6."""
  import matplotlib

  matplotlib.use("agg")
  import matplotlib.pyplot as plt

  rows = found["rows"]
  grids = [row["grid"] for row in rows]
  figure, axes = plt.subplots(figsize=(6, 4.5))
  for name, exponent in found["exponents"]["median_s"].items():
    seconds = [row["median_s"][name] for row in rows]
    axes.loglog(grids, seconds, marker="o", label=f"{name}: n^{exponent:.1f}")
  top = max(max(row["median_s"].values()) for row in rows)
  for power, style in ((4, ":"), (6, "--")):
    line = [top * (n / grids[-1]) ** power for n in grids]
    axes.loglog(grids, line, style, color="grey", label=f"slope of n^{power}")
  axes.set_xlabel("side of the token grid")
  axes.set_ylabel("seconds an image")
  axes.set_xticks(grids, [str(n) for n in grids])
  axes.minorticks_off()
  axes.legend()
  figure.tight_layout()
  figure.savefig(path)
  plt.close(figure)
