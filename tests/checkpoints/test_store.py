"""Checkpoints that are missing, cut short or from elsewhere."""

import gc
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_models

from var_jax.checkpoints import store, weights
from var_jax.checkpoints.description import Description
from var_jax.models.tokenizer import Tokenizer
from var_jax.training import tokenizer_step

CFG = tiny_models.tokenizer_config()


@pytest.fixture(scope="module")
def variables():
  return tokenizer_step.init_params(
    Tokenizer(CFG), jax.random.key(0, impl="rbg")
  )


@pytest.fixture
def workdir(tmp_path, variables):
  """A workdir with a tokenizer of steps 1 and 2."""
  description = Description(CFG, None, ("a", "b"), {"seed": 0})
  description.write(tmp_path)
  checkpoints = store.Store(tmp_path, keep=2)
  for step in (1, 2):
    scaled = jax.tree.map(lambda x, step=step: x * step, variables)
    checkpoints.save(step, {"params": scaled, "ema": None}, position=step)
  checkpoints.close()
  return tmp_path


def test_description_round_trips(workdir):
  description = Description.read(workdir)
  assert description == Description(CFG, None, ("a", "b"), {"seed": 0})


def test_newest_step_is_read_and_ema_falls_back_to_raw(workdir, variables):
  _, tokenizer, transformer = weights.read_models(workdir, weights="ema")
  assert transformer is None
  jax.tree.map(
    lambda ours, x: np.testing.assert_array_equal(ours, 2 * x),
    tokenizer,
    variables,
  )


def test_an_older_step_can_be_read(workdir, variables):
  _, tokenizer, _ = weights.read_models(workdir / "checkpoints" / "1")
  jax.tree.map(np.testing.assert_array_equal, tokenizer, variables)
  with pytest.raises(ValueError, match="7 is no finished checkpoint; .* 1, 2"):
    weights.read_models(workdir / "checkpoints" / "7")


def test_only_the_newest_are_kept(tmp_path):
  checkpoints = store.Store(tmp_path, keep=2)
  for step in range(5):
    checkpoints.save(step, {"params": {"a": jnp.ones(3)}}, position=0)
  checkpoints.close()
  names = {path.name for path in (tmp_path / "checkpoints").iterdir()}
  assert names == {"3", "4"}


def test_weights_land_on_the_given_mesh(workdir):
  mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]), ("data",))
  sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
  _, tokenizer, _ = weights.read_models(workdir, sharding=sharding)
  assert tokenizer["params"]["codebook"].sharding == sharding


# Orbax drops its coroutines unawaited when one of them fails.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_truncated_checkpoint_without_checksums_is_one_line_that_names_it(
  workdir, caplog
):
  (workdir / "checkpoints" / "2" / "checksums.json").unlink()
  for path in (workdir / "checkpoints" / "2" / "params").rglob("*"):
    if path.is_file() and path.stat().st_size > 64:
      path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
  with pytest.raises(ValueError, match="checkpoint .*2 cannot be read") as info:
    weights.read_models(workdir)
  assert "\n" not in str(info.value)
  assert "not verified" in caplog.text
  del info
  gc.collect()


def test_reading_a_step_logs_nothing(workdir, caplog):
  weights.read_models(workdir)
  assert caplog.text == ""


def test_a_damaged_step_is_not_resumed(workdir, variables):
  path = max(
    (workdir / "checkpoints" / "2" / "params").rglob("*"),
    key=lambda path: path.stat().st_size if path.is_file() else 0,
  )
  data = bytearray(path.read_bytes())
  data[len(data) // 2] ^= 1
  path.write_bytes(bytes(data))
  checkpoints = store.Store(workdir, keep=2)
  with pytest.raises(ValueError, match="is not what was written"):
    checkpoints.restore(2, {"params": variables})
  trees, position = checkpoints.restore(1, {"params": variables})
  checkpoints.close()
  assert position == 1
  jax.tree.map(np.testing.assert_array_equal, trees["params"], variables)


def test_every_step_has_its_checksums_when_it_has_its_name(workdir):
  for step in ("1", "2"):
    folder = workdir / "checkpoints" / step
    listed = json.loads((folder / "checksums.json").read_text())["sha256"]
    kept = {
      str(path.relative_to(folder))
      for path in folder.rglob("*")
      if path.is_file() and path.parent != folder
    }
    assert kept - set(listed) <= {
      name for name in kept if name.endswith("commit_success.txt")
    }
    assert any(name.startswith("params/") for name in listed)


def test_an_unfinished_save_is_not_read(workdir, variables):
  newest = workdir / "checkpoints" / "2"
  newest.rename(newest.with_name("2.orbax-checkpoint-tmp-17"))
  _, tokenizer, _ = weights.read_models(workdir)
  np.testing.assert_array_equal(
    tokenizer["params"]["codebook"], variables["params"]["codebook"]
  )


def test_weights_of_another_architecture_are_an_error(workdir):
  content = json.loads((workdir / "config.json").read_text())
  content["tokenizer"]["vocab_size"] = 32
  (workdir / "config.json").write_text(json.dumps(content))
  with pytest.raises(ValueError, match="for another architecture"):
    weights.read_models(workdir)


@pytest.mark.parametrize(
  "damage, message",
  [
    (lambda folder: (folder / "config.json").unlink(), "does not exist"),
    (lambda folder: (folder / "config.json").write_text("{"), "not valid JSON"),
    (
      lambda folder: (folder / "config.json").write_text("{}"),
      "has no format_version",
    ),
    (
      lambda folder: (folder / "config.json").write_text(
        '{"format_version": 1}'
      ),
      "does not describe a model",
    ),
    (
      lambda folder: (folder / "config.json").write_text("[]"),
      "has no format_version",
    ),
    (
      lambda folder: (folder / "config.json").write_text(
        '{"format_version": 1, "tokenizer": "x", "transformer": null, '
        '"class_names": [], "config": {}}'
      ),
      "does not describe a model",
    ),
    (
      lambda folder: (folder / "checkpoints").rename(folder / "moved"),
      "no finished checkpoint",
    ),
  ],
)
def test_a_folder_that_is_no_workdir_is_an_error(workdir, damage, message):
  damage(workdir)
  with pytest.raises(ValueError, match=message):
    weights.read_models(workdir)


def test_an_interrupted_copy_of_the_tokenizer_leaves_no_folder(
  tmp_path, variables, monkeypatch
):
  description = Description(CFG)

  def killed(self, folder):
    raise KeyboardInterrupt

  monkeypatch.setattr(Description, "write", killed)
  with pytest.raises(KeyboardInterrupt):
    weights.write_tokenizer(tmp_path, description, variables)
  assert not (tmp_path / "tokenizer").exists()
  monkeypatch.undo()
  weights.write_tokenizer(tmp_path, description, variables)
  _, tokenizer, _ = weights.read_models(tmp_path / "tokenizer")
  jax.tree.map(np.testing.assert_array_equal, tokenizer, variables)
