"""Official checkpoints become models that do what was recorded, and go back."""

import dataclasses
import hashlib
import json
import pathlib
import signal
import subprocess
import sys

import golden_files
import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
import safetensors.numpy

import var_jax
from var_jax import cli
from var_jax.checkpoints import (
  convert,
  export,
  hub,
  model_card,
  orbax_trees,
  store,
  tensor_files,
  torch_format,
  verify,
  weights,
)
from var_jax.checkpoints.architecture import Settings
from var_jax.checkpoints.description import Description
from var_jax.models.tokenizer import Tokenizer

HEADS = {"A": None, "B": None, "C": 3}  # QK normalisation is off in C
HASHES = golden_files.table("weights_sha256.json")


@pytest.fixture(scope="module")
def official(tmp_path_factory):
  """A folder with the recorded state dicts as .safetensors."""
  folder = tmp_path_factory.mktemp("official")
  golden_files.write_safetensors_files(folder)
  return folder


@pytest.fixture(scope="module")
def torch_files(tmp_path_factory):
  pytest.importorskip("torch")
  folder = tmp_path_factory.mktemp("torch")
  golden_files.write_torch_files(folder)
  return folder


@pytest.fixture(scope="module")
def workdirs(official, tmp_path_factory):
  """The recorded models, converted: {variant: workdir}."""
  made = {}
  for variant, heads in HEADS.items():
    made[variant] = tmp_path_factory.mktemp("made") / variant
    convert.import_official(
      str(official / "vae.safetensors"),
      str(official / f"{variant}.safetensors"),
      made[variant],
      Settings(heads=heads),
    )
  return made


@pytest.fixture(params=HEADS)
def variant(request):
  return request.param


@pytest.fixture
def model(workdirs, variant):
  return var_jax.load(workdirs[variant])


def hashes(tensors):
  return {
    name: hashlib.sha256(np.ascontiguousarray(tensor).tobytes()).hexdigest()
    for name, tensor in tensors.items()
  }


def recorded_hashes(file):
  return {name: entry["sha256"] for name, entry in HASHES[file].items()}


def recorded_images():
  recorded = golden_files.arrays("vae_share4_znorm0.npz")
  return golden_files.nhwc(recorded["img"])


def test_the_architecture_is_inferred(model, variant):
  transformer = model.config.transformer
  recorded = golden_files.VARIANTS[variant]
  names = (
    "depth", "width", "heads", "mlp_ratio", "num_classes", "vocab_size",
    "latent_channels", "scales", "shared_adaln", "qk_norm", "norm_eps",
  )  # fmt: skip
  for name in names:
    assert getattr(transformer, name) == getattr(recorded, name), name
  assert transformer.drop_path == pytest.approx(0.1 * 3 / 24)  # as published
  assert model.config.tokenizer == golden_files.TOKENIZER


def test_logits_tokens_and_images_equal_the_recorded_ones(model, variant):
  recorded = golden_files.arrays("vae_share4_znorm0.npz")
  tokens_BL = model.encode(recorded_images())
  expected = np.concatenate([recorded[f"ids_{s}"] for s in range(4)], axis=1)
  np.testing.assert_array_equal(tokens_BL, expected)
  golden_files.assert_close(
    model.decode(tokens_BL[:2]), golden_files.nhwc(recorded["recon_last"])
  )
  recorded = golden_files.arrays(f"var_{variant}_train.npz")
  labels_B = np.where(recorded["labels"] == 10, -1, recorded["labels"])
  logits_BLV = model.logits(labels_B, recorded["gt_ids"].astype(np.int32))
  golden_files.assert_close(logits_BLV, recorded["logits"])


def test_greedy_samples_equal_the_recorded_ones(model, variant):
  recorded = golden_files.arrays(f"var_{variant}_ar.npz")
  for guidance in (0.0, 1.5, 4.0):
    sample = model.sample(
      [3, 7], jax.random.key(0), guidance=guidance, top_k=1, top_p=0
    )
    name = f"cfg{guidance}_"
    np.testing.assert_array_equal(sample.tokens_BL, recorded[name + "ids"])
    golden_files.assert_close(
      sample.images_BHW3, golden_files.to_ours(recorded[name + "image"])
    )


