"""Everything that looks at a run without touching its state.

Metrics, ledger, broken images and the policy for refused updates, behind one
object, so that the loop is only about steps.
"""

import contextlib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from etils import epath

from var_jax import appended, files
from var_jax.data import broken
from var_jax.ledger import checksum, provenance
from var_jax.ledger.records import Recorder
from var_jax.training import checks, panel
from var_jax.training.report import Report

# A lasting shift of the loss looks like spikes that never end.
MAX_SKIPPED = 100
_SHOWN = 8  # sample indices in a message; the ledger has them all


def open_ledger(run, workdir: epath.Path, start: int) -> Recorder | None:
  """Return the ledger of a run, which no other process can then open.

  Of several processes the first writes; the others have none.
  """
  if jax.process_index():
    return None
  config = run.config
  return Recorder(
    workdir / "ledger.jsonl",
    start,
    provenance.describe(checks.to_json(config), run.mesh),
    position=start * config.data.batch_size,
  )


class Refused(Exception):
  """A step's update was refused, and the policy is to roll back."""


class Observer:
  """Of a run from `start` on.

  Args:
    run: a `setup.Run`.
    recorder: what `open_ledger` returned.
  """

  def __init__(self, run, workdir: epath.Path, start: int, state, recorder):
    config, program = run.config, run.program
    self._run, self._workdir = run, workdir
    self._broken = set(_lines(workdir / "broken.txt"))
    self._names = None  # broken.txt, once there is something to add
    self._skipped = 0  # updates in a row
    self._recorder = recorder
    self.report = Report(
      workdir=workdir,
      start=start,
      steps=config.steps,
      batch_size=config.data.batch_size,
      **program.work(program.stage(start))._asdict(),
      devices=run.mesh.size,
      device_kind=run.mesh.devices.flat[0].device_kind,
    )
    if not start:
      self.report.overview(state.params)
    self.pause = self.report.pause

  def works_at(self, stage: int | None) -> None:
    """Count the steps from here on as those of a stage."""
    work = self._run.program.work(stage)
    self.report.tokens_per_image = work.tokens_per_image
    self.report.flops_per_step = work.flops_per_step

  def step(self, step: int, metrics: Mapping[str, Any]) -> None:
    """Take note of a step's numbers.

    Raises:
      Refused: its update was refused, and the policy is to roll back.
      ValueError: likewise, and the policy is to stop.
    """
    values = dict(metrics)
    batch = values.pop("record")
    bits = values.pop("checksum", None)
    self._note_broken(batch)
    if self._recorder:
      named = {name: values[name] for name in ("loss", "grad_norm", "skipped")}
      if bits is not None:
        named["checksum"] = checksum.as_hex(bits)
      for change in self._recorder.step(step, batch, named):
        self.report.message(f"step {step}: {change}")
    self.report.step(step, values)
    self.report.advance(step)
    config = self._run.config
    if step % config.log_every == 0 or step == config.steps:
      self.report.log(step)
    self._collapsed(step, values)
    if not values["skipped"]:
      self._skipped = 0
    else:
      self._skipped += 1
      self._refused(step, values, batch["index"])

  def evaluation(self, step: int, means, pictures) -> None:
    self.report.evaluation(step, means)
    for name, pixels in pictures.items():
      self.report.images(step, name, pixels)
    if jax.process_index() == 0:
      self.report.flush()
      try:
        panel.write(self._workdir, pictures)
      except OSError as error:  # it is for eyes only, and no reason to end
        self.report.message(
          f"step {step}: report.html cannot be written ({files.reason(error)})"
        )

  def rolled_back(self, step: int, to: int) -> None:
    self.report.message(
      f"step {step}: back to the weights of step {to}; the batches of steps "
      f"{to + 1}..{step} are passed over"
    )
    if self._recorder:
      self._recorder.rollback(step, to)

  def flush(self) -> None:
    """Put where it stays what a checkpoint is about to vouch for."""
    if self._recorder:
      self._recorder.flush()
    self.report.flush()
    if self._names:
      self._names.flush()

  def end(self, step: int, best: int | None) -> None:
    """Note that the run is over; `best` is its best step, where one is kept."""
    if best is not None:
      self.report.message(f"the best checkpoint that is kept is of step {best}")
    if self._recorder:
      self._recorder.end(step)

  def close(self) -> None:
    with contextlib.ExitStack() as closed:
      closed.callback(self.report.close)
      if self._names:
        closed.callback(self._names.close)

  def _note_broken(self, batch) -> None:
    if not np.any(batch["skipped"]):
      return
    names = broken.broken_names(self._run.source, batch)
    new = [name for name in names if name not in self._broken]
    self._broken.update(new)
    if new and jax.process_index() == 0:
      path = self._workdir / "broken.txt"
      self._names = self._names or appended.open_file(path)
      self._names.write("".join(f"{name}\n" for name in new).encode())
      self.report.message(
        f"{len(self._broken)} broken images so far, the last {new[-1]}; all "
        f"are named in {path}"
      )

  def _collapsed(self, step: int, values) -> None:
    """Name the scales of a tokenizer that say nothing, if it was looked for."""
    scales = [s for s, flag in values.get("collapsed", {}).items() if flag]
    if not scales:
      return
    sizes = self._run.program.description.tokenizer.schedule.shapes
    named = ", ".join(
      f"scale {s} ({sizes[int(s)][0]}x{sizes[int(s)][1]}, explains "
      f"{values['explained'][s]:.2%} of the energy that reaches it, perplexity "
      f"{values['perplexity'][s]:.1f})"
      for s in scales
    )
    config = self._run.config.collapse
    policy = config.policy
    if policy == "stop":
      raise ValueError(
        f"step {step}: the codes collapse at {named}; at least "
        f"{config.min_explained:.2%} and {config.min_perplexity:g} are asked "
        "for: ask for less, lower the learning rate, or set collapse.policy to "
        "revive or lower (with --allow-config-change)."
      )
    if values["skipped"]:
      self.report.message(
        f"step {step}: the codes collapse at {named}; its update was refused, "
        "and nothing is done"
      )
      return
    done = {
      "report": "nothing is done about it",
      "revive": "the least used codes are moved to what it wants",
      "lower": f"the learning rate is now {values['rate']:g} of its schedule",
    }
    self.report.message(
      f"step {step}: the codes collapse at {named}; {done[policy]}"
    )

  def _refused(self, step: int, values, index_B) -> None:
    policy = self._run.config.guard.policy
    shown = ", ".join(str(i) for i in index_B[:_SHOWN])
    more = f" and {len(index_B) - _SHOWN} more" if len(index_B) > _SHOWN else ""
    what = (
      f"step {step}: loss {values['loss']:.6g}, gradient norm "
      f"{values['grad_norm']:.6g}, so its update was refused; samples "
      f"{shown}{more} of the source"
    )
    if policy == "stop":
      raise ValueError(
        f"{what}; look at them, or lower the learning rate, or set "
        "guard.policy to skip or rollback (with --allow-config-change)."
      )
    if policy == "skip" and self._skipped > MAX_SKIPPED:
      raise ValueError(
        f"{what}: {MAX_SKIPPED} updates before it were refused too; lower the "
        "learning rate or raise guard.spike_factor."
      )
    self.report.message(what)
    if policy == "rollback":
      raise Refused


def _lines(path: epath.Path) -> list[str]:
  return path.read_text().splitlines() if path.exists() else []
