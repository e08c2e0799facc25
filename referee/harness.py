"""The referee: everything about a run that an idea must not touch.

This file reads the flags and carries out the run: log, data, trainer, warm-up, training, result.
The task is in task.py, its loss in validation.py, the clock in clock.py, device and ranks in
ranks.py. The referee imports no trainer: `execute` gets a function that makes one, and drives it.
A trainer gets copies of the settings and of the `Runtime`, and nothing that leads to clock, log,
task or validation rows. In validation it gets inputs, never targets, and yields logits, of which
validation.py computes the loss. Both share one process, so a source could still tamper with the
referee through the interpreter (frames, gc, patched modules); people read each record's source.
"""

import argparse
import copy
import dataclasses
import gc
import math
import os
import re
import shlex
import signal
import sys
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from referee.checkpoints import (
    check_same_run,
    delete_checkpoint,
    digests,
    fill,
    read_checkpoint,
    write_checkpoint,
)
from referee.clock import OTHER_ENDED, Stopwatch, Turns
from referee.environment import ROOT, calibration, contention, foreign_modules, mfu
from referee.flags import RunError, add_flags, check_ranges, join_values, open_streams, option
from referee.log import Log, write_header
from referee.ranks import RANK, Runtime, compile_errors, is_first_to_say, rank_store
from referee.shards import absolute_glob
from referee.sources import source_texts
from referee.task import DATA_FIELDS, TASKS, Task, check_shards, tokenizer_sha256
from referee.validation import Validation

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
SAME_REQUEST_S = 1.0  # keys bounce, and launchers pass on what their children got too
STOPPING = b"\nstopping after this step; press again to abort without a checkpoint\n"
# A run has diverged after DIVERGED_STEPS steps in a row with a loss more than DIVERGED_NATS above
# ln(vocab_size), or above the first validation loss if that is higher.
DIVERGED_STEPS, DIVERGED_NATS = 50, 0.1


# ------------------------------------------------------------------------------ Flags


@dataclass(frozen=True)
class RunOptions:
    """How this run is carried out. Only seed and arithmetic affect what is trained."""

    seed: int = option(0, "seed of the initial weights and of the order of data")
    slug: str = option("run", "word in the log's name that says what was tried")
    log_dir: str = option("", "folder of logs and checkpoints; empty: logs, in the project")
    save_every: int = option(0, "steps between checkpoints; 0: only when interrupted")
    resume: str = option("", "checkpoint to continue from")
    micro_batch_seqs: int = option(0, "rows per forward pass of one rank; 0: what fits in memory")
    compile: bool = option(True, "use torch.compile where it works")
    fp32: bool = option(False, "multiply matrices in fp32 even where bf16 is faster")
    other_source: bool = option(False, "resume a checkpoint of another source; no record then")
    rank_timeout_s: int = option(600, "seconds that ranks wait for one that does not answer", 1)
    source_dir: str = option("", "folder that holds the source for many logs", hidden=True)
    declared_runs: int = option(0, "runs that this attempt will have", hidden=True)
    cpu_dtype: str = option("", "float32 or bfloat16 on a CPU; empty: measured", hidden=True)
    turn_steps: int = option(0, "steps between turns with the pair's other run", hidden=True)

    def __post_init__(self):
        check_ranges(self)
        if not re.fullmatch(r"(?!\.+$)[\w.+-]{1,80}", self.slug):
            raise RunError(f"--slug {self.slug!r} is no part of a file's name; give at most 80 of "
                           "letters, digits and _ . + -")  # fmt: skip
        if self.cpu_dtype not in ("", "float32", "bfloat16"):
            raise RunError(f"--cpu_dtype {self.cpu_dtype!r} is neither float32 nor bfloat16")


class Settings(NamedTuple):
    """What the flags of one process say."""

    track: str
    task: Task
    hp: object  # the trainer's hyperparameters
    options: RunOptions
    overrides: list[str]  # names of changed fields of task and hp


