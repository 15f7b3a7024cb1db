"""The digits demo: a tokenizer and a VAR from nothing, judged by a stranger.

Real scanned digits (scikit-learn, 1,797 images) are split 70/30. Both models
see the 70% only. The judge, a support vector classifier, is fitted on the
same 70% of real digits and first has to prove itself on the other 30%.
"""

import time
from typing import Any

import jax
import ml_collections
import numpy as np
from etils import epath

from var_jax import files, images, loading
from var_jax.data import pipeline, sources, transforms
from var_jax.models.tokenizer import TokenizerConfig
from var_jax.models.transformer import VARConfig
from var_jax.training import checks, loop
from var_jax.training.config import run_config, section
from var_jax.training.optim import OptimizerConfig
from var_jax.training.tokenizer_step import TokenizerLossConfig
from var_jax.training.var_step import VARLossConfig

SAMPLES_A_CLASS = 50
SAMPLING = dict(guidance=1.0, top_k=0, top_p=0.95)

# Of metrics.json: (bound, whether it is a lower one).
BOUNDS = {
  "judge_accuracy": (0.97, True),
  "sample_accuracy": (0.95, True),
  "worst_class_accuracy": (0.85, True),
  "novelty": (0.8, True),
  "token_copies": (0.02, False),
  "diversity": (0.5, True),
}


def run(workdir: epath.PathLike) -> None:
  """Train, sample, judge; write the pictures and metrics.json.

  Raises:
    ValueError: a measure misses its bound; everything is written by then.
  """
  start = time.monotonic()
  workdir = files.absolute(workdir, buckets=())
  resumed = (workdir / "tokenizer_training").exists()
  tokenizer_workdir = workdir / "tokenizer_training"
  loop.train(tokenizer_config(), tokenizer_workdir)
  loop.train(var_config(str(tokenizer_workdir)), workdir)
  trained = time.monotonic()
  model = loading.load(workdir)
  train, held_out = (all_of(split) for split in ("train", "val"))
  labels = np.repeat(np.arange(10), SAMPLES_A_CLASS)
  sample = model.sample(labels, jax.random.key(0), **SAMPLING)
  metrics = judge(model, train, held_out, labels, sample)
  write_pictures(workdir, model, held_out, labels, sample)
  end = time.monotonic()
  metrics["resumed"] = resumed  # then the seconds are not those of a demo
  metrics["seconds"] = end - start
  metrics["seconds_of_training"] = trained - start
  metrics["settings"] = {
    "sampling": SAMPLING,
    "samples_a_class": SAMPLES_A_CLASS,
    "tokenizer": checks.to_json(tokenizer_config()),
    "var": checks.to_json(var_config()),
  }
  files.write_json(workdir / "metrics.json", metrics)
  missed = _print_metrics(metrics)
  names = ("samples.png", "reconstructions.png", "scales.png", "metrics.json")
  for name in names:
    print(workdir / name)
  if missed:
    raise ValueError(
      f"the demo missed {', '.join(missed)}; look at {workdir}/metrics.json."
    )


def judge(model, train, held_out, labels, sample) -> dict[str, Any]:
  """Return what the samples are worth, by the measures of BOUNDS.

  Args:
    train, held_out: (uint8 images [B, 32, 32, 3], labels [B]) of real digits.
    sample: a Sample of `labels`.
  """
  from sklearn.svm import SVC

  pixels = images.to_uint8(sample.images_BHW3)
  classifier = SVC(C=10.0, gamma=0.001).fit(_features(train[0]), train[1])
  right = classifier.predict(_features(pixels)) == labels
  classes = [float(right[labels == c].mean()) for c in range(10)]

  train_tokens = model.encode(images.to_float(train[0]))
  known = {row.tobytes() for row in np.asarray(train_tokens)}
  copies = [row.tobytes() in known for row in np.asarray(sample.tokens_BL)]
  held_out_right = classifier.predict(_features(held_out[0])) == held_out[1]
  return {
    "judge_accuracy": float(held_out_right.mean()),
    "sample_accuracy": float(right.mean()),
    "worst_class_accuracy": min(classes),
    "class_accuracy": classes,
    "novelty": novelty(*map(grey, (pixels, held_out[0], train[0]))),
    "token_copies": float(np.mean(copies)),
    "diversity": diversity(grey(pixels), labels, grey(train[0]), train[1]),
  }


def novelty(samples, held_out, train) -> float:
  """Return how far samples are from the training images.

  The median distance to the nearest one, over that of held-out ones.
  """
  nearest = [
    np.median(distances(images, train).min(axis=1))
    for images in (samples, held_out)
  ]
  return float(nearest[0] / nearest[1])


def diversity(samples, labels, real, real_labels) -> float:
  """Return how far samples of a class are from each other.

  The median distance to the nearest other one of the class, over that of as
  many real images.
  """

  def nearest_other(images):
    apart = distances(images, images)
    np.fill_diagonal(apart, np.inf)
    return apart.min(axis=1)

  drawn, found = [], []
  for c in np.unique(labels):
    of_class = samples[labels == c]
    drawn.append(nearest_other(of_class))
    found.append(nearest_other(real[real_labels == c][: len(of_class)]))
  return float(
    np.median(np.concatenate(drawn)) / np.median(np.concatenate(found))
  )