@pytest.mark.parametrize("mode", ["inpaint", "outpaint"])
def test_edits_equal_the_recorded_ones(workdirs, mode):
  recorded = golden_files.arrays("var_A_ar.npz")
  keep_hw = recorded[f"edit_{mode}_mask"].astype(bool)
  sample = var_jax.load(workdirs["A"]).edit(
    recorded_images()[:2], keep_hw, [3, -1], jax.random.key(0),
    guidance=1.5, top_k=1, top_p=0,
  )  # fmt: skip
  golden_files.assert_close(
    sample.images_BHW3[:1],
    golden_files.to_ours(recorded[f"edit_{mode}_image"]),
  )


@pytest.mark.parametrize("to", ["safetensors", "hf"])
def test_what_goes_back_has_the_recorded_hashes(
  workdirs, variant, tmp_path, to
):
  output = tmp_path / "out"
  assert export.export_official(workdirs[variant], output, to) == []
  names = ["vae.safetensors", "var.safetensors"]
  if to == "hf":
    names = ["vae/model.safetensors", "model.safetensors"]
  files = ["vae_tiny.pth", golden_files.VAR_FILES[variant]]
  for name, file in zip(names, files, strict=True):
    tensors = safetensors.numpy.load_file(output / name)
    assert hashes(tensors) == recorded_hashes(file)
    for tensor, entry in HASHES[file].items():
      assert str(tensors[tensor].dtype) == entry["dtype"]
      assert list(tensors[tensor].shape) == entry["shape"]


def test_a_hub_folder_says_what_no_tensor_says(workdirs, tmp_path):
  """C has no QK normalisation: its heads are in config.json alone."""
  export.export_official(workdirs["C"], tmp_path / "hub", "hf")
  convert.import_official(
    None, str(tmp_path / "hub"), tmp_path / "back", Settings()
  )
  there, back = (
    Description.read(folder) for folder in (workdirs["C"], tmp_path / "back")
  )
  assert back.transformer == there.transformer
  assert back.tokenizer == there.tokenizer
  sources = {"hub/model.safetensors", "vae/model.safetensors"}
  assert set(back.origin["sources"]) == sources


def test_torch_files_become_the_same_weights(workdirs, torch_files, tmp_path):
  for variant, heads in HEADS.items():
    convert.import_official(
      str(torch_files / "vae.pth"),
      str(torch_files / f"{variant}.pth"),
      tmp_path / variant,
      Settings(heads=heads),
    )
    for ours, theirs in zip(
      weights.read_models(tmp_path / variant)[1:],
      weights.read_models(workdirs[variant])[1:],
      strict=True,
    ):
      jax.tree.map(np.testing.assert_array_equal, ours, theirs)


def test_torch_exports_have_the_recorded_hashes(workdirs, variant, tmp_path):
  torch = pytest.importorskip("torch")
  export.export_official(workdirs[variant], tmp_path / "out", "torch")
  files = {"vae": "vae_tiny.pth", "var": golden_files.VAR_FILES[variant]}
  for kind, file in files.items():
    tensors = torch.load(tmp_path / "out" / f"{kind}.pth", weights_only=True)
    assert all(tensor.is_contiguous() for tensor in tensors.values())
    plain = {name: tensor.numpy() for name, tensor in tensors.items()}
    assert hashes(plain) == recorded_hashes(file)


def test_exports_load_strictly_in_the_reference(workdirs, variant, tmp_path):
  torch = pytest.importorskip("torch")
  import torch_reference

  export.export_official(workdirs[variant], tmp_path / "pt", "torch")
  export.export_official(workdirs[variant], tmp_path / "hub", "hf")
  tokenizer = torch_reference.Tokenizer(golden_files.TOKENIZER)
  var = torch_reference.VAR(golden_files.VARIANTS[variant])
  for module, kind, name in (
    (tokenizer, "vae", "vae/model.safetensors"),
    (var, "var", "model.safetensors"),
  ):
    plain = torch.load(tmp_path / "pt" / f"{kind}.pth", weights_only=True)
    module.load_state_dict(plain, strict=True)
    hub = safetensors.numpy.load_file(tmp_path / "hub" / name)
    hub = {k: torch.from_numpy(tensor) for k, tensor in hub.items()}
    module.load_state_dict(hub, strict=True)