def parse_flags(argv: list[str], tracks: dict, gpu_track: str, description: str) -> Settings:
    """Every field of task, hyperparameters and options is a flag, whose default the track sets.

    tracks: hyperparameters by name; their field `task` names one of TASKS. gpu_track: the track
    without --track on a GPU.
    """
    # --track and --task come first: they set the defaults of all other flags.
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--track", default=gpu_track if torch.cuda.is_available() else "embedded")
    first.add_argument("--task")
    options, any_hp = RunOptions(), next(iter(tracks.values()))
    names = {f.name for part in (Task(), any_hp, options) for f in dataclasses.fields(part)}
    argv = join_values(argv, names | {"track"})
    chosen = first.parse_known_args(argv)[0]
    hp = tracks.get(chosen.track) or any_hp
    parts = TASKS.get(chosen.task or hp.task, Task()), hp, options
    usage = "%(prog)s [--track NAME] [--FLAG VALUE]...    (all flags: --help)"
    parser = argparse.ArgumentParser(usage=usage, description=description, allow_abbrev=False)
    parser.add_argument("--track", choices=tracks, help=f"sets the defaults; now: {chosen.track}")
    for part in parts:
        group = parser.add_argument_group(type(part).__name__, type(part).__doc__)
        add_flags(group, part, choices={"task": TASKS})
    given = vars(parser.parse_args(argv))
    given.pop("track")
    for name in ("train_files", "val_files"):
        if given.get(name):
            given[name] = absolute_glob(given[name])
    changes = [{name: given[name] for name, default in vars(part).items()
                if given.get(name, default) != default} for part in parts]  # fmt: skip
    task, hp, options = (
        dataclasses.replace(part, **c) for part, c in zip(parts, changes, strict=True)
    )
    overrides = changes[0].keys() | changes[1].keys() | (changes[2].keys() & {"other_source"})
    return Settings(chosen.track, task, hp, options, sorted(overrides))


# ------------------------------------------------------------------------------ Signals


class StopRequest:
    """ctrl-C, SIGTERM, a closed terminal or Slurm's warning (SIGUSR1).

    In the training loop the first one asks for a clean end; a second one interrupts.
    """

    def __init__(self):
        self.signal, self.deferred, self.since = 0, False, 0.0
        for number in STOP_SIGNALS:
            under_nohup = number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN
            if not under_nohup:
                signal.signal(number, self)

    def __call__(self, number, frame):
        now, is_first = time.monotonic(), not self.signal
        if not is_first and now - self.since < SAME_REQUEST_S:
            return
        self.signal, self.since = number, now
        if not (is_first and self.deferred):
            raise KeyboardInterrupt
        if RANK == 0:
            with suppress(OSError):  # of a terminal that was closed
                os.write(2, STOPPING)


# ------------------------------------------------------------------------------ Run


