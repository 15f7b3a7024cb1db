"""A program a layer: views of the stack, donated caches, heads one by one."""

import re

import golden_files
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from var_jax import Model
from var_jax.generation import by_layer, sampler
from var_jax.generation.sampler import Options
from var_jax.models import cpu_attention
from var_jax.parallel import mesh as mesh_lib
from var_jax.parallel import rules

MODELS, PARAMS = golden_files.pair("A")
FREE = Options(2.0, 40, 0.9)
KEY = jax.random.key(5)


def test_the_parameters_of_layers_are_views():
  params = jax.tree.map(jnp.asarray, PARAMS)
  whole = params.var["params"]["blocks"]["ffn"]["fc1"]["kernel"]
  layers = by_layer.unstack(params).var
  assert len(layers.blocks) == len(whole) and "blocks" not in layers.rest
  for r, layer in enumerate(layers.blocks):
    kernel = layer["ffn"]["fc1"]["kernel"]
    np.testing.assert_array_equal(kernel, whole[r])
    place = whole.unsafe_buffer_pointer() + r * kernel.nbytes
    assert kernel.unsafe_buffer_pointer() == place


def test_only_values_are_drawn_layer_by_layer():
  assert by_layer.suits(PARAMS)
  assert by_layer.suits(jax.tree.map(jnp.asarray, PARAMS))
  assert not jax.jit(lambda params: jnp.array(by_layer.suits(params)))(PARAMS)


def test_a_layers_cache_and_f_hat_are_donated():
  params = by_layer.unstack(PARAMS)
  start, _, draw_scale = by_layer.programs()
  state, modulation = start(MODELS, params, jnp.array([3]), True)
  keys_B = sampler.image_keys(KEY, 1)
  draw_scale(
    MODELS, 0, True, False, params, state, modulation, keys_B, FREE, None
  )
  assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state))


def test_attention_a_head_at_a_time_draws_the_same_tokens(monkeypatch):
  """Here all scales are below what it is for, so that is lowered."""
  lengths = []

  def attend(q_BlNK, *rest):
    lengths.append(q_BlNK.shape[1])
    return attend_by_heads(q_BlNK, *rest)

  attend_by_heads = cpu_attention.attend
  monkeypatch.setattr(cpu_attention, "attend", attend)
  monkeypatch.setattr(cpu_attention, "_MIN_QUERIES", 4)
  jax.clear_caches()
  tokens = []
  for layer_programs in (True, False):
    scales = sampler.draw_scales(
      MODELS,
      PARAMS,
      jnp.array([3, -1]),
      sampler.image_keys(KEY, 2),
      FREE,
      layer_programs=layer_programs,
    )
    drawn = [scale.tokens_Bl for scale in scales]
    tokens.append(np.concatenate(drawn, axis=1))
  np.testing.assert_array_equal(*tokens)
  assert max(lengths) >= 4
  jax.clear_caches()  # of programs with the lowered number


@pytest.mark.parametrize("where", ["nowhere", "device", "mesh", "fused"])
def test_what_is_compiled_ahead_is_not_compiled_again(where, caplog):
  fused = where == "fused"
  params = jax.device_put(
    PARAMS, None if where == "nowhere" else jax.devices()[0]
  )
  models, mesh = MODELS, None
  if where == "mesh":  # of one device
    mesh = mesh_lib.make_mesh(devices=jax.devices()[:1])
    models = models._replace(context=rules.Context(mesh))
  model = Model(models, params, mesh=mesh)
  how = dict(guidance=2.0, guided_scales=(0, 2), fused=fused)
  programs = "fused_program" if fused else "_layer leave_program to_images"

  def compiled(labels) -> set[str]:
    caplog.clear()
    with jax.log_compiles():
      model.sample(labels, KEY, top_k=7, **how)
    found = re.findall(r"XLA compilation of jit\((\w+)\)", caplog.text)
    return set(programs.split()) & set(found)

  jax.clear_caches()
  model.compile(2, **how)
  assert not compiled([3, 7])
  assert compiled([3, 7, 1]) == set(programs.split())


def test_what_cannot_be_compiled_is_said():
  model = Model(MODELS, PARAMS)
  with pytest.raises(ValueError, match="batch size 0 is no number"):
    model.compile(0)
  with pytest.raises(ValueError, match="guided_scales"):
    model.compile(1, guided_scales=(2, 1))
