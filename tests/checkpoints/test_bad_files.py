"""Sixty broken inputs: one line that names what is wrong, and nothing left."""

import io
import json
import pickle
import shutil
import zipfile

import golden_files
import numpy as np
import pytest
import safetensors.numpy

from var_jax import cli

A, B, C = (golden_files.VAR_FILES[variant] for variant in "ABC")
VAE = "vae_tiny.pth.xz"


def tensors(file):
  return {k: v.copy() for k, v in golden_files.state_dict(file).items()}


def run(capsys, tmp_path, *flags):
  """Run convert; return its one line of complaint."""
  before = sorted(tmp_path.rglob("*"))
  output = tmp_path / "new" / "made"
  code = cli.main(["convert", "--output", str(output), *map(str, flags)])
  out, err = capsys.readouterr()
  assert code == 1, (code, out, err)
  assert out == ""
  assert err.count("\n") == 1 and err.startswith("var-jax: ")
  assert sorted(tmp_path.rglob("*")) == before
  return err


def without(name):
  return lambda t: t.pop(name)


def replaced(name, change):
  def damage(t):
    t[name] = np.ascontiguousarray(change(t[name]))

  return damage


def renamed(name, new):
  def damage(t):
    t[new] = t.pop(name)

  return damage


def filled(name, value):
  def damage(t):
    t[name].flat[3] = value

  return damage


def added(name, shape=(3,)):
  return lambda t: t.update({name: np.zeros(shape, np.float32)})


HALF = "blocks.1.attn.proj.weight"
PHI = "quantize.quant_resi.qresi_ls"

VAR_TENSORS = [
  ("a missing weight", without(HALF), [HALF, "missing"]),
  ("a missing bias", without("head.bias"), ["head.bias", "missing"]),
  ("no embedding of tokens", without("word_embed.weight"), ["A.safetensors"]),
  ("no classes", without("class_emb.weight"), ["class_emb.weight"]),
  ("no head", without("head.weight"), ["head.weight", "missing"]),
  ("no levels", without("lvl_1L"), ["lvl_1L", "--scales"]),
  ("one layer lost", without("blocks.1.attn.proj.weight"), ["blocks.1"]),
  ("no scale of q", without("blocks.2.attn.scale_mul_1H11"), ["blocks.2"]),
  ("an extra tensor", added("blocks.0.extra"), ["blocks.0.extra", "no place"]),
  ("a layer too many", added("blocks.9.attn.q_bias"), ["blocks.9.attn.q_bias"]),
  ("a gap in the layers", renamed(HALF, "blocks.7.attn.proj.weight"), [HALF]),
  ("a renamed tensor", renamed("pos_1LC", "pos"), ["pos_1LC", "missing"]),
  ("other prefixes", renamed("head.bias", "module.head.bias"), ["head.bias"]),
  ("a shorter weight", replaced(HALF, lambda x: x[:-1]), [HALF, "(31, 32)"]),
  ("a transposed one", replaced("head.weight", lambda x: x.T), ["vocab_size"]),
  ("a flat one", replaced(HALF, np.ravel), [HALF, "(1024,)"]),
  ("a flat first one", replaced("word_embed.weight", np.ravel),
   ["word_embed.weight", "2 dimensions"]),
  ("an empty one", replaced("class_emb.weight", lambda x: x[:0]),
   ["class_emb.weight", "(0, 32)"]),
  ("fewer heads", replaced("blocks.0.attn.scale_mul_1H11", lambda x: x[:, :3]),
   ["width 32", "3 heads"]),
  ("longer positions", replaced("pos_1LC", lambda x: np.repeat(x, 2, 1)),
   ["pos_1LC", "(1, 60, 32)"]),
  ("levels out of order", replaced("lvl_1L", lambda x: x[:, ::-1]), ["lvl_1L"]),
  ("a level left out", replaced("lvl_1L", lambda x: x * 2), ["lvl_1L"]),
  ("levels not square", replaced("lvl_1L", lambda x: np.minimum(x, 1)),
   ["lvl_1L"]),
  ("NaN", filled(HALF, np.nan), [HALF, "NaN"]),
  ("infinity", filled("head.weight", np.inf), ["head.weight", "infinity"]),
  ("half precision", replaced(HALF, lambda x: x.astype("f2")),
   [HALF, "float16", ".float()"]),
  ("double precision", replaced(HALF, lambda x: x.astype("f8")),
   [HALF, "float64"]),
  ("whole numbers", replaced(HALF, lambda x: x.astype("i8")), [HALF, "int64"]),
  ("another mask", replaced("attn_bias_for_masking", np.zeros_like),
   ["attn_bias_for_masking"]),
  ("levels of another type", replaced("lvl_1L", lambda x: x.astype("i4")),
   ["lvl_1L", "int32"]),
  ("a bias of k", replaced("blocks.1.attn.zero_k_bias", np.ones_like),
   ["blocks.1.attn.zero_k_bias"]),
]  # fmt: skip