class Run:
    """One run: its settings, device, clock and log, and what came out. No trainer gets hold of it.

    carry_out calls build, start, train and finish, in this order.
    """

    def __init__(self, settings: Settings, entry: str, rt: Runtime, stop, started: float):
        """entry: path of the trainer's file; stop: a StopRequest; started: as in execute."""
        self.settings = settings
        self.track, self.task, self.hp, self.options, self.overrides = settings
        self.entry, self.sources = entry, source_texts(ROOT, entry)  # what the log embeds
        self.rt, self.stop, self.clock = rt, stop, Stopwatch(started, rt.synchronize)
        self.turns = Turns(self.options.turn_steps)
        if self.turns.steps:
            with self.clock.charged_to("turn"):
                self.turns.begin()
        stamp = time.strftime("%Y-%m-%dT%H%M%SZ", time.gmtime())
        name = f"{stamp}_{self.track}_{self.options.slug}_{uuid.uuid4().hex[:8]}"
        self.name = rt.on_main(lambda: name)
        self.log = Log(self.options.log_dir, self.name, self.hp.num_steps)
        self.data_sha256 = ""
        self.status, self.step, self.tokens, self.curve = "", 0, 0, []  # curve: (train ms, loss)
        self.first_step = self.first_tokens = self.saved_step = self.bad_steps = self.graphs = 0
        self.saved = None  # folder of the newest checkpoint
        self.contended = ""  # what was said of other processes on this machine
        self.pending = []  # steps whose loss has not been read
        self.flops_per_token, self.micro_batch_seqs = math.nan, 1

    @cached_property
    def validation(self) -> Validation:
        return Validation(self.task, self.rt)

    def build(self, make_trainer):
        """A trainer, which is handed copies: none of them leads back to this run."""
        assert self.validation  # its errors come before the trainer's
        trainer = make_trainer(copy.deepcopy(self.settings), copy.copy(self.rt))
        self.flops_per_token = trainer.flops_per_token
        self.micro_batch_seqs = trainer.micro_batch_seqs
        self.log.line(f"trainer: {' '.join(str.split(trainer.description))}")
        return trainer

    def config(self) -> dict:
        """The configuration that a resumed run must share with its checkpoint; without paths."""
        task = {k: v for k, v in dataclasses.asdict(self.task).items() if k not in DATA_FIELDS}
        return {**task, **dataclasses.asdict(self.hp), "seed": self.options.seed}

    def facts(self) -> dict:
        """What a checkpoint stores beside its tensors: source, step, losses, configuration."""
        rt = self.rt
        return {
            "trainer": self.entry,
            "sources": digests(self.sources),
            "step": self.step,
            "tokens": self.tokens,
            "curve": self.curve,
            "train_ms": self.clock.train_ms(),
            "data_sha256": self.data_sha256,
            "tokenizer_sha256": tokenizer_sha256(self.task),
            "arithmetic": {"matmul_dtype": str(rt.matmul_dtype),
                           "stream_dtype": str(rt.stream_dtype)},
            "config": self.config(),
        }  # fmt: skip

    def choose_arithmetic(self, checkpoint: dict | None = None) -> None:
        """By the flags, or the checkpoint to resume, or else by a measurement."""
        asked = "float32" if self.options.fp32 else self.options.cpu_dtype
        if checkpoint and not asked:
            saved = checkpoint["arithmetic"].get("matmul_dtype")
            asked = "bfloat16" if saved == "torch.bfloat16" else "float32"
        self.rt.choose_arithmetic(asked)

    def header(self) -> None:
        """Write the sections above the data: sources, config, environment, git state."""
        rt, overrides = self.rt, " ".join(self.overrides) or "none"
        config = {"run": self.name, "track": self.track, "overrides": overrides}
        for part in (self.task, self.hp, self.options):
            config |= dataclasses.asdict(part)
        device = {"device": rt.device_name, "world_size": rt.world_size,
                  "matmul_dtype": rt.matmul_dtype, "stream_dtype": rt.stream_dtype,
                  "bf16_gain": rt.bf16_gain}  # fmt: skip
        write_header(self.log, self.sources, self.options.source_dir, config, device)

    def compiler(self) -> Callable:
        """torch.compile for this run, or dont_compile; logs which, and why."""
        problem = self.rt.any_problem(self.rt.compiler_problem())
        if problem and self.rt.is_gpu:
            raise RunError(problem)
        problem = problem if self.options.compile else "--compile false"
        self.log.line(f"compile: {problem or 'yes'}", show=bool(problem))
        if problem:
            return dont_compile
        self.rt.prepare_compiler()
        # In a broken graph FlexAttention is not fused, and takes the memory of all scores.
        return partial(torch.compile, dynamic=False, fullgraph=self.rt.is_gpu)

    def start(self) -> None:
        """Start the timed part; from here on the first signal asks for a clean end."""
        self.stop.deferred = True
        if self.turns.steps:
            other_works = self.give_turn()
            if not other_works and self.turns.is_first:
                raise RunError(OTHER_ENDED)
        self.clock.switch("train")

    def give_turn(self) -> bytes:
        """Let the other run of the pair work; return b"" if it has ended."""
        with self.clock.charged_to("turn"):
            return self.turns.hand_over()

    def train(self, trainer) -> None:
        """Take the steps that are left; validate before the first, every val_every, at the end.

        Save and stop only where the trainer's state is whole, every trainer.state_every steps.
        """
        steps, every = trainer.steps(self.step), trainer.state_every
        while self.step < self.hp.num_steps and not (self.status and self.step % every == 0):
            if self.step % self.hp.val_every == 0:
                self.validate(partial(trainer.predict, self.step), trainer.val_batch_rows)
            self.end_step(*next(steps))
            if self.step % every == 0 and self.checkpoint_is_due():
                self.save(trainer.state)
        if not self.status:
            self.validate(partial(trainer.predict, self.step), trainer.val_batch_rows)

    def end_step(self, loss: Tensor, tokens: int) -> None:
        """Count an optimizer step. loss: this rank's mean, 0-D; tokens: those of all ranks.

        On a GPU, step n is logged after step n + 1 is queued, so that the device never waits for
        the host.
        """
        if (type(loss), type(tokens)) != (Tensor, int):  # others could write lines of the log
            raise RunError(
                f"a step gave {type(loss).__name__} and {type(tokens).__name__}, not "
                "Tensor and int themselves; mend what the trainer's steps give"
            )
        report = torch.stack([loss, torch.full_like(loss, self.stop.signal > 0)])
        self.rt.average([report])
        self.step, self.tokens = self.step + 1, self.tokens + tokens
        self.pending.append((self.step, *self.rt.to_host(report)))
        is_last = self.step == self.hp.num_steps
        while len(self.pending) > (0 if is_last else self.rt.steps_in_flight):
            self.log_step(*self.pending.pop(0))
        if self.turns.end_at(self.step) and not (self.status or is_last):
            self.give_turn()

    def log_step(self, step: int, report: Tensor, wait) -> None:
        """Log a step once its report [loss, stop request] is here; end the run if it has to end."""
        wait()
        loss, stop = report.tolist()
        train_ms, num_steps = self.clock.train_ms(), self.hp.num_steps
        self.log.line(f"step:{step}/{num_steps} train_loss:{loss:.6f} train_time:{train_ms:.0f}ms")
        rate = self.tokens_per_second() / 1000
        self.log.progress(step, f"loss {loss:.4f}, {rate:.1f}k tokens/s, MFU {self.mfu()}")
        first_val_loss = self.curve[0][1] if self.curve else 0.0
        start = max(math.log(self.task.vocab_size), first_val_loss)
        self.bad_steps = self.bad_steps + 1 if loss > start + DIVERGED_NATS else 0
        if not math.isfinite(loss) or self.bad_steps >= DIVERGED_STEPS:
            self.status = "diverged"
        elif stop and self.step < num_steps:  # else all steps are taken, and it is validated
            self.status = self.status or "aborted"

    def validate(self, predict, batch_rows: int) -> None:
        """Take and log the validation loss; predict and batch_rows as in Validation.loss."""
        self.log.progress(self.step, "validation")
        with self.clock.charged_to("validation"):
            loss = self.validation.loss(predict, batch_rows)
        train_ms = self.clock.train_ms()
        self.curve.append((train_ms, loss))
        if not math.isfinite(loss):
            self.status = "diverged"
        self.log.line(
            f"step:{self.step}/{self.hp.num_steps} val_loss:{loss:.6f} "
            f"train_time:{train_ms:.0f}ms step_avg:{train_ms / max(self.step, 1):.2f}ms",
            show=True,
        )
        self.log.check()
        if self.step > self.first_step and not self.contended:
            self.contended = contention(self.rt.is_gpu, self.clock.cpu_share())
            if self.contended:
                self.log.show(f"so far, {self.contended}")

    def finish(self) -> None:
        """End the timed part; the last validation gives the status of a run that came so far."""
        while self.pending:  # steps that were under way when the run was asked to end
            self.log_step(*self.pending.pop(0))
        reached = self.curve and self.curve[-1][1] <= self.task.target_val_loss
        self.status = self.status or ("success" if reached else "missed")
        self.clock.switch("end")

    def checkpoint_is_due(self) -> bool:
        every = self.options.save_every
        return self.status == "aborted" or 0 < every <= self.step - self.saved_step

    def save(self, state: Callable[[], dict[str, Tensor]]) -> None:
        """Write a checkpoint of state() beside the log. A kill leaves the previous one or this one.

        A run that is not stopping continues if the checkpoint cannot be written.
        """
        stem, self.saved_step = self.log.path.stem, self.step
        folder = self.log.path.with_name(f"{stem}_step{self.step:07}")
        with self.clock.charged_to("checkpoint"):
            try:
                write_checkpoint(folder, state(), self.facts(), self.rt)
            except RunError as error:
                if self.status:
                    raise
                self.log.line(f"no checkpoint: {error}; the run goes on", show=True)
                return
            earlier = [f for f in folder.parent.glob(f"{stem}_step*") if f != folder]
            self.rt.on_main(lambda: [delete_checkpoint(f) for f in earlier])
            self.saved = folder
            self.log.line(f"checkpoint: {folder} step:{self.step}", show=True)

    def checkpoint_to_resume(self) -> dict | None:
        """The facts of the checkpoint --resume, if this run may continue from it."""
        path = Path(self.options.resume)
        facts = read_checkpoint(path, self.rt) if self.options.resume else None
        self.choose_arithmetic(facts)
        if facts:
            check_same_run(path, facts, self.facts(), self.options.other_source)
        return facts

    def resume(self, facts: dict, tensors: dict[str, Tensor]) -> None:
        """Continue from the checkpoint --resume: fill tensors, and count from its step."""
        fill(Path(self.options.resume), tensors)
        self.step = self.first_step = self.saved_step = facts["step"]
        self.tokens = self.first_tokens = facts["tokens"]
        self.curve = [tuple(point) for point in facts["curve"]]
        self.clock.carried_ms = facts["train_ms"]
        self.log.line(f"resumed: {self.options.resume} step:{self.step}", show=True)

    def check_data(self, checkpoint: dict | None) -> list[str]:
        """Read all shards, on each machine; return the log's lines. RunError if they differ."""
        found = self.rt.on_ranks(lambda: check_shards(self.task), self.rt.is_first_of_machine)
        self.data_sha256, lines = found[0]
        if any(other != self.data_sha256 for other, _ in found):
            raise RunError("the machines have different shards; copy those of the first to all")
        if checkpoint and checkpoint["data_sha256"] != self.data_sha256:
            hashes = f"data_sha256 {checkpoint['data_sha256'][:12]}, here {self.data_sha256[:12]}"
            raise RunError(f"{self.options.resume} was trained on other shards ({hashes}); name "
                           "them: --train_files, --val_files")  # fmt: skip
        return lines

    def tokens_per_second(self) -> float:
        """Of all ranks together, over the train time since this process started."""
        seconds = max(self.clock.train_ms() - self.clock.carried_ms, 1) / 1000
        return (self.tokens - self.first_tokens) / seconds

    def mfu(self) -> str:
        rate = self.flops_per_token * self.tokens_per_second()
        return mfu(rate, self.rt.device_name, self.rt.world_size)

    def result(self) -> str:
        """The result line's fields, without the hash."""
        target, clock = self.task.target_val_loss, self.clock
        return (
            f"status:{self.status or 'aborted'} "
            f"val_loss:{self.curve[-1][1] if self.curve else math.nan:.6f} "
            f"target:{target} train_time:{clock.train_ms():.0f}ms "
            f"time_to_target:{time_to_target(self.curve, target)} steps:{self.step} "
            f"tokens:{self.tokens} tokens_per_s:{self.tokens_per_second():.0f} "
            f"flops_per_token:{self.flops_per_token:.4g} mfu:{self.mfu()} "
            f"peak_memory:{self.rt.peak_memory_mib()}MiB cpu_share:{clock.cpu_share():.2f} "
            f"recompiled:{compiled_graphs() - self.graphs} "
            f"seed:{self.options.seed} overrides:{len(self.overrides)} "
            f"resumed_from:{self.first_step}"
        )


