"""report.html of a run: what its evaluations measured, and the last pictures.

One file without scripts or links, to open from anywhere. It is written anew
after each evaluation from metrics.jsonl, so that a resumed run has all of it.
"""

import base64
import html
import json
from collections.abc import Mapping, Sequence

import numpy as np
from etils import epath

from var_jax import files, images

_WIDTH, _HEIGHT, _EDGE = 320, 160, 8  # of a chart, pixels
# Of lines, coarse to fine; they repeat where there are more scales.
_COLOURS = (
  "#440154", "#46317e", "#365c8d", "#277f8e", "#1fa187", "#4ac16d", "#9fda3a",
  "#d0b800", "#e8743b", "#c2185b",
)  # fmt: skip

Charts = Mapping[str, Mapping[str, Sequence[tuple[int, float]]]]


def write(workdir: epath.Path, pictures: Mapping[str, np.ndarray]) -> None:
  """Write WORKDIR/report.html.

  Args:
    pictures: uint8, by name, of the last evaluation.
  """
  lines = (workdir / "metrics.jsonl").read_text().splitlines()
  charts = charts_of([json.loads(line) for line in lines])
  page = render(workdir.name, charts, pictures)
  files.write_bytes(workdir / "report.html", page.encode())


def charts_of(records: Sequence[Mapping]) -> Charts:
  """Return the points (step, value) of each line, by chart and line.

  eval/NAME/SCALE is line SCALE of chart NAME; eval/NAME is a chart's only one.
  """
  charts = {}
  for record in records:
    for key, value in record.items():
      if not key.startswith("eval/") or isinstance(value, str):
        continue  # words stand for what is no number
      _, name, *line = key.split("/")
      points = charts.setdefault(name, {}).setdefault("/".join(line), [])
      points.append((record["step"], value))
  return charts


def render(
  title: str, charts: Charts, pictures: Mapping[str, np.ndarray]
) -> str:
  """Return the page."""
  alone = {name: lines for name, lines in charts.items() if "" in lines}
  by_scale = {name: lines for name, lines in charts.items() if "" not in lines}
  body = [f"<h1>{html.escape(title)}</h1>"]
  if by_scale:
    body += ["<h2>Scales, at the last evaluation</h2>", _table(by_scale)]
  body.append("<h2>Evaluations</h2><div>")
  body += [_chart(name, lines) for name, lines in (alone | by_scale).items()]
  body.append("</div>")
  for name, pixels in pictures.items():
    data = base64.b64encode(images.encoded(pixels)).decode()
    body.append(
      f"<h2>{html.escape(name)}</h2>"
      f'<img alt="{html.escape(name)}" src="data:image/png;base64,{data}">'
    )
  return (
    f'<!doctype html><meta charset="utf-8"><title>{html.escape(title)}</title>'
    "<style>body{font:14px sans-serif;margin:2em}div{display:flex;"
    "flex-wrap:wrap;gap:1em}figure{margin:0}td,th{padding:.2em .8em;"
    "text-align:right}img{max-width:100%}</style>" + "\n".join(body) + "\n"
  )


def _table(charts: Charts) -> str:
  scales = list(dict.fromkeys(s for lines in charts.values() for s in lines))
  rows = ["".join(f"<th>{html.escape(x)}</th>" for x in ("scale", *charts))]
  for s in scales:
    last = [
      lines[s][-1][1] if s in lines else None for lines in charts.values()
    ]
    shown = ("" if value is None else f"{value:.4g}" for value in last)
    rows.append("".join(f"<td>{x}</td>" for x in (html.escape(s), *shown)))
  return "<table>" + "".join(f"<tr>{row}</tr>" for row in rows) + "</table>"


def _chart(name: str, lines: Mapping[str, Sequence]) -> str:
  """Return a figure; a scale's number is at the end of its line."""
  xy = np.array([point for points in lines.values() for point in points])
  (x0, y0), (x1, y1) = xy.min(axis=0), xy.max(axis=0)

  def place(step: float, value: float) -> str:
    x = _EDGE + (step - x0) / max(x1 - x0, 1) * (_WIDTH - 4 * _EDGE)
    share = (value - y0) / (y1 - y0) if y1 > y0 else 0.5
    return f"{x:.1f},{_HEIGHT - _EDGE - share * (_HEIGHT - 2 * _EDGE):.1f}"

  drawn = []
  for i, (line, points) in enumerate(lines.items()):
    colour = _COLOURS[i % len(_COLOURS)]
    path = " ".join(place(*point) for point in points)
    x, y = place(*points[-1]).split(",")
    drawn.append(
      f'<polyline fill="none" stroke="{colour}" points="{path}"/>'
      f'<circle r="2" cx="{x}" cy="{y}" fill="{colour}"/>'
      f'<text x="{x}" y="{y}" dx="4" fill="{colour}" font-size="10">'
      f"{html.escape(line)}</text>"
    )
  return (
    f"<figure><figcaption>{html.escape(name)}: {y0:.4g} to {y1:.4g}, steps "
    f'{x0:.0f} to {x1:.0f}</figcaption><svg width="{_WIDTH}" height="{_HEIGHT}"'
    f' style="background:#f4f4f4">{"".join(drawn)}</svg></figure>'
  )
