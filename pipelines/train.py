"""Training: one loop for every network, method and machine. Fabric places tensors; order, state and steps are ours.

Precision: weights, averages, optimiser, losses, distillers, frozen teachers and everything that is a place or a time are
float32 in every precision; ``bf16-mixed`` and ``16-mixed`` run the trained network's layers in half precision. A step that
the loss scaler of 16-mixed skips is a step: schedule, data and averages go on, the weights stay.

Exact resume: the random state of a step is a function of (seed, step, rank), the order of samples is arithmetic, and a
checkpoint holds optimiser, averages and the stream's position. So a run killed anywhere and resumed gives the weights of
the uninterrupted run, bit for bit on CPU.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from imkd_data.cache import fault
from imkd_data.errors import ImkdError, UsageError
from imkd_data.loader.batch import Batch
from imkd_data.loader.order import key64
from imkd_data.loader.stream import Stream, held_out_rows, stream
from imkd_models.checkpoint import Checkpoint, add_score, load_checkpoint, save_checkpoint
from pipelines import validate
from pipelines.guard import StopSignals, agree, elsewhere, interrupted, lost_rank, non_finite_error, run_lock, total
from pipelines.machine import Machine, accumulation, loss_scaler, make_fabric
from pipelines.measure import loader_values
from pipelines.networks import Networks, Sealed, build_networks, place, use_cached_teachers
from pipelines.optimise import Ema, lr_factor, make_optimiser, synchronised
from pipelines.resumable import check_end, check_resumable
from pipelines.run import Run
from pipelines.sampling import is_listed, make_paster, saved_rows
from pipelines.strength import sweep_warnings, teacher_records, teacher_warnings
from pipelines.trainlog import Meter, Tick, TrainLog, pull_due, pull_warnings
from pipelines.trainmeta import (
    cache_meta,
    check_folder,
    check_teachers,
    restore,
    saved_run,
    stage_teachers,
    start_warnings,
    stream_meta,
)

if TYPE_CHECKING:
    from imkd_data.cache.store import Cache

__all__ = ["TrainResult", "train"]

Progress = Callable[[Tick], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainResult:
    """checkpoint: last.ckpt of the (last) network. step: optimiser steps done. losses: terms of the last logged
    step. rank: of this process. skipped: damaged samples left out in this call, over all ranks.
    stages: checkpoints by stage for a run of several networks."""

    out: Path
    checkpoint: Path
    step: int
    losses: dict[str, float]
    seconds: float
    rank: int = 0
    skipped: int = 0
    stages: dict[str, Path] = field(default_factory=dict)


def train(
    run: Run,
    cache: Cache | Path | str,
    out: Path | str,
    teachers: Mapping[str, Path | str] | None = None,
    *,
    resume: bool | str = False,
    progress: Progress | None = None,
    devices: int = 1,
    accelerator: str = "auto",
    memory_limit: str | None = None,
    dataroot: Path | None = None,
) -> TrainResult:
    """Train a run on a cache into the folder ``out``.

    Args:
        teachers: name -> checkpoint. resume: True continues ``out``; "auto" starts where nothing is yet.
        progress: called after every step. memory_limit: e.g. "22GiB", enforced on GPUs. dataroot: where the truth for
            validation lies (``validate_every``).

    Raises:
        UsageError: held-out rows, a used folder, validation without ``dataroot``. MissingFeatureError: cache or teachers lack
        something. MismatchError: resumed with another configuration, cache or earlier end, a teacher of another kind.
        LockedError: another process trains there. InterruptedBuildError: a signal.
    """
    from imkd_data import open_cache

    opened = open_cache(cache) if isinstance(cache, str | Path) else cache
    machine = Machine(devices=devices, accelerator=accelerator, memory_limit=memory_limit)
    root, given, made = Path(out), dict(teachers or {}), dict[str, Path]()
    if any(one.validate_every for one in run.stages or (run,)):
        validate.need_truth(dataroot, opened.recipe.version)
    if not run.stages:
        return _train_one(run, opened, root, given, run.name, resume, progress, machine, dataroot)
    check_teachers(run, given)
    for stage in run.stages:
        folder = root / stage.name
        wanted = stage_teachers(stage, given, made)
        how = "auto" if resume else False
        result = _train_one(stage, opened, folder, wanted, run.name, how, progress, machine, dataroot)
        made[stage.name] = folder / "last.ckpt"
    return replace(result, out=root, stages=made)


def _train_one(
    run: Run,
    cache: Cache,
    out: Path,
    teachers: dict[str, Path | str],
    top: str,
    resume: bool | str,
    progress: Progress | None,
    machine: Machine,
    dataroot: Path | None,
) -> TrainResult:
    """One network, with its folder held."""
    check_folder(out, resume)  # before other ranks are started: what is refused is refused once
    fabric = make_fabric(run, machine)
    with run_lock(out, fabric.global_rank, fabric.device):
        saved = saved_run(out, resume)
        return _Trainer(run, cache, out, teachers, top, saved, progress, fabric, dataroot).train()


class _Trainer:
    """One network's training. Lives for one call of ``train``."""

    def __init__(
        self,
        run: Run,
        cache: Cache,
        out: Path,
        teachers: dict[str, Path | str],
        top: str,
        saved: Checkpoint | None,
        progress: Progress | None,
        fabric: Any,
        dataroot: Path | None,
    ) -> None:
        self.run, self.cache, self.out, self.top = run, cache, out, top
        self.progress, self.dataroot = progress, dataroot
        self.saved, self.fabric = saved, fabric
        self.world, self.rank = self.fabric.world_size, self.fabric.global_rank
        self.global_batch, self.accumulate = accumulation(run, self.world)
        fresh = run if self.saved is None else run.with_values(start="")
        self.networks: Networks = build_networks(fresh, teachers, pretrained=self.saved is None)
        self.start = self.networks.start if self.saved is None else self.saved.meta.get("start", {})
        if self.networks.distiller is not None:
            self.networks.distiller.micro_batches = self.accumulate
        if run.loader.cached_teachers:
            use_cached_teachers(self.networks, cache)
        self.stream = self._stream()
        self.steps_per_epoch = len(self.stream.order) // self.global_batch
        if self.steps_per_epoch == 0:
            raise UsageError(
                "fewer rows than one optimiser step takes",
                expected=f"at least {self.global_batch}",
                found=f"{len(self.stream.order)} rows",
                next="lower batch_size or global_batch",
            )
        self.total = run.max_steps or run.epochs * self.steps_per_epoch
        if run.pastes:
            epochs = -(-self.total // self.steps_per_epoch)
            how = {"write": self.rank == 0, "fresh": self.saved is None}
            self.stream.reader.paste = make_paster(run, cache, self.stream.order.rows, out, epochs, **how)
            self.fabric.barrier()
        self.teacher_records = teacher_records(teachers)
        self.warnings = [
            *teacher_warnings(run, teachers, baseline=run.baseline or None, model_name=self.networks.config.name),
            *sweep_warnings(run, teachers, cache.recipe.lidar_sweeps),
            *start_warnings(self.start),
        ]
        self.meter = Meter(self.global_batch)
        self.losses: dict[str, float] = {}
        self.skips, self.told = 0, set[str]()

    def _stream(self) -> Stream:
        made = stream(
            self.cache,
            self.run.batch_size,
            rank=self.rank,
            world=self.world,
            device=self.fabric.device,
            **loader_values(self.run, self.networks, self.cache),
        )
        if is_listed(self.run.loader):
            saved_rows(made.order.rows, self.out, write=self.rank == 0)
        if self.top != "overfit" and (held := held_out_rows(self.cache, made.order.rows)):
            raise UsageError(
                "validation rows are not trained on",
                rule="train.held_out",
                expected="rows of train or mini_train",
                found=f"{len(held)} of {len(made.order)} rows from other splits (loader.split={self.run.loader.split})",
                next="leave loader.split at train; only the run `overfit` may use every row",
            )
        return made

    # ------------------------------------------------------------------------------------------------------ the loop

    def train(self) -> TrainResult:
        """Run to the end, or to a signal."""
        begun = time.perf_counter()
        unit, optimiser, ema, first = self._set_up()
        log = TrainLog(self.out, resumed_step=first, tensorboard=self.run.tensorboard) if self.rank == 0 else None
        if log is not None:
            log.warn(self.warnings)
        batches = self.stream.forever(self.steps_per_epoch * self.global_batch)
        saved_step = first if self.saved is not None else -1
        try:
            with StopSignals() as signals:
                if self.saved is not None and "score" not in self.saved.meta.get("metrics", {}):  # stopped on a validation step
                    self._validate(first, ema)
                for step in range(first, self.total):
                    stopped = self._step(step, batches, unit, optimiser, ema, log, signals)
                    if stopped or self._due(step + 1):
                        self._save(step + 1, unit, optimiser, ema)
                        saved_step = step + 1
                    if stopped:
                        raise interrupted(stopped, step + 1, self.total)
                    self._validate(step + 1, ema)
            if saved_step != self.total:
                self._save(self.total, unit, optimiser, ema)
        except RuntimeError as error:
            raise (lost_rank(error) if self.world > 1 else None) or error from None
        finally:
            batches.close()  # type: ignore[attr-defined]
            if log is not None:
                log.close()
        return TrainResult(
            out=self.out,
            checkpoint=self.out / "last.ckpt",
            step=self.total,
            losses=self.losses,
            seconds=time.perf_counter() - begun,
            rank=self.rank,
            skipped=self.skips,
        )

    def _set_up(self) -> tuple[Any, Any, Ema | None, int]:
        run = self.run
        plain = self.plain = place(self.networks, self.fabric.device)
        if run.sync_batchnorm:
            synchronised(plain, self.fabric.device, self.world)
        raw_optimiser = make_optimiser(plain.model, plain.distiller, run.optim)
        unit, optimiser = self.fabric.setup(plain, raw_optimiser)
        unit.train()
        ema = Ema(plain.model, run.optim.ema) if run.optim.ema else None
        first = 0
        if self.saved is not None:
            check_resumable(self.saved.meta["run"], self._config())
            check_end(self.saved.step, self.total)
            self.losses = dict(self.saved.meta.get("metrics", {}).get("losses", {}))
            first = restore(self.saved, plain, raw_optimiser, ema, self.stream, loss_scaler(self.fabric))
        return unit, optimiser, ema, first

    def _step(
        self,
        step: int,
        batches: Iterator[Batch],
        unit: Any,
        optimiser: Any,
        ema: Ema | None,
        log: TrainLog | None,
        signals: StopSignals,
    ) -> int:
        """One optimiser step; returns the stop signal that any rank received, else 0."""
        begun, waited = time.perf_counter(), 0.0
        config = self.run.optim
        torch.manual_seed(key64("step", self.run.seed, step, self.rank) & 0x7FFF_FFFF_FFFF_FFFF)
        factor = lr_factor(config, step, total_steps=self.total, steps_per_epoch=self.steps_per_epoch)
        for group in optimiser.param_groups:
            group["lr"] = config.lr * factor * group["factor"]
        sums: dict[str, torch.Tensor] = {}
        micros = [self._next(batches) for _ in range(self.accumulate)]
        self._all_fed([t for _, _, t in micros if t is not None])
        given = [b for b, _, _ in micros if b is not None]
        self.plain.expect(given)
        if pull_due(step) and self.plain.distiller is not None:
            self.plain.measure_pull()
        for micro, batch in enumerate(given):
            waited += micros[micro][1]
            last = micro == self.accumulate - 1
            quiet = nullcontext() if last or self.world == 1 else self.fabric.no_backward_sync(unit)
            with quiet:
                terms = unit(Sealed(batch))
                loss = sum(terms.values()) / self.accumulate
                self._all_well(batch, terms, loss, step)
                self.fabric.backward(loss)
            for name, value in terms.items():
                sums[name] = sums.get(name, 0) + value.detach() / self.accumulate
        self._tell_skips(log)
        norm = self._clip(unit, optimiser, batch, step)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        if ema is not None:
            ema.update(self.networks.model, step)
        self.meter.add(time.perf_counter() - begun, waited)
        self._tell(step + 1, sums, norm, config.lr * factor, log)
        fault.point("train.step")
        return agree(signals.received, self.fabric.device)

    def _next(self, batches: Iterator[Batch]) -> tuple[Batch | None, float, ImkdError | None]:
        """The next batch and the time waited; an error is kept until every rank knows of it."""
        begun = time.perf_counter()
        try:
            batch = next(batches)
        except ImkdError as error:
            if self.world == 1:
                raise
            return None, 0.0, error
        return batch, time.perf_counter() - begun, None

    def _all_fed(self, troubles: list[ImkdError]) -> None:
        """Trouble with data on any rank stops all of them here: later they would wait in the losses' own collectives."""
        if agree(int(bool(troubles)), self.fabric.device):
            raise troubles[0] if troubles else elsewhere()

    def _all_well(self, batch: Batch, terms: Any, loss: torch.Tensor, step: int) -> None:
        bad = not bool(torch.isfinite(loss.detach()))
        if agree(int(bad), self.fabric.device):
            raise non_finite_error(batch, terms, step=step + 1, out=self.out, what="the loss") if bad else elsewhere()

    def _clip(self, unit: Any, optimiser: Any, batch: Batch, step: int) -> float:
        if not self.run.optim.clip:
            return 0.0
        norm = self.fabric.clip_gradients(unit, optimiser, max_norm=self.run.optim.clip, error_if_nonfinite=False)
        value = float(norm)  # type: ignore[arg-type]
        if value != value or value == float("inf"):
            scaler = loss_scaler(self.fabric)
            if scaler is not None and scaler.get_scale() > 1:
                return value  # the loss scaler skips this step and halves its scale; at 1 the gradient itself is not finite
            gradients = {
                n: p.grad for n, p in unit.named_parameters() if p.grad is not None and not bool(torch.isfinite(p.grad).all())
            }
            raise non_finite_error(batch, gradients, step=step + 1, out=self.out, what="the gradient")
        return value

    # ------------------------------------------------------------------------------------------------ telling, saving

    def _tell(self, step: int, sums: Mapping[str, torch.Tensor], norm: float, lr: float, log: TrainLog | None) -> None:
        pull, self.plain.pull = self.plain.pull, {}
        logged = step % self.run.log_every == 0 or step == self.total or bool(pull)
        if not (logged or self.progress):
            return
        self.losses = {name: float(value) for name, value in sums.items()}
        total = sum(self.losses.values())
        rates = {"samples_per_s": self.meter.samples_per_s, "data_wait": self.meter.data_wait}
        if logged and log is not None:
            epoch = (step - 1) // self.steps_per_epoch
            seen = {} if self.networks.distiller is None else {"diagnostics": self.networks.distiller.diagnostic_values()}
            seen |= {"pull": pull} if pull else {}
            log.write(step, {"epoch": epoch, "loss": total, **self.losses, "lr": lr, "grad_norm": norm, **rates, **seen})
            log.warn(pull_warnings(pull, step))
        if self.progress is not None and self.rank == 0:
            left = (self.total - step) * self.meter.step_s
            tick = Tick(stage=self.run.name, step=step, total=self.total, loss=total, lr=lr, eta_s=left, **rates)
            self.progress(tick)

    def _tell_skips(self, log: TrainLog | None) -> None:
        new = [f"sample {t} is skipped: {why}" for t, why in self.stream.skipped.items() if t not in self.told]
        self.told.update(self.stream.skipped)
        if log is not None:
            log.warn(new)
        else:
            for line in new:
                print(f"warning: {line}", file=sys.stderr)

    def _due(self, step: int) -> bool:
        every = self.run.checkpoint_every or self.steps_per_epoch
        return step % every == 0 or step == self.total or validate.due(self.run, step)

    def _config(self) -> dict[str, Any]:
        return {**self.run.as_dict(), "global_batch": self.global_batch, "teachers": dict(self.networks.teacher_sha256)}

    def _save(self, step: int, unit: Any, optimiser: Any, ema: Ema | None) -> None:
        self.skips = total(self.stream.skips, self.fabric.device)
        if self.rank != 0:
            self.fabric.barrier()
            return
        state: dict[str, Any] = {"optimiser": optimiser.optimizer.state_dict(), "stream": self.stream.state_dict()}
        if ema is not None:
            state["raw"] = self.networks.model.state_dict()
        scaler = loss_scaler(self.fabric)
        if scaler is not None:
            state["scaler"] = scaler.state_dict()
        meta = {
            "name": self.top if self.top == self.run.name else f"{self.top}/{self.run.name}",
            "run": self._config(),
            "method": self.run.as_dict()["method"],
            "options": self.networks.options,
            "model": self.networks.config.as_dict(),
            "networks": {n: m.config.as_dict() for n, m in self.networks.kept.items()},  # type: ignore[union-attr,operator]
            "teachers": self.networks.teacher_sha256,
            "head_start": self.networks.head_start,
            "start": self.start,
            "cache": cache_meta(self.cache, self.stream),
            "stream": stream_meta(self.stream),
            "teacher_records": self.teacher_records,
            "warnings": self.warnings,
            "metrics": {"losses": self.losses, "skipped": self.skips},
        }
        save_checkpoint(
            self.out,
            step,
            self.networks.model if ema is None else ema.shadow,
            self.networks.distiller,
            state,
            meta,
            networks=self.networks.kept,
            keep=self.run.keep,
        )
        self.fabric.barrier()

    def _validate(self, step: int, ema: Ema | None) -> None:
        """NDS of the copy that is deployed, by the fast engine, every ``validate_every`` steps. It is written into the step's
        checkpoint, which is whole by then: what ends the process meanwhile loses no step, and the resumed run validates."""
        if not validate.due(self.run, step):
            return
        if self.rank == 0:
            score = validate.score_network(
                self.networks.model,
                None if ema is None else ema.shadow,
                self.cache,
                self.dataroot,
                self.out / "validation",
                meta={"run": self._config(), "step": step},
                device=self.fabric.device,
            )
            add_score(self.out, step, score, best=score >= self._best())
        self.fabric.barrier()

    def _best(self) -> float:
        try:
            return float(load_checkpoint(self.out / "best.ckpt").meta["metrics"]["score"])
        except (ImkdError, KeyError):
            return float("-inf")