VAE_TENSORS = [
  ("a missing weight", without("decoder.mid.attn_1.qkv.weight"),
   ["decoder.mid.attn_1.qkv.weight", "missing"]),
  ("no first layer", without("encoder.conv_in.weight"),
   ["encoder.conv_in.weight"]),
  ("no codes", without("quantize.embedding.weight"), ["vae.safetensors"]),
  ("a missing level", without("encoder.down.2.block.0.conv2.weight"),
   ["encoder.down.2.block.0.conv2.weight"]),
  ("a phi lost", without(f"{PHI}.1.weight"), [f"{PHI}.1.weight", "missing"]),
  ("its bias lost", without(f"{PHI}.3.bias"), [f"{PHI}.3.bias", "missing"]),
  ("a phi too many", added(f"{PHI}.9.weight"), [f"{PHI}.4.weight"]),
  ("an extra tensor", added("loss.logvar"), ["loss.logvar", "no place"]),
  ("other codes", replaced("quantize.embedding.weight", lambda x: x[:-1]),
   ["quantize.ema_vocab_hit_SV", "127"]),
  ("other channels", replaced("quantize.embedding.weight", lambda x: x[:, 1:]),
   ["latent_channels is 7"]),
  ("odd features",
   replaced("encoder.down.3.block.0.conv2.weight", lambda x: x[1:]),
   ["encoder.down.3.block.0.conv2.weight", "63"]),
  ("channels not in groups",
   replaced("encoder.conv_in.weight", lambda x: x[:16]), ["channels 16"]),
  ("a kernel too small",
   replaced("quant_conv.weight", lambda x: x[..., 1:2, 1:2]),
   ["quant_conv.weight", "(8, 8, 1, 1)"]),
  ("counts of other codes",
   replaced("quantize.ema_vocab_hit_SV", lambda x: x[:, :9]),
   ["quantize.ema_vocab_hit_SV", "(4, 9)"]),
  ("NaN in the codes", filled("quantize.embedding.weight", np.nan),
   ["quantize.embedding.weight", "NaN"]),
  ("NaN in the counts", filled("quantize.ema_vocab_hit_SV", np.nan),
   ["quantize.ema_vocab_hit_SV", "NaN"]),
]  # fmt: skip


def write(folder, var=A, damage_var=None, damage_vae=None):
  """Write both files; return the flags that name them."""
  folder.mkdir(exist_ok=True)
  flags = []
  for name, file, damage in (("vae", VAE, damage_vae), ("A", var, damage_var)):
    content = tensors(file)
    if damage:
      damage(content)
    path = folder / f"{name}.safetensors"
    safetensors.numpy.save_file(content, path)
    flags += ["--var" if name == "A" else "--vae", path]
  return flags


