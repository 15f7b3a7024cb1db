"""Samples of a VAR, judged by a stranger.

    python benchmarks/judged.py --checkpoint DIR --train train.npz \\
      --test test.npz --judge network --output DIR

The judge is fitted on the real training images and first has to prove itself
on the real test images: a small convolutional network, for tens of thousands
of grey images, or a support vector machine, for a thousand in colour. Both
archives hold `images` (uint8) and `labels`. Writes samples.png, neighbours.png
(samples above the training images nearest to them), reconstructions.png,
scales.png and judged.json.
"""

import argparse
import json
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from etils import epath

import var_jax
from var_jax import demo, files, images
from var_jax.data import sources, transforms
from var_jax.evaluation import classifier, measure

SAMPLES_A_CLASS = 100
SAMPLES_AT_ONCE = 250
SVM = dict(cells=16, components=100, C=10.0)

Judge = Callable[[np.ndarray], np.ndarray]  # uint8 [B, H, W, 3] -> labels [B]


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  for name in ("checkpoint", "train", "test", "output"):
    parser.add_argument(f"--{name}", required=True)
  parser.add_argument("--judge", choices=("network", "svm"), required=True)
  parser.add_argument("--guidance", type=float, default=1.5)
  parser.add_argument("--top-k", type=int, default=0)
  parser.add_argument("--top-p", type=float, default=0.95)
  parser.add_argument("--seed", type=int, default=0)
  args = parser.parse_args()

  start = time.process_time()
  output = epath.Path(args.output)
  model = var_jax.load(args.checkpoint)
  if model.config.transformer is None:
    raise SystemExit(f"{args.checkpoint} has no transformer; give a VAR's.")
  shape = model.config.tokenizer.image_shape
  train, test = (read_images(path, shape) for path in (args.train, args.test))
  fit = {"network": fit_network, "svm": fit_svm}[args.judge]
  settings = {"network": {}, "svm": SVM}[args.judge]
  for name, (_, labels) in (("train", train), ("test", test)):
    missing = set(range(len(model.class_names))) - set(labels.tolist())
    if missing:
      words = ", ".join(model.class_names[c] for c in sorted(missing))
      raise SystemExit(f"--{name} has no image of {words}; give some of each.")
  judge = fit(*train)
  judged = time.process_time()
  sampling = dict(guidance=args.guidance, top_k=args.top_k, top_p=args.top_p)
  labels, pixels = draw(model, args.seed, sampling)
  # Grey images as such, whatever colours their samples have.
  grey = not np.ptp(train[0], axis=-1).any()
  compared = demo.grey if grey else np.asarray
  real, unseen = ((compared(x), classes) for x, classes in (train, test))
  record = {
    "sampling": {**sampling, "seed": args.seed},
    "samples_a_class": SAMPLES_A_CLASS,
    "class_names": list(model.class_names),
    "judge": {
      "kind": args.judge,
      **settings,
      **accuracies(judge(test[0]), test[1]),
    },
    "reconstructions": measure_reconstructions(model, judge, *test),
    "samples": {
      **accuracies(judge(pixels), labels),
      "novelty": novelty(compared(pixels), labels, real, unseen),
      "diversity": demo.diversity(compared(pixels), labels, *real),
    },
    "cpu_seconds_of_the_judge": round(judged - start),
    "cpu_seconds": round(time.process_time() - start),
  }
  write_pictures(
    output, model, args.seed, sampling, train, test, labels, pixels, compared
  )
  files.write_json(output / "judged.json", record)
  print(json.dumps(record, indent=2))


def read_images(path: str, shape: tuple[int, int]):
  """Return (uint8 images [B, H, W, 3], labels [B]) as the tokenizer sees them.

  Resampled to `shape` as `data.transform = "resize"` does.
  """
  source = sources.open_source(f"npz:{path}", "train")
  transform = transforms.make_transform(
    "resize", shape, train=False, flip=False
  )
  pixels = [transform(sample["image"], None) for sample in source]
  return np.stack(pixels), np.asarray(source.labels)


def fit_network(pixels_BHW3: np.ndarray, labels_B: np.ndarray) -> Judge:
  """Return a classifier of such images by their grey values."""
  fitted = classifier.fit(demo.grey(pixels_BHW3), labels_B)
  return lambda pixels: fitted.logits(demo.grey(pixels)).argmax(axis=1)


