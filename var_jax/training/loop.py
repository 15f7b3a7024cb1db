"""The training loop: resume, step, watch, save. One loop for both models.

Step k is a pure function of (config, seed, k): it takes sample positions
(k-1)B .. kB-1, and every random choice follows from the seed and a position or
a step. So a run that was interrupted ends where it would have ended.

The devices never wait for the host: while step k runs, the batch of step k + 1
is brought to them and the numbers of step k - 1 are read.
"""

import dataclasses
from typing import Any

import jax
import ml_collections
from etils import epath

from var_jax.checkpoints import store
from var_jax.training import checks, evaluation, setup
from var_jax.training.observer import Observer, Refused
from var_jax.training.preemption import Preempted, Watch

# Without progress between them, a cause that data cannot explain.
MAX_ROLLBACKS = 3


def train(
  config: ml_collections.ConfigDict,
  workdir: epath.PathLike,
  *,
  allow_config_change: bool = False,
) -> None:
  """Train what `config` describes, from the newest checkpoint if there is one.

  Args:
    config: as `configs/var.py` or `configs/tokenizer.py` returns it.
    workdir: created if missing; `checkpoints/store.py` shows its layout.
    allow_config_change: go on in a workdir of another config, with this one.

  Raises:
    ValueError: the config makes no sense, or differs from the workdir's; or a
      step's update was refused and the policy is to stop.
    OSError: a checkpoint could not be written; the one before is kept.
    Preempted: SIGTERM; the step that was reached is saved.
  """
  workdir = epath.Path(workdir).absolute()
  checks.check_config(config)
  changed = checks.check_workdir(config, workdir, allow_config_change)
  checks.check_writable(workdir)
  with Watch() as watch:
    run = setup.open_run(config, workdir)
    start = store.latest_step(workdir) or 0
    state = None if start else run.fresh()  # reads init_from
    if not (workdir / "config.json").exists():
      run.program.prepare()
      run.program.description.write(workdir)  # the last of a new workdir
    if start >= config.steps:
      print(f"{workdir} is already at step {start} of {config.steps}")
      return
    checkpoints = store.Store(
      workdir,
      config.keep_checkpoints,
      keep_best=config.keep_best,
      keep_every=config.keep_every,
    )
    try:
      if state is None:
        state = run.restore(checkpoints, start)
      if changed:
        run.program.description.write(workdir)
      observer = Observer(run, workdir, start, state)
      try:
        _Loop(run, workdir, checkpoints, observer, watch).take(state, start)
      finally:
        observer.close()
    finally:
      checkpoints.close()


@dataclasses.dataclass
class _Loop:
  """Takes the steps. What it keeps between them is here and in the state."""

  run: setup.Run
  workdir: epath.Path
  checkpoints: store.Store
  observer: Observer
  watch: Watch
  rollbacks: int = 0  # since the last save
  feed: Any = None
  pending: tuple[int, Any] | None = None  # a step whose numbers are unread

  def take(self, state, step: int) -> None:
    """Take the steps after `step`, to the last."""
    steps = self.run.config.steps
    self.feed = self.run.feed(step)
    try:
      while step < steps:
        state, step = self._one_step(state, step)
        if self.watch.asked(step):
          self._preempted(state, step)
    finally:
      self.feed.close()
    self.observer.end(steps)

  def _one_step(self, state, step: int):
    """Return the state and the step that are reached."""
    config, program = self.run.config, self.run.program
    batch = self.feed.take()
    step += 1
    stage = program.stage(step - 1)
    state, metrics = program.step(state, batch, stage)
    if step % config.ledger_every == 0 or step == config.steps:
      metrics = {**metrics, "checksum": program.checksum(state.params)}
    if step < config.steps:
      self.observer.waited(self.feed.fetch(), metrics)
    refused = self._settle()
    self.observer.works_at(stage)
    if refused:
      # This step ran on a state that is not to be: take it again.
      self.feed.give_back(batch)
      return self._roll_back(refused)
    self.pending = (step, metrics)
    if not self._is_boundary(step):
      return state, step
    # What a boundary writes must not run ahead of the log of its step.
    refused = self._settle()
    if refused:
      return self._roll_back(refused)
    loss = None
    if config.eval_every and step % config.eval_every == 0:
      loss = self._evaluate(state, step)
    if step % config.checkpoint_every == 0 or step == config.steps:
      self._save(state, step, loss)
    return state, step

  def _is_boundary(self, step: int) -> bool:
    config = self.run.config
    evaluates = config.eval_every and step % config.eval_every == 0
    saves = step % config.checkpoint_every == 0
    return bool(evaluates or saves or step == config.steps)

  def _settle(self) -> int | None:
    """Read what is pending; return its step if it has to be rolled back."""
    if not self.pending:
      return None
    (step, metrics), self.pending = self.pending, None
    try:
      self.observer.step(step, jax.device_get(metrics))
    except Refused:
      return step
    return None

  def _roll_back(self, step: int):
    """Return the newest kept state, its clock at `step`.

    So the batches between are passed over, and nothing else about the run
    changes: step k still takes the positions that it would have taken.
    """
    self.rollbacks += 1
    self.checkpoints.wait()
    to = store.latest_step(self.workdir) or 0
    if self.rollbacks > MAX_ROLLBACKS:
      raise ValueError(
        f"step {step} is the one after {MAX_ROLLBACKS} rollbacks to step {to} "
        "that has to be rolled back too; lower the learning rate, or look for "
        "the cause in metrics.jsonl."
      )
    run = self.run
    state = run.restore(self.checkpoints, to) if to else run.fresh()
    self.observer.rolled_back(step, to)
    return run.at_step(state, step), step

  def _evaluate(self, state, step: int) -> float:
    with self.observer.pause():
      means = evaluation.evaluate(self.run, state)
      pictures = self.run.program.pictures(self.run, state)
    self.observer.evaluation(step, means, pictures)
    return means[self.run.program.held_out_loss]

  def _save(self, state, step: int, loss: float | None = None) -> None:
    self.observer.flush()
    self.checkpoints.save(
      step,
      setup.trees_of(state),
      position=step * self.run.config.data.batch_size,
      loss=loss,
    )
    self.rollbacks = 0

  def _preempted(self, state, step: int) -> None:
    """Save the step that is reached, and leave."""
    refused = self._settle()
    if refused:
      state, step = self._roll_back(refused)
    self.checkpoints.wait()
    if store.latest_step(self.workdir) != step:
      self._save(state, step)
    self.checkpoints.wait()
    raise Preempted(step, self.workdir)