def execute(
    make_trainer: Callable[[Settings, Runtime], object],
    tracks: dict,
    gpu_track: str,
    started: float,
) -> int:
    """Carry out the run that this process's flags describe; return its exit code.

    make_trainer(settings, rt) returns an object with five methods. compile(compile_fn) applies
    compile_fn to what is to be compiled; warm_up() runs all of that; state() returns every tensor
    that training changes, by name; steps(first) is an iterator that takes a step per item, from
    this one on, and gives (this rank's mean loss, tokens of all ranks); predict(step, inputs) is
    that of Validation.loss after so many steps. Its attributes: rt as handed, val_batch_rows (rows
    per call of predict), micro_batch_seqs (rows per forward pass at most), flops_per_token (forward
    and backward), state_every (steps after which state is whole) and description (one line for the
    log). tracks, gpu_track: as in parse_flags.
    started: perf_counter at first import.
    """
    open_streams()
    stop = StopRequest()
    rt = run = None
    try:
        rank_store()
        caller = sys._getframe(1)  # whose file is the source, whatever it says of itself
        entry = Path(caller.f_code.co_filename).resolve().relative_to(ROOT).as_posix()
        description = (caller.f_globals["__doc__"] or " ").splitlines()[0]
        settings = parse_flags(sys.argv[1:], tracks, gpu_track, description)
        options = settings.options
        rt = Runtime(options.fp32, 2 if options.turn_steps else 1, options.rank_timeout_s)
        run = Run(settings, entry, rt, stop, started)
        carry_out(run, make_trainer)
        if rt.is_main:
            tell(f"log: {run.log.path}    python: {sys.executable}")
        return {"success": 0, "missed": 0, "diverged": 1}.get(run.status, 128 + stop.signal)
    except KeyboardInterrupt:
        if is_first_to_say("interrupted"):
            tell("interrupted")
        return 128 + stop.signal
    except (RunError, OSError) as error:
        if is_first_to_say(str(error)):
            tell(f"error: {error}")
        return 1
    finally:
        if run is not None and run.status in ("", "aborted") and run.saved and rt.is_main:
            tell(f"to resume from step {int(run.saved.name[-7:])}: {resume_command(run.saved)}")
        if rt is not None:
            rt.close()


