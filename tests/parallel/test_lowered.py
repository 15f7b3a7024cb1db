"""What a sharded bfloat16 step asks XLA for, and what a device gets of it."""

import json
import os
import pathlib
import re
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[2]
DEPTH, WIDTH, MODEL = 5, 64, 2  # as in lower_step.py


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  folder = tmp_path_factory.mktemp("lowered")
  environment = os.environ | {
    "XLA_FLAGS": "--xla_force_host_platform_device_count=8 "
    "--xla_backend_optimization_level=0",
    "JAX_PLATFORMS": "cpu",
    "PYTHONPATH": str(ROOT),
  }
  script = pathlib.Path(__file__).with_name("lower_step.py")
  subprocess.run([sys.executable, script, folder], check=True, env=environment)
  return folder


@pytest.fixture(scope="module")
def lowered(folder):
  return (folder / "lowered.mlir").read_text()


def test_every_array_of_the_state_is_donated_to_an_output(folder, lowered):
  shapes = json.loads((folder / "state.json").read_text())
  (head,) = re.findall(r"func\.func public @main\((.*)", lowered)
  arguments = re.findall(
    r"%arg\d+: tensor<([^>]*)> \{(.*?)\}(?=, %arg|\))", head
  )
  for shape, (tensor, attributes) in zip(shapes, arguments, strict=False):
    *dims, _ = tensor.split("x")
    assert [int(d) for d in dims] == shape
    assert "tf.aliasing_output" in attributes, tensor
  # And nothing else: neither tokenizer nor batch are overwritten.
  rest = arguments[len(shapes) :]
  assert rest and not any("aliasing" in more for _, more in rest)


def test_no_product_is_float32_where_bfloat16_was_asked(lowered):
  products = re.findall(
    r"dot_general .*?precision = \[(\w+), \w+\] : "
    r"\(tensor<([^>]*)>, tensor<([^>]*)>\)",
    lowered,
  )
  half = [
    p for p in products if p[1].endswith("bf16") and p[2].endswith("bf16")
  ]
  assert len(half) > 20
  for precision, *operands in products:
    if (precision, *operands) not in half:
      # What is float32 by intent says so: head, embeddings, the tokenizer.
      assert precision == "HIGHEST", operands


def test_a_parameter_is_gathered_in_its_layer_only(folder):
  program = (folder / "compiled.hlo").read_text()
  gathered = [
    tuple(map(int, re.search(r"\w+\[([\d,]*)\]", line)[1].split(",")))
    for line in program.splitlines()
    if re.search(r"= \S+ all-gather(-start)?\(", line)
  ]
  # A layer's first MLP matrix, whole but for the model axis.
  assert (WIDTH, 4 * WIDTH // MODEL) in gathered
  assert not [shape for shape in gathered if shape[0] == DEPTH], gathered
