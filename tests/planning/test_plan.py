"""Plans of a tiny model, by the real compiler where libtpu is installed."""

import json

import pytest

from configs import tokenizer as tokenizer_presets
from configs import var as var_presets
from var_jax import cli
from var_jax.checkpoints.description import Description
from var_jax.models.tokenizer import TokenizerConfig
from var_jax.planning import compiling, report, search, topology
from var_jax.planning.asked import Asked, tokenizer_of

CONFIG = "configs/var.py:tiny"
TINY = {**tokenizer_presets.get_config("tiny").model, "dtype": "float32"}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
  """A folder with the description of a tiny tokenizer, and no weights."""
  folder = tmp_path_factory.mktemp("tokenizer")
  Description(TokenizerConfig(**TINY), None, ("0",), {}, {}).write(folder)
  return f"--config.tokenizer_path={folder}"


@pytest.fixture(autouse=True)
def environment(monkeypatch):
  """Forget what a plan tells libtpu."""
  for name in topology.ALONE:
    monkeypatch.setenv(name, "")


def run(capsys, *arguments):
  code = cli.main(["plan", *arguments])
  return code, capsys.readouterr()


def needs_compiler():
  pytest.importorskip("libtpu")


def test_a_tiny_run_fits_and_the_numbers_are_kept(tokenizer, tmp_path, capsys):
  needs_compiler()
  path = tmp_path / "plan.json"
  code, said = run(
    capsys,
    f"--config={CONFIG}",
    "--topology=v5e:2x2",
    "--mesh=fsdp=2,model=2",
    "--price=2",
    "--mfu=0.5",
    f"--output={path}",
    tokenizer,
  )
  assert code == 0, said.err
  (found,) = json.loads(path.read_text())
  assert found["fits"] and found["mesh"] == "data=1,fsdp=2,model=2"
  (program,) = found["programs"]
  available = found["available_bytes"]
  assert 0 < program["arguments"] < program["peak"] < available
  # Half the peak of four chips, or the bound.
  bounds = found["bound_seconds"].values()
  seconds = max(found["flops"] / (0.5 * 4 * 197e12), *bounds)
  assert found["images_per_second"] == pytest.approx(16 / seconds)
  assert found["days"] == pytest.approx(100 * seconds / 86400)
  assert found["cost"] == pytest.approx(4 * 2 * 100 * seconds / 3600)
  assert "fits, peak" in said.out and str(path) in said.out
  assert found["attention"] == "splash"
  assert found["mfu"] * 4 * 197e12 * seconds == pytest.approx(found["flops"])
  assert found["busy"] == pytest.approx(
    found["bound_seconds"]["compute"] / seconds
  )


def test_auto_compiles_the_best_two(tokenizer, tmp_path, capsys):
  needs_compiler()
  path = tmp_path / "plan.json"
  code, said = run(
    capsys,
    f"--config={CONFIG}",
    "--topology=v5e:2x2",
    "--mesh=auto",
    f"--output={path}",
    tokenizer,
  )
  assert code == 0, said.err
  found = json.loads(path.read_text())
  first, second = (max(plan["bound_seconds"].values()) for plan in found)
  assert 0 < first <= second
  assert len({plan["mesh"] for plan in found}) == 2
  assert all(plan["fits"] for plan in found)


def test_a_tokenizer_s_training_is_planned_too(tmp_path, capsys):
  needs_compiler()
  path = tmp_path / "plan.json"
  code, said = run(
    capsys,
    "--config=configs/tokenizer.py:tiny",
    "--topology=v5e:2x2",
    "--slices=2",
    f"--output={path}",
  )
  assert code == 0, said.err
  (found,) = json.loads(path.read_text())
  assert found["fits"] and found["chips"] == 8
  assert found["mesh"] == "slices=2,data=4,fsdp=1,model=1"
  assert found["traffic_bytes"]["dcn"] > 0 and found["estimate"] is None


def test_what_does_not_fit_is_told_what_would(tokenizer, tmp_path, capsys):
  needs_compiler()
  path = tmp_path / "plan.json"
  code, said = run(
    capsys,
    f"--config={CONFIG}",
    "--topology=v5e:2x2",
    "--config.data.batch_size=1048576",
    f"--output={path}",
    tokenizer,
  )
  assert code == 1 and not said.err
  (found,) = json.loads(path.read_text())
  assert not found["fits"] and found["remedies"]
  (program,) = found["programs"]
  assert program["needed"] > found["available_bytes"]
  # No mesh of four chips holds so many rows at once, remat or not.
  changes = ["--config.accumulate=16", "--config.data.batch_size=65536"]
  assert found["remedies"] == changes
  assert "DOES NOT FIT" in said.out


def test_the_sampler_s_programs_are_planned_too(tokenizer, tmp_path, capsys):
  needs_compiler()
  path = tmp_path / "plan.json"
  code, said = run(
    capsys,
    f"--config={CONFIG}",
    "--topology=v5e:2x2",
    "--mesh=model=2",
    "--program=sample",
    f"--output={path}",
    tokenizer,
  )
  assert code == 0, said.err
  (found,) = json.loads(path.read_text())
  assert [p["name"] for p in found["programs"]] == ["finest scale", "decoder"]
  assert found["images"] == 16 and found["mesh"] == "data=2,fsdp=1,model=2"
  scale, decoder = found["programs"]
  # Neither program takes the other model, and both have it beside them.
  assert 0 < scale["beside"] < decoder["beside"]
  assert found["flops"] > 0 and 0 < found["busy"] <= 1


