"""What evaluations of a transformer say of the images that it draws."""

import dataclasses
import math
from collections.abc import Callable, Iterator

import numpy as np

from var_jax.api import Model
from var_jax.data import pipeline
from var_jax.evaluation import (
  comparable,
  made_sets,
  measure,
  networks,
  receipt,
)
from var_jax.evaluation.partial import Part

Stopped = Callable[[], bool]


@dataclasses.dataclass(frozen=True)
class DrawsConfig:
  """Args:
  count: images that each evaluation draws, a multiple of the classes; 0
    draws none.
  network: the folder of what looks at them, as `var-jax evaluate` takes it
    for --inception or --classifier.
  guidance, top_k, top_p: as `Model.sample` has them.
  """

  count: int = 0
  network: str = ""
  guidance: float = 1.5
  top_k: int = 900
  top_p: float = 0.96

  def __post_init__(self):
    if self.count < 0 or self.count == 1:
      raise ValueError(
        f"count {self.count} is no number of images to measure; use 2 or more, "
        "or 0 for none."
      )
    if self.count and not self.network:
      raise ValueError(
        f"count {self.count} needs a network that looks at the images; set "
        "network to what `var-jax convert --inception` or `var-jax evaluate "
        "--fit-classifier` wrote."
      )
    if not math.isfinite(self.guidance):
      raise ValueError(f"guidance {self.guidance} is no number; use 1.5.")


class Draws:
  """Distance and score of images that are drawn, always from the same keys.

  The reference is the held-out split, looked at once. A number has the count in
  its name: one of fewer images is another measure.
  """

  def __init__(self, cfg: DrawsConfig, model_config, mesh, batch_size: int):
    """Open the network.

    Args:
      model_config: of tokenizer and transformer.

    Raises:
      ValueError: there is none, or it or an option does not suit the model.
    """
    self._cfg, self._mesh, self._batch_size = cfg, mesh, batch_size
    self._network = networks.open_either(cfg.network)
    self._reference = None
    made_sets.check_options(model_config, cfg.guidance, cfg.top_k, cfg.top_p)
    made_sets.check_count(cfg.count, model_config.transformer.num_classes)
    shape, suits = model_config.tokenizer.image_shape, self._network.shape
    if suits and suits[:2] != shape:
      raise ValueError(
        f"the classifier {cfg.network} is of {suits[0]}x{suits[1]} pixels and "
        f"the model of {shape[0]}x{shape[1]}; fit another."
      )

  def __call__(
    self, run, model: Model, stopped: Stopped
  ) -> dict[str, float] | None:
    """Return the numbers, or None if there is no time left for them."""
    if self._reference is None:
      parts = self._look(self._real(run), stopped)
      if parts is None:
        return None
      if sum(len(part["pooled_BD"]) for part in parts) < 2:
        raise ValueError(
          "draws.count compares with held-out images, and fewer than two can "
          "be read; give eval_source more."
        )
      # Without images, which only measures that are not kept need.
      self._reference = measure.as_reference(parts, count=0)
    cfg, names = self._cfg, self._network.names
    how = dict(guidance=cfg.guidance, top_k=cfg.top_k, top_p=cfg.top_p)
    drawn = made_sets.Drawn(model, cfg.count, run.config.seed, **how)
    parts = self._look(drawn.batches(self._batch_size), stopped)
    if parts is None:
      return None
    numbers = measure.compare(measure.gather(parts), self._reference, names)
    kept = {name: numbers[name] for name in (names.distance, names.score)}
    named = receipt.renamed(kept, comparable.other_weights(self._network))
    return {f"{name}_{cfg.count}": value for name, value in named.items()}

  def _real(self, run) -> Iterator[np.ndarray]:
    """Yield held-out images, as training sees them without chance."""
    for batch in pipeline.evaluation_batches(
      run.held_out,
      run.plain,
      batch_size=self._batch_size,
      limit=run.config.eval_samples or None,
      on_broken=run.config.data.on_broken,
    ):
      if batch["real"].any():  # else all of it was broken
        yield batch["image"][batch["real"]]

  def _look(
    self, batches: Iterator[np.ndarray], stopped: Stopped
  ) -> list[Part] | None:
    parts = []
    for _, features in networks.extract(
      self._network, batches, self._batch_size, self._mesh
    ):
      parts.append(features.present())
      if stopped():
        return None
    return parts