def test_a_trainer_checkpoint_holds_both_models(torch_files, tmp_path):
  import torch

  source = str(torch_files / "trainer.pth")
  convert.import_official(None, source, tmp_path / "made", Settings())
  export.export_official(tmp_path / "made", tmp_path / "out", "torch")
  trainer = torch.load(source, weights_only=True)["trainer"]
  for kind, name in (("vae", "vae_local"), ("var", "var_wo_ddp")):
    back = torch.load(tmp_path / "out" / f"{kind}.pth", weights_only=True)
    theirs = {k: tensor.numpy() for k, tensor in trainer[name].items()}
    assert hashes({k: t.numpy() for k, t in back.items()}) == hashes(theirs)
  # These are the weights after the recorded five steps of run A.
  model = var_jax.load(tmp_path / "made")
  norms = golden_files.table("optim.json")["A"]["param_norms_after"]
  flat = export.official_var(
    weights.newest(tmp_path / "made"), model.config.transformer, "raw"
  )
  for name, norm in norms.items():
    assert np.linalg.norm(flat[name]) == pytest.approx(norm, rel=1e-5), name


def test_code_counts_are_carried_along(workdirs, tmp_path):
  recorded = golden_files.state_dict("vae_tiny.pth.xz")
  hits_SV = recorded["quantize.ema_vocab_hit_SV"]
  step = weights.newest(workdirs["A"] / "tokenizer")
  found = weights.read_code_hits(step, golden_files.TOKENIZER)
  np.testing.assert_array_equal(found, hits_SV)


@pytest.mark.parametrize("cosine", [False, True])
@pytest.mark.parametrize("share", [0, 1, 4])
def test_a_tokenizer_alone_converts_with_its_scales(tmp_path, share, cosine):
  cfg, variables = golden_files.tokenizer(share, cosine)
  tensors = golden_files.tokenizer_tensors(share)
  tensors = {name: tensor.copy() for name, tensor in tensors.items()}
  safetensors.numpy.save_file(tensors, tmp_path / "vae.safetensors")
  said = Settings(scales=(1, 2, 3, 4), distance="cosine" if cosine else None)
  convert.import_official(
    str(tmp_path / "vae.safetensors"), None, tmp_path / "made", said
  )
  model = var_jax.load(tmp_path / "made")
  assert model.config.tokenizer == cfg
  assert model.config.transformer is None
  jax.tree.map(np.testing.assert_array_equal, model.params.tokenizer, variables)
  recorded = golden_files.arrays(f"vae_share{share}_znorm{int(cosine)}.npz")
  expected = np.concatenate([recorded[f"ids_{s}"] for s in range(4)], axis=1)
  np.testing.assert_array_equal(model.encode(recorded_images()), expected)


def test_a_tokenizer_without_phi_converts(tmp_path):
  tensors = golden_files.state_dict("vae_tiny.pth.xz")
  tensors = {k: v.copy() for k, v in tensors.items() if "quant_resi" not in k}
  safetensors.numpy.save_file(tensors, tmp_path / "vae.safetensors")
  convert.import_official(
    str(tmp_path / "vae.safetensors"), None, tmp_path / "made",
    Settings(scales=(1, 2, 3, 4)),
  )  # fmt: skip
  assert var_jax.load(tmp_path / "made").config.tokenizer.quant_resi == 0
  export.export_official(tmp_path / "made", tmp_path / "back", "safetensors")
  back = safetensors.numpy.load_file(tmp_path / "back" / "vae.safetensors")
  assert hashes(back) == hashes(tensors)


def test_exported_weights_are_the_average_or_the_raw_ones(tmp_path, workdirs):
  description, tokenizer, var = weights.read_models(workdirs["A"])
  alone = Description(description.tokenizer)
  runs = {"var": (tmp_path / "run", description, var)}
  runs["vae"] = (tmp_path / "tokenizer_run", alone, tokenizer)
  weights.write_tokenizer(tmp_path / "run", alone, tokenizer)
  names = {"var": "head.bias", "vae": "encoder.conv_in.bias"}
  files = {"var": "var_tiny.pth", "vae": "vae_tiny.pth.xz"}
  for kind, (run, described, variables) in runs.items():
    described.write(run)
    checkpoints = store.Store(run, keep=1)
    doubled = jax.tree.map(lambda x: 2 * x, variables)
    checkpoints.save(5, {"params": variables, "ema": doubled}, position=0)
    checkpoints.close()
    expected = golden_files.state_dict(files[kind])[names[kind]]
    for which, factor in (("ema", 2), ("raw", 1)):
      output = tmp_path / kind / which
      export.export_official(run, output, "safetensors", which)
      back = safetensors.numpy.load_file(output / f"{kind}.safetensors")
      np.testing.assert_array_equal(back[names[kind]], factor * expected)
      assert f"the {which} weights" in (output / "README.md").read_text()


