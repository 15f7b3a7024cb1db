"""The model as users hold it: encode, decode, sample, edit."""

import functools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import numpy as np

from var_jax import checks
from var_jax.generation import edit as edit_lib
from var_jax.generation import sampler
from var_jax.generation.sampler import ModelParams, Models, Sample
from var_jax.models import cpu
from var_jax.models.scales import ScaleSchedule, Size
from var_jax.models.tokenizer import TokenizerConfig
from var_jax.models.transformer import VARConfig
from var_jax.parallel import mesh as mesh_lib


class ModelConfig(NamedTuple):
  tokenizer: TokenizerConfig
  transformer: VARConfig | None  # None: a tokenizer alone


class Preview(NamedTuple):
  """One scale of `Model.stream`, as soon as it is drawn."""

  scale: int
  tokens_Bl: jax.Array
  preview_BHW3: jax.Array


class Model:
  """A tokenizer and, unless it was trained alone, a transformer.

  Images are float32 [B, H, W, 3] in [-1, 1]; tokens int32 [B, L], scales
  concatenated coarse to fine; labels 0..C-1, or -1 for unconditional. Every
  method raises ValueError on an argument that does not fit.

  On a mesh, results are split by rows, or whole on every device where rows do
  not divide. All its processes make every call, with the same values or what
  a call returned; `parallel.multihost.gathered` makes NumPy of that.
  """

  def __init__(
    self,
    models: Models,
    params: ModelParams,
    class_names: tuple[str, ...] = (),
    mesh: jax.sharding.Mesh | None = None,
  ):
    """Hold models and their parameters.

    Args:
      mesh: that the parameters are on; its context is in `models`.
    """
    self.models, self.params, self.class_names = models, params, class_names
    self.mesh = mesh

  @property
  def config(self) -> ModelConfig:
    var = self.models.var
    return ModelConfig(self.models.tokenizer.cfg, var and var.cfg)

  def encode(
    self, images_BHW3: jax.Array, scales: Sequence[Size] | None = None
  ) -> jax.Array:
    """Return tokens [B, L].

    Args:
      scales: a list other than the model's; it ends at the latent grid of
        the images, which may then be of another size, or not square.
    """
    schedule = self._schedule(scales)
    images_BHW3 = checks.images(images_BHW3, schedule, self.config.tokenizer)
    return self._on_rows(
      functools.partial(
        _encode_program,
        self.models.tokenizer,
        schedule,
        self.params.tokenizer,
      ),
      images_BHW3,
    )

  def decode(
    self, tokens_BL: jax.Array, scales: Sequence[Size] | None = None
  ) -> jax.Array:
    """Return images, clipped to [-1, 1]."""
    schedule = self._schedule(scales)
    tokens_BL = checks.tokens(tokens_BL, schedule, self.config.tokenizer)
    return self._on_rows(
      functools.partial(
        _decode_program,
        self.models.tokenizer,
        schedule,
        self.params.tokenizer,
      ),
      tokens_BL,
    )

  def logits(self, labels_B: jax.Array, tokens_BL: jax.Array) -> jax.Array:
    """Return teacher-forced logits [B, L, V] in float32, nothing dropped."""
    labels_B = checks.labels(labels_B, self.config.transformer)
    schedule = self._schedule(None)
    tokens_BL = checks.tokens(tokens_BL, schedule, self.config.tokenizer)
    if labels_B.shape[0] != tokens_BL.shape[0]:
      raise ValueError(
        f"{labels_B.shape[0]} labels do not match {tokens_BL.shape[0]} rows "
        "of tokens; give one label a row."
      )
    return self._on_rows(
      functools.partial(_logits, self.models, self.params), labels_B, tokens_BL
    )

  def sample(
    self,
    labels_B: jax.Array,
    key: jax.Array,
    guidance: float = 1.5,
    top_k: int = 900,
    top_p: float = 0.96,
    smooth: bool = False,
    *,
    temperature: float | Sequence[float] = 1.0,
    guided_scales: tuple[int, int] | None = None,
    fused: bool | None = None,
  ) -> Sample:
    """Return images and tokens.

    An image depends on its own key, label and options, not on its batch.

    Args:
      key: one key (image i uses fold_in(key, i)), or keys [B].
      guidance: strength at the finest scale; it grows linearly from 0.
      top_k, top_p: filters, 0 is off; top-p acts on what top-k left.
      smooth: mixtures of codes in place of drawn ones, the official
        `more_smooth`; the image then does not follow from the tokens.
      temperature: that guided logits are divided by; one, or one a scale.
      guided_scales: (a, b) has guidance from scale a up to, not with, scale b
        only. What comes after takes half the work.
      fused: one program for all, or one a scale, which draw the same. By
        default one, but on CPU, where it gains nothing and compiles later.
    """
    call = self._prepare(
      labels_B, key, guidance, top_k, top_p, smooth, temperature, guided_scales
    )
    return self._cut(sampler.generate(**call, fused=fused), len(labels_B))

  def compile(
    self,
    batch_size: int,
    guidance: float = 1.5,
    smooth: bool = False,
    *,
    guided_scales: tuple[int, int] | None = None,
    fused: bool | None = None,
  ) -> None:
    """Compile what `sample` of so many labels takes, before it is called.

    On a CPU, where that is many programs, they are compiled side by side.

    Args:
      batch_size: of labels; `sample_all` has the same whatever their number.
      guidance: any but 0 is the same. The rest is as in `sample`, and what is
        not asked here changes no program.
    """
    checks.batch_size(batch_size)
    labels_B = np.zeros(batch_size, np.int32)
    how = (guidance, 0, 0.0, smooth, 1.0, guided_scales)
    call = self._prepare(labels_B, jax.random.key(0), *how)
    sampler.compile_ahead(**call, fused=fused)

  def stream(
    self,
    labels_B: jax.Array,
    key: jax.Array,
    guidance: float = 1.5,
    top_k: int = 900,
    top_p: float = 0.96,
    smooth: bool = False,
    *,
    temperature: float | Sequence[float] = 1.0,
    guided_scales: tuple[int, int] | None = None,
  ) -> Iterator[Preview]:
    """Yield a preview as soon as its scale is drawn; else as `sample`."""
    call = self._prepare(
      labels_B, key, guidance, top_k, top_p, smooth, temperature, guided_scales
    )

    def previews():
      for drawn in sampler.draw_scales(**call):
        image = sampler.decode(self.models, self.params, drawn.f_hat_BhwZ)
        shown = (drawn.tokens_Bl, image)
        yield Preview(drawn.scale, *self._cut(shown, len(labels_B)))

    return previews()

  def sample_all(
    self, labels_N: jax.Array, key: jax.Array, batch_size: int, **how
  ) -> Iterator[Sample]:
    """Yield any number of images in batches, the next drawn meanwhile.

    Image i has the key fold_in(key, i) whatever the size of a batch.

    Args:
      key: one key, or keys [N].
      batch_size: of all but the last Sample, which has what is left.
      how: options, as `sample` has them.
    """
    labels_N = checks.labels(labels_N, self.config.transformer)
    keys_N = sampler.image_keys(checks.key(key, len(labels_N)), len(labels_N))
    checks.batch_size(batch_size)

    def batch(first: int) -> Sample:
      # The last one is filled up: it is no reason to compile again.
      rows = np.arange(first, first + batch_size).clip(max=len(labels_N) - 1)
      drawn = self.sample(labels_N[rows], keys_N[rows], **how)
      return jax.tree.map(lambda x: x[: len(labels_N) - first], drawn)

    ahead = None
    for first in range(0, len(labels_N), batch_size):
      drawn, ahead = ahead, batch(first)
      if drawn is not None:
        yield drawn
    yield ahead

  def edit(
    self,
    images_BHW3: jax.Array,
    keep_hw: np.ndarray,
    labels_B: jax.Array,
    key: jax.Array,
    *,
    method: str = "official",
    guidance: float = 1.5,
    top_k: int = 900,
    top_p: float = 0.96,
    smooth: bool = False,
    temperature: float | Sequence[float] = 1.0,
    guided_scales: tuple[int, int] | None = None,
    fused: bool | None = None,
  ) -> Sample:
    """Return images whose kept tokens are given and whose others are drawn.

    Args:
      keep_hw: bool [h, w] on the finest token grid, True keeps.
      method: "official", the mask rule of the published demo.
    """
    if method not in edit_lib.METHODS:
      raise ValueError(
        f"method {method!r} is not known; use one of {edit_lib.METHODS}."
      )
    call = self._prepare(
      labels_B, key, guidance, top_k, top_p, smooth, temperature, guided_scales
    )
    schedule = self._schedule(None)
    keep_hw = np.asarray(keep_hw)
    if keep_hw.shape != schedule.grid or keep_hw.dtype != bool:
      raise ValueError(
        f"keep_hw is {keep_hw.dtype} {keep_hw.shape}, not bool "
        f"{schedule.grid}; give the finest token grid."
      )
    tokens_BL = self.encode(images_BHW3)
    if tokens_BL.shape[0] != len(labels_B):
      raise ValueError(
        f"{len(labels_B)} labels do not match {tokens_BL.shape[0]} images; "
        "give one label an image."
      )
    given = edit_lib.given_tokens(self._spread(tokens_BL), keep_hw, schedule)
    drawn = sampler.generate(**call, given=given, fused=fused)
    return self._cut(drawn, len(labels_B))

  def _schedule(self, scales: Sequence[Size] | None) -> ScaleSchedule:
    if scales is None:
      return self.config.tokenizer.schedule
    return ScaleSchedule(tuple(scales))

  def _prepare(self, labels_B, key, *how):
    """Check the arguments of a draw; return the sampler's."""
    guidance, top_k, top_p, smooth, temperature, guided_scales = how
    tokenizer, var = self.config
    labels_B = checks.labels(labels_B, var)
    key = checks.key(key, labels_B.shape[0])
    checks.fits(labels_B.shape[0], self.models, self.params)
    return dict(
      models=self.models,
      params=self.params,
      labels_B=self._spread(labels_B),
      keys_B=self._spread(sampler.image_keys(key, labels_B.shape[0])),
      options=checks.options(guidance, top_k, top_p, temperature, tokenizer),
      guided=guidance != 0 and checks.guided_scales(guided_scales, var),
      smooth=smooth,
    )

  def _on_rows(self, function, *arrays) -> jax.Array:
    """Return function(*arrays), rows split over the mesh if there is one."""
    with self.models.context():
      result = function(*map(self._spread, arrays))
    return self._cut(result, len(arrays[0]))

  def _spread(self, array):
    """Return an array by rows, filled up to divide; as it is without a mesh."""
    return array if self.mesh is None else mesh_lib.spread(self.mesh, array)

  def _cut(self, tree, rows: int):
    """Return the first rows: what filled the batch up is not the caller's."""
    if self.mesh is None:
      return tree
    return jax.tree.map(lambda x: mesh_lib.cut(self.mesh, x, rows), tree)


def _encode(tokenizer, schedule, params, images_BHW3):
  return tokenizer.apply(params, images_BHW3, schedule, method="encode")


_encode_program = cpu.Jit(_encode, static_argnums=(0, 1))


def _decode(tokenizer, schedule, params, tokens_BL):
  return tokenizer.apply(params, tokens_BL, schedule, method="decode")


_decode_program = cpu.Jit(_decode, static_argnums=(0, 1))


@functools.partial(jax.jit, static_argnums=0)
def _logits(models, params, labels_B, tokens_BL):
  inputs_BLZ = models.tokenizer.apply(
    params.tokenizer, tokens_BL, method="inputs"
  )
  return models.var.apply(params.var, labels_B, inputs_BLZ)
