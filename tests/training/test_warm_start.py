"""Starting from another model: what is kept, what is new, what is refused."""

import dataclasses
import shutil

import golden_files
import jax
import numpy as np
import pytest

from configs import tokenizer as tokenizer_presets
from configs import var as var_presets
from var_jax.checkpoints import store, weights
from var_jax.checkpoints.description import Description
from var_jax.data import sources
from var_jax.models import resize
from var_jax.models.tokenizer import Tokenizer, TokenizerConfig
from var_jax.models.transformer import VAR, VARConfig
from var_jax.parallel.mesh import make_mesh
from var_jax.training import (
  loop,
  tokenizer_program,
  tokenizer_step,
  var_program,
  var_step,
  warm_start,
)

OLD = golden_files.VARIANTS["A"]  # scales 1, 2, 3, 4; ten classes
POSITIONS = ("pos", "pos_start", "lvl_emb")


def start(**changes):
  """Return (old parameters, new ones, what is said) of a changed config."""
  new = dataclasses.replace(OLD, **changes)
  variables = golden_files.var_params("A")
  key = jax.random.key(7, impl="rbg")
  fresh = var_step.init_params(VAR(new), key)
  started, changes = warm_start.start_var(
    variables, OLD, new, lambda: var_step.init_class_emb(VAR(new), key)
  )
  same = jax.tree.structure(started) == jax.tree.structure(fresh)
  assert same and jax.tree.map(np.shape, started) == jax.tree.map(
    np.shape, fresh
  )
  return variables["params"], started["params"], fresh["params"], changes


def assert_same_but(old, new, names):
  for name in old:
    if name not in names:
      jax.tree.map(np.testing.assert_array_equal, old[name], new[name])


def test_the_same_architecture_is_kept_whole():
  old, new, _, changes = start(drop_path=0.5, remat=True)
  assert_same_but(old, new, ())
  assert changes == []


def test_other_classes_keep_all_but_the_class_embedding():
  old, new, fresh, changes = start(num_classes=4)
  assert_same_but(old, new, {"class_emb"})
  np.testing.assert_array_equal(new["class_emb"], fresh["class_emb"])
  assert "10 classes there and 4 here" in changes[0] and len(changes) == 1


def test_other_scales_interpolate_positions_and_keep_the_rest():
  sizes = (1, 2, 4, 8)
  old, new, _, changes = start(scales=sizes)
  assert_same_but(old, new, set(POSITIONS))
  assert "(1, 2, 3, 4) to (1, 2, 4, 8)" in changes[0]
  # Scales of one size and place are what they were.
  np.testing.assert_array_equal(new["pos"][:5], old["pos"][:5])
  np.testing.assert_array_equal(new["lvl_emb"], old["lvl_emb"])
  # The others are maps, enlarged as maps: each channel by itself.
  map_44D = old["pos"][14:30].reshape(4, 4, -1)
  matrix_84 = resize.bicubic_matrix(8, 4)
  expected = np.einsum("ih,hwd,jw->ijd", matrix_84, map_44D, matrix_84)
  np.testing.assert_allclose(
    new["pos"][21:].reshape(8, 8, -1), expected, rtol=1e-5, atol=1e-5
  )


def test_more_scales_lie_between_those_that_there_were():
  """Of seven scales s lies at s/6; the old four at 0, 1/3, 2/3 and 1."""
  old, new, _, _ = start(scales=(1, 2, 3, 4, 5, 6, 8))
  levels = old["lvl_emb"]
  between = [(levels[s] + levels[s + 1]) / 2 for s in range(3)]
  expected = [levels[0], between[0], levels[1], between[1], levels[2],
              between[2], levels[3]]  # fmt: skip
  np.testing.assert_allclose(new["lvl_emb"], np.stack(expected), rtol=1e-6)
  # 1x1 enlarged to 2x2 is constant; the old 2x2 is as large already.
  expected = (old["pos"][0] + old["pos"][1:5]) / 2
  np.testing.assert_allclose(new["pos"][1:5], expected, rtol=1e-5, atol=1e-6)


