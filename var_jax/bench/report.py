"""Measurements in tables."""

from collections.abc import Iterator
from typing import Any

from rich.console import Console
from rich.table import Table

from var_jax.bench.timing import GIB


def print_samples(records: list[dict[str, Any]], title: str) -> None:
  """Print a table of whole batches, and one of their parts where there are."""
  console = Console()
  # Rather lines that wrap than columns that are cut.
  console.width = max(console.width, 110)
  table = Table(title=title)
  for column in (
    "batch", "program", "ms", "images/s", "steps",
    "GFLOP", "bound", "share", "GiB", "compile s",
  ):  # fmt: skip
    table.add_column(column, justify="left" if column == "program" else "right")
  for record in records:
    for row in _whole(record):
      table.add_row(*row)
    table.add_section()
  console.print(table)
  for record in records:
    if "transformer 0" in record["programs"]:
      console.print(_parts(record))


def print_mapping(found: dict[str, Any], title: str) -> None:
  """Print names and values."""
  table = Table(title=title, show_header=False)
  for name, value in found.items():
    if not isinstance(value, dict):
      text = f"{value:.4g}" if isinstance(value, float) else str(value)
      table.add_row(name, text)
  console = Console()
  console.width = max(console.width, 110)
  console.print(table)


def print_growth(found: dict[str, Any]) -> None:
  """Print seconds and exponents by grid."""
  names = list(found["exponents"]["flops"])
  table = Table(title="seconds of an image by the side of the grid")
  table.add_column("grid")
  for name in names:
    table.add_column(name, justify="right")
  for row in found["rows"]:
    seconds = [f"{row['median_s'][name]:.4f}" for name in names]
    table.add_row(str(row["grid"]), *seconds)
  table.add_section()
  for kind, what in (("median_s", "time"), ("flops", "FLOPs")):
    fitted = found["exponents"][kind]
    table.add_row(f"{what} ~", *(f"n^{fitted[name]:.2f}" for name in names))
  Console().print(table)


def _whole(record: dict[str, Any]) -> Iterator[list[str]]:
  batch, work = record["batch"], record["flops_per_image"]
  products = {
    "fused": work["var"] + work["decoder"],
    "transformer": work["var"],
    "decoder": work["decoder"],
  }
  for name, found in record["programs"].items():
    raster = name.startswith("raster")
    if not raster and name not in products:
      continue
    steps = record["steps"]["raster" if raster else "var"]
    bound = record["bound_s"].get(name)
    yield [
      str(batch),
      name,
      f"{1e3 * found['median_s']:.2f}",
      f"{batch / found['median_s']:.2f}",
      "" if name == "decoder" else str(steps),
      f"{(work if raster else products)[name] / 1e9:.0f}",
      f"{1e3 * bound:.2f}" if bound else "",
      f"{100 * bound / found['median_s']:.0f}%" if bound else "",
      f"{found['peak_bytes'] / GIB:.2f}",
      f"{found['compile_s']:.1f}",
    ]
  if record["stream_median_s"]:
    stream = f"{1e3 * record['stream_median_s']:.2f}"
    yield [str(batch), "transformer by scale", stream, *[""] * 7]


def _parts(record: dict[str, Any]) -> Table:
  table = Table(title=f"parts in ms, batch {record['batch']}")
  parts = ("transformer", "draw", "quantizer")
  for column in ("scale", *parts, "bound of the transformer"):
    table.add_column(column, justify="right")
  bounds = record["scales_bound_s"]

  def ms(name):
    return 1e3 * record["programs"][name]["median_s"]

  sums = [0.0] * len(parts)
  for s, bound in enumerate(bounds):
    times = [ms(f"{part} {s}") for part in parts]
    sums = [a + b for a, b in zip(sums, times, strict=True)]
    table.add_row(str(s), *(f"{t:.2f}" for t in times), f"{1e3 * bound:.2f}")
  table.add_section()
  table.add_row("all", *(f"{t:.2f}" for t in sums), f"{1e3 * sum(bounds):.2f}")
  return table


def print_laws(found: dict[str, Any], published: dict[str, Any]) -> None:
  """Print a row for each fitted law."""
  table = Table(title="y = (a x)^b")
  for column in ("y", "x", "b", "95%", "published b", "r", "points"):
    table.add_column(column, justify="left" if column in "yx" else "right")
  for x, by_measure in found.items():
    for name, law in by_measure.items():
      low, high = law["b_interval"]
      table.add_row(
        name,
        x,
        f"{law['b']:.4f}",
        f"{low:.4f} .. {high:.4f}",
        f"{published[x][name]}",
        f"{law['correlation']:.3f}",
        str(law["points"]),
      )
  console = Console()
  console.width = max(console.width, 110)
  console.print(table)
