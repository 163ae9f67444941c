"""A whole training run: from a configuration to a model, over interruptions and explosions."""

from __future__ import annotations

import time
from dataclasses import replace

from host_trainer import checkpoint, folder, subject
from host_trainer.checkpoint import Snapshot, Store, agree
from host_trainer.compilation import compile_forward
from host_trainer.config import Config
from host_trainer.data import Share, open_samples, open_training, share
from host_trainer.errors import ConfigError, Diverged, TrainingError
from host_trainer.evaluate import Evaluator
from host_trainer.folder import Summary
from host_trainer.gpu import Gpu
from host_trainer.health import Health
from host_trainer.loop import Task, TrainSettings, Watcher, run
from host_trainer.objective import Inputs
from host_trainer.parallel import Parallel
from host_trainer.record import Activations, Journal, Recorder
from host_trainer.saving import Interrupted, Saver
from host_trainer.show import Bar


def train(config: Config) -> Summary:
    """Train as one of the processes that torchrun started, or as the only one; goes on where the run stopped.

    Raises:
        ConfigError: something that was given is wrong.
        MissingError: a GPU was asked for and there is none.
        Diverged: the run exploded; the last good checkpoint is there.
        TrainingError: the last checkpoint could not be written.
        Interrupted: after Ctrl-C or SIGTERM.
    """
    engine = Parallel(config)
    try:
        if engine.rank == 0:
            folder.begin(config)
        return _Run(config, engine).drive()
    finally:
        engine.close()