def test_a_folder_says_what_it_is_and_where_it_comes_from(workdirs, official):
  card = (workdirs["A"] / "README.md").read_text()
  assert "64,748" in card  # parameters of variant A, by hand
  assert "depth 3, width 32, 4 heads" in card
  source = official / "A.safetensors"
  assert hashlib.sha256(source.read_bytes()).hexdigest() in card
  assert "MIT" in card
  origin = json.loads((workdirs["A"] / "config.json").read_text())["origin"]
  assert set(origin["sources"]) == {"A.safetensors", "vae.safetensors"}


@pytest.mark.parametrize(
  "card, licence",
  [
    ("---\nlicense: cc-by-nc-4.0\ntags: [x]\n---\n# Mine\n", "cc-by-nc-4.0"),
    ('---\nlicense: "mit"\n---\n', "mit"),
    ("---\ntags: [x]\n---\n# Mine\nlicense: of the text\n---\n", None),
    ("# Mine\n\nlicense: none\n", None),
  ],
)
def test_the_licence_of_a_hub_folder_is_kept(tmp_path, card, licence):
  (tmp_path / "README.md").write_text(card)
  assert hub.licence(tmp_path) == licence
  origin = {"sources": {"x": "y"}, "licence": licence}
  text = model_card.render(golden_files.TOKENIZER, None, origin)
  assert (f"license: {licence}\n" in text) == bool(licence)


def test_a_large_model_is_read_in_many_parts(workdirs, tmp_path, monkeypatch):
  whole = weights.read_models(workdirs["A"])
  monkeypatch.setattr(orbax_trees, "PART_BYTES", 1)
  parts = list(
    weights.read_parts(
      weights.newest(workdirs["A"]),
      torch_format.abstract_var(whole[0].transformer),
      "raw",
    )
  )
  assert len(parts) > 10 and all(len(part) == 1 for part in parts)
  sizes = [array.size for part in parts for array in part.values()]
  assert sizes == sorted(sizes, reverse=True)
  for ours, theirs in zip(
    weights.read_models(workdirs["A"])[1:], whole[1:], strict=True
  ):
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)
  export.export_official(workdirs["A"], tmp_path / "out", "safetensors")
  back = safetensors.numpy.load_file(tmp_path / "out" / "var.safetensors")
  assert hashes(back) == recorded_hashes("var_tiny.pth")


@pytest.mark.parametrize("shape", [(3, 5), (3, 1), (1, 1), (2, 3, 4, 5)])
def test_a_tensor_is_packed_where_it_lies(shape):
  array = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
  expected = array.T.copy()
  packed = export._packed(array.T)
  np.testing.assert_array_equal(packed, expected)
  assert packed.flags.c_contiguous and np.shares_memory(packed, array)


def test_safetensors_are_for_everyone_and_of_any_strides(tmp_path):
  path = tmp_path / "x.safetensors"
  array = np.arange(6, dtype=np.float32).reshape(2, 3)
  tensor_files.write_safetensors(path, {"x": array.T})
  np.testing.assert_array_equal(safetensors.numpy.load_file(path)["x"], array.T)
  assert path.stat().st_mode & 0o777 == 0o644
  with safetensors.safe_open(path, framework="np") as file:
    assert file.metadata() == {"format": "pt"}  # the hub's readers look for it


@pytest.mark.parametrize(
  "changes",
  [
    dict(distance="cosine", num_phis=1),
    dict(num_phis=0, beta=0.5),
    dict(quant_resi=0.25),
  ],
)
def test_a_tokenizer_goes_through_a_hub_folder(tmp_path, changes):
  cfg = dataclasses.replace(
    golden_files.TOKENIZER, channel_mults=(1, 1), **changes
  )
  variables = jax.jit(Tokenizer(cfg).init)(
    jax.random.key(0, impl="rbg"), np.zeros((1, *cfg.image_shape, 3))
  )
  weights.write_model(tmp_path / "made", Description(cfg), variables)
  export.export_official(tmp_path / "made", tmp_path / "hub", "hf")
  if "quant_resi" in changes:  # VAR: its sign means nothing
    config = json.loads((tmp_path / "hub" / "config.json").read_text())
    config["quant_resi"] *= -1
    (tmp_path / "hub" / "config.json").write_text(json.dumps(config))
    (tmp_path / "hub" / "checksums.json").unlink()
  convert.import_official(
    str(tmp_path / "hub"), None, tmp_path / "back", Settings()
  )
  described, back = weights.read_tokenizer(tmp_path / "back")
  assert described.tokenizer == cfg
  jax.tree.map(np.testing.assert_array_equal, back, variables)