def tell(text: str) -> None:
    """Print to stderr, which may have been closed."""
    with suppress(OSError):
        print(text, file=sys.stderr, flush=True)


def resume_command(checkpoint: Path) -> str:
    """The command that resumes this process's run from a checkpoint."""
    launcher = []
    if (ranks := int(os.environ.get("LOCAL_WORLD_SIZE") or 1)) > 1:
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    return shlex.join([sys.executable, *launcher, *sys.argv, "--resume", str(checkpoint)])


def carry_out(run: Run, make_trainer) -> None:
    """Open the run's log, build the trainer and train.

    The log always gets its last line; that of a run without a step is deleted.
    """
    rt, log = run.rt, run.log
    try:
        rt.on_main(log.open)
        checkpoint = run.checkpoint_to_resume()
        rt.on_main(run.header)
        log.section("data", run.check_data(checkpoint))
        log.section("run")
        log.line(calibration(rt.device, rt.matmul_dtype, rt.synchronize))
        trainer = run.build(make_trainer)
        with run.clock.charged_to("compile"):
            log.progress(0, "compiling, a minute or two")
            warm_up(run, trainer)
        run.graphs = compiled_graphs()
        if checkpoint:
            run.resume(checkpoint, trainer.state())
        gc.collect()
        gc.freeze()  # else passes of the collector over what exists by now would delay steps
        run.start()
        run.train(trainer)
        run.finish()
        log.line(calibration(rt.device, rt.matmul_dtype, rt.synchronize))
        log.line(f"foreign_modules: {foreign_modules(run.sources)}")  # late imports are there now
        if warning := contention(rt.is_gpu, run.clock.cpu_share()):
            log.line(f"warning: {warning}", show=True)
    except RuntimeError as error:  # that of a CPU is of no class of its own
        if not isinstance(error, torch.OutOfMemoryError) and "can't allocate" not in str(error):
            raise
        rows = run.micro_batch_seqs
        fewer = f"add --micro_batch_seqs {rows // 2}, or " if rows > 1 else ""
        raise RunError(
            f"out of memory on {rt.device_name} with {rows} rows per forward pass; {fewer}lower "
            "--seq_len or the model's size"
        ) from None
    finally:
        gc.unfreeze()
        try:
            with suppress(RuntimeError):  # after an error of the GPU no clock can wait for it
                log.line(run.clock.ledger(), show=run.step > 0)
            log.close(run.result(), show=run.step > 0)  # without a step, show the reason alone
        finally:  # even if the disk is full
            if log.file and "\nstep:" not in log.path.read_text(encoding="utf-8"):
                log.path.unlink()