class _Run:
    """What the parts of a run share."""

    def __init__(self, config: Config, engine: Parallel) -> None:
        first = engine.rank == 0
        self._began = time.perf_counter()
        self._config = config
        self._engine = engine
        self._bar = Bar(visible=first)
        part = share(config, engine.rank, engine.world)
        self._prepare(part)
        self._store = Store(config.run / "checkpoints", config.checkpoint.keep)
        self._saver = Saver(
            self._store, config.checkpoint.every_steps, self._snapshot, first, self._bar.alert
        )
        self._health = Health(config.monitor, self._bar.alert, config.run / "diverged")
        self._journal = Journal(config.run, config.monitor) if first else None
        self._evaluator = self._make_evaluator(part)
        self._watchers = self._make_watchers(part)

    def drive(self) -> Summary:
        """Take all steps that are left, and write the model."""
        try:
            step = self._resume()
            self._summarize("running", step)
            with self._bar, self._saver.listening(alone=self._engine.world == 1):
                self._to_the_end(step)
            self._saver.finish()
        except Interrupted:
            self._summarize("interrupted", self._saver.last_step, "Ctrl-C or SIGTERM")
            raise
        except TrainingError as error:
            self._store.wait()
            state = "diverged" if isinstance(error, Diverged) else "failed"
            self._summarize(state, self._saver.last_step, f"{error.what}: {error.why}")
            raise
        finally:
            if self._journal is not None:
                self._journal.close()
        weights = checkpoint.whole_weights(self._task.model)
        if self._engine.rank == 0:
            self._subject.save(weights, self._config.run / "model")
        return self._summarize("finished", self._task.total_steps)

    def _prepare(self, part: Share) -> None:
        config, optimize = self._config, self._config.optimize
        loader = open_training(config, part)
        self._subject = subject.build(config, self._engine.device, lambda: _first_batch(config))
        for note in self._subject.notes:
            self._bar.alert(note)
        loss = self._subject.loss
        if config.precision.compile:
            compile_forward(self._subject.module, self._bar.alert)
        settings = TrainSettings(
            epochs=optimize.epochs,
            learning_rate=optimize.learning_rate,
            weight_decay=optimize.weight_decay,
            warmup_fraction=optimize.warmup_fraction,
            clip_norm=optimize.clip_norm,
            seed=config.seed,
        )
        model, optimizer = self._engine.prepare(self._subject.module, settings)
        self._task = Task(
            model, optimizer, loader.batches, loader.steps_per_epoch, loss, settings, self._engine,
            lambda: self._saver.told_to_end,
        )  # fmt: skip

    def _make_evaluator(self, part: Share) -> Evaluator | None:
        if not self._config.data.eval:
            return None
        samples = open_samples(self._config.data.eval, self._config, training=False)
        if not len(samples):
            raise ConfigError(
                "data.eval has no sample", f"{self._config.data.eval} is empty", "give more, or leave it out"
            )
        return Evaluator(samples, self._subject.loss, self._config, part, self._engine, self._journal)

    def _make_watchers(self, part: Share) -> list[Watcher]:
        monitor, watchers = self._config.monitor, list[Watcher]()
        watchers.append(self._health)
        if self._journal is not None:
            gpu = Gpu(self._engine.device)
            watchers += [
                Recorder(
                    self._journal, monitor, part.batch_size,
                    lambda: {"precision/loss_scale": self._engine.loss_scale, **gpu.read()},
                ),
                self._bar,
            ]  # fmt: skip
            if monitor.activations_every_steps:
                watchers.append(Activations(self._journal, monitor.activations_every_steps))
        if self._evaluator is not None:
            watchers.append(self._evaluator)
        return [*watchers, self._saver]

    def _resume(self) -> int:
        """Go on from the newest checkpoint; gives its step, or 0."""
        steps = agree(self._store.steps())
        return self._go_to(steps[-1]) if steps else 0

    def _go_to(self, step: int) -> int:
        snapshot = self._store.read(step)
        was, now = snapshot.state["steps_per_epoch"], self._task.steps_per_epoch
        if was != now:
            raise ConfigError(
                "the training data changed since the run began", f"an epoch had {was} steps and has {now}",
                "bring back the data, or give another run directory",
            )  # fmt: skip
        checkpoint.restore(snapshot, self._task.model, self._task.optimizer)
        self._engine.load_loss_scale(snapshot.state["loss_scale"])
        self._health.first_loss = snapshot.state["first_loss"]
        self._saver.last_step = step
        self._set_learning_rate(self._config.optimize.learning_rate * snapshot.state["learning_rate_factor"])
        return step

    def _to_the_end(self, step: int) -> None:
        """Run; after an explosion, go back and halve the learning rate, as often as is allowed."""
        left = self._config.monitor.rollbacks
        if left and not step:
            self._saver.save(0)  # there must be something to go back to
        behind: int | None = None
        while True:
            try:
                run(self._task, step, self._watchers)
                return
            except Diverged as error:
                self._store.wait()
                steps = agree(self._store.steps())
                if not left or not steps or error.data_at_fault:
                    raise
                left -= 1
                # Where it explodes again before there is a new checkpoint, that one was not good enough.
                step = behind = ([saved for saved in steps if saved != behind] or steps)[-1]
                self._go_back(step, error)

    def _go_back(self, step: int, error: Diverged) -> None:
        rate = self._task.settings.learning_rate / 2
        self._engine.give_up_step()
        self._go_to(step)
        self._set_learning_rate(rate)
        if self._engine.rank == 0:
            self._store.forget_after(step)
        self._bar.alert(f"{error.what}: {error.why}")
        self._bar.alert(f"back to step {step}, with the learning rate {rate:.3g}")

    def _set_learning_rate(self, rate: float) -> None:
        self._task = replace(self._task, settings=replace(self._task.settings, learning_rate=rate))

    def _snapshot(self, step: int) -> Snapshot:
        task = self._task
        extra = {
            "steps_per_epoch": task.steps_per_epoch,
            "learning_rate_factor": task.settings.learning_rate / self._config.optimize.learning_rate,
            "first_loss": self._health.first_loss,
            "loss_scale": self._engine.saved_loss_scale(),
        }
        return checkpoint.take(task.model, task.optimizer, step, extra)

    def _summarize(self, state: str, step: int, why: str = "") -> Summary:
        summary = Summary(
            state=state,
            step=step,
            total_steps=self._task.total_steps,
            seconds=round(time.perf_counter() - self._began, 3),
            processes=self._engine.world,
            results={} if self._evaluator is None else self._evaluator.results,
            why=why,
        )
        if self._engine.rank == 0:
            folder.save_summary(self._config.run, summary)
        return summary


def _first_batch(config: Config) -> Inputs:
    """The inputs that a student is made by: the same in every process, and for any number of them."""
    size = min(config.optimize.micro_batch_size or config.optimize.batch_size, config.optimize.batch_size)
    loader = open_training(config, Share(size, size))
    inputs: Inputs = next(iter(loader.batches(0, 0)))[0]
    return inputs
