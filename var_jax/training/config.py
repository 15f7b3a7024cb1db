"""Config sections that follow the dataclasses they become."""

import dataclasses

import ml_collections
from ml_collections import config_dict


def section(cls, *, without: tuple[str, ...] = (), **values):
  """Return a ConfigDict of all fields of a dataclass, `values` over defaults.

  So every hyper-parameter can be set from the command line.

  Args:
    without: fields that follow from other settings.
  """
  defaults = {
    field.name: field.default
    for field in dataclasses.fields(cls)
    if field.name not in without
  }
  optional = {name for name, value in defaults.items() if value is None}
  config = ml_collections.ConfigDict(
    {**defaults, **{name: config_dict.placeholder(float) for name in optional}}
  )
  config.update(values)
  return config
