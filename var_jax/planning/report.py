"""A plan in words."""

from collections.abc import Iterator, Mapping
from typing import Any

_GIB = 2.0**30


def title(found: Mapping[str, Any]) -> str:
  """Return what was planned, and on what."""
  slices = f"{found['slices']} x " if found["slices"] > 1 else ""
  what = {"train": "training", "sample": "sampling"}[found["program"]]
  return f"{found['config']}, {what} on {slices}{found['topology']}"


def lines(found: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
  """Yield name and value of each thing that is known."""
  training = found["program"] == "train"
  size = f"{found['image_size']} px"
  yield "mesh", found["mesh"]
  if training:
    yield "batch", f"{found['batch']} of {size}, {found['steps']} steps"
    if found["attention"]:
      yield "attention", found["attention"]
  else:
    yield "images at once", f"{found['images']} of {size}"
  available = _gib(found["available_bytes"])
  for program in found["programs"]:
    yield f"{program['name']}, of {available} a chip", _memory(program)
  if training:
    yield "state on a chip", _gib(found["state_bytes"])
    if found["estimate"]:
      yield "peak by estimate", _gib(found["estimate"]["peak"])
    traffic = found["traffic_bytes"]
    yield (
      "out of a chip in a step",
      f"{_gib(traffic['ici'])} over ICI, {_gib(traffic['dcn'])} over DCN",
    )
  what = "a step" if training else "a batch"
  limits = found["bound_seconds"]
  each = ", ".join(f"{name} {_ms(limits[name])}" for name in limits)
  yield f"products of {what}", f"{found['flops']:.3g} FLOP"
  yield f"{what} takes at least", f"{_ms(max(limits.values()))} ({each})"
  yield (
    f"images/s, if MFU is {found['mfu']:.2f}",
    f"{found['images_per_second']:.0f}, units for products "
    f"{100 * found['busy']:.0f}% busy",
  )
  if training:
    yield "to the last step", f"{found['days']:.2f} days"
    if found["cost"] is not None:
      yield "cost", f"{found['cost']:.0f}"
  for remedy in found["remedies"]:
    yield "what may help", remedy


def _memory(program: Mapping[str, Any]) -> str:
  if "peak" not in program:
    needed, part = program["needed"], program["part"]
    if not needed:
      return "DOES NOT FIT"
    of = "" if part == "all" else f" for {part} alone"
    return f"DOES NOT FIT: asks for {_gib(needed)}{of}"
  rest = max(program["peak"] - program["arguments"], 0)
  return (
    f"{'fits' if program['fits'] else 'DOES NOT FIT'}, "
    f"peak {_gib(program['peak'])}: given {_gib(program['arguments'])}, "
    f"activations and temporaries {_gib(rest)}; "
    f"beside it {_gib(program['beside'])}; "
    f"compiled in {program['compile_seconds']:.0f} s"
  )


def _gib(number: float) -> str:
  return f"{number / _GIB:.2f} GiB"


def _ms(seconds: float) -> str:
  return f"{1000 * seconds:.1f} ms"