@pytest.mark.parametrize(
  "damage, parts",
  [case[1:] for case in VAR_TENSORS],
  ids=[case[0] for case in VAR_TENSORS],
)
def test_a_transformer_with_broken_tensors(tmp_path, capsys, damage, parts):
  flags = write(tmp_path, damage_var=damage)
  line = run(capsys, tmp_path, *flags)
  assert all(part in line for part in parts), line


@pytest.mark.parametrize(
  "damage, parts",
  [case[1:] for case in VAE_TENSORS],
  ids=[case[0] for case in VAE_TENSORS],
)
def test_a_tokenizer_with_broken_tensors(tmp_path, capsys, damage, parts):
  flags = write(tmp_path, damage_vae=damage)
  line = run(capsys, tmp_path, *flags)
  assert all(part in line for part in parts), line


def test_what_only_the_caller_knows_has_to_be_said(tmp_path, capsys):
  flags = write(tmp_path, var=C)
  assert "--heads" in run(capsys, tmp_path, *flags)
  vae = flags[:2]
  line = run(capsys, tmp_path, *vae)
  assert "--scales" in line and "there are 4" in line
  line = run(capsys, tmp_path, *vae, "--scales", "1,2,4")
  assert "3 scales" in line and "counts 4" in line
  assert "decreases" in run(capsys, tmp_path, *vae, "--scales", "4,3,2,1")
  for value, part in ((0, "quant_resi 0.0 does not fit"), ("nan", "nan is no")):
    line = run(
      capsys, tmp_path, *vae, "--scales", "1,2,3,4", "--quant-resi", value
    )
    assert part in line


def test_what_the_file_says_is_not_overruled(tmp_path, capsys):
  flags = write(tmp_path)
  line = run(capsys, tmp_path, *flags, "--heads", 8)
  assert "heads 8" in line and "says 4" in line
  line = run(capsys, tmp_path, *flags, "--scales", "1,2,3,5")
  assert "lvl_1L says (1, 2, 3, 4)" in line
  assert "5 heads" in run(
    capsys, tmp_path, *write(tmp_path, var=C), "--heads", 5
  )


def test_files_in_the_wrong_place(tmp_path, capsys):
  vae_flag, vae, var_flag, var = write(tmp_path)
  assert "--var" in run(capsys, tmp_path, vae_flag, var)
  assert "--vae" in run(capsys, tmp_path, var_flag, vae)
  assert "give its tokenizer" in run(capsys, tmp_path, var_flag, var)
  line = run(capsys, tmp_path, vae_flag, vae, var_flag, tmp_path / "no.pth")
  assert "no.pth does not exist" in line
  assert "a/no.pth does not exist" in run(
    capsys, tmp_path, vae_flag, "a/no.pth"
  )
  (tmp_path / "text.txt").write_text("hello")
  line = run(capsys, tmp_path, vae_flag, tmp_path / "text.txt")
  assert "text.txt ends in none of .pth" in line
  (tmp_path / "folder").mkdir()
  line = run(capsys, tmp_path, vae_flag, tmp_path / "folder")
  assert "folder has no model.safetensors" in line


