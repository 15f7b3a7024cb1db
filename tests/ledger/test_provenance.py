"""Provenance: what is recorded, and how each difference is named."""

import copy
import getpass
import hashlib
import json
import os
import platform
import subprocess

import jax
import numpy as np
import optax
import pytest

from var_jax.ledger import provenance, records

CONFIG = {"optimizer": {"rate": 0.1, "betas": (0.9, 0.95)}, "steps": 5}


def git(folder, *arguments):
  identity = ("-c", "user.name=a", "-c", "user.email=a@b.c")
  command = ("git", "-C", str(folder), *identity, *arguments)
  subprocess.run(command, check=True, capture_output=True)


@pytest.fixture
def package(tmp_path, monkeypatch):
  """Return a package of two files, in a checkout without changes."""
  monkeypatch.setenv("GIT_CONFIG_GLOBAL", os.devnull)
  folder = tmp_path / "checkout" / "package"
  (folder / "room").mkdir(parents=True)
  (folder / "__init__.py").write_text("")
  (folder / "room" / "loss.py").write_text("loss = 1\n")
  git(folder.parent, "init")
  git(folder.parent, "add", ".")
  git(folder.parent, "commit", "-m", "first")
  monkeypatch.setattr(provenance, "PACKAGE", folder)
  return folder


def test_a_description_is_the_same_when_it_comes_out_of_a_ledger(tmp_path):
  mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]), ("data",))
  here = provenance.describe(CONFIG, mesh)
  book = records.Ledger(tmp_path / "ledger.jsonl")
  book.append("start", step=0, provenance=here)
  book.close()
  (record,) = records.read(tmp_path / "ledger.jsonl")
  assert record["provenance"] == here
  assert provenance.differences(record["provenance"], here) == []
  assert provenance.differences(here, provenance.describe(CONFIG, mesh)) == []


def test_a_description_says_what_is_installed_and_where_it_runs():
  mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]), ("data",))
  here = provenance.describe(CONFIG, mesh)
  assert here["packages"]["jax"] == jax.__version__
  assert here["packages"]["optax"] == optax.__version__
  assert here["packages"]["python"] == platform.python_version()
  assert here["devices"]["platform"] == jax.devices()[0].platform
  assert here["devices"]["mesh"] == {"data": 1}
  assert here["devices"]["count"] == here["devices"]["processes"] == 1
  files = here["code"]["files"]
  source = (provenance.PACKAGE / "models" / "vae.py").read_bytes()
  assert files["models/vae.py"] == hashlib.sha256(source).hexdigest()
  canonical = '{"optimizer":{"betas":[0.9,0.95],"rate":0.1},"steps":5}'
  digest = hashlib.sha256(canonical.encode()).hexdigest()
  assert here["config_sha256"] == digest


def test_a_description_names_no_machine_user_or_path(monkeypatch):
  monkeypatch.setenv("XLA_FLAGS", "--xla_dump_to=/home/me/x --xla_a=1,2")
  here = provenance.describe(CONFIG)
  words = ["--xla_a=1,2", "--xla_dump_to=PATH"]
  assert here["flags"]["XLA_FLAGS"] == words
  text = json.dumps(here)
  assert str(provenance.PACKAGE.parent) not in text
  assert f'"{platform.node()}"' not in text
  assert f'"{getpass.getuser()}"' not in text


def test_flags_that_change_numbers_are_recorded():
  before = provenance.describe(CONFIG)
  with jax.default_matmul_precision("highest"):
    now = provenance.describe(CONFIG)
  assert provenance.differences(before, now) == [
    'environment: flags.jax_default_matmul_precision was null, is "highest"'
  ]


def test_a_clean_checkout_has_a_revision_only(package):
  code = provenance.describe(CONFIG)["code"]
  head = subprocess.run(
    ["git", "-C", str(package), "rev-parse", "HEAD"],
    check=True,
    capture_output=True,
    text=True,
  ).stdout.strip()
  assert (code["revision"], code["uncommitted"]) == (head, None)
  assert list(code["files"]) == ["__init__.py", "room/loss.py"]


