"""What a sharded bfloat16 step asks XLA for, and what a device gets of it."""

import json
import math
import os
import pathlib
import re
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[2]
# As in lower_step.py. Products of the layers have none of V and Z.
R, D, F, V, Z, FSDP, MODEL = 5, 96, 384, 32, 4, 2, 2


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
    r"stablehlo\.dot_general .*?precision = \[(\w+), \w+\] : "
    r"\(tensor<([^>]*)>, tensor<([^>]*)>\)",
    lowered,
  )
  assert len(products) == lowered.count("stablehlo.dot_general")
  half = {
    (left, right)
    for _, left, right in products
    if left.endswith("bf16") and right.endswith("bf16")
  }
  assert (f"24x21x{D}xbf16", f"{D}x{F}xbf16") in half
  assert (f"24x21x{F}xbf16", f"{F}x{D}xbf16") in half
  assert ("24x21x6x16xbf16", "24x21x6x16xbf16") in half  # scores
  for precision, left, right in products:
    if (left, right) not in half:
      # Head, embeddings, codes and the tokenizer: float32, and say so.
      assert precision == "HIGHEST", (left, right)
      sizes = {int(n) for n in re.findall(r"(\d+)x", left + right)}
      assert sizes & {V, Z}, (left, right)


def test_a_parameter_is_gathered_in_its_layer_only(folder):
  program = (folder / "compiled.hlo").read_text()
  moved = [
    tuple(int(n) for n in shape.split(","))
    for results in re.findall(
      r"= (.*?) (?:all-gather|all-reduce|all-to-all|collective-permute)"
      r"(?:-start)?\(",
      program,
    )
    for shape in re.findall(r"\w+\[([\d,]+)\]", results)
  ]
  # A layer's first MLP matrix, whole but for the model axis.
  assert (D, F // MODEL) in moved
  state = map(tuple, json.loads((folder / "state.json").read_text()))
  stacks = {shape for shape in state if len(shape) == 3 and shape[0] == R}
  assert (R, D, F) in stacks
  for shape in moved:
    # Neither a stack of layers nor what a chip would have of it unsplit.
    for stack in stacks:
      whole = math.prod(stack) // MODEL
      assert shape[0] != R or math.prod(shape) < whole, (shape, stack)
