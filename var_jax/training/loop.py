"""The training loop: resume, step, watch, save. One loop for both models.

Step k is a pure function of (config, seed, k): it takes sample positions
(k-1)B .. kB-1, and every random choice follows from the seed and a position or
a step. So a run that was interrupted ends where it would have ended.

The devices never wait for the host: while step k runs, the batch of step k + 1
is brought to them and the numbers of step k - 1 are read.
"""

import contextlib
import dataclasses
import time
from concurrent import futures
from typing import Any

import jax
import ml_collections
from etils import epath

from var_jax.checkpoints import store
from var_jax.ledger.checksum import param_checksum
from var_jax.parallel import multihost
from var_jax.training import checks, evaluation, profiling, setup
from var_jax.training.observer import Observer, Refused, open_ledger
from var_jax.training.preemption import Preempted, Watch

# Without progress between them, a cause that data cannot explain.
MAX_ROLLBACKS = 3


def train(
  config: ml_collections.ConfigDict,
  workdir: epath.PathLike,
  *,
  allow_config_change: bool = False,
  profile: tuple[int, int] | None = None,
) -> None:
  """Train what `config` describes, from the newest checkpoint if there is one.

  Args:
    config: as `configs/var.py` or `configs/tokenizer.py` returns it.
    workdir: created if missing; `checkpoints/store.py` shows its layout.
    allow_config_change: go on in a workdir of another config, with this one.
    profile: first and last step to trace into WORKDIR/profile.

  Raises:
    ValueError: the config makes no sense, or differs from the workdir's; or a
      step's update was refused and the policy is to stop.
    OSError: a checkpoint could not be written; the one before is kept.
    Preempted: SIGTERM; the step that was reached is saved.
  """
  checks.check_config(config)
  workdir = checks.folder(workdir)
  changed = checks.check_workdir(config, workdir, allow_config_change)
  checks.check_writable(workdir)
  with Watch() as watch:
    run = setup.open_run(config, workdir)
    start = store.latest_step(workdir) or 0
    state = None if start else run.fresh()  # reads init_from
    if start >= config.steps:
      print(f"{workdir} is already at step {start} of {config.steps}")
      return
    with contextlib.ExitStack() as closed:
      # First of all: of two runs that start at once, one finds it locked.
      recorder = open_ledger(run, workdir, start)
      if recorder:
        closed.callback(recorder.close)
      if run.is_new:
        multihost.first_writes(lambda: _begin(run, workdir))
      checkpoints = store.Store(
        workdir,
        config.keep_checkpoints,
        keep_best=config.keep_best,
        keep_every=config.keep_every,
        every=config.checkpoint_every,
      )
      closed.callback(checkpoints.close)
      if state is None:
        state = run.restore(checkpoints, start)
      if changed:
        write = run.program.description.write
        multihost.first_writes(lambda: write(workdir))
      observer = Observer(run, workdir, start, state, recorder)
      closed.callback(observer.close)
      profiler = profiling.Profiler(workdir / "profile", profile)
      closed.callback(profiler.close)
      parts = (run, workdir, checkpoints, observer, watch, profiler)
      _Loop(*parts).take(state, start)


def _begin(run: setup.Run, workdir: epath.Path) -> None:
  """Write what a new workdir needs, config.json last."""
  run.program.prepare()
  run.program.description.write(workdir)


@dataclasses.dataclass
class _Loop:
  """Takes the steps. What it keeps between them is here and in the state."""

  run: setup.Run
  workdir: epath.Path
  checkpoints: store.Store
  observer: Observer
  watch: Watch
  profiler: profiling.Profiler
  rollbacks: int = 0  # since a save that none came before
  feed: Any = None
  over: Any = dataclasses.field(
    default_factory=lambda: futures.ThreadPoolExecutor(1)
  )
  pending: tuple[int, Any] | None = None  # a step whose numbers are unread

  def take(self, state, step: int) -> None:
    """Take the steps after `step`, to the last."""
    steps = self.run.config.steps
    if self.watch.asked(step):
      raise Preempted(step, self.workdir)
    if step and jax.process_index() == 0:
      print(f"{self.workdir} goes on from step {step} of {steps}")
    self.feed = self.run.feed(step)
    try:
      while step < steps:
        state, step = self._one_step(state, step)
        if step < steps and self.watch.asked(step):
          self._preempted(state, step)
    finally:
      self.feed.close()
      self.over.shutdown()
    best = self.checkpoints.best_step() if self.run.config.keep_best else None
    self.observer.end(steps, best)

  def _one_step(self, state, step: int):
    """Return the state and the step that are reached."""
    config = self.run.config
    batch = self.feed.take()
    step += 1
    with self.profiler.step(step, state):
      state, metrics = self.run.take(state, batch, step)
    if step % config.ledger_every == 0 or step == config.steps:
      metrics = {**metrics, "checksum": param_checksum(state.params)}
    if step < config.steps:
      self._fetch(metrics)
    refused = self._settle()
    self.observer.works_at(self.run.program.stage(step - 1))
    if refused:
      # This step ran on a state that is not to be: take it again.
      self.feed.give_back(batch)
      return self._roll_back(refused)
    self.pending = (step, metrics)
    if not (self._evaluates(step) or self._saves(step)):
      return state, step
    # What a boundary writes must not run ahead of the log of its step.
    refused = self._settle()
    if refused:
      state, step = self._roll_back(refused)
    loss = self._evaluate(state, step) if self._evaluates(step) else None
    if self._saves(step):
      self._save(state, step, loss)
      self.rollbacks = self.rollbacks if refused else 0
    return state, step

  def _evaluates(self, step: int) -> bool:
    every = self.run.config.eval_every
    return bool(every) and step % every == 0

  def _saves(self, step: int) -> bool:
    config = self.run.config
    return step % config.checkpoint_every == 0 or step == config.steps

  def _fetch(self, metrics) -> None:
    """Bring the next batch to the devices; note how long they had none."""
    begin = time.monotonic()
    over = self.over.submit(_time_of, metrics["loss"])
    self.feed.fetch()
    end = time.monotonic()
    if over.done():
      self.observer.report.waited(end - max(begin, over.result()))

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
    """Return the newest regular state, its clock at `step`.

    So the batches between are passed over, and nothing else about the run
    changes: step k still takes the positions that it would have taken. What
    SIGTERM saved does not count, or it would change what comes after.
    """
    self.rollbacks += 1
    self.checkpoints.wait()
    every = self.run.config.checkpoint_every
    regular = [s for s in store.all_steps(self.workdir) if s % every == 0]
    to = max(regular, default=0)
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

  def _evaluate(self, state, step: int) -> float | None:
    """Return the held-out loss, or None if there is no time left for it."""
    with self.observer.pause():
      means = evaluation.evaluate(self.run, state, self.watch.noticed)
      if means is None:
        return None
      drawn = self.run.program.drawn(self.run, state, self.watch.noticed)
      if drawn is None:
        return None
      means = {**means, **drawn}
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


def _time_of(array: jax.Array) -> float:
  """Wait for an array; return when it was there."""
  array.block_until_ready()
  return time.monotonic()