def warm_up(run: Run, trainer) -> None:
    """Compile every graph before the clock starts, and leave no trace in the trainer's state."""
    trainer.compile(run.compiler())
    before = {name: local(t).to("cpu", copy=True) for name, t in trainer.state().items()}
    problem = ""
    with trainer.rt.alone():
        try:
            trainer.warm_up()
        except compile_errors() as error:
            problem = compiler_line(error)
    if problem := run.rt.any_problem(problem):
        if run.rt.is_gpu:  # where attention and kernels cannot do without
            raise RunError(f"torch.compile failed ({problem}); see its output above, or train on "
                           "the CPU: CUDA_VISIBLE_DEVICES= ./run.sh")  # fmt: skip
        run.log.line(f"compile: failed, so this run is slower ({problem})", show=True)
        trainer.compile(dont_compile)
        with trainer.rt.alone():
            trainer.warm_up()
    for name, tensor in trainer.state().items():
        if name in before:
            local(tensor).copy_(before[name])
        else:  # an optimizer's state, which does not exist before its first step
            tensor.zero_()


def compiler_line(error: Exception) -> str:
    """Why a compilation failed, in one line: the compiler's own, if there is one."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    own = [line for line in lines if "error:" in line]
    return [*own, *lines, type(error).__name__][0]


def dont_compile(function: Callable) -> Callable:
    """Takes the place of torch.compile in eager runs."""
    return function


def local(tensor: Tensor) -> Tensor:
    """What this rank holds of a tensor that may be sharded (a DTensor)."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def compiled_graphs() -> int:
    """Graphs that torch.compile has made so far in this process; it grows when it recompiles."""
    dynamo = sys.modules.get("torch._dynamo.utils")  # loading it takes seconds
    return dynamo.counters["stats"]["unique_graphs"] if dynamo else 0


def time_to_target(curve: list, target: float) -> str:
    """Train time at which validation losses [(train ms, loss)] cross target, interpolated."""
    for (ms0, loss0), (ms1, loss1) in pairwise(curve):
        if loss0 > target >= loss1:
            return f"{ms0 + (ms1 - ms0) * (loss0 - target) / (loss0 - loss1):.0f}ms"
    return "none"