def test_a_transformer_keeps_its_epsilon_through_a_hub_folder(tmp_path):
  cfg = dataclasses.replace(
    golden_files.VARIANTS["C"], norm_eps=1e-5, drop_path=0.2
  )
  tokenizer, variables = golden_files.tokenizer()
  made = tmp_path / "made"
  made.mkdir()
  weights.write_tokenizer(made, Description(tokenizer), variables)
  weights.write_model(
    made, Description(tokenizer, cfg), golden_files.var_params("C")
  )
  export.export_official(made, tmp_path / "hub", "hf")
  convert.import_official(
    None, str(tmp_path / "hub"), tmp_path / "back", Settings()
  )
  assert Description.read(tmp_path / "back").transformer == cfg


def strip(official, folder):
  """Write the files without what follows from the architecture."""
  for name in ("vae", "A"):
    tensors = safetensors.numpy.load_file(official / f"{name}.safetensors")
    kept = {
      k: v
      for k, v in tensors.items()
      if not torch_format.is_buffer(k) or k == "lvl_1L"
    }
    assert len(kept) < len(tensors)
    safetensors.numpy.save_file(kept, folder / f"{name}.safetensors")


def test_files_without_buffers_convert_and_come_back_with_them(
  official, tmp_path
):
  strip(official, tmp_path)
  rows = []
  convert.import_official(
    str(tmp_path / "vae.safetensors"),
    str(tmp_path / "A.safetensors"),
    tmp_path / "made",
    Settings(),
    lambda folder, source: rows.extend(verify.imported(folder, source)),
  )
  assert [row.tensors for row in rows[:2]] == [323, 47]
  export.export_official(tmp_path / "made", tmp_path / "back", "safetensors")
  back = safetensors.numpy.load_file(tmp_path / "back" / "var.safetensors")
  assert hashes(back) == recorded_hashes("var_tiny.pth")
  back = safetensors.numpy.load_file(tmp_path / "back" / "vae.safetensors")
  assert not back[torch_format.CODE_HITS].any()


def test_code_counts_of_other_scales_are_left_out_and_told(official, tmp_path):
  """As the official tokenizer does; alone, they tell that scales are wrong."""
  tensors = safetensors.numpy.load_file(official / "vae.safetensors")
  tensors[torch_format.CODE_HITS] = tensors[torch_format.CODE_HITS][:3].copy()
  path = tmp_path / "vae.safetensors"
  safetensors.numpy.save_file(tensors, path)
  description = convert.import_official(
    str(path), str(official / "A.safetensors"), tmp_path / "made", Settings()
  )
  (note,) = description.origin["notes"]
  assert "of 3 scales, the transformer has 4" in note
  assert note in (tmp_path / "made" / "README.md").read_text()
  step = weights.newest(tmp_path / "made" / "tokenizer")
  assert weights.read_code_hits(step, golden_files.TOKENIZER) is None
  with pytest.raises(ValueError, match="has 4 scales, but .* counts 3"):
    convert.import_official(
      str(path), None, tmp_path / "alone", Settings(scales=(1, 2, 3, 4))
    )


def test_parameters_of_a_module_are_tensors_too(torch_files, tmp_path):
  import torch

  state_dict = torch.load(torch_files / "A.pth", weights_only=True)
  parameters = {
    k: torch.nn.Parameter(v) if v.is_floating_point() else v
    for k, v in state_dict.items()
  }
  torch.save(parameters, tmp_path / "A.pth")
  found = tensor_files.read(str(tmp_path / "A.pth")).state_dicts["var"]
  assert hashes(found) == recorded_hashes("var_tiny.pth")