def test_a_single_scale_takes_after_the_coarsest():
  old, new, _, _ = start(scales=(2,))
  np.testing.assert_array_equal(new["lvl_emb"], old["lvl_emb"][:1])
  assert new["pos"].shape == new["pos_start"].shape == (4, 32)


@pytest.mark.parametrize(
  "changes, message",
  [
    (dict(depth=4), "depth 3, the config says 4"),
    (dict(heads=8), "heads 4, the config says 8"),
    (dict(vocab_size=64), "vocab_size 128, the config says 64"),
    (dict(qk_norm=False), "qk_norm True"),
    (dict(norm_eps=1e-5), "norm_eps 1e-06"),
  ],
)
def test_another_architecture_is_refused(changes, message):
  new = dataclasses.replace(OLD, **changes)
  with pytest.raises(ValueError, match=message):
    warm_start.start_var(golden_files.var_params("A"), OLD, new, None)


def test_a_tokenizer_takes_other_scales_only_with_shared_phis():
  cfg, variables = golden_files.tokenizer(4)
  new = dataclasses.replace(cfg, scales=(1, 4))
  assert warm_start.start_tokenizer(variables, cfg, new) is variables
  alone = dataclasses.replace(cfg, num_phis=0)
  new = dataclasses.replace(alone, scales=(1, 4))
  with pytest.raises(ValueError, match="scales"):
    warm_start.start_tokenizer(variables, alone, new)


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
  """A workdir as `convert` writes it, of the size of the tiny presets."""
  folder = tmp_path_factory.mktemp("pretrained") / "made"
  folder.mkdir()
  model = tokenizer_presets.get_config("tiny").model
  tokenizer = TokenizerConfig(**{**model, "dtype": "float32"})
  key = jax.random.key(1, impl="rbg")
  variables = tokenizer_step.init_params(Tokenizer(tokenizer), key)
  hits_SV = np.arange(3.0 * 32, dtype=np.float32).reshape(3, 32)
  alone = Description(tokenizer)
  weights.write_tokenizer(folder, alone, to_numpy(variables), hits_SV)
  var = VARConfig(
    **{**var_presets.get_config("tiny").model, "dtype": "float32"},
    num_classes=10,
    vocab_size=tokenizer.vocab_size,
    latent_channels=tokenizer.latent_channels,
    scales=tokenizer.scales,
  )
  variables = var_step.init_params(VAR(var), key)
  weights.write_model(folder, Description(tokenizer, var), to_numpy(variables))
  return folder


def to_numpy(tree):
  return jax.tree.map(np.asarray, tree)


def fine_tuning(pretrained, **changes):
  config = var_presets.get_config("tiny")
  config.init_from = str(pretrained)
  config.data.batch_size = 4
  config.update(changes)
  return config


def test_a_run_starts_from_the_weights_and_resumes_without_them(
  pretrained, tmp_path, capsys
):
  moved = tmp_path / "moved"
  shutil.copytree(pretrained, moved)
  config = fine_tuning(moved, steps=2, checkpoint_every=1)
  config.optimizer.learning_rate = 1e-12
  loop.train(config, tmp_path / "whole")
  assert "class embedding" not in capsys.readouterr().out
  _, tokenizer, var = weights.read_models(tmp_path / "whole")
  _, old_tokenizer, old_var = weights.read_models(pretrained)
  jax.tree.map(np.testing.assert_array_equal, tokenizer, old_tokenizer)
  jax.tree.map(  # two steps of next to nothing
    lambda x, y: np.testing.assert_allclose(x, y, atol=1e-9), var, old_var
  )
  for folder in (tmp_path / "whole", pretrained):
    step = weights.newest(weights.tokenizer_folder(folder))
    hits_SV = weights.read_code_hits(step, Description.read(folder).tokenizer)
    assert hits_SV[2, 31] == 95

  shutil.copytree(tmp_path / "whole", tmp_path / "cut")
  shutil.rmtree(tmp_path / "cut" / "checkpoints" / "2")
  shutil.rmtree(moved)
  loop.train(config, tmp_path / "cut")
  _, _, resumed = weights.read_models(tmp_path / "cut")
  jax.tree.map(np.testing.assert_array_equal, resumed, var)


