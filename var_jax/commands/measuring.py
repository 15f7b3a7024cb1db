"""What `var-jax evaluate` measures, of the flags that it got."""

import datetime
import os
import time

_SPECS = ("npz:", "folder:", "tfds:")
_STATED = 50_000  # images, of published numbers
_DRAWN = 10_000  # images, where a classifier looks
_TELL_EVERY = 10.0  # seconds
_COMPARE_SECONDS = 3600.0  # that other processes wait while one compares


def open_all(args):
  """Return how a network looks, and the model if there is one."""
  import jax

  from var_jax import compile_cache, loading
  from var_jax.checkpoints import weights
  from var_jax.evaluation import networks, run
  from var_jax.parallel import mesh as mesh_lib

  network = (
    networks.open_inception(args.inception)
    if args.inception
    else networks.open_classifier(args.classifier)
  )
  compile_cache.enable()
  mesh = mesh_lib.make_mesh()
  model = None
  if args.checkpoint:
    # A run under way makes newer ones: all that is measured is of this one.
    args.checkpoint = told(lambda: weights.pinned(args.checkpoint))
    kept = weights.identity(args.checkpoint, args.weights)["weights"]
    if kept != args.weights:
      say(f"{args.checkpoint} has no averaged weights; its own are measured")
    model = loading.load(
      args.checkpoint,
      mesh=mesh if jax.device_count() > 1 else None,
      weights=args.weights,
    )
  progress = _Progress() if writes() else (lambda *_: None)
  return run.Looking(network, mesh, args.batch_size, progress), model


def writes() -> bool:
  """Return whether this process is the one that writes and speaks."""
  import jax

  return jax.process_index() == 0


def say(text: str) -> None:
  if writes():
    print(text, flush=True)


def told(make):
  """Return, in all processes, what the first one makes, as JSON."""
  from var_jax.parallel import multihost

  return multihost.exchange(make() if writes() else None, _COMPARE_SECONDS)[0]


def image_set(args, looking, model, how: dict):
  """Return the set that is measured, and what a receipt says of its making."""
  from var_jax.checkpoints import weights
  from var_jax.evaluation import image_sets, made_sets

  if args.samples:
    if not _is_source(args.samples):
      return image_sets.open_set(args.samples), {}
    shape = looking.network.shape and looking.network.shape[:2]
    return made_sets.OfDataset(args.samples, "val", shape, _transform(args)), {}
  about = {"checkpoint": weights.identity(args.checkpoint, args.weights)}
  if args.tokens:
    return made_sets.Decoded(model, args.tokens), about
  shape = model.config.tokenizer.image_shape
  if args.reconstruct:
    originals = made_sets.OfDataset(
      args.reconstruct, "val", shape, _transform(args)
    )
    return made_sets.Reconstructed(model, originals), about
  if model.config.transformer is None:
    raise ValueError(
      f"{args.checkpoint} is a tokenizer and cannot draw; give --reconstruct."
    )
  C = model.config.transformer.num_classes
  wanted = _STATED if args.inception else _DRAWN
  count = args.count or max(C, wanted - wanted % C)
  drawn = made_sets.Drawn(model, count, args.seed, **how)
  return drawn, {**about, "sampler": {**how, "seed": args.seed}}


def _is_source(spec: str) -> bool:
  return spec == "digits" or spec.startswith(_SPECS)


def _transform(args) -> str:
  """Return how images of sources are brought to size."""
  from var_jax.checkpoints import weights
  from var_jax.checkpoints.description import Description

  if args.transform:
    return args.transform
  if not args.checkpoint:  # as the classifier was fitted, or as the official
    return "resize" if args.classifier else "crop"
  workdir, _ = weights.split_step(args.checkpoint)
  trained = Description.read(workdir).config.get("data", {}).get("transform")
  # As training sees held-out images, where jitter is resizing.
  return "crop" if trained in (None, "crop") else "resize"


