"""`var-jax evaluate`."""

import itertools
from functools import partial

from var_jax.commands import measuring
from var_jax.commands.arguments import (
  UsageError,
  add_joining,
  check_matplotlib,
  joining,
  numbers,
  positive,
  scale_range,
  seed,
  temperature,
)


def add(commands) -> None:
  """Add the parser of the command."""
  parser = commands.add_parser(
    "evaluate", help="FID and its kin, with a receipt; or compare two receipts"
  )
  what = parser.add_argument_group("what is measured")
  what.add_argument("--checkpoint", help="a workdir, which draws or decodes")
  what.add_argument(
    "--samples",
    help="a folder of images, or an .npz; or a source like npz:held_out.npz, "
    "which is brought to the size of a classifier",
  )
  what.add_argument("--tokens", help="an .npz, which --checkpoint decodes")
  what.add_argument(
    "--reconstruct",
    metavar="SOURCE",
    help="held-out images, like folder:/data, which --checkpoint encodes and "
    "decodes",
  )
  parser.add_argument(
    "--reference",
    help="an .npz of ADM, a folder, an .npz of images, or a source like "
    "tfds:name; with --reconstruct the originals if unsaid",
  )
  parser.add_argument(
    "--reference-split",
    choices=("train", "val"),
    help="what it is of; of folder: and tfds: also which is read",
  )
  parser.add_argument("--output", help="a .json file; of a sweep, a folder")
  parser.add_argument(
    "--compare",
    nargs=2,
    metavar=("A", "B"),
    help="say whether two receipts may be compared",
  )
  network = parser.add_argument_group("what looks at the images")
  network.add_argument("--inception", help="what convert --inception wrote")
  network.add_argument("--classifier", help="what --fit-classifier wrote")
  network.add_argument(
    "--fit-classifier",
    metavar="SOURCE",
    help="fit a small classifier to a dataset; --output is its folder",
  )
  network.add_argument(
    "--image-size",
    type=positive,
    help="pixels that --fit-classifier resizes to, as a model has; else none",
  )
  how = parser.add_argument_group("how")
  how.add_argument(
    "--count",
    type=positive,
    help="images there should be; 50000, or all that a classifier is given, "
    "or about 10000 that it draws",
  )
  how.add_argument(
    "--transform",
    choices=("crop", "resize"),
    help="of sources to the size of the images; crop, the official one, unless "
    "the checkpoint was trained on images that were resized",
  )
  how.add_argument("--batch-size", type=positive, default=64)
  how.add_argument("--weights", choices=("ema", "raw"), default="ema")
  how.add_argument("--seed", type=seed, default=0, help="%(default)s")
  how.add_argument("--save-npz", help="write the images in ADM's layout")
  how.add_argument(
    "--shuffle",
    action="store_true",
    help="take the parts of IS in an order drawn by the seed, not as read",
  )
  how.add_argument(
    "--force",
    action="store_true",
    help="measure what is not comparable, under another name",
  )
  drawing = parser.add_argument_group(
    "drawing", "Several values, like 1,1.5,2, make a sweep of all combinations."
  )
  for name, default in (("guidance", 1.5), ("top-k", 900), ("top-p", 0.96)):
    kind = numbers(int if name == "top-k" else float)
    drawing.add_argument(
      f"--{name}", type=kind, default=[default], help=str(default)
    )
  drawing.add_argument("--smooth", action="store_true")
  drawing.add_argument("--temperature", type=temperature, default=1.0)
  drawing.add_argument("--guided-scales", type=scale_range)
  add_joining(parser)
  parser.set_defaults(run=_evaluate, parser=parser)


# Flags that mean something together with each way to call the command.
_DRAWING = {
  "guidance", "top_k", "top_p", "smooth", "temperature", "guided_scales"
}  # fmt: skip
_FITTING = {"fit_classifier", "image_size", "output"}


def _evaluate(args) -> int | None:
  if args.compare:
    _refuse_all_but({"compare"}, args, "--compare")
    return _compare(*args.compare)
  if args.fit_classifier is not None:
    _refuse_all_but(_FITTING, args, "--fit-classifier")
  if not args.output:
    raise UsageError("--output is missing; see var-jax evaluate --help.")
  if args.fit_classifier is not None:
    return _fit(args)
  _check(args)
  from var_jax.parallel import multihost

  with multihost.joined(**joining(args)):
    (_sweep if _is_sweep(args) else _one)(args)


def _compare(a: str, b: str) -> int:
  from var_jax.evaluation import receipt

  lines = receipt.differences(receipt.read(a), receipt.read(b))
  for line in lines:
    print(line)
  if not lines:
    print("they may be compared")
  return 1 if lines else 0