def test_an_export_is_verified_by_reading_it(workdirs, tmp_path):
  torch = pytest.importorskip("torch")
  del torch
  flags = ["--checkpoint", workdirs["A"], "--to", "torch", "--verify"]
  flags += ["--output", tmp_path / "out"]
  assert cli.main(["convert", *map(str, flags)]) == 0


def lose(tensors):
  return {k: v for k, v in tensors.items() if ".1.ffn" not in k}


def turn(tensors):
  name = "blocks.1.attn.proj.weight"
  return tensors | {name: tensors[name].T.copy()}


@pytest.mark.parametrize("damage", [lose, turn])
def test_an_export_that_lost_something_is_not_left(
  workdirs, tmp_path, monkeypatch, capsys, damage
):
  honest = tensor_files.write_safetensors

  def write(path, tensors):
    honest(path, damage(tensors) if "var" in path.name else tensors)

  monkeypatch.setattr(tensor_files, "write_safetensors", write)
  flags = ["--checkpoint", workdirs["A"], "--to", "safetensors", "--verify"]
  flags += ["--output", tmp_path / "out"]
  assert cli.main(["convert", *map(str, flags)]) == 1
  err = capsys.readouterr().err
  assert "blocks.1.ffn" in err or "attn/proj" in err
  assert list(tmp_path.iterdir()) == []


def test_an_encoder_that_differs_is_not_left(official, tmp_path, monkeypatch):
  pytest.importorskip("torch")
  honest = Tokenizer.quantize_latent

  def other(self, f_BhwZ, scales=None):
    return honest(self, -f_BhwZ, scales)

  monkeypatch.setattr(Tokenizer, "quantize_latent", other)
  with pytest.raises(ValueError, match="of an image's tokens are the PyTorch"):
    convert.import_official(
      str(official / "vae.safetensors"),
      None,
      tmp_path / "made",
      Settings(scales=(1, 2, 3, 4)),
      verify.imported,
    )
  assert list(tmp_path.iterdir()) == []


@pytest.fixture
def run_under_way(workdirs, tmp_path):
  """A training workdir with step 1, and what saves a newer one."""
  description, tokenizer, var = weights.read_models(workdirs["A"])
  alone = Description(description.tokenizer)
  weights.write_tokenizer(tmp_path / "run", alone, tokenizer)
  description.write(tmp_path / "run")
  checkpoints = store.Store(tmp_path / "run", keep=2)

  def save(step, factor):
    tree = jax.tree.map(lambda x: factor * x, var)
    checkpoints.save(step, {"params": tree}, position=0)
    checkpoints.wait()

  save(1, 1)
  yield save
  checkpoints.close()


def test_one_step_is_exported_though_a_run_goes_on(run_under_way, tmp_path):
  rows = []

  def check(folder, steps):
    run_under_way(2, 3)
    rows.extend(verify.exported(folder, steps, "ema"))

  export.export_official(
    tmp_path / "run", tmp_path / "out", "safetensors", check=check
  )
  assert [row.difference for row in rows[:2]] == ["0", "0"]
  back = safetensors.numpy.load_file(tmp_path / "out" / "var.safetensors")
  assert hashes(back) == recorded_hashes("var_tiny.pth")


def test_a_training_workdir_is_exported_by_a_relative_path(
  run_under_way, tmp_path, monkeypatch
):
  monkeypatch.chdir(tmp_path)
  flags = ["--checkpoint", "run", "--to", "safetensors", "--output", "out"]
  assert cli.main(["convert", *flags]) == 0
  back = safetensors.numpy.load_file("out/var.safetensors")
  assert hashes(back) == recorded_hashes("var_tiny.pth")