def find_reasons(args, looking, images) -> list:
  """Return why numbers would have other names; refuse unless forced."""
  from var_jax.evaluation import comparable, receipt, run

  run.check_suits(looking, images)
  stated = args.count or images.count
  if args.inception and images.kind not in ("reconstructed", "drawn"):
    stated = args.count or _STATED
  reasons = comparable.reasons_before(
    looking.network, images, _split(args), stated, not args.shuffle
  )
  if not args.force:
    receipt.refuse(reasons)
  return reasons


def _split(args) -> str:
  """Return that of the reference, "" where nobody says."""
  if args.reference_split:
    return args.reference_split
  if not args.reference:
    return "val"  # the originals
  spec = args.reference
  named = spec == "digits" or spec.startswith(("folder:", "tfds:"))
  return "train" if named else ""


def reference_of(args, looking, images):
  from var_jax.evaluation import adm_reference, image_sets, made_sets, run

  spec, split = args.reference, _split(args)
  if spec and not _is_source(spec):
    spec = os.path.expanduser(spec)
    if adm_reference.is_one(spec):
      return run.against_statistics(looking, spec, split, images.shape)
    there = image_sets.open_set(spec)
  elif spec:
    there = made_sets.OfDataset(
      spec, split or "train", images.shape[:2], _transform(args)
    )
  else:
    there = images.originals
  return run.against_images(looking, there, split, images.shape)


def asked(args, looking, images, about: dict) -> dict:
  """Return all that a receipt follows from, of what the flags say."""
  return {
    "features": looking.network.about,
    "reference": [args.reference, _split(args), _transform(args)],
    "images": [images.kind, images.name, images.count, images.sha256],
    "order": [args.shuffle, args.seed],
    "force": args.force,
    **about,
  }


def measured(args, looking, images, against, reasons, about, output) -> dict:
  """Look at a set, write its receipt and return it.

  What was interrupted goes on. All processes look; the first one compares and
  writes.
  """
  from var_jax import files
  from var_jax.evaluation import run
  from var_jax.evaluation.partial import Elsewhere, Partial

  keep_pixels = bool(args.save_npz or args.reconstruct)
  settings = {
    "features": looking.network.about,
    "images": [images.kind, images.name, images.count, images.sha256],
    "pixels": keep_pixels,
    **about,
  }
  kept = Partial(f"{output}.partial", settings) if writes() else None
  count = told(lambda: kept.count)
  run.look_and_keep(
    looking, images, kept or Elsewhere(count), keep_pixels=keep_pixels
  )
  say(f"{images.count} images are seen; comparing")

  def compared():
    found = _compared(args, looking, images, against, reasons, about, kept)
    files.write_json(output, found)
    kept.remove()
    return found

  return told(compared)


def _compared(args, looking, images, against, reasons, about, kept) -> dict:
  """Return the receipt of what was seen; write the images if that is asked."""
  from var_jax.evaluation import image_sets, measure, run

  looks, more = measure.gather(kept.parts()), {}
  if args.reconstruct:
    pairs = (
      (next(images.originals.batches(len(part["pixels"]), at)), part["pixels"])
      for at, part in kept.numbered()
    )
    more = measure.psnr_and_ssim(pairs)
  found = run.to_receipt(
    looking,
    images,
    looks,
    against,
    reasons=reasons,
    forced=args.force,
    shuffle=args.seed if args.shuffle else None,
    more=more,
    asked=asked(args, looking, images, about),
    **about,
  )
  if args.save_npz:
    pixels = (part["pixels"] for part in kept.parts())
    labels = getattr(images, "labels", None)
    image_sets.write_archive(args.save_npz, pixels, images, labels)
  return found


class _Progress:
  """A line now and then, with what is left of the time."""

  def __call__(self, done: int, of: int, began: int) -> None:
    now = time.monotonic()
    if done == began:
      self._since = self._told = now
      return
    if now - self._told < _TELL_EVERY and done < of:
      return
    self._told = now
    rate = (done - began) / max(now - self._since, 1e-9)
    left = datetime.timedelta(seconds=int((of - done) / rate))
    print(f"{done}/{of} images  {rate:.1f}/s  eta {left}", flush=True)
