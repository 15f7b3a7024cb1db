"""What a number was measured by, beside the number.

A receipt is JSON: numbers by name, and everything they depend on. What would
make a number of another kind is refused; forced, the number has another name.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from etils import epath

from var_jax import files
from var_jax.ledger import provenance

VERSION = 1

_FORM = {
  "numbers": dict,
  "features": dict,
  "reference": dict,
  "images": dict,
  "forced": list,
}

# What two receipts must share, and what is said if they do not.
_SAME = {
  "features.sha256": "another feature network",
  "features.resize": "another way of resizing",
  "reference.sha256": "another reference",
  "reference.kind": "another use of the reference",
  "reference.split": "another split of the reference",
  "reference.transform": "another crop of the reference",
  "images.count": "another number of images",
  "images.shape": "another size",
  "images.transform": "another crop",
}
_OF_SOURCES = "images.transform"


class Reason(NamedTuple):
  """Why some measures are not what their names say."""

  suffix: str  # of their names, if they are taken anyway
  measures: tuple[str, ...]  # all of them if empty
  text: str  # what is wrong, and the remedy


def refuse(reasons: Sequence[Reason]) -> None:
  """Raise ValueError if there is a reason."""
  if reasons:
    raise ValueError(
      f"{'; '.join(reason.text for reason in reasons)}. --force measures all "
      "the same, under another name."
    )


def renamed(
  numbers: Mapping[str, float], reasons: Sequence[Reason]
) -> dict[str, float]:
  """Return numbers by the names that they may have."""
  named = {}
  for name, value in numbers.items():
    suffixes = [r.suffix for r in reasons if _concerns(r, name)]
    named["_".join([name, *suffixes])] = value
  return named


def _concerns(reason: Reason, name: str) -> bool:
  return not reason.measures or name in reason.measures


def make(
  numbers: Mapping[str, float],
  *,
  forced: Iterable[Reason] = (),
  warnings: Sequence[str] = (),
  **depends: Any,
) -> dict[str, Any]:
  """Return a receipt.

  Args:
    depends: features, reference, images, order, sampler, checkpoint: what the
      numbers depend on, as JSON.
  """
  here = provenance.describe({})
  return {
    "format_version": VERSION,
    "numbers": dict(numbers),
    **depends,
    "forced": [reason.text for reason in forced],
    "warnings": list(warnings),
    "code": {k: v for k, v in here["code"].items() if k != "files"},
    "packages": here["packages"],
    "devices": here["devices"],
  }


def read(path: epath.PathLike) -> dict[str, Any]:
  """Return a receipt.

  Raises:
    ValueError: it is none.
  """
  path = files.absolute(path)
  if path.is_dir():
    raise ValueError(f"{path} is a folder; name a receipt in it.")
  found = files.read_json(path)
  if (
    not isinstance(found, dict)
    or found.get("format_version") != VERSION
    or any(not isinstance(found.get(k), kind) for k, kind in _FORM.items())
  ):
    raise ValueError(
      f"{path} is no receipt of format {VERSION}; give what `var-jax evaluate` "
      "wrote."
    )
  return found


def differences(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[str]:
  """Return why the numbers of two receipts may not be compared, a line each."""
  lines = []
  for name, what in _SAME.items():
    found = [_at(receipt, name) for receipt in (a, b)]
    if name == _OF_SOURCES and None in found:
      continue  # drawn, or as it was in a file
    pair = [json.dumps(value) for value in found]
    if pair[0] != pair[1]:
      lines.append(f"{what}: {name} is {pair[0]} and {pair[1]}")
  for which, receipt in (("first", a), ("second", b)):
    lines += [f"the {which} was forced: {text}" for text in receipt["forced"]]
  if not set(a["numbers"]) & set(b["numbers"]):
    lines.append(
      f"no measure in common: {', '.join(a['numbers'])} and "
      f"{', '.join(b['numbers'])}"
    )
  return lines


def _at(receipt: Mapping, name: str) -> Any:
  for part in name.split("."):
    receipt = receipt.get(part, {}) if isinstance(receipt, Mapping) else {}
  return None if receipt == {} else receipt