@pytest.mark.parametrize(
  ("arguments", "code", "line"),
  [
    (
      ["--topology=v5e:3x3"],
      2,
      "topology 'v5e:3x3' does not exist; use",
    ),
    (["--mesh=fsdp=3"], 1, "does not multiply to 4 devices; use one like"),
    (["--mesh=data=1,fsdp=4,x=1"], 2, "not understood at 'x=1'"),
    (["--mesh=fsdp=4,fsdp=2"], 2, "says fsdp twice"),
    (["--images=8"], 2, "--images 8 is of --program sample"),
    (["--program=sample", "--price=1"], 2, "--price is of a training"),
    (["--output=nowhere/plan.json"], 1, "nowhere; make that folder"),
    (["--config.data.batch_size=10"], 1, "batch 10 is not divisible by 4"),
    (["--mesh=model=4"], 1, "2 heads do not split over model=4"),
    (["--mfu=1.5"], 2, "--mfu: '1.5' is not above 0 and up to 1"),
    (["--price=dear"], 2, "--price: 'dear' is not a number from 0"),
    (["--slices=0"], 2, "--slices: '0' is not a count"),
    (["--config.data.image_size=100"], 1, "image_size 100"),
    (["--program=sample", "--images=3"], 1, "batch 3 is not divisible by 4"),
    (["--program=sample", "--mesh=auto"], 2, "--mesh auto ranks meshes"),
  ],
)
def test_what_makes_no_sense_is_one_line(
  tokenizer, capsys, arguments, code, line
):
  if "--topology=v5e:3x3" not in arguments:
    needs_compiler()
  given = {"--topology": "v5e:2x2", "--config": CONFIG}
  given |= dict(a.partition("=")[::2] for a in arguments)
  found, said = run(capsys, *(f"{k}={v}" for k, v in given.items()), tokenizer)
  assert found == code
  assert line in said.err and said.err.count("\n") == 1


def test_a_missing_compiler_has_a_remedy(tokenizer, capsys, monkeypatch):
  monkeypatch.setattr(topology.importlib.util, "find_spec", lambda name: None)
  code, said = run(
    capsys, f"--config={CONFIG}", "--topology=v5e:2x2", tokenizer
  )
  assert code == 1 and "pip install 'jax[tpu]'" in said.err


@pytest.mark.parametrize(
  ("message", "expected"),
  [
    (
      "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 33.5G "
      "of 15.75G hbm. Exceeded hbm capacity by 17.7G.",
      (33.5 * 2**30, "all"),
    ),
    (
      "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required "
      "for HLO temporaries (1.5T) exceeds available HBM (15.75G).",
      (1.5 * 2**40, "temporaries"),
    ),
    (
      "RESOURCE_EXHAUSTED: CompileTimeHbmOom: it is too much.",
      (None, "all"),
    ),
    (
      "RESOURCE_EXHAUSTED: Ran out of memory in memory space vmem. Used 20.00M "
      "of 16.00M",
      None,
    ),
    ("INTERNAL: something of hbm", None),
  ],
)
def test_only_a_lack_of_hbm_is_taken_for_one(message, expected):
  assert compiling.refused(message) == expected


def test_meshes_that_fit_are_ranked_before_those_that_do_not():
  needs_compiler()
  topology.use_no_tpu()
  config = var_presets.get_config("d30,cached")
  question = Asked(config, topology.Topology("v6e:4x4"))
  ranked = search.ranked(question)
  limit = question.topology.chip.hbm_bytes
  fits = [1.1 * estimate.peak <= limit for _, estimate in ranked]
  assert True in fits and False in fits
  assert fits == sorted(fits, reverse=True)
  # Two billion parameters with their moments are 22 GiB, and more comes.
  assert not fits[
    [str(cfg) for cfg, _ in ranked].index("data=16,fsdp=1,model=1")
  ]


def test_a_tokenizer_has_the_size_that_the_preset_asks_for():
  for preset, size in (("d36-512", 512), ("d16", 256)):
    tokenizer = tokenizer_of(var_presets.get_config(preset))
    assert tokenizer.image_shape == (size, size)


def test_a_size_of_another_tokenizer_is_refused(tokenizer, capsys):
  needs_compiler()
  code, said = run(
    capsys,
    f"--config={CONFIG}",
    "--topology=v5e:2x2",
    "--config.data.image_size=256",
    tokenizer,
  )
  assert code == 1
  assert "image_size 256 is not that of the tokenizer, (16, 16)" in said.err


def test_the_report_says_what_each_number_is():
  found = {
    "program": "train",
    "mesh": "data=2",
    "batch": 8,
    "steps": 10,
    "image_size": 256,
    "attention": "splash",
    "available_bytes": 2.0**34,
    "programs": [
      {
        "name": "train step",
        "fits": False,
        "needed": 2.0**35,
        "part": "temporaries",
      }
    ],
    "state_bytes": 2.0**30,
    "estimate": {"peak": 2.0**33},
    "traffic_bytes": {"ici": 2.0**30, "dcn": 0.0},
    "flops": 1.5e12,
    "bound_seconds": {"compute": 0.002, "memory": 0.001},
    "mfu": 0.4,
    "busy": 0.5,
    "images_per_second": 100.0,
    "days": 1.5,
    "cost": 12.3,
    "remedies": ["--config.accumulate=2"],
  }
  lines = dict(report.lines(found))
  assert lines["train step, of 16.00 GiB a chip"] == (
    "DOES NOT FIT: asks for 32.00 GiB for temporaries alone"
  )
  assert lines["peak by estimate"] == "8.00 GiB"
  assert lines["a step takes at least"].startswith("2.0 ms (compute 2.0 ms")
  rate = lines["images/s, if MFU is 0.40"]
  assert rate == "100, units for products 50% busy"
  assert lines["what may help"] == "--config.accumulate=2"
  assert lines["cost"] == "12"
