"""THE training loop: restore -> [batch -> step -> monitor -> log -> evaluate -> checkpoint] -> status.

It asks nobody which method it is running. All that decides what happens next is the state and the clock, and both
are in every checkpoint: a run that was killed goes on as if it had not been, to the last bit.
"""

from __future__ import annotations

import contextlib
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import jax

from stabletrain.errors import EXIT_DIVERGED, EXIT_OK, ConfigError, Interrupted, StableTrainError, nearest
from stabletrain.training.checkpoints import Checkpoints, Restored
from stabletrain.training.clock import Clock
from stabletrain.training.devices import compile_step, replicated
from stabletrain.training.experiment import Experiment, Outcome, Reporter, State
from stabletrain.training.journal import SESSION_EVENTS, Journal
from stabletrain.training.machine import CompileClock
from stabletrain.training.rows import RowMaker
from stabletrain.training.run_directory import RunDirectory, now
from stabletrain.training.signals import StopRequest
from stabletrain.training.state import abstract_state, fresh_state, state_hash
from stabletrain.training.watch import Verdict, Watch

AHEAD = 2
"""Dispatches that may be under way: enough to hide Python, few enough to stop within a step or two."""

RunSteps = Callable[[State, Sequence[Any]], tuple[State, Any]]


def train(experiment: Experiment, *, run: RunDirectory, reporter: Reporter, stop: StopRequest) -> Outcome:
    """Trains up to the configured number of steps, from the last complete checkpoint if there is one.

    Returns the outcome with its exit code: 0 done, 4 diverged, 75 or 130 interrupted after a checkpoint. A run that
    is done or diverged is left as it is.

    Raises: `StableTrainError` for what a user can mend (a full disk, unreadable checkpoints, changed data); the status
    is then "failed", and earlier checkpoints are intact.
    """
    run.hold()
    try:
        if run.status.get("state") in ("done", "diverged"):
            return _nothing_left(run, reporter)
        with stop, CompileClock() as compile_clock:
            session = _Session(experiment, run, reporter, stop, compile_clock)
            try:
                outcome = session.train()
            except Interrupted as interruption:
                outcome = session.interrupted(interruption.exit_code)
            except BaseException as error:
                session.failed(error)
                raise
        reporter.finished(outcome)
        return outcome
    finally:
        run.release()


def _nothing_left(run: RunDirectory, reporter: Reporter) -> Outcome:
    status, rows = run.status, run.rows()
    code = EXIT_OK if status["state"] == "done" else EXIT_DIVERGED
    reason = status["reason"] or "finished before: nothing left to do"
    outcome = Outcome(run.path, status["state"], status["step"], rows[-1] if rows else {}, code, reason)
    reporter.finished(outcome)
    return outcome


