"""Profile training steps: ./run.sh tools/profile_step.py [--steps 4] [trainer's flags]

Warms up as a run does, then profiles steps of each stage of the schedule, after as many others.
Prints the times of the classes that preflight expects, the wait for data, the longest operations,
tokens/s and MFU. Writes no log. On a CPU, the head's loss counts as element-wise work.
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)  # the project's root
    from referee.start import finish

import time
from collections import Counter
from operator import sub

from torch.profiler import profile, record_function

from data.prefetch import Prefetcher
from referee.environment import mfu
from referee.harness import Run, StopRequest, parse_flags, warm_up
from referee.ranks import Runtime
from tools.cli import ToolError, flag_parser
from tools.preflight import class_of
from train_gpt import ADAM_EVERY, TRACKS, Trainer

SPANS = {"photofinish::head_loss": "head_loss", "profile::optimizer": "optimizer"}


def class_name(event, operation: str) -> str:
    """The class of an operation, by its name and the spans around it."""
    above, names = event, f"{operation} {event.name}"
    while above is not None:
        names += "".join(f" of {part}" for span, part in SPANS.items() if span in above.name)
        above = above.cpu_parent
    return class_of(names)


def operations(prof, on_gpu: bool):
    """Yield (class, name, microseconds) of each kernel, or on a CPU of each operation."""
    for event in prof.events():
        if on_gpu:
            yield from ((class_name(event, k.name), k.name, k.duration) for k in event.kernels)
        elif event.self_cpu_time_total and not event.name.startswith("profile::"):
            yield class_name(event, event.name), event.name, event.self_cpu_time_total


def timed(batches, waits: list[float]):
    """Yield the batches; append to waits the seconds that each took to arrive."""
    while True:
        start = time.perf_counter()
        batch = next(batches)
        waits.append(time.perf_counter() - start)
        yield batch


def profiled_steps(trainer: Trainer, first: int, steps: int):
    """Profile steps after as many others; return (profile, wall seconds, seconds of waiting)."""
    rt, waits = trainer.rt, []
    batches = timed(Prefetcher(trainer.batches(first), rt), waits)
    for step in range(first, first + steps):
        trainer.update(step, batches)
    rt.synchronize()
    waits.clear()
    with profile() as prof:
        start = time.perf_counter()
        for step in range(first + steps, first + 2 * steps):
            trainer.update(step, batches)
        rt.synchronize()
        seconds = time.perf_counter() - start
    return prof, seconds, sum(waits)


def report(trainer: Trainer, first: int, steps: int, prof, seconds: float, waited: float) -> None:
    hp, rt = trainer.hp, trainer.rt
    parts, names = Counter(), Counter()
    for part, name, microseconds in operations(prof, rt.is_gpu):
        parts[part] += microseconds
        names[part, name] += microseconds
    first += steps
    tokens = sum(hp.value_at_step(hp.batch_tokens, first + i) for i in range(steps)) / seconds
    share = mfu(trainer.flops_per_token * tokens, rt.device_name, rt.world_size)
    print(f"{rt.device_name}, steps {first} to {first + steps - 1}: {1e3 * seconds / steps:.2f} ms "
          f"per step under the profiler, {tokens:.0f} tokens/s, MFU {share}")  # fmt: skip
    busy = sum(parts.values())
    for part, microseconds in parts.most_common():
        print(f"{microseconds / busy:7.1%} {microseconds / 1e3 / steps:10.3f} ms  {part}")
    print(f"{waited / seconds:7.1%} {1e3 * waited / steps:10.3f} ms  of the wall time: data")
    print("the longest operations:")
    for (part, name), time_us in names.most_common(15):
        print(f"{time_us / busy:7.1%} {time_us / 1e3 / steps:10.3f} ms  {part}: {name:.70}")


def make_trainer(settings) -> Trainer:
    """A trainer after warm-up, whose optimizers are spans of the profile."""
    rt = Runtime(settings.options.fp32)
    run = Run(settings, "train_gpt.py", rt, StopRequest(), started=time.perf_counter())
    run.choose_arithmetic()
    trainer = run.build(Trainer)
    warm_up(run, trainer)
    if trainer.loss is trainer.model:
        print("not compiled: these are the times of eager operations", file=sys.stderr)
    for optimizer in trainer.optimizers.values():
        optimizer.step = record_function("profile::optimizer")(optimizer.step)
    return trainer


def main() -> int:
    parser = flag_parser(__doc__)
    parser.add_argument("--steps", type=int, default=4, help="steps to profile per stage")
    own, flags = parser.parse_known_args()
    settings = parse_flags(flags, TRACKS, "fineweb", __doc__)
    hp = settings.hp
    stages = max(len(hp.batch_tokens), len(hp.window_tokens))
    starts = [hp.first_step(stage, stages) for stage in range(stages)]
    shortest = min(map(sub, [*starts[1:], hp.num_steps], starts))
    if own.steps < 1 or own.steps % ADAM_EVERY or 2 * own.steps > shortest:
        raise ToolError(f"--steps {own.steps} must be a multiple of {ADAM_EVERY}, as Adam updates "
                        f"so often, and at most half of {shortest} steps")  # fmt: skip
    trainer = make_trainer(settings)
    for first in starts:
        report(trainer, first, own.steps, *profiled_steps(trainer, first, own.steps))
    return 0


if __name__ == "__main__":
    finish(main)
