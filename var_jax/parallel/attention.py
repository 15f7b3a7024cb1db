"""The attention function of a platform, for the transformer to call.

All of them return what `layers.attend` returns. Splash attention (a Pallas
kernel of JAX) never has the L^2 weights in memory and skips blocks that the
block-causal mask hides; it runs inside a shard_map, rows of the batch and heads
split as everywhere. `cpu_attention.Attend` does the like on one CPU. Where
nothing is masked, as in sampling, plain attention is used.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu.splash_attention import (
  splash_attention_kernel,
  splash_attention_mask,
)
from jax.sharding import Mesh, PartitionSpec

from var_jax.models import cpu_attention, layers
from var_jax.models.scales import ScaleSchedule
from var_jax.parallel import mesh as mesh_lib

IMPLEMENTATIONS = ("auto", "plain", "splash", "cudnn", "cpu")

_LANES = 128  # of a TPU; lengths are padded to a multiple
_MAX_BLOCK = 512


def choose(name: str, mesh: Mesh, scales: ScaleSchedule, dtype) -> Callable:
  """Return the attention function of a name, or of the mesh's platform.

  Args:
    name: "auto" is splash on TPU, cudnn on GPU in bfloat16, cpu on one CPU in
      float32, plain elsewhere.
    dtype: of the matmul inputs.

  Raises:
    ValueError: the name is not known, or cudnn or cpu is asked for elsewhere.
  """
  if name not in IMPLEMENTATIONS:
    raise ValueError(
      f"attention {name!r} is not known; use one of "
      f"{', '.join(IMPLEMENTATIONS)}."
    )
  platform = mesh.devices.flat[0].platform
  half = jnp.dtype(dtype) == jnp.bfloat16
  if name == "auto":
    of_gpu = "cudnn" if half else "plain"
    one_cpu = mesh_lib.is_one_cpu(mesh) and not half
    of_cpu = "cpu" if one_cpu else "plain"
    name = {"tpu": "splash", "gpu": of_gpu, "cpu": of_cpu}.get(
      platform, "plain"
    )
  levels = tuple(scales.level_ids().tolist())
  if name == "splash":
    return Splash(mesh, levels, interpret=platform != "tpu")
  if name == "cpu":
    if not mesh_lib.is_one_cpu(mesh) or half:
      raise ValueError(
        f"attention 'cpu' is for one CPU in float32, not for {mesh.size} x "
        f"{platform} in {dtype}; use auto."
      )
    return cpu_attention.Attend(levels)
  if name == "cudnn":
    if platform != "gpu" or not half:
      raise ValueError(
        f"attention 'cudnn' does not run on {platform} in {dtype}; use auto, "
        "or model.dtype=bfloat16 on a GPU."
      )
    return cudnn
  return layers.attend


def unmasked(platform: str | None, dtype) -> Callable:
  """Return the function for sampling, where a scale sees all that came before.

  Args:
    platform: by default that of the first device.
  """
  on_gpu = (platform or jax.default_backend()) == "gpu"
  half = jnp.dtype(dtype) == jnp.bfloat16
  return cudnn if on_gpu and half else layers.attend


def name_of(attend: Callable) -> str:
  """Return which of IMPLEMENTATIONS a function is, as `choose` returns it."""
  if isinstance(attend, Splash):
    return "splash"
  if isinstance(attend, cpu_attention.Attend):
    return "cpu"
  return "cudnn" if attend is cudnn else "plain"


def cudnn(q_BlNK, k_BTNK, v_BTNK, mask_lT) -> jax.Array:
  """Return softmax(q k^T) v by cuDNN's fused kernel."""
  return jax.nn.dot_product_attention(
    q_BlNK,
    k_BTNK,
    v_BTNK,
    mask=None if mask_lT is None else mask_lT[None, None],
    scale=1.0,
    implementation="cudnn",
  )


@dataclasses.dataclass(frozen=True)
class Splash:
  """Splash attention with the block-causal mask, which it makes itself.

  Args:
    level_ids: the scale of each token.
    interpret: run the kernel's Python, which any platform can.
  """

  mesh: Mesh
  level_ids: tuple[int, ...]
  interpret: bool

  def __call__(self, q_BlNK, k_BTNK, v_BTNK, mask_lT) -> jax.Array:
    """Return [B, l, N, K]; a mask must be that of the first l tokens."""
    if mask_lT is None:
      return layers.attend(q_BlNK, k_BTNK, v_BTNK, None)
    rows = mesh_lib.present(self.mesh, mesh_lib.BATCH_AXES)
    (heads,) = mesh_lib.present(self.mesh, ("model",)) or (None,)
    split = PartitionSpec(rows, None, heads, None)
    return jax.shard_map(
      self._local,
      mesh=self.mesh,
      in_specs=(split,) * 3,
      out_specs=split,
      check_vma=False,  # Pallas does not say what varies over which axis
    )(q_BlNK, k_BTNK, v_BTNK)

  def _local(self, q_BlNK, k_BlNK, v_BlNK) -> jax.Array:
    l, N = q_BlNK.shape[1:3]
    padding = -l % _LANES
    kernel = self._kernel(l, l + padding, N)
    q_BNpK, k_BNpK, v_BNpK = (
      jnp.pad(x.swapaxes(1, 2), ((0, 0), (0, 0), (0, padding), (0, 0)))
      for x in (q_BlNK, k_BlNK, v_BlNK)
    )
    out_BNpK = jax.vmap(kernel)(q_BNpK, k_BNpK, v_BNpK)
    return out_BNpK[:, :, :l].swapaxes(1, 2)

  def _kernel(self, length: int, padded: int, heads: int):
    # Padding is a scale of its own, finer than all: no other sees it, and no
    # row of it is empty, which has no softmax.
    level_p = np.full(padded, len(self.level_ids))
    level_p[:length] = self.level_ids[:length]
    mask = splash_attention_mask.NumpyMask(level_p[:, None] >= level_p)
    block = max(
      size
      for size in range(_LANES, _MAX_BLOCK + 1, _LANES)
      if padded % size == 0
    )
    sizes = splash_attention_kernel.BlockSizes(
      block_q=block,
      block_kv=block,
      block_q_dkv=block,
      block_kv_dkv=block,
      block_q_dq=block,
      block_kv_dq=block,
    )
    return splash_attention_kernel.make_splash_mha(
      splash_attention_mask.MultiHeadMask([mask] * heads),
      block_sizes=sizes,
      head_shards=1,
      q_seq_shards=1,
      interpret=self.interpret,
    )