class _Session:
    """One process's share of a run."""

    def __init__(
        self,
        experiment: Experiment,
        run: RunDirectory,
        reporter: Reporter,
        stop: StopRequest,
        compile_clock: CompileClock,
    ) -> None:
        self.experiment = experiment
        self.config = experiment.config
        self.run = run
        self.reporter = reporter
        self.stop = stop
        self.compile_clock = compile_clock
        self.inner_steps = (self.config.inner_steps or experiment.inner_steps) if experiment.traceable else 1
        self.clock = Clock()
        self.state: State = None
        self.checkpoints = Checkpoints(run.path, keep=self.config.keep_checkpoints, scheduled=self._is_scheduled)
        self.saved_step = -1
        self.watch = Watch(run.path / "incidents", self.config)
        self.rows = RowMaker(experiment.examples_per_step)
        self.row: Mapping[str, Any] = {}  # the last one written
        self.journal = Journal(run, reporter, self.config.steps, compile_clock)

    # --- the loop ---------------------------------------------------------------------------------------------

    def train(self) -> Outcome:
        self._restore()
        run_steps = self._compiled()
        self._log_and_save()  # what an interruption left undone at this step
        while self.clock.step < self.config.steps:
            self.stop.check()
            with self._timed():
                metrics = self._advance(run_steps)  # batch -> step
            verdict = self._monitor(metrics)
            if verdict is not None and verdict.action == "stop":
                return self._stopped(verdict)
            if verdict is not None:
                self._roll_back(verdict)
            self._log_and_save()  # log -> evaluate -> checkpoint
        return self._finished()

    def _advance(self, run_steps: RunSteps) -> list[dict[str, Any]]:
        """Runs up to the next step at which something is due, or a stop is asked for; the metrics of each step."""
        in_flight: list[Any] = []
        until = self._next_due()
        while self.clock.step < until and not (in_flight and self.stop.requested):
            count = min(self.inner_steps, until - self.clock.step)
            first = self.clock.step + self.clock.offset
            self.state, metrics = run_steps(self.state, [self.experiment.batch(first + i) for i in range(count)])
            self.clock.step += count
            in_flight.append(metrics)
            if len(in_flight) > AHEAD:
                in_flight[-AHEAD - 1].block_until_ready()
            self.reporter.progressed(step=self.clock.step)
            self.journal.heartbeat(self.clock.step)
        return [row for metrics in in_flight for row in metrics.rows()]

    def _compiled(self) -> RunSteps:
        if self.experiment.traceable:
            return compile_step(self.experiment, self.experiment.mesh, self.inner_steps)
        return self._plain_step

    def _plain_step(self, state: State, batches: Sequence[Any]) -> tuple[State, Any]:
        state, metrics = self.experiment.step(state, batches[0])
        # Laid out as a restored one is: another layout can be another program, with other last bits.
        return jax.device_put(state, replicated(self.experiment.mesh)), _PlainMetrics(metrics)

    @contextlib.contextmanager
    def _timed(self) -> Iterator[None]:
        step, compiling, begun = self.clock.step, self.compile_clock.seconds, time.monotonic()
        yield
        seconds = time.monotonic() - begun - (self.compile_clock.seconds - compiling)
        self.rows.time(self.clock.step - step, max(seconds, 0.0))

    # --- what is due ------------------------------------------------------------------------------------------

    def _due(self, every: int) -> bool:
        step = self.clock.step
        return step == self.config.steps or (every > 0 and step > 0 and step % every == 0)

    def _next_due(self) -> int:
        step, config = self.clock.step, self.config
        periods = [every for every in (config.log_every, config.eval_every, config.checkpoint_every) if every]
        return min([(step // every + 1) * every for every in periods] + [config.steps])

    def _is_scheduled(self, step: int) -> bool:
        """The checkpoints that are there however often a run was interrupted."""
        return step == self.config.steps or step % self.config.checkpoint_every == 0

    # --- restore ----------------------------------------------------------------------------------------------

    def _restore(self) -> None:
        """State and clock from the newest readable checkpoint, or from the seed."""
        self.checkpoints.clean()
        restored = self._load(lambda step: True)
        # A row of this very step may have been written after its checkpoint: it stays, and is not made again.
        dropped = self.run.cut_rows(after=self.clock.step if restored else -1)
        self.run.cut_events(after=self.clock.events, but=SESSION_EVENTS)
        self.row = (self.run.rows() or [{}])[-1]
        self.watch.import_state(self.clock.watch)
        self.watch.begin(self.state)
        step, notes = self.clock.step, list[str]()
        again = bool(self.run.record.get("sessions"))
        notes += self._tell_damaged(restored)
        if restored is not None:
            notes.append(f"resumed from the checkpoint of step {step}")
            self.journal.event(step, "resume", message=notes[-1], rows_dropped=dropped)
        elif again:
            notes.append("started again from step 0: the run had ended before its first checkpoint")
            self.journal.event(step, "restart", message=notes[-1], rows_dropped=dropped)
        notes += getattr(self.experiment, "notes", ())
        notes += self.journal.begin_session(self.experiment, step, self.inner_steps)
        self.reporter.started(run_dir=self.run.path, first_step=step, total_steps=self.config.steps, notes=notes)
        self.journal.status("running", step)

    def _load(self, at: Callable[[int], bool]) -> Restored | None:
        """Sets state and clock to the newest readable checkpoint of those admitted, or to the start."""
        abstract, sharding = abstract_state(self.experiment), replicated(self.experiment.mesh)
        restored = self.checkpoints.restore(abstract, sharding, at=at)
        if restored is None:
            self.state, self.clock, self.saved_step = fresh_state(self.experiment), Clock(), -1
        else:
            self.state, self.clock, self.saved_step = restored.state, Clock(**restored.clock), restored.step
        self.checkpoints.point_to_best(self.clock.best_step)
        self.rows.import_state(self.clock.rows)
        return restored

    def _tell_damaged(self, restored: Restored | None) -> list[str]:
        notes = []
        for step, why in restored.damaged if restored else ():
            notes.append(f"the checkpoint of step {step} is damaged ({why}); it was set aside as {step}.damaged")
            self.journal.event(self.clock.step, "damaged-checkpoint", damaged=step, message=notes[-1])
        return notes

    def _roll_back(self, verdict: Verdict) -> None:
        """Back to the newest scheduled checkpoint before the bad step; the batches up to that one are left out.

        Nothing is saved here: a run that is killed now goes on from that checkpoint as it is, meets the same bad step,
        and comes to the same rollback.
        """
        bad, before = verdict.step, self.clock
        self.checkpoints.wait()
        restored = self._load(lambda step: step < bad and self._is_scheduled(step))
        self._tell_damaged(restored)
        target = self.clock.step
        self.clock.offset = before.offset + bad - target
        self.clock.rollbacks = before.rollbacks + 1
        self.checkpoints.discard_after(target)
        dropped = self.run.cut_rows(after=target if restored else -1)
        self.row = (self.run.rows() or [{}])[-1]
        self.journal.event(
            bad,
            "rollback",
            to=target,
            skipped_batches=bad - target,
            rows_dropped=dropped,
            rollbacks=self.clock.rollbacks,
            message=f"back to step {target} and past {bad - target} batches; {verdict.reason}",
        )

    # --- monitor ----------------------------------------------------------------------------------------------

    def _monitor(self, metrics_of_steps: Sequence[Mapping[str, Any]]) -> Verdict | None:
        """Looks at each step in order, up to the first that asks for something; what follows that one is void."""
        first = self.clock.step - len(metrics_of_steps) + 1
        may_roll_back = self.clock.rollbacks < self.config.max_interventions
        for step, metrics in enumerate(metrics_of_steps, start=first):
            findings = self.watch.see(step, step - 1 + self.clock.offset, metrics, may_roll_back=may_roll_back)
            self.rows.add(metrics)
            for event in (*findings.events, *self._own_events(metrics)):
                self.journal.event(step, event.pop("kind"), **event)
            if findings.verdict is not None:
                self.clock.step = step
                return findings.verdict
        return None

    def _own_events(self, metrics: Mapping[str, Any]) -> list[dict[str, Any]]:
        """What the experiment itself has to tell of a step, where it has a way to."""
        events = getattr(self.experiment, "events", None)
        return [] if events is None else [dict(event) for event in events(metrics)]

    # --- log, evaluate, checkpoint ----------------------------------------------------------------------------

    def _log_and_save(self) -> None:
        """Whatever is due at this step and not yet done."""
        improved = False
        evaluating = self._due(self.config.eval_every)
        if (evaluating or self._due(self.config.log_every)) and self.clock.logged < self.clock.step:
            self._log(evaluating)
            improved = evaluating and self._improved()
        if (improved or self._due(self.config.checkpoint_every)) and self.saved_step != self.clock.step:
            self._checkpoint()
        if improved:
            self.checkpoints.wait()  # what the pointer names is there
            self.checkpoints.point_to_best(self.clock.step)

    def _log(self, evaluating: bool) -> None:
        """One row: the metrics since the last one, the probe, and this step's evaluation."""
        step = self.clock.step
        if self.row.get("step") != step:  # else it was written after the checkpoint that the run goes on from
            row: dict[str, Any] = {"step": step, "time": now(), **self.rows.make(self.config.steps - step)}
            probed = jax.device_get(dict(self.experiment.probe(self.state)))
            row |= {name: float(value) for name, value in probed.items()}
            if evaluating:
                row |= self._evaluate()
            self.row = self.run.append_row(row)
        self.rows.restart()
        self.clock.logged = step
        self.reporter.logged(step=step, row=self.row)

    def _evaluate(self) -> dict[str, float]:
        # The offset tells the courses before and after a rollback apart: their parts must not be mixed.
        scratch = self.run.path / "eval" / f".{self.clock.step}-{self.clock.offset}.partial"
        begun = time.monotonic()
        evaluation = self.experiment.evaluate(self.state, self.clock.step, _Context(self, scratch))
        for name, content in evaluation.files.items():
            self.run.write_file(name, content)
        shutil.rmtree(scratch, ignore_errors=True)
        self.journal.event(self.clock.step, "evaluation", seconds=round(time.monotonic() - begun, 3))
        if evaluation.shown:
            self.journal.event(self.clock.step, "samples", message=evaluation.shown)
        return {name: float(value) for name, value in evaluation.scalars.items()}

    def _improved(self) -> bool:
        """Whether this step's evaluation is the best so far by the named metric."""
        name, clock = self.config.best_metric, self.clock
        if not name:
            return False
        if name not in self.row:
            metrics = [key for key in self.row if "/" in key]
            self._checkpoint(wait=True)  # nothing is lost: the same command with the right name goes on from here
            raise ConfigError(f"there is no metric {name!r} (--best-metric): {nearest(name, metrics)}")
        value, sign = self.row[name], 1 if self.config.best_mode == "min" else -1
        if value is None or (clock.best is not None and sign * value >= sign * clock.best):
            return False
        clock.best, clock.best_step = value, clock.step
        self.journal.event(clock.step, "best", metric=name, value=value)
        return True

    def _checkpoint(self, *, wait: bool = False) -> None:
        clock = self.clock
        if self._is_scheduled(clock.step):
            clock.best_when_scheduled = clock.best_step
        self.journal.event(clock.step, "checkpoint")
        clock.events = self.run.count_events()
        clock.rows, clock.watch = self.rows.export_state(), self.watch.export_state()
        protected = {step for step in (clock.best_step, clock.best_when_scheduled) if step is not None}
        self.checkpoints.save(clock.step, self.state, asdict(clock), protect=protected, wait=wait)
        self.saved_step = clock.step

    # --- ends -------------------------------------------------------------------------------------------------

    def _finished(self) -> Outcome:
        self.checkpoints.wait()
        for scratch in (self.run.path / "eval").glob(".*.partial"):
            shutil.rmtree(scratch, ignore_errors=True)
        lost = self.watch.lost(self.state)
        facts = {"params_sha256": state_hash(self.state)}
        if lost:
            self.journal.event(self.clock.step, "diverged", message=lost)
            return self._end("diverged", EXIT_DIVERGED, lost, **facts)
        return self._end("done", EXIT_OK, **facts)

    def _stopped(self, verdict: Verdict) -> Outcome:
        """The monitor asked to stop. The last row ends at the bad step, whenever that was noticed."""
        step = self.clock.step
        self.journal.event(step, "stop", message=verdict.reason)
        self.row = self.run.append_row({"step": step, "time": now(), **self.rows.make(0)})
        self.reporter.logged(step=step, row=self.row)
        self.checkpoints.wait()
        return self._end("diverged", EXIT_DIVERGED, verdict.reason)

    def interrupted(self, exit_code: int) -> Outcome:
        """Checkpoints synchronously, so that nothing but the evaluation under way is to be done again."""
        if self.saved_step != self.clock.step:
            self._checkpoint(wait=True)
        self.checkpoints.wait()
        self.journal.event(self.clock.step, "interrupted", message="asked to stop")
        return self._end("preempted", exit_code, "asked to stop")

    def failed(self, error: BaseException) -> None:
        """Leaves the reason behind, as far as the disk allows."""
        expected = isinstance(error, StableTrainError)
        reason = str(error) if expected else f"{type(error).__name__}: {error}"
        step = self.clock.step
        notes: list[Callable[[], object]] = [
            self.checkpoints.wait,
            lambda: None if expected else self.watch.crashed(step, reason),
            lambda: self.journal.status("failed", step, reason),
            lambda: self.journal.end_session("failed", step),
        ]
        for note in notes:
            with contextlib.suppress(StableTrainError, OSError):  # `error` is the one to show
                note()

    def _end(self, state: str, exit_code: int, reason: str = "", **facts: Any) -> Outcome:
        self.journal.end_session(state, self.clock.step)
        self.journal.status(state, self.clock.step, reason, **facts)
        return Outcome(self.run.path, state, self.clock.step, self.row, exit_code, reason)

    def working(self, label: str, done: int, total: int) -> None:
        """Progress of an evaluation. Raises: `Interrupted` when the run was asked to stop."""
        self.reporter.working(label, done, total)
        self.journal.heartbeat(self.clock.step, doing=label, done=done, of=total)
        self.stop.check()


class _Context:
    """What an evaluation is given: see `EvaluationContext`."""

    def __init__(self, session: _Session, scratch: Path) -> None:
        self._session = session
        self.scratch = scratch
        scratch.mkdir(parents=True, exist_ok=True)

    def tick(self, label: str, done: int, total: int) -> None:
        self._session.working(label, done, total)


class _PlainMetrics:
    """The metrics of a step that is plain Python, in the form of `StepMetrics`."""

    def __init__(self, metrics: Mapping[str, Any]) -> None:
        self._metrics = metrics

    def block_until_ready(self) -> None:
        jax.block_until_ready(self._metrics)

    def rows(self) -> list[dict[str, Any]]:
        fetched = jax.device_get(dict(self._metrics))
        return [{name: value.tolist() if hasattr(value, "tolist") else value for name, value in fetched.items()}]