@pytest.mark.parametrize("number", ["SIGINT", "SIGTERM"])
def test_a_signal_leaves_one_line_and_no_folder(official, tmp_path, number):
  """In the middle of writing: the folder is there by then."""
  flags = ["--vae", official / "vae.safetensors", "--scales", "1,2,3,4"]
  flags += ["--output", tmp_path / "new" / "made"]
  code = """
import sys, time
from var_jax import cli
from var_jax.checkpoints import checksums
def write(*_):  # as long as it takes
  print("writing", flush=True)
  time.sleep(60)
checksums.write = write
cli.run()
"""
  process = subprocess.Popen(
    [sys.executable, "-c", code, "convert", *map(str, flags)],
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )
  assert process.stdout.readline() == "writing\n"
  assert (tmp_path / "new" / ".made.partial").exists()
  process.send_signal(getattr(signal, number))
  _, err = process.communicate(timeout=30)
  assert process.returncode == 1
  assert err == "var-jax: interrupted\n"
  assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_one_line(workdirs, tmp_path, monkeypatch, capsys):
  def full(*_, **__):
    raise RuntimeError("no space left\non the device")

  monkeypatch.setattr(safetensors.numpy, "save_file", full)
  monkeypatch.setattr(ocp.Checkpointer, "save", full)
  flags = ["--checkpoint", workdirs["A"], "--to", "hf"]
  for arguments in (flags, ["--var", tmp_path / "hub"]):
    if arguments is not flags:
      monkeypatch.undo()
      export.export_official(workdirs["A"], tmp_path / "hub", "hf")
      monkeypatch.setattr(ocp.Checkpointer, "save", full)
    arguments = [*arguments, "--output", tmp_path / "out"]
    assert cli.main(["convert", *map(str, arguments)]) == 1
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert "cannot be written (no space left)" in err
    assert not (tmp_path / "out").exists()


def test_a_mistyped_scale_takes_no_memory():
  """The image of these scales would be 27 GB."""
  cfg = dataclasses.replace(golden_files.TOKENIZER, scales=(1, 2, 3, 3000))
  assert "48000 x 48000" in model_card.render(cfg, None, {})


def test_weights_that_nobody_knows_are_refused(workdirs, tmp_path):
  with pytest.raises(ValueError, match="weights 'best' is not known"):
    export.export_official(workdirs["A"], tmp_path / "out", "hf", "best")


def test_the_table_says_zero_and_compares_with_the_reference(
  official, tmp_path, variant
):
  pytest.importorskip("torch")
  rows = []
  convert.import_official(
    str(official / "vae.safetensors"),
    str(official / f"{variant}.safetensors"),
    tmp_path / "made",
    Settings(heads=HEADS[variant]),
    lambda folder, source: rows.extend(verify.imported(folder, source)),
  )
  tokenizer, transformer, *rest = rows
  assert tokenizer[1:] == (324, 4_375_515, "0")
  assert transformer.tensors == len(HASHES[golden_files.VAR_FILES[variant]])
  assert transformer.difference == "0"
  assert [row.what for row in rest] == [
    "latent, to PyTorch", "tokens",
    "reconstruction, to PyTorch", "logits, to PyTorch",
  ]  # fmt: skip
  assert rest[1].difference == "100.00% the same"


def test_a_conversion_that_loses_something_leaves_nothing(
  official, tmp_path, monkeypatch
):
  """One layer's projection is stored as its neighbour's."""
  from var_jax.checkpoints import torch_format

  honest = torch_format.from_official

  def swapped(tensors, entries):
    params = honest(tensors, entries)
    if "blocks" in params:
      kernel = params["blocks"]["attn"]["proj"]["kernel"]
      kernel[[0, 1]] = kernel[[1, 0]]
    return params

  monkeypatch.setattr(torch_format, "from_official", swapped)
  with pytest.raises(ValueError, match="blocks.0.attn.proj.weight does not"):
    convert.import_official(
      str(official / "vae.safetensors"),
      str(official / "A.safetensors"),
      tmp_path / "made",
      Settings(),
      verify.imported,
    )
  assert list(tmp_path.iterdir()) == []


def test_models_that_differ_from_the_reference_are_refused(
  official, tmp_path, monkeypatch
):
  """The tensors are right, but what is made of them is not."""
  pytest.importorskip("torch")
  from var_jax.models import layers

  monkeypatch.setattr(
    layers, "modulate", lambda x, scale, shift: x * (1.001 + scale) + shift
  )
  jax.clear_caches()
  with pytest.raises(ValueError, match="logits differs from the PyTorch"):
    convert.import_official(
      str(official / "vae.safetensors"),
      str(official / "A.safetensors"),
      tmp_path / "made",
      Settings(),
      verify.imported,
    )
  monkeypatch.undo()
  jax.clear_caches()
  assert list(tmp_path.iterdir()) == []


def test_models_that_an_official_file_cannot_hold_are_refused(tmp_path):
  for changes, message in (
    (dict(norm_groups=16), "norm_groups 16 has no place"),
    (dict(scales=(1, (2, 4))), "are not all square"),
  ):
    cfg = dataclasses.replace(golden_files.TOKENIZER, **changes)
    Description(cfg).write(tmp_path)
    with pytest.raises(ValueError, match=message):
      export.export_official(tmp_path, tmp_path / "out", "torch")
    assert not (tmp_path / "out").exists()


