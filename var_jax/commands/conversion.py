"""`var-jax convert`."""

from var_jax import files
from var_jax.commands.arguments import UsageError, count, scales


def add(commands) -> None:
  """Add the parser of the command."""
  convert = commands.add_parser(
    "convert", help="official PyTorch weights in, our models out"
  )
  convert.add_argument("--output", required=True, help="a new folder")
  convert.add_argument(
    "--verify", action="store_true", help="read back, compare, print a table"
  )
  source = convert.add_argument_group(
    "in", "a .pth or .safetensors file, a hub folder or a hub id"
  )
  source.add_argument("--vae", help="the tokenizer")
  source.add_argument("--var", help="the transformer, or a file with both")
  source.add_argument(
    "--heads", type=count, help="where QK normalisation is off"
  )
  source.add_argument(
    "--scales", type=scales, help="of a tokenizer alone, like 1,2,3,4"
  )
  source.add_argument("--distance", choices=("euclidean", "cosine"))
  source.add_argument(
    "--quant-resi", type=float, help="r of phi, 0.5 if unsaid"
  )
  losses = convert.add_argument_group(
    "other networks", "of a loss or a measure; .pth or .safetensors"
  )
  losses.add_argument(
    "--lpips", help="the heads of the lpips package, or all of LPIPS"
  )
  losses.add_argument("--vgg", help="VGG16 of torchvision, with the heads")
  losses.add_argument("--inception", help="the Inception of FID; or a .pb")
  target = convert.add_argument_group("out")
  target.add_argument("--checkpoint", help="a workdir")
  target.add_argument(
    "--to", choices=("torch", "safetensors", "hf", "stablehlo")
  )
  target.add_argument("--weights", choices=("ema", "raw"), help="ema if unsaid")
  target.add_argument(
    "--batch",
    type=count,
    help="of stablehlo programs, 1 if unsaid",
  )
  convert.set_defaults(run=_convert)


def _convert(args) -> None:
  if "://" in args.output:
    raise ValueError(
      f"output {args.output} is no local folder; write to one and copy it."
    )
  with files.removed_on_signals():
    _convert_one_way(args)


def _convert_one_way(args) -> None:
  if args.inception:
    _import_inception(args)
  elif args.lpips or args.vgg:
    _import_lpips(args)
  elif args.checkpoint:
    if not args.to:
      raise UsageError("--checkpoint needs --to; see var-jax convert --help.")
    _refuse(args, "--checkpoint", *IN_FLAGS)
    if args.to == "stablehlo":
      _refuse(args, "--to stablehlo", "verify")
      _export_programs(args)
    else:
      _refuse(args, f"--to {args.to}", "batch")
      _export(args)
  elif args.vae or args.var:
    _refuse(args, "--vae and --var", "to", "weights", "batch")
    if not args.var:
      _refuse(args, "a tokenizer alone", "heads")
    _import(args)
  else:
    raise UsageError(
      "nothing to convert; give --vae and --var, or --checkpoint and --to."
    )


IN_FLAGS = ("vae", "var", "heads", "scales", "distance", "quant_resi")


def _refuse(args, given: str, *flags: str) -> None:
  for name in flags:
    value = getattr(args, name)
    if value is not None and value is not False:
      raise UsageError(
        f"--{name.replace('_', '-')} does not go with {given}; leave it out."
      )


_OUT_FLAGS = ("checkpoint", "to", "weights", "batch", "verify")


def _import_inception(args) -> None:
  from var_jax.evaluation import inception_weights

  _refuse(args, "--inception", *IN_FLAGS, *_OUT_FLAGS, "lpips", "vgg")
  inception_weights.convert(args.inception, args.output)
  print(f"wrote the weights of Inception to {args.output}")


def _import_lpips(args) -> None:
  from var_jax.checkpoints import lpips

  if not args.lpips:
    raise UsageError("--vgg needs --lpips; see var-jax convert --help.")
  _refuse(args, "--lpips", *IN_FLAGS, *_OUT_FLAGS)
  lpips.convert(args.lpips, args.output, args.vgg)
  print(f"wrote the weights of LPIPS to {args.output}")


def _import(args) -> None:
  from var_jax.checkpoints import architecture, convert, verify

  said = architecture.Settings(
    heads=args.heads,
    scales=args.scales,
    distance=args.distance,
    quant_resi=args.quant_resi,
  )
  rows = []

  def check(folder, source):
    if args.verify:
      rows.extend(verify.imported(folder, source))

  description = convert.import_official(
    args.vae, args.var, args.output, said, check
  )
  _print_table(rows)
  what = "tokenizer and transformer" if description.transformer else "tokenizer"
  for note in description.origin["notes"]:
    print(f"note: {note}")
  print(f"wrote {what} to {args.output}")


def _export(args) -> None:
  from var_jax.checkpoints import export, verify

  which = args.weights or "ema"
  rows = []

  def check(folder, steps):
    if args.verify:
      rows.extend(verify.exported(folder, steps, which))

  fixed = export.export_official(
    args.checkpoint, args.output, args.to, which, check
  )
  _print_table(rows)
  if fixed:
    print(
      "note: the official tokenizer class has other fixed settings and would "
      f"not load this: {', '.join(fixed)}"
    )
  print(f"wrote {args.output}")


def _export_programs(args) -> None:
  from var_jax import stablehlo

  names = stablehlo.export(
    args.checkpoint,
    args.output,
    batch=args.batch or 1,
    weights=args.weights or "ema",
  )
  print(
    f"wrote {' and '.join(names)} of batch {args.batch or 1} to {args.output}"
  )


def _print_table(rows) -> None:
  if not rows:
    return
  import rich.console
  import rich.table

  table = rich.table.Table("", "tensors", "parameters", "largest difference")
  for row in rows:
    counts = ("" if n is None else f"{n:,}" for n in row[1:3])
    table.add_row(row.what, *counts, row.difference)
  rich.console.Console().print(table)
