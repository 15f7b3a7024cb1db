"""Timing, bounds, growth and the records that a benchmark writes."""

import json

import golden_files
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from var_jax import cli, compile_cache
from var_jax.bench import growth, report, roofline, sampling, timing
from var_jax.models.scales import SCALES
from var_jax.models.tokenizer import TokenizerConfig
from var_jax.models.transformer import VARConfig

# bfloat16 products and bytes a second, and published least milliseconds at
# batch 1, 8 and 64, guided, decoder included.
PUBLISHED = {
  ("H100", 16): (989e12, 3350e9, (1.87, 8.39, 64.22)),
  ("v5e", 16): (197e12, 819e9, (8.39, 41.60, 322.25)),
  ("v5p", 16): (459e12, 2765e9, (3.03, 17.60, 138.21)),
  ("H100", 30): (989e12, 3350e9, (9.74, 36.02, 269.88)),
  ("v5e", 30): (197e12, 819e9, (42.43, 177.40, 1353.73)),
}


@pytest.mark.parametrize("device, depth", PUBLISHED)
def test_bounds_are_the_published_ones(device, depth):
  products, bandwidth, published = PUBLISHED[device, depth]
  has = roofline.Peaks(products, bandwidth, "data sheet")
  cfg = VARConfig.official(depth, dtype="bfloat16")
  for batch, expected in zip((1, 8, 64), published, strict=True):
    bound = roofline.of_draw(cfg, TokenizerConfig(), batch, 2, has)
    least = 1e3 * (bound.transformer + bound.decoder)
    # The table has the quantiser's work too, and rounds.
    np.testing.assert_allclose(least, expected, rtol=0.02)


def test_exponents_of_power_laws():
  sizes = [8, 12, 16, 32]
  for power in (4.0, 6.0):
    values = [3e-4 * n**power for n in sizes]
    np.testing.assert_allclose(roofline.exponent(sizes, values), power)


def test_stretched_scales_end_at_the_grid_and_grow():
  for n in range(2, 33):
    scales = growth.scales_of(n)
    assert scales[0] == 1 and scales[-1] == n
    assert list(scales) == sorted(set(scales))
  assert growth.scales_of(16) == SCALES[256]
  assert growth.scales_of(32) == SCALES[512]


def test_a_carried_argument_goes_from_call_to_call():
  calls = []

  def step(count, x):
    return count + 1, x * count

  program = timing.Program(
    step, lambda: (jnp.float32(0.0), jnp.ones(4)), carries=True
  )
  compiled = jax.jit(step, donate_argnums=0).lower(*program.make_args())
  call = timing._caller(compiled.compile(), program)
  for _ in range(3):
    calls.append(float(call()[0]))
  assert calls == [1.0, 2.0, 3.0]


def test_runs_end_with_the_seconds_or_the_repeats_but_are_three():
  count = []

  def call():
    count.append(0)
    return jnp.zeros(())

  assert len(timing.time_calls(call, seconds=0.0, repeats=9)) == 3
  assert len(timing.time_calls(call, seconds=60.0, repeats=5)) == 5
  assert len(count) == 3 + 5 + 2  # a warm-up each


def test_a_measured_program_says_its_median_and_its_memory():
  program = timing.Program(lambda x: x + 1.0, lambda: (jnp.ones(2**20),))
  found = timing.measure({"add": program}, 0.0, 3)["add"]
  assert 0 < found.low_s <= found.median_s <= found.high_s
  assert found.compile_s > 0
  assert found.peak_bytes >= 2 * 4 * 2**20  # the argument and the result


def test_a_record_has_the_whole_the_parts_and_raster_order(capsys):
  models, params = golden_files.pair("A")
  how = sampling.Settings(seconds=0.0, repeats=3, raster=("cached",))
  (record,) = sampling.of_batches(models, params, [2], how)
  whole = {"fused", "transformer", "decoder", "raster cached"}
  parts = {
    f"{part} {s}"
    for part in ("transformer", "draw", "quantizer")
    for s in range(4)
  }
  assert set(record["programs"]) == whole | parts
  assert record["batch"] == 2
  assert record["steps"] == {"var": 4, "raster": 16}
  assert len(record["scales_bound_s"]) == 4
  fused = record["programs"]["fused"]["median_s"]
  np.testing.assert_allclose(record["images_per_second"], 2 / fused)
  np.testing.assert_allclose(
    record["share_of_bound"]["fused"], record["bound_s"]["fused"] / fused
  )
  work = record["flops_per_image"]
  assert work["raster free"] > 4 * work["raster cached"]
  assert json.loads(json.dumps(record)) == record
  report.print_samples([record], "tiny")
  out, _ = capsys.readouterr()
  assert "images/s" in out and "quantizer" in out
  assert f"{1e3 * fused:.2f}" in out


def test_the_command_times_grids_draws_a_plot_and_writes_all_numbers(
  tmp_path, capsys
):
  output, plot = tmp_path / "bench.json", tmp_path / "growth.png"
  code = cli.main(
    [
      "bench", "sample", "--depth", "1", "--growth", "2,4", "--plot", str(plot),
      "--seconds", "1", "--repeats", "1", "--output", str(output),
    ]
  )  # fmt: skip
  assert code == 0
  found = json.loads(output.read_text())
  assert {"device", "dtype", "jax", "depth"} <= set(found)
  assert [row["grid"] for row in found["rows"]] == [2, 4]
  assert set(found["exponents"]["median_s"]) == {"var", "raster cached"}
  assert plot.stat().st_size > 1000
  assert "n^" in capsys.readouterr().out


@pytest.mark.parametrize(
  "flags, code, message",
  [
    (["--batch", "0"], 2, "'0' are no batch sizes"),
    (["--batch", "1,x"], 2, "like 1,8,64"),
    (["--batch", "100000000"], 1, "draw at most"),
    (["--dtype", "float8"], 1, "dtype 'float8' is not known"),
    (["--image-size", "300"], 2, "300 is not one of 256, 512"),
    (["--plot", "a.png"], 2, "give both"),
    (["--growth", "8"], 2, "two sides or more"),
    (["--growth", "2,4", "--plot", "a.gif"], 2, "no .png or .svg"),
    (["--growth", "2,4", "--plot", "no/a.png"], 2, "in a folder that exists"),
    (["--raster", "free", "wat"], 2, "'wat'"),
    (["--depth", "0"], 2, "'0'"),
  ],
  ids=str,
)
def test_bad_benchmarks_are_one_line(flags, code, message, capsys):
  assert cli.main(["bench", "sample", "--depth", "1", *flags]) == code
  out, err = capsys.readouterr()
  assert out == ""
  assert err.count("\n") == 1 and err.startswith("var-jax: ")
  assert message in err


def test_programs_are_kept_where_the_user_keeps_caches(monkeypatch, tmp_path):
  names = (
    "jax_compilation_cache_dir",
    "jax_persistent_cache_min_compile_time_secs",
  )
  before = {name: getattr(jax.config, name) for name in names}
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
  try:
    compile_cache.enable()  # another folder was named
    assert jax.config.jax_compilation_cache_dir == before[names[0]]
    jax.config.update(names[0], None)
    compile_cache.enable()
    assert jax.config.jax_compilation_cache_dir == str(tmp_path / "var_jax")
    assert jax.config.jax_persistent_cache_min_compile_time_secs == 0.0
  finally:
    for name, value in before.items():
      jax.config.update(name, value)