def test_settings_that_the_official_class_has_fixed_are_told(tmp_path):
  cfg = dataclasses.replace(
    golden_files.TOKENIZER, channel_mults=(1, 2), decoder_blocks=1
  )
  init = Tokenizer(cfg).init
  variables = jax.jit(init)(
    jax.random.key(0, impl="rbg"), np.zeros((1, *cfg.image_shape, 3))
  )
  weights.write_model(tmp_path / "made", Description(cfg), variables)
  told = export.export_official(
    tmp_path / "made", tmp_path / "out", "safetensors"
  )
  assert told == [
    "channel_mults (1, 2) (there (1, 1, 2, 2, 4))",
    "decoder_blocks 1 (there 3)",
  ]
  convert.import_official(
    str(tmp_path / "out" / "vae.safetensors"),
    None,
    tmp_path / "back",
    Settings(scales=cfg.scales),
  )
  back, again = weights.read_tokenizer(tmp_path / "back")
  assert back.tokenizer == cfg
  jax.tree.map(np.testing.assert_array_equal, again, variables)


def test_bfloat16_weights_are_the_same_model_in_less_memory(workdirs):
  """What is only multiplied in bfloat16 is read as bfloat16."""
  half = var_jax.load(workdirs["A"], dtype="bfloat16")
  full = var_jax.load(workdirs["A"])
  whole = var_jax.Model(half.models, full.params)  # cast at each use
  blocks = half.params.var["params"]["blocks"]
  assert blocks["ffn"]["fc1"]["kernel"].dtype == jax.numpy.bfloat16
  assert blocks["attn"]["scale_mul"].dtype == jax.numpy.float32
  encoder = half.params.tokenizer["params"]["encoder"]
  assert encoder["conv_in"]["kernel"].dtype == jax.numpy.float32
  key = jax.random.key(1)
  for ours, theirs in zip(
    half.sample([3, -1], key), whole.sample([3, -1], key), strict=True
  ):
    np.testing.assert_array_equal(ours, theirs)
  tokens_BL = full.encode(recorded_images())
  np.testing.assert_array_equal(half.encode(recorded_images()), tokens_BL)
  np.testing.assert_array_equal(half.decode(tokens_BL), whole.decode(tokens_BL))
  np.testing.assert_array_equal(
    half.logits([1, 2, 3, -1], tokens_BL),
    whole.logits([1, 2, 3, -1], tokens_BL),
  )


def test_hub_ids_are_fetched(workdirs, tmp_path, monkeypatch):
  """By a stand-in for the library: there is no network in tests."""
  import sys
  import types

  export.export_official(workdirs["A"], tmp_path / "hub", "hf")
  calls = []

  def hf_hub_download(repository, file):
    calls.append((repository, file))
    return str(tmp_path / "hub" / file)

  def snapshot_download(repository, allow_patterns):
    calls.append((repository, None))
    return str(tmp_path / "hub")

  library = types.SimpleNamespace(
    hf_hub_download=hf_hub_download, snapshot_download=snapshot_download
  )
  monkeypatch.setitem(sys.modules, "huggingface_hub", library)
  whole = tensor_files.read("someone/var-tiny")
  assert set(whole.state_dicts) == {"vae", "var"}
  part = tensor_files.read("someone/var-tiny/vae/model.safetensors")
  assert set(part.state_dicts) == {"vae"}
  assert calls == [
    ("someone/var-tiny", None), ("someone/var-tiny", "vae/model.safetensors"),
  ]  # fmt: skip
  monkeypatch.setitem(sys.modules, "huggingface_hub", None)
  with pytest.raises(ValueError, match="pip install huggingface_hub"):
    tensor_files.read("someone/else")


def test_what_was_written_is_not_written_over(workdirs, official, tmp_path):
  (tmp_path / "made").mkdir()
  with pytest.raises(ValueError, match="made. exists already"):
    convert.import_official(
      str(official / "vae.safetensors"), None, tmp_path / "made", Settings()
    )
  with pytest.raises(ValueError, match="made. exists already"):
    export.export_official(workdirs["A"], tmp_path / "made", "hf")
  assert pathlib.Path(tmp_path / "made").exists()
