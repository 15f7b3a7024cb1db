"""A plan in words."""

from collections.abc import Iterator, Mapping
from typing import Any

_GIB = 2.0**30


def title(found: Mapping[str, Any]) -> str:
  slices = f"{found['slices']} x " if found["slices"] > 1 else ""
  what = {"train": "training", "sample": "sampling"}[found["program"]]
  return f"{found['config']}, {what} on {slices}{found['topology']}"


def lines(found: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
  """Yield name and value of each thing that is known."""
  yield "mesh", found["mesh"]
  data = f"{found['image_size']} px"
  if found["program"] == "train":
    yield "batch", f"{found['batch']} of {data}, {found['steps']} steps"
  else:
    yield "images at once", f"{found['images']} of {data}"
  available = found["available_bytes"]
  for program in found["programs"]:
    yield f"{program['name']}, of {_gib(available)} a chip", _memory(program)
  if found["program"] == "train":
    yield "state on a chip", _gib(found["state_bytes"])
    if found["estimate"]:
      yield "peak by estimate", _estimate(found["estimate"])
    traffic = found["traffic_bytes"]
    yield "products of a step", f"{found['flops_per_step']:.3g} FLOP"
    yield (
      "out of a chip in a step",
      f"{_gib(traffic['ici'])} over ICI, {_gib(traffic['dcn'])} over DCN",
    )
  limits = found["bound_seconds"]
  each = ", ".join(f"{name} {_ms(limits[name])}" for name in limits)
  yield "no step is faster than", f"{_ms(max(limits.values()))} ({each})"
  yield f"images/s at MFU {found['mfu']:g}", f"{found['images_per_second']:.0f}"
  if found["program"] == "train":
    yield "to the last step", f"{found['days']:.2f} days"
    if found["cost"] is not None:
      yield "cost", f"{found['cost']:.0f}"
  for remedy in found["remedies"]:
    yield "would fit by estimate", remedy


def _memory(program: Mapping[str, Any]) -> str:
  if not program["fits"]:
    needed = program["needed_bytes"]
    much = f": asks for {_gib(needed)}" if needed else ""
    return f"DOES NOT FIT{much}"
  rest = program["peak"] - program["arguments"]
  return (
    f"fits, peak {_gib(program['peak'])}: {_gib(program['arguments'])} state "
    f"and batch, {_gib(max(rest, 0))} activations and temporaries; compiled in "
    f"{program['compile_seconds']:.0f} s"
  )


def _estimate(estimate: Mapping[str, float]) -> str:
  return (
    f"{_gib(estimate['peak'])}, {_gib(estimate['saved'])} of it saved for the "
    "backward pass"
  )


def _gib(number: float) -> str:
  return f"{number / _GIB:.2f} GiB"


def _ms(seconds: float) -> str:
  return f"{1000 * seconds:.1f} ms"