def test_other_classes_are_said_and_the_rest_is_kept(
  pretrained, tmp_path, capsys
):
  path = tmp_path / "two.npz"
  images = np.random.default_rng(0).integers(0, 256, (8, 16, 16, 3))
  np.savez(path, images=images.astype(np.uint8), labels=np.arange(8) % 2)
  source = sources.open_source(f"npz:{path}", "train")
  program = var_program.make(
    fine_tuning(pretrained), make_mesh(), source, None, tmp_path / "run"
  )
  params = program.init().params["params"]
  out = capsys.readouterr().out
  assert "class embedding: new, 10 classes there and 2 here" in out
  assert program.description.transformer.num_classes == 2
  assert params["class_emb"].shape[0] == 3
  _, old = weights.read_transformer(pretrained)
  assert_same_but(old["params"], params, {"class_emb"})


def test_the_average_is_the_start_and_tokenizer_path_comes_first(
  pretrained, tmp_path
):
  """And the card says where the weights are from, and under which licence."""
  run = tmp_path / "average"
  shutil.copytree(pretrained, run)
  shutil.rmtree(run / "checkpoints")
  description, tokenizer, var = weights.read_models(pretrained)
  checkpoints = store.Store(run, keep=1)
  doubled = jax.tree.map(lambda x: 2 * x, var)
  checkpoints.save(3, {"params": var, "ema": doubled}, position=0)
  checkpoints.close()
  origin = {"licence": "cc-by-nc-4.0"}
  dataclasses.replace(description, origin=origin).write(run)
  other = tmp_path / "other"
  tripled = to_numpy(jax.tree.map(lambda x: 3 * x, tokenizer))
  weights.write_model(other, Description(description.tokenizer), tripled)

  config = fine_tuning(run, tokenizer_path=str(other))
  source = sources.open_source("digits", "train")
  program = var_program.make(
    config, make_mesh(), source, None, tmp_path / "run"
  )
  params = program.init().params["params"]
  assert_same_but(doubled["params"], params, {})
  (tmp_path / "run").mkdir()
  program.prepare()
  _, copied = weights.read_tokenizer(tmp_path / "run" / "tokenizer")
  jax.tree.map(np.testing.assert_array_equal, copied, tripled)
  made = program.description.origin
  assert made["licence"] == "cc-by-nc-4.0"
  assert str(run) in made["made_by"]


@pytest.mark.parametrize(
  "changes, message",
  [
    (dict(model=dict(depth=3)), "depth 2, the config says 3"),
    (dict(init_from="nowhere"), "nowhere/config.json does not exist"),
  ],
)
def test_a_bad_start_leaves_no_workdir(pretrained, tmp_path, changes, message):
  with pytest.raises(ValueError, match=message):
    loop.train(fine_tuning(pretrained, **changes), tmp_path / "run")
  assert not (tmp_path / "run").exists()


def test_a_tokenizer_is_no_start_for_a_transformer(pretrained, tmp_path):
  config = fine_tuning(pretrained, init_from=str(pretrained / "tokenizer"))
  with pytest.raises(ValueError, match="holds a tokenizer alone"):
    loop.train(config, tmp_path / "run")
  assert not (tmp_path / "run").exists()


def test_a_tokenizer_starts_from_a_tokenizer(pretrained, tmp_path):
  config = tokenizer_presets.get_config("tiny")
  config.init_from = str(pretrained)  # its frozen tokenizer
  source = sources.open_source("digits", "train")
  state = tokenizer_program.make(
    config, make_mesh(), source, None, tmp_path / "run"
  ).init()
  _, old = weights.read_tokenizer(pretrained)
  jax.tree.map(np.testing.assert_array_equal, state.params, old)