def changes(package, change):
  """Return what a change of the package's folder is called."""
  before = provenance.describe(CONFIG)
  change()
  return provenance.differences(before, provenance.describe(CONFIG))


def test_a_changed_line_is_named_with_and_without_git(package):
  loss = package / "room" / "loss.py"
  named, of_checkout = changes(package, lambda: loss.write_text("loss = 2\n"))
  assert named == "code: package/room/loss.py changed"
  assert of_checkout.startswith("code: the uncommitted changes were None, are ")
  (package.parent / ".git").rename(package.parent / "git")
  assert changes(package, lambda: loss.write_text("loss = 3\n")) == [named]


def test_new_and_removed_files_are_named(package):
  lines = changes(package, lambda: (package / "more.py").write_text(""))
  assert lines[0] == "code: package/more.py is new"
  lines = changes(package, (package / "room" / "loss.py").unlink)
  assert lines[0] == "code: package/room/loss.py is gone"
  assert lines[1].startswith("code: the uncommitted changes were ")


def test_a_file_beside_the_package_counts_as_code_of_the_checkout(package):
  script = package.parent / "script.py"
  (line,) = changes(package, lambda: script.write_text("1"))
  assert line.startswith("code: the uncommitted changes were None, are ")
  (line,) = changes(package, lambda: script.write_text("2"))
  assert "None" not in line
  notes = package.parent / "notes.txt"
  assert changes(package, lambda: notes.write_text("untracked")) == []


def test_a_commit_is_named(package):
  (line,) = changes(
    package, lambda: git(package, "commit", "--allow-empty", "-m", "second")
  )
  assert line.startswith("code: the git revision was ")


def test_the_digest_of_changes_does_not_follow_from_git_settings(package):
  (package / "room" / "loss.py").write_text("loss = 2\n")
  settings = ("diff.noprefix", "diff.mnemonicPrefix", "color.ui")
  values = ("true", "true", "always")
  for name, value in zip(settings, values, strict=True):
    assert changes(package, lambda n=name, v=value: git(
      package, "config", n, v
    )) == []  # fmt: skip


def test_a_package_beneath_another_checkout_is_not_of_it(package):
  installed = package.parent / "lib" / "package"
  installed.mkdir(parents=True)
  (installed / "__init__.py").write_text("")
  assert provenance._checkout(installed) == (None, None)


def test_without_git_there_is_no_revision(package, monkeypatch):
  monkeypatch.setenv("PATH", "")
  code = provenance.describe(CONFIG)["code"]
  assert (code["revision"], code["uncommitted"]) == (None, None)
  assert len(code["files"]) == 2


def test_differences_come_as_code_config_environment(monkeypatch):
  monkeypatch.delenv("XLA_FLAGS", raising=False)
  recorded = provenance.describe(CONFIG)
  here = copy.deepcopy(recorded)
  here["packages"]["jax"] = "0.0.1"
  del here["packages"]["numpy"]
  here["devices"]["count"] = 8
  here["devices"]["mesh"] = {"data": 8}
  here["flags"]["XLA_FLAGS"] = ["--a"]
  here["config"]["optimizer"]["rate"] = 0.2
  here["config"]["name"] = "new"
  here["code"]["files"]["models/vae.py"] = "0"
  here["code"]["files"]["a.py"] = "0"
  assert provenance.differences(recorded, here) == [
    "code: var_jax/a.py is new",
    "code: var_jax/models/vae.py changed",
    'config: name was null, is "new"',
    "config: optimizer.rate was 0.1, is 0.2",
    f'environment: packages.jax was "{jax.__version__}", is "0.0.1"',
    f'environment: packages.numpy was "{np.__version__}", is null',
    "environment: devices.count was 1, is 8",
    "environment: devices.mesh.data was null, is 8",
    'environment: flags.XLA_FLAGS was [], is ["--a"]',
  ]