def fit_svm(pixels_BHW3: np.ndarray, labels_B: np.ndarray) -> Judge:
  """Return a classifier of such images by the colours of 16x16 cells."""
  from sklearn.decomposition import PCA
  from sklearn.pipeline import make_pipeline
  from sklearn.svm import SVC

  n, components = SVM["cells"], SVM["components"]
  H, W = pixels_BHW3.shape[1:3]
  if H % n or W % n or len(pixels_BHW3) < components:
    raise SystemExit(
      f"{len(pixels_BHW3)} images of {H}x{W} pixels: the svm needs sides that "
      f"are multiples of {n} and at least {components} images; use network."
    )

  def features(pixels_BHW3):
    B = len(pixels_BHW3)
    cells = pixels_BHW3.reshape(B, n, H // n, n, W // n, 3) / 255
    return cells.mean(axis=(2, 4)).reshape(B, -1)

  # The solver of a part of the components starts at random.
  pca = PCA(components, random_state=0)
  classifier = make_pipeline(pca, SVC(C=SVM["C"]))
  classifier.fit(features(pixels_BHW3), labels_B)
  return lambda pixels_BHW3: classifier.predict(features(pixels_BHW3))


def draw(model, seed: int, sampling: dict) -> tuple[np.ndarray, np.ndarray]:
  """Return (labels, uint8 images), SAMPLES_A_CLASS a class in turn."""
  labels_B = np.repeat(np.arange(len(model.class_names)), SAMPLES_A_CLASS)
  drawn = []
  for i in range(0, len(labels_B), SAMPLES_AT_ONCE):
    key = jax.random.fold_in(jax.random.key(seed), i)
    sample = model.sample(labels_B[i : i + SAMPLES_AT_ONCE], key, **sampling)
    drawn.append(images.to_uint8(sample.images_BHW3))
  return labels_B, np.concatenate(drawn)


def accuracies(predicted_B: np.ndarray, labels_B: np.ndarray) -> dict[str, Any]:
  right_B = predicted_B == labels_B
  classes = [float(right_B[labels_B == c].mean()) for c in np.unique(labels_B)]
  return {
    "accuracy": float(right_B.mean()),
    "mean_class_accuracy": float(np.mean(classes)),
    "worst_class_accuracy": min(classes),
    "class_accuracy": classes,
  }


def measure_reconstructions(model, judge: Judge, pixels, labels):
  """Return what the tokenizer keeps of the first thousand images."""
  real, labels = pixels[:1000], labels[:1000]
  again = _reconstruct(model, real)
  return {
    **measure.psnr_and_ssim([(real, again)]),
    **accuracies(judge(again), labels),
  }


def novelty(pixels, labels, train, test) -> float:
  """Return `demo.novelty` of a class, averaged over the classes."""
  classes = [
    demo.novelty(
      pixels[labels == c],
      test[0][test[1] == c][:SAMPLES_A_CLASS],
      train[0][train[1] == c],
    )
    for c in np.unique(labels)
  ]
  return float(np.mean(classes))


def write_pictures(
  output, model, seed, sampling, train, test, labels, pixels, compared
):
  """Write samples, neighbours, reconstructions and scales, each a .png.

  Args:
    compared: what of images is looked at to find the nearest.
  """
  names, classes = model.class_names, np.arange(len(model.class_names))
  rows = [list(pixels[labels == c][:10]) for c in classes]
  _write(output / "samples.png", rows, names)
  pairs, real = [], compared(train[0])
  for row in rows:
    drawn = compared(np.stack(row))
    nearest = demo.distances(drawn, real).argmin(axis=1)
    pairs += [row, list(train[0][nearest])]
  names_of_pairs = [word for name in names for word in (name, "nearest")]
  _write(output / "neighbours.png", pairs, names_of_pairs)
  real = np.stack([test[0][test[1] == c][0] for c in classes])
  pairs = [list(real), list(_reconstruct(model, real))]
  _write(output / "reconstructions.png", pairs, ("real", "rec."))
  stages = [
    images.to_uint8(drawn.preview_BHW3)
    for drawn in model.stream(classes, jax.random.key(seed + 1), **sampling)
  ]
  sides = [f"{n}x{n}" for n in model.config.tokenizer.scales]
  _write(output / "scales.png", [list(row) for row in stages], sides)


def _reconstruct(model, pixels_BHW3: np.ndarray) -> np.ndarray:
  tokens_BL = model.encode(images.to_float(pixels_BHW3))
  return images.to_uint8(model.decode(tokens_BL))


def _write(path, rows, names) -> None:
  factor = max(1, 64 // rows[0][0].shape[0])
  enlarged = [[images.enlarge(image, factor) for image in row] for row in rows]
  images.write_image(path, images.grid(enlarged, names))


if __name__ == "__main__":
  try:
    main()
  except ValueError as error:
    raise SystemExit(f"{error}") from None
