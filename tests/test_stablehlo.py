"""Programs that run where this package cannot be imported."""

import functools
import pathlib
import re
import subprocess
import sys

import golden_files
import jax
import numpy as np
import pytest
import safetensors.numpy

import var_jax
from var_jax import cli
from var_jax.checkpoints import store, weights
from var_jax.checkpoints.description import Description

BATCH = 2

RUNNER = """
import sys
sys.modules["var_jax"] = None  # an import would raise
{snippet}
np.savez("out.npz", **{{k: v for k, v in (
  ("images", images), ("drawn", globals().get("tokens"))) if v is not None}})
assert not any(name.startswith("var_jax.") for name in sys.modules)
"""


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
  """Transformer B with its tokenizer."""
  folder = tmp_path_factory.mktemp("workdir")
  models, params = golden_files.pair("B")
  params = jax.tree.map(np.asarray, params)
  alone = Description(models.tokenizer.cfg)
  weights.write_tokenizer(folder, alone, params.tokenizer)
  whole = Description(models.tokenizer.cfg, models.var.cfg)
  weights.write_model(folder, whole, params.var)
  return folder


def run_readme(folder: pathlib.Path):
  """Run the code of the folder's README in a process of its own."""
  text = (folder / "README.md").read_text()
  snippet = re.search(r"```python\n(.*?)```", text, re.DOTALL)[1]
  subprocess.run(
    [sys.executable, "-c", RUNNER.format(snippet=snippet)],
    check=True,
    cwd=folder,
  )
  with np.load(folder / "out.npz") as file:
    return dict(file)


def export(workdir, output, *flags):
  arguments = ["--checkpoint", workdir, "--to", "stablehlo", *flags]
  return cli.main(["convert", "--output", str(output), *map(str, arguments)])


def test_the_readme_draws_and_decodes_the_same_image(workdir, tmp_path, capsys):
  output = tmp_path / "programs"
  assert export(workdir, output, "--batch", BATCH) == 0
  assert f"decode and sample of batch {BATCH}" in capsys.readouterr().out
  found = run_readme(output)
  model = var_jax.load(workdir)
  sample = model.sample([0] * BATCH, jax.random.key(0))  # as the README draws
  np.testing.assert_array_equal(found["drawn"], sample.tokens_BL)
  # The whole sampler is one program there and one a scale here.
  np.testing.assert_allclose(found["images"], sample.images_BHW3, atol=1e-5)

  # Labels, keys and options are arguments, not constants of the program.
  arrays = safetensors.numpy.load_file(output / "weights.safetensors")
  data = (output / "sample.stablehlo").read_bytes()
  program = jax.export.deserialize(bytearray(data)).call
  for labels, seed, guidance, top_k, top_p in (
    ([3, -1], 5, 4.0, 5, 0.0),
    ([7, 2], 6, 0.0, 0, 0.5),
  ):
    key = jax.random.key(seed)
    images, tokens = program(
      arrays,
      np.array(labels, np.int32),
      jax.random.key_data(key),
      np.float32(guidance),
      np.int32(top_k),
      np.float32(top_p),
    )
    sample = model.sample(
      labels, key, guidance=guidance, top_k=top_k, top_p=top_p
    )
    np.testing.assert_array_equal(tokens, sample.tokens_BL)
    np.testing.assert_allclose(images, sample.images_BHW3, atol=1e-5)


@pytest.mark.parametrize("which, factor", [("ema", 2), ("raw", 1)])
def test_programs_hold_the_average_or_the_raw_weights(
  workdir, tmp_path, which, factor
):
  _, tokenizer, _ = weights.read_models(workdir)
  Description(golden_files.TOKENIZER).write(tmp_path / "run")
  checkpoints = store.Store(tmp_path / "run", keep=1)
  doubled = jax.tree.map(lambda x: 2 * x, tokenizer)
  checkpoints.save(1, {"params": tokenizer, "ema": doubled}, position=0)
  checkpoints.close()
  output = tmp_path / "programs"
  assert export(tmp_path / "run", output, "--weights", which) == 0
  arrays = safetensors.numpy.load_file(output / "weights.safetensors")
  np.testing.assert_array_equal(
    arrays["tokenizer/params/codebook"],
    factor * np.asarray(tokenizer["params"]["codebook"]),
  )


def test_keys_are_threefry_whatever_the_default(workdir, tmp_path):
  output = tmp_path / "programs"
  with jax.default_prng_impl("rbg"):
    assert export(workdir, output) == 0


def test_a_tokenizer_alone_becomes_a_decoder(workdir, tmp_path):
  output = tmp_path / "programs"
  assert export(workdir / "tokenizer", output) == 0
  assert not (output / "sample.stablehlo").exists()
  found = run_readme(output)
  model = var_jax.load(workdir / "tokenizer")
  # As the program is: without the options that ours has on a CPU.
  tokenizer = model.models.tokenizer
  decode = jax.jit(functools.partial(tokenizer.apply, method="decode"))
  expected = decode(model.params.tokenizer, np.zeros((1, 30), np.int32))
  np.testing.assert_allclose(found["images"], expected, atol=1e-6)


def test_weights_are_named_and_whole(workdir, tmp_path):
  output = tmp_path / "programs"
  export(workdir, output)
  arrays = safetensors.numpy.load_file(output / "weights.safetensors")
  models, params = golden_files.pair("B")
  expected = params.var["params"]["head"]["kernel"]
  np.testing.assert_array_equal(arrays["var/params/head/kernel"], expected)
  leaves = jax.tree.leaves(params)
  assert sum(x.size for x in arrays.values()) == sum(x.size for x in leaves)


def test_programs_are_for_every_platform(workdir, tmp_path):
  output = tmp_path / "programs"
  export(workdir / "tokenizer", output)
  data = (output / "decode.stablehlo").read_bytes()
  program = jax.export.deserialize(bytearray(data))
  assert set(program.platforms) == {"cpu", "cuda", "tpu"}


def test_a_failed_export_leaves_nothing(workdir, tmp_path, capsys):
  (tmp_path / "there").mkdir()
  assert export(workdir, tmp_path / "there") == 1
  assert "there' exists already" in capsys.readouterr().err
  assert export(tmp_path / "no", tmp_path / "new") == 1
  assert [path.name for path in tmp_path.iterdir()] == ["there"]