def write_pictures(workdir, model, held_out, labels, sample) -> None:
  """Write reconstructions.png, samples.png and scales.png."""
  pixels = images.to_uint8(sample.images_BHW3)
  real = held_out[0][:12]
  again = model.decode(model.encode(images.to_float(real)))
  pairs = [list(real), list(images.to_uint8(again))]
  _write(workdir / "reconstructions.png", pairs, ("real", "rec."))
  rows = [list(pixels[labels == c][:12]) for c in range(10)]
  _write(workdir / "samples.png", rows, [str(c) for c in range(10)])
  digits = np.arange(10)
  stages = [
    images.to_uint8(drawn.preview_BHW3)
    for drawn in model.stream(digits, jax.random.key(1), **SAMPLING)
  ]
  sides = [f"{n}x{n}" for n in model.config.tokenizer.scales]
  _write(workdir / "scales.png", [list(row) for row in stages], sides)


def _write(path, rows, names) -> None:
  enlarged = [[images.enlarge(image, 2) for image in row] for row in rows]
  images.write_image(path, images.grid(enlarged, names))


def all_of(split: str) -> tuple[np.ndarray, np.ndarray]:
  """Return the uint8 images [B, 32, 32, 3] and labels of a split."""
  source = sources.open_source("digits", split)
  transform = transforms.make_transform(
    "resize", (32, 32), train=False, flip=False
  )
  (batch,) = pipeline.evaluation_batches(
    source, transform, batch_size=len(source)
  )
  return batch["image"], batch["label"]


def _features(pixels_BHW3: np.ndarray) -> np.ndarray:
  """Return the 8x8 grey values 0..16 that the digits were scanned at."""
  cells = grey(pixels_BHW3).reshape(-1, 8, 4, 8, 4).mean(axis=(2, 4))
  return cells.reshape(len(cells), 64) * (16 / 255)


def grey(pixels_BHW3: np.ndarray) -> np.ndarray:
  """Return the mean of the colours, [B, H, W, 1]."""
  return pixels_BHW3.mean(axis=-1, keepdims=True, dtype=np.float32)


def distances(a_BHWZ: np.ndarray, b_BHWZ: np.ndarray) -> np.ndarray:
  """Return Euclidean distances between all images of two kinds, [A, B]."""
  from scipy.spatial.distance import cdist

  a, b = (x.reshape(len(x), -1) for x in (a_BHWZ, b_BHWZ))
  return cdist(a, b)


def _print_metrics(metrics: dict[str, Any]) -> list[str]:
  """Print each measure beside its bound; return those that miss."""
  missed = []
  for name, (bound, lower) in BOUNDS.items():
    value = metrics[name]
    holds = value >= bound if lower else value <= bound
    if not holds:
      missed.append(name)
    sign = ">=" if lower else "<="
    mark = "" if holds else "   MISSED"
    print(f"{name:22s} {value:.3f}  ({sign} {bound}){mark}")
  print(f"{'seconds':22s} {metrics['seconds']:.0f}")
  return missed


def tokenizer_config() -> ml_collections.ConfigDict:
  """Return the tokenizer's config: 32 px, 4x4 latent, scales 1, 2, 4."""
  config = _common("tokenizer", steps=500, batch_size=32)
  config.ema_decay = 0.99
  config.model = section(
    TokenizerConfig,
    vocab_size=128,
    latent_channels=16,
    channels=16,
    channel_mults=(1, 1, 2, 4),
    norm_groups=8,
    encoder_blocks=1,
    decoder_blocks=1,
    scales=(1, 2, 4),
    num_phis=0,
  )
  config.loss = section(TokenizerLossConfig, revive_every=50)
  # Rates are written for a batch of 256.
  config.optimizer = section(
    OptimizerConfig,
    learning_rate=2e-3 * 8,
    schedule="cos",
    warmup_fraction=0.04,
  )
  return config


def var_config(tokenizer_path: str = "") -> ml_collections.ConfigDict:
  """Return the transformer's config: 4 layers of 128, 1.2M parameters."""
  config = _common("var", steps=1200, batch_size=32)
  config.tokenizer_path = tokenizer_path
  config.ema_decay = 0.995
  config.model = section(
    VARConfig,
    without=("num_classes", "vocab_size", "latent_channels", "scales"),
    depth=4,
    width=128,
    heads=4,
    dropout=0.1,
    drop_path=0.0,
  )
  config.loss = section(VARLossConfig)
  config.optimizer = section(
    OptimizerConfig,
    learning_rate=1e-3 * 8,
    schedule="cos",
    warmup_fraction=0.06,
  )
  return config


def _common(kind: str, steps: int, batch_size: int):
  config = run_config(kind)
  config.steps = steps
  config.data.source = "digits"
  config.data.batch_size = batch_size
  config.data.transform = "jitter"
  config.log_every, config.checkpoint_every = 100, 500
  config.keep_checkpoints = 1
  return config