def damaged_files():
  """Yield (name, ending, function of the file's bytes)."""
  for ending in ("pth", "safetensors"):
    yield f"empty {ending}", ending, lambda data: b""
    yield f"cut {ending}", ending, lambda data: data[: len(data) // 2]
    yield f"start of {ending}", ending, lambda data: data[:9]
    yield f"text as {ending}", ending, lambda data: b"not weights\n" * 99
    yield f"cut head of {ending}", ending, lambda data: data[100:]
  yield "flipped weight", "pth", lambda data: flip(data, len(data) // 2)
  yield (
    "flipped pickle",
    "pth",
    lambda data: flip(data, data.index(b"data.pkl") + 300),
  )
  yield "flipped index", "pth", lambda data: flip(data, len(data) - 40)
  yield "flipped header", "safetensors", lambda data: flip(data, 3)


def flip(data, at):
  return data[:at] + bytes([data[at] ^ 0x10]) + data[at + 1 :]


DAMAGED = list(damaged_files())


@pytest.mark.parametrize(
  "ending, change", [case[1:] for case in DAMAGED], ids=[d[0] for d in DAMAGED]
)
def test_a_damaged_file(tmp_path, capsys, ending, change):
  if ending == "pth":
    pytest.importorskip("torch")
    golden_files.write_torch_files(tmp_path)
  else:
    golden_files.write_safetensors_files(tmp_path)
  broken = tmp_path / f"broken.{ending}"
  broken.write_bytes(change((tmp_path / f"A.{ending}").read_bytes()))
  flags = "--vae", tmp_path / f"vae.{ending}", "--var", broken
  assert broken.name in run(capsys, tmp_path, *flags)


class Hostile:
  def __reduce__(self):
    import os

    return os.system, ("touch attacked",)


def odd_files(torch):
  """Yield (name, bytes) of files that are no plain state dict."""
  zeros_22 = torch.zeros(2, 2)
  contents = {
    "hostile": {"head.weight": Hostile()},
    "a module": torch.nn.Linear(2, 2),
    "a list": [zeros_22],
    "text": {"word_embed.weight": "text"},
    "a number as name": {"word_embed.weight": zeros_22, 3: zeros_22},
    "trainer without models": {"epoch": 3, "trainer": {"config": {}}},
    "bfloat16": {"word_embed.weight": zeros_22.bfloat16()},
  }
  for name, content in contents.items():
    buffer = io.BytesIO()
    torch.save(content, buffer)
    yield name, buffer.getvalue()
  yield "plain pickle", pickle.dumps({"head.weight": Hostile()})
  buffer = io.BytesIO()
  old = dict(_use_new_zipfile_serialization=False)
  torch.save({"word_embed.weight": zeros_22}, buffer, **old)
  yield "old torch", buffer.getvalue()
  buffer = io.BytesIO()
  with zipfile.ZipFile(buffer, "w") as archive:
    archive.writestr("letter.txt", "hello")
  yield "some zip", buffer.getvalue()


def test_files_that_hold_something_else_and_nothing_is_run(
  tmp_path, capsys, monkeypatch
):
  torch = pytest.importorskip("torch")
  monkeypatch.chdir(tmp_path)
  golden_files.write_torch_files(tmp_path)
  for name, data in odd_files(torch):
    broken = tmp_path / "broken.pth"
    broken.write_bytes(data)
    line = run(capsys, tmp_path, "--vae", "vae.pth", "--var", "broken.pth")
    assert "broken.pth" in line, name
    if name == "hostile":
      assert "system" in line and "not run" in line
    assert not (tmp_path / "attacked").exists()


def test_torch_files_need_torch(tmp_path, capsys, monkeypatch):
  import sys

  golden_files.write_torch_files(tmp_path)
  monkeypatch.setitem(sys.modules, "torch", None)
  line = run(capsys, tmp_path, "--var", tmp_path / "trainer.pth")
  assert "trainer.pth" in line and "pip install torch" in line


@pytest.fixture(scope="module")
def made(tmp_path_factory):
  """A sound workdir, a hub folder of it, and programs of it."""
  folder = tmp_path_factory.mktemp("sound")
  flags = write(folder / "from")
  for name, arguments in (
    ("work", flags),
    ("hub", ["--checkpoint", folder / "work", "--to", "hf"]),
  ):
    arguments = ["--output", folder / name, *arguments]
    assert cli.main(["convert", *map(str, arguments)]) == 0
  return folder


def largest_file(folder):
  files = (path for path in folder.rglob("*") if path.is_file())
  return max(files, key=lambda path: path.stat().st_size)


def flip_file(path):
  data = path.read_bytes()
  path.write_bytes(flip(data, len(data) // 2))


def edit_json(path, **changes):
  content = json.loads(path.read_text())
  for name, value in changes.items():
    content[name] = value
  path.write_text(json.dumps(content))


STEP = "checkpoints/0"

WORKDIRS = [
  ("a flipped bit", lambda w: flip_file(largest_file(w / STEP)),
   ["is not what was written", STEP]),
  ("one in the tokenizer",
   lambda w: flip_file(largest_file(w / "tokenizer" / STEP)),
   ["is not what was written", "tokenizer"]),
  ("a cut file",
   lambda w: largest_file(w / STEP).write_bytes(b""), ["is not what was"]),
  ("a lost file", lambda w: largest_file(w / STEP).unlink(), ["is missing"]),
  ("lost weights", lambda w: shutil.rmtree(w / STEP), ["no finished check"]),
  ("a lost tokenizer", lambda w: shutil.rmtree(w / "tokenizer"),
   ["tokenizer is missing"]),
  ("no config", lambda w: (w / "config.json").unlink(), ["config.json"]),
  ("a changed r of phi",
   lambda w: edit_json(w / "tokenizer" / "config.json", tokenizer={
     **json.loads((w / "tokenizer" / "config.json").read_text())["tokenizer"],
     "quant_resi": 0.25}),
   ["another architecture", "config.json"]),
  ("another epsilon of the transformer",
   lambda w: edit_json(w / "config.json", transformer={
     **json.loads((w / "config.json").read_text())["transformer"],
     "norm_eps": 1e-5}),
   ["another architecture", "config.json"]),
  ("weights of another shape, not verified",
   lambda w: (
     (w / STEP / "checksums.json").unlink(),
     edit_json(w / "config.json", transformer={
       **json.loads((w / "config.json").read_text())["transformer"],
       "num_classes": 5})),
   ["class_emb has shape (11, 32), the config describes (6, 32)"]),
  ("layers lost, not verified",
   lambda w: (
     (w / STEP / "checksums.json").unlink(),
     edit_json(w / "config.json", transformer={
       **json.loads((w / "config.json").read_text())["transformer"],
       "depth": 2})),
   ["(3, ", "(2, "]),
  ("checksums that are no text",
   lambda w: (w / STEP / "checksums.json").write_text('{"sha256": {"a": 3}}'),
   ["lists no checksums"]),
  ("checksums of nothing",
   lambda w: (w / STEP / "checksums.json").write_text("{}"),
   ["lists no checksums"]),
  ("checksums that are no JSON",
   lambda w: (w / STEP / "checksums.json").write_text("{"), ["not valid JSON"]),
]  # fmt: skip


@pytest.mark.parametrize("command", ["convert", "sample"])
@pytest.mark.parametrize(
  "damage, parts",
  [case[1:] for case in WORKDIRS],
  ids=[case[0] for case in WORKDIRS],
)
def test_a_damaged_workdir(tmp_path, capsys, made, damage, parts, command):
  workdir = tmp_path / "work"
  shutil.copytree(made / "work", workdir)
  damage(workdir)
  if command == "convert":
    line = run(capsys, tmp_path, "--checkpoint", workdir, "--to", "safetensors")
  else:
    output = tmp_path / "out.png"
    flags = ["--checkpoint", workdir, "--labels", 3, "--output", output]
    assert cli.main(["sample", *map(str, flags)]) == 1
    line = capsys.readouterr().err
    assert line.count("\n") == 1 and not output.exists()
  assert all(part in line for part in parts), line


def unlisted(change):
  """Damage a hub folder that carries no checksums."""

  def damage(hub):
    (hub / "checksums.json").unlink()
    change(hub / "config.json")

  return damage


HUBS = [
  ("a flipped bit", lambda h: flip_file(h / "model.safetensors"),
   ["model.safetensors", "is not what was written"]),
  ("no config", lambda h: (h / "config.json").unlink(), ["config.json"]),
  ("no weights", lambda h: (h / "model.safetensors").unlink(),
   ["has no model.safetensors"]),
  ("another config", lambda h: edit_json(h / "config.json", num_heads=2),
   ["config.json", "is not what was written"]),
  ("other heads", unlisted(lambda c: edit_json(c, num_heads=2)),
   ["heads 2", "says 4"]),
  ("a list as config", unlisted(lambda c: c.write_text("[]")),
   ["config.json", "no table"]),
  ("no epsilon", unlisted(lambda c: edit_json(c, norm_eps=-1)),
   ["norm_eps -1.0"]),
  ("no table within", unlisted(lambda c: edit_json(c, vae_kwargs=3)),
   ["config.json", "make no sense"]),
  ("odd settings",
   unlisted(lambda c: edit_json(c, vae_kwargs={"using_znorm": "maybe"})),
   ["config.json", "make no sense"]),
]  # fmt: skip


@pytest.mark.parametrize(
  "damage, parts", [case[1:] for case in HUBS], ids=[case[0] for case in HUBS]
)
def test_a_damaged_hub_folder(tmp_path, capsys, made, damage, parts):
  hub = tmp_path / "hub"
  shutil.copytree(made / "hub", hub)
  damage(hub)
  line = run(capsys, tmp_path, "--var", hub)
  assert all(part in line for part in parts), line


def test_a_damaged_tokenizer_of_a_hub_folder(tmp_path, capsys, made):
  """The checksums lie in the folder above."""
  shutil.copytree(made / "hub", tmp_path / "hub")
  flip_file(tmp_path / "hub" / "vae" / "model.safetensors")
  for vae in ("hub/vae", "hub/vae/model.safetensors"):
    line = run(capsys, tmp_path, "--vae", tmp_path / vae, "--var", made / "hub")
    assert "vae/model.safetensors is not what was written" in line


def test_a_workdir_is_no_official_file(tmp_path, capsys, made):
  line = run(capsys, tmp_path, "--var", made / "work")
  assert "workdir already" in line and "--checkpoint" in line
  line = run(capsys, tmp_path, "--checkpoint", made / "hub", "--to", "hf")
  assert "no workdir" in line and "--var" in line


def test_an_output_elsewhere_is_refused(tmp_path, capsys, made):
  code = cli.main(
    ["convert", "--var", str(made / "hub"), "--output", "gs://x/y"]
  )
  assert code == 1
  assert "gs://x/y is no local folder" in capsys.readouterr().err
  (tmp_path / "link").symlink_to(tmp_path / "nothing")
  flags = ["--var", str(made / "hub"), "--output", str(tmp_path / "link")]
  assert cli.main(["convert", *flags]) == 1
  assert "link' exists already" in capsys.readouterr().err


@pytest.mark.parametrize(
  "flags, part",
  [
    ([], "nothing to convert"),
    (["--checkpoint", "x"], "--to"),
    (["--checkpoint", "x", "--to", "onnx"], "onnx"),
    (["--checkpoint", "x", "--to", "hf", "--vae", "y"], "--vae"),
    (["--checkpoint", "x", "--to", "hf", "--quant-resi", "0"], "--quant-resi"),
    (["--checkpoint", "x", "--to", "hf", "--batch", "2"], "--batch"),
    (["--checkpoint", "x", "--to", "stablehlo", "--verify"], "--verify"),
    (["--vae", "x", "--to", "hf"], "--to"),
    (["--vae", "x", "--heads", "0"], "--heads"),
    (["--vae", "x", "--heads", "4"], "--heads does not go with a tokenizer"),
    (["--vae", "x", "--scales", "a"], "--scales"),
    (["--vae", "x", "--distance", "l1"], "--distance"),
  ],
)
def test_command_lines_that_make_no_sense_exit_with_2(capsys, flags, part):
  assert cli.main(["convert", "--output", "new", *flags]) == 2
  err = capsys.readouterr().err
  assert err.count("\n") == 1 and part in err
