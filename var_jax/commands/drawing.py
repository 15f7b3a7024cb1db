"""`var-jax sample` and `var-jax edit`."""

import difflib
from collections.abc import Sequence

from var_jax.commands.arguments import (
  UsageError,
  box,
  count,
  positive,
  scale_range,
  seed,
  temperature,
)


def add(commands) -> None:
  """Add the parsers of the commands."""
  sample = commands.add_parser("sample", help="draw images")
  sample.add_argument("--checkpoint", required=True, help="a workdir")
  sample.add_argument(
    "--labels",
    required=True,
    help="3,7 or names of classes; unconditional is -1, as in --labels=-1,3",
  )
  sample.add_argument("--count", type=count, default=4, help="a label")
  sample.add_argument(
    "--output",
    required=True,
    help="a .png file; or, with a / at its end, a folder for one file an image",
  )
  sample.add_argument(
    "--batch-size",
    type=positive,
    default=64,
    help="images drawn at once, at most; %(default)s",
  )
  sample.add_argument(
    "--show-scales", action="store_true", help="each image after each scale"
  )
  _add_drawing(sample)
  sample.set_defaults(run=_sample)

  edit = commands.add_parser("edit", help="in- or outpaint an image")
  edit.add_argument("--checkpoint", required=True, help="a workdir")
  edit.add_argument("--image", required=True, help="of the model's resolution")
  edit.add_argument(
    "--box", type=box, required=True, help="y0,x0,y1,x1 as fractions"
  )
  edit.add_argument("--mode", choices=("inpaint", "outpaint"), required=True)
  edit.add_argument("--label", type=int, default=-1, help="%(default)s")
  edit.add_argument("--method", default="official", help="%(default)s")
  edit.add_argument("--output", required=True, help="a .png file")
  _add_drawing(edit)
  edit.set_defaults(run=_edit)


def _add_drawing(parser) -> None:
  parser.add_argument("--guidance", type=float, default=1.5, help="%(default)s")
  parser.add_argument("--top-k", type=int, default=900, help="%(default)s")
  parser.add_argument("--top-p", type=float, default=0.96, help="%(default)s")
  parser.add_argument("--seed", type=seed, default=0, help="%(default)s")
  parser.add_argument(
    "--smooth", action="store_true", help="mix codes instead of drawing them"
  )
  parser.add_argument(
    "--temperature",
    type=temperature,
    default=1.0,
    help="that logits are divided by: one, or one a scale; 1",
  )
  parser.add_argument(
    "--guided-scales",
    type=scale_range,
    help="A:B has guidance from scale A up to, not with, B only; all",
  )


def _sample(args) -> None:
  import jax
  import numpy as np

  from var_jax import compile_cache, images, loading
  from var_jax.parallel import mesh as mesh_lib

  folder = args.output.endswith("/")
  if folder and args.show_scales:
    raise UsageError("--show-scales is one picture; name a .png file.")
  (images.check_folder if folder else images.check_output)(args.output)
  compile_cache.enable()
  mesh = mesh_lib.make_mesh() if jax.device_count() > 1 else None
  model = loading.load(args.checkpoint, mesh=mesh)
  asked = labels_of(args.labels, model.class_names)
  labels = np.repeat(asked, args.count)
  draw = (labels, jax.random.key(args.seed))
  if args.show_scales:
    previews = [p.preview_BHW3 for p in model.stream(*draw, **_drawing(args))]
    rows = images.to_uint8(np.stack(previews, axis=1))
    names = [str(label) for label in labels]
    images.write_image(args.output, images.grid(rows, names))
  else:
    size = min(args.batch_size, len(labels))
    batches = model.sample_all(*draw, size, **_drawing(args))
    pixels = (images.to_uint8(batch.images_BHW3) for batch in batches)
    if folder:
      images.write_numbered(args.output, pixels, len(labels))
    else:
      rows = np.concatenate(list(pixels))
      rows = rows.reshape(-1, args.count, *rows.shape[1:])
      names = [str(label) for label in asked]
      images.write_image(args.output, images.grid(rows, names))
  print(f"wrote {len(labels)} images to {args.output}")


def labels_of(text: str, class_names: Sequence[str]) -> list[int]:
  """Return the labels of "3,7" or "cat,dog".

  Raises:
    UsageError: one is neither a number nor the name of a class.
  """
  labels = []
  for part in text.split(","):
    name = part.strip()
    if name in class_names:
      labels.append(class_names.index(name))
      continue
    try:
      labels.append(int(name))
    except ValueError:
      near = difflib.get_close_matches(name, class_names) or class_names[:5]
      names = f", or a class like {', '.join(near)}" if near else ""
      raise UsageError(
        f"--labels: {name!r} is not a label; give numbers like 3,7{names}."
      ) from None
  return labels


def _edit(args) -> None:
  import jax
  import numpy as np

  from var_jax import compile_cache, images, loading
  from var_jax.generation.edit import box_mask

  images.check_output(args.output)
  compile_cache.enable()
  model = loading.load(args.checkpoint)
  image = images.read_image(args.image)
  keep_hw = box_mask(args.box, model.config.tokenizer.schedule.grid, args.mode)
  sample = model.edit(
    image[None],
    keep_hw,
    np.array([args.label]),
    jax.random.key(args.seed),
    method=args.method,
    **_drawing(args),
  )
  images.write_image(args.output, images.to_uint8(sample.images_BHW3)[0])
  print(f"wrote {args.output}")


def _drawing(args) -> dict:
  return dict(
    guidance=args.guidance,
    top_k=args.top_k,
    top_p=args.top_p,
    smooth=args.smooth,
    temperature=args.temperature,
    guided_scales=args.guided_scales,
  )