def _fit(args) -> None:
  from var_jax import files
  from var_jax.evaluation import classifier, made_sets

  files.check_new_file(args.output)
  shape = args.image_size and (args.image_size, args.image_size)
  images = made_sets.OfDataset(args.fit_classifier, "train", shape, "resize")
  accuracy = classifier.write(args.output, *images.labelled(), images.name)
  print(
    f"wrote {args.output}, a classifier that is right on {accuracy:.3f} of a "
    "held-out tenth"
  )


def _refuse_all_but(names: set[str], args, given: str) -> None:
  said = {
    name
    for name, value in vars(args).items()
    if name not in ("command", "run", "parser", "overrides")
    and value != args.parser.get_default(name)
  }
  for name in sorted(said - names):
    raise UsageError(
      f"--{name.replace('_', '-')} does not go with {given}; leave it out."
    )


def _check(args) -> None:
  if args.image_size:
    raise UsageError("--image-size is of --fit-classifier; leave it out.")
  if not args.inception and not args.classifier:
    raise UsageError(
      "give --inception DIR, for FID, or --classifier DIR; `var-jax convert "
      "--inception` and --fit-classifier make them."
    )
  if args.inception and args.classifier:
    raise UsageError("--inception does not go with --classifier; take one.")
  if args.tokens and args.reconstruct:
    raise UsageError("--tokens does not go with --reconstruct; take one.")
  every = set(vars(args))
  if args.samples:
    made = {"checkpoint", "tokens", "reconstruct", "weights"}
    _refuse_all_but(every - made - _DRAWING, args, "--samples")
  for name in ("tokens", "reconstruct"):
    if getattr(args, name):
      if not args.checkpoint:
        raise UsageError(f"--{name} needs --checkpoint, which decodes.")
      _refuse_all_but(every - _DRAWING, args, f"--{name}")
  if not args.samples and not args.checkpoint:
    raise UsageError("give --checkpoint or --samples, one of them.")
  if not args.reference and not args.reconstruct:
    raise UsageError("--reference is missing; see var-jax evaluate --help.")
  if _is_sweep(args) and args.output.endswith(".json"):
    raise UsageError(f"--output {args.output!r}: a sweep's is a folder.")
  if _is_sweep(args) and args.save_npz:
    raise UsageError("--save-npz is of one set; leave it out of a sweep.")


def _is_sweep(args) -> bool:
  return max(map(len, (args.guidance, args.top_k, args.top_p))) > 1


def _one(args) -> None:
  _check_file(args.output, ".json")
  if args.save_npz:
    _check_file(args.save_npz, ".npz")
  looking, model = measuring.open_all(args)
  images, about = measuring.image_set(
    args, looking, model, _combinations(args)[0]
  )
  reasons = measuring.find_reasons(args, looking, images)
  against = measuring.reference_of(args, looking, images)
  _print(
    measuring.measured(
      args, looking, images, against, reasons, about, args.output
    )
  )


def _sweep(args) -> None:
  from var_jax import files
  from var_jax.evaluation import sweep

  check_matplotlib("a sweep")
  sweep.check_folder(args.output)
  looking, model = measuring.open_all(args)
  against, receipts = None, {}
  for how in _combinations(args):  # mistakes, before anything is drawn
    measuring.image_set(args, looking, model, how)
  for how in _combinations(args):
    images, about = measuring.image_set(args, looking, model, how)
    reasons = measuring.find_reasons(args, looking, images)
    name = ",".join(
      f"{k}={how[k]:.12g}" for k in ("guidance", "top_k", "top_p")
    )
    path = files.absolute(args.output) / f"{name}.json"
    if measuring.told(path.exists):
      asked = measuring.asked(args, looking, images, about)
      receipts[name] = measuring.told(partial(sweep.again, path, asked))
    else:
      measuring.say(name)
      against = against or measuring.reference_of(args, looking, images)
      receipts[name] = measuring.measured(
        args, looking, images, against, reasons, about, path
      )
    _print(receipts[name])
  if measuring.writes():
    names = looking.network.names
    sweep.write(args.output, receipts, names.distance, names.score)
  measuring.say(
    f"wrote {len(receipts)} receipts and sweep.png to {args.output}"
  )


def _check_file(path: str, suffix: str) -> None:
  from var_jax import files

  if not path.endswith(suffix):
    raise UsageError(f"{path!r} is no {suffix} file; name one.")
  files.check_new_file(path)


def _combinations(args) -> list[dict]:
  rest = dict(
    smooth=args.smooth,
    temperature=args.temperature,
    guided_scales=args.guided_scales,
  )
  return [
    dict(guidance=guidance, top_k=top_k, top_p=top_p, **rest)
    for guidance, top_k, top_p in itertools.product(
      args.guidance, args.top_k, args.top_p
    )
  ]


def _print(found: dict) -> None:
  for name, value in found["numbers"].items():
    measuring.say(f"{name}  {value:.4f}")
  for line in found["warnings"]:
    measuring.say(f"warning: {line}")
