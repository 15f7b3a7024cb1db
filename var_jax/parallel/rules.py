"""How parameters and activations lie on the mesh: two tables and a look-up.

PARAM_AXES names the dimensions of every parameter, AXIS_RULES says which mesh
axes a name is split over. With fsdp=F and model=M a layer's first MLP matrix
is fc1_DF [D_F, F_M]; no name twice on the same mesh axis.

The tokenizer is small beside a transformer, and its channels are not many:
every device has all of it.
"""

import contextlib
import dataclasses
import re
from collections.abc import Callable, Iterator
from typing import Any

import flax.linen as nn
import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from var_jax.models import cpu
from var_jax.parallel import mesh as mesh_lib

# First match wins. The pattern is of the path below "params", or of another
# array's name in the state; scalars are everywhere and need no rule.
PARAM_AXES = (
  (r"blocks/attn/mat_qkv/kernel", ("layers", "width", "heads")),
  (r"blocks/attn/proj/kernel", ("layers", "heads", "width")),
  (r"blocks/attn/[qv]_bias", ("layers", "heads")),
  (r"blocks/attn/scale_mul", ("layers", "heads")),
  (r"blocks/ffn/fc1/kernel", ("layers", "width", "mlp")),
  (r"blocks/ffn/fc1/bias", ("layers", "mlp")),
  (r"blocks/ffn/fc2/kernel", ("layers", "mlp", "width")),
  (r"blocks/(attn/proj|ffn/fc2)/bias", ("layers", "width")),
  (r"ada/linear/kernel", ("layers", "width", "modulation")),
  (r"ada/linear/bias", ("layers", "modulation")),
  (r"(shared|head)_ada/linear/kernel", ("width", "modulation")),
  (r"(shared|head)_ada/linear/bias", ("modulation",)),
  (r"ada_gss", ("layers", "vectors", "width")),
  (r"class_emb", ("classes", "width")),
  (r"pos|pos_start", ("length", "width")),
  (r"lvl_emb", ("scales", "width")),
  (r"word_emb/kernel", ("latent", "width")),
  (r"word_emb/bias", ("width",)),
  (r"head/kernel", ("width", "vocab")),
  (r"head/bias", ("vocab",)),
  # The tokenizer.
  (r"(en|de)coder/.+/kernel", ("i", "j", "channels_in", "channels_out")),
  (r"(en|de)coder/.+/(bias|scale)", ("channels_out",)),
  (r"(post_)?quant_conv/kernel", ("i", "j", "latent_in", "latent_out")),
  (r"(post_)?quant_conv/bias", ("latent_out",)),
  (r"phi_kernel", ("phis", "i", "j", "latent_in", "latent_out")),
  (r"phi_bias", ("phis", "latent_out")),
  (r"codebook", ("vocab", "latent")),
  (r"code_hits_SV", ("scales", "vocab")),
  (r"explained_S", ("scales",)),
  (r"grace_V", ("vocab",)),
  (r"patch_\w+/kernel", ("i", "j", "channels_in", "channels_out")),
  (r"patch_\w+/(bias|scale)", ("channels_out",)),
)

# What is not here is not split. Activations call their D "embed", so that it
# stays whole where "width" is split.
AXIS_RULES = (
  ("batch", mesh_lib.BATCH_AXES),
  ("width", ("fsdp",)),
  ("heads", ("model",)),
  ("mlp", ("model",)),
  ("modulation", ("model",)),
)


def axes_of(path: str) -> tuple[str, ...]:
  """Return the names of a parameter's dimensions; `path` as in PARAM_AXES.

  Raises:
    ValueError: no rule matches.
  """
  for pattern, axes in PARAM_AXES:
    if re.fullmatch(pattern, path):
      return axes
  raise ValueError(
    f"parameter {path} matches no rule; add one to PARAM_AXES in "
    "var_jax/parallel/rules.py."
  )


def sharding(mesh: Mesh, path: str, shape: tuple[int, ...]) -> NamedSharding:
  """Return how an array of the state lies on the mesh.

  Raises:
    ValueError: no rule matches.
  """
  axes = axes_of(path) if shape else ()
  if len(axes) != len(shape):
    raise ValueError(
      f"parameter {path} has shape {shape} and its rule names {axes}; correct "
      "PARAM_AXES in var_jax/parallel/rules.py."
    )
  return NamedSharding(mesh, logical(mesh, axes))


def logical(mesh: Mesh, axes) -> PartitionSpec:
  """Return how an array with such logical axes lies on the mesh."""
  return nn.logical_to_mesh_axes(axes, axis_rules(mesh))


def axis_rules(mesh: Mesh) -> list[tuple[str, tuple[str, ...]]]:
  """Return AXIS_RULES without the axes that a mesh does not have."""
  return [(name, mesh_lib.present(mesh, axes)) for name, axes in AXIS_RULES]


def shardings(mesh: Mesh, tree: Any) -> Any:
  """Return the sharding of each leaf of a state, parameters or moments.

  Args:
    tree: of arrays or their shapes.

  Raises:
    ValueError: a leaf has no rule, or does not divide.
  """
  check_divides(mesh, tree)
  return jax.tree.map_with_path(
    lambda path, leaf: sharding(mesh, name_of(path), leaf.shape), tree
  )


def name_of(path) -> str:
  """Return what PARAM_AXES calls a leaf, wherever in a state it is."""
  names = [str(getattr(k, "key", getattr(k, "name", k))) for k in path]
  if "params" in names:  # of the model, its average, or a moment of it
    last = len(names) - 1 - names[::-1].index("params")
    names = names[last + 1 :]
  return "/".join(names)


def check_divides(mesh: Mesh, tree: Any) -> None:
  """Raise ValueError unless each leaf divides; the message has what would."""
  leaves = [
    (name_of(path), leaf.shape)
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    if leaf.shape
  ]
  wrong = _first_uneven(dict(mesh.shape), leaves)
  if not wrong:
    return
  fits = [
    str(cfg)
    for cfg in mesh_lib.factorisations(mesh.size // mesh.shape.get("slice", 1))
    if not _first_uneven({"fsdp": cfg.fsdp, "model": cfg.model}, leaves)
  ]
  raise ValueError(f"{wrong}; use a mesh like {', or '.join(fits[-3:])}.")


def _first_uneven(sizes: dict[str, int], leaves) -> str:
  rules = dict(AXIS_RULES)
  for path, shape in leaves:
    for name, size in zip(axes_of(path), shape, strict=True):
      (axis,) = rules.get(name, ("",))
      if size % sizes.get(axis, 1):
        return (
          f"{name} {size} of {path} is not divisible by {axis}={sizes[axis]}"
        )
  return ""


@dataclasses.dataclass(frozen=True)
class Context:
  """Gives the logical axes of activations their meaning on a mesh.

  Calling it returns a context manager; equal meshes make equal contexts.
  """

  mesh: Mesh

  @contextlib.contextmanager
  def __call__(self) -> Iterator[None]:
    with jax.set_mesh(self.mesh), nn.logical_axis_rules(axis_rules(self.mesh)):
      yield


class Jit:
  """`jax.jit` whose function is traced, and runs, on a mesh."""

  def __init__(self, mesh: Mesh, function: Callable, **options):
    platform = mesh.devices.flat[0].platform
    self._on = Context(mesh)
    self._jitted = cpu.Jit(function, platform, **options)

  def __call__(self, *args):
    with self._on():
      return self._jitted(*args)

  def lower(self, *args) -> jax.stages.Lowered:
    """Return the program for arguments of such shapes and shardings."""
    with self._on():
      return self._jitted.lower(*args)
