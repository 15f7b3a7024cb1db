"""What the facts of all workers amount to: pure functions, one a check.

Most checks ask whether the workers agree. What most of them have is taken for
right, and those that have something else are named.
"""

import collections
import dataclasses
import functools
import json
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from flax.traverse_util import flatten_dict

Facts = Mapping[str, Mapping[str, Any]]  # of a worker, as in `facts.py`
Off = dict[int, str]  # what is wrong, by worker

MAX_SKEW = 1.0  # seconds between a clock and the others

_SHOWN = 3  # differences of a worker


@dataclasses.dataclass(frozen=True)
class Verdict:
  """Of one check. All is well where there is no remedy."""

  check: str
  found: str
  remedy: str = ""


@dataclasses.dataclass(frozen=True)
class Check:
  """What to look at, and what to do if it is wrong.

  Args:
    needs: names of facts; without the first on any worker nothing is asked.
    look: values of each of these by worker -> (what is right, what is off).
  """

  name: str
  needs: Sequence[str]
  look: Callable[..., tuple[str, Off]]
  remedy: str


def judge(
  workers: Sequence[Facts], devices: int | None = None
) -> list[Verdict]:
  """Return a verdict on each thing that was asked of.

  Args:
    workers: their facts, by process.
    devices: how many there should be; None takes what there is.
  """
  checks = (
    Check("code", ["provenance"], _code, "check out one revision everywhere"),
    Check(
      "packages", ["provenance"], _packages, "install the same ones everywhere"
    ),
    Check("flags", ["provenance"], _flags, "set the same ones everywhere"),
    Check(
      "config",
      ["config", "provenance"],
      _config,
      "give the same readable --config everywhere",
    ),
    Check(
      "devices",
      ["devices"],
      functools.partial(_devices, devices),
      "see that nothing else holds devices there, or replace the worker",
    ),
    Check("mesh", ["mesh"], _mesh, "change the mesh, the batch or the devices"),
    Check(
      "workdir",
      ["workdir", "unseen"],
      _workdir,
      "give a folder that all share and can write to",
    ),
    Check("clock", ["time"], _clock, "set it by a time server"),
    Check("sum", ["sum"], _sum, "look at the devices and the network there"),
    Check("data", ["data"], _data, "bring the whole dataset there"),
  )
  asked = [c for c in checks if any(c.needs[0] in facts for facts in workers)]
  return [_verdict(check, workers) for check in asked]


def _verdict(check: Check, workers: Sequence[Facts]) -> Verdict:
  off = {}
  for worker, facts in enumerate(workers):
    for name in check.needs:
      if "value" not in facts.get(name, {}):
        missing = {"error": "was not asked as the others were"}
        off[worker] = facts.get(name, missing)["error"]
        break
  found = ""
  if not off:
    values = [[facts[n]["value"] for facts in workers] for n in check.needs]
    found, off = check.look(*values)
  if not off:
    return Verdict(check.name, found)
  return Verdict(check.name, "; ".join(_named(off, workers)), check.remedy)


def _named(off: Off, workers: Sequence[Facts]) -> Iterator[str]:
  """Yield "worker 3 (host): what", once for those of whom the same is said."""
  said = collections.defaultdict(list)
  for worker, what in off.items():
    said[what].append(worker)
  for what, those in said.items():
    hosts = [f"{w} ({workers[w]['host']['value']})" for w in those]
    several = "s" if len(those) > 1 else ""
    yield f"worker{several} {', '.join(hosts)}: {what}"


def _odd(values: Sequence[Mapping[str, Any]]) -> Off:
  """Return how those that differ from most differ from them."""
  texts = [json.dumps(value, sort_keys=True) for value in values]
  # Of as many each, the lowest worker's counts.
  common = json.loads(collections.Counter(texts).most_common(1)[0][0])
  off = {}
  for worker, value in enumerate(map(json.loads, texts)):
    differ = [
      f"{name} is {value.get(name)}, not {common.get(name)}"
      for name in sorted(value.keys() | common.keys())
      if value.get(name) != common.get(name)
    ]
    if differ:
      rest = len(differ) - _SHOWN
      more = [f"{rest} more"] if rest > 0 else []
      off[worker] = ", ".join(differ[:_SHOWN] + more)
  return off


def _code(found: Sequence[Mapping]) -> tuple[str, Off]:
  codes = []
  for one in found:
    code, changes = one["code"], one["code"]["uncommitted"]
    codes.append(
      {"revision": code["revision"], "uncommitted": changes and changes[:12]}
      | {name: digest[:12] for name, digest in code["files"].items()}
    )
  revision = codes[0]["revision"]
  text = revision[:12] if revision else f"{len(codes[0]) - 2} files, no git"
  changed = ", with uncommitted changes" if codes[0]["uncommitted"] else ""
  return text + changed, _odd(codes)


def _packages(found: Sequence[Mapping]) -> tuple[str, Off]:
  versions = [one["packages"] for one in found]
  shown = [f"{name} {versions[0].get(name)}" for name in ("jax", "jaxlib")]
  return f"{', '.join(shown)} and {len(versions[0]) - 2} more", _odd(versions)


def _flags(found: Sequence[Mapping]) -> tuple[str, Off]:
  flags = [one["flags"] for one in found]
  return f"{len(flags[0])} of JAX and XLA", _odd(flags)


def _config(_, found: Sequence[Mapping]) -> tuple[str, Off]:
  configs = [flatten_dict(one["config"], sep=".") for one in found]
  return f"{len(configs[0])} settings", _odd(configs)


def _devices(wanted: int | None, found: Sequence[Mapping]) -> tuple[str, Off]:
  one, total = found[0], sum(worker["local"] for worker in found)
  off = _odd(found)
  if not off and wanted not in (None, total):
    share = f"of {total} devices in all, and {wanted} are wanted"
    off = {w: f"has {one['local']} {share}" for w in range(len(found))}
  return f"{total} x {one['kind']}, {one['local']} a worker", off


def _mesh(found: Sequence[str]) -> tuple[str, Off]:
  return found[0], _odd([{"it": mesh} for mesh in found])


def _workdir(_, unseen: Sequence[Sequence[int]]) -> tuple[str, Off]:
  off = {
    worker: f"does not see what {', '.join(map(str, others))} wrote"
    for worker, others in enumerate(unseen)
    if others
  }
  return f"written to and seen by {len(unseen)}", off


def _clock(times: Sequence[float]) -> tuple[str, Off]:
  middle = statistics.median_low(times)
  off = {
    worker: f"{abs(at - middle):.1f} s {'ahead' if at > middle else 'behind'}"
    for worker, at in enumerate(times)
    if abs(at - middle) > MAX_SKEW
  }
  return f"{max(times) - min(times):.3f} s apart at most", off


def _sum(found: Sequence[Mapping[str, float]]) -> tuple[str, Off]:
  off = {
    worker: f"{one['got']:g}, not {one['expected']:g}"
    for worker, one in enumerate(found)
    if one["got"] != one["expected"]
  }
  return f"{found[0]['got']:g}, as it should be", off


def _data(found: Sequence[Mapping]) -> tuple[str, Off]:
  one = found[0]
  return f"{one['source']}: {one['samples']} samples, first read", _odd(found)
