"""The half of tools/probe.py that runs in the process of the source under test, from its folder.

    python probe_inside.py ENTRY FACTS [--FLAG VALUE of the trainer]...

It wraps the referee's `carry_out` and `Run.validate`, asks the trainer for the logits of changed
rows, and writes what it saw to FACTS, as JSON. It imports nothing of the project but that source.
tools/probe.py judges the facts.
"""

import hashlib
import importlib
import json
import os
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

ROOT = os.path.dirname(os.path.realpath(__file__))
PROBED_ROWS, PROBED_TOKENS = 4, 1024  # at most; the rest of the validation is left out
NOISE = 0.3  # added to every weight: paths that begin at zero then carry something
CUTS = 24  # per row, at random places: a leak at one place in 20 escapes once in 100 times
QUIET = (ROOT, *map(os.path.realpath, (sys.prefix, sys.base_prefix)), "/proc/", "/sys/", "/dev/",
         "/etc/", "/usr/")  # fmt: skip
NETWORK = ("socket.connect", "socket.bind", "socket.sendto", "socket.getaddrinfo",
           "socket.gethostbyname", "urllib.Request")  # fmt: skip
SHARD_READERS = ("data/shards.py", "referee/shards.py", Path(__file__).name)  # they open for others
SECRET = torch.Generator().manual_seed(int.from_bytes(os.urandom(7)))  # no source can know it
PROGRAMS = ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.spawn")


class Watch:
    """Notes what the process opens, starts and calls: an audit hook, which nothing can remove."""

    def __init__(self):
        self.seen = {"opened": set(), "network": set(), "programs": set()}
        self.is_set_up = False  # once it is, nobody needs to open a validation shard

    def __call__(self, event: str, args: tuple) -> None:
        if event == "open" and isinstance(args[0], str | bytes | os.PathLike):
            path = os.path.realpath(os.fsdecode(args[0]))
            file, links = identity(path)
            if not path.startswith(QUIET) or links > 1:
                self.seen["opened"].add((path, file, self.caller(), self.is_set_up))
        elif event in NETWORK:
            self.seen["network"].add((f"{event} {args[1:]}", self.caller()))
        elif event in PROGRAMS:
            self.seen["programs"].add((str(args[0]), self.caller()))

    def caller(self) -> str:
        """FILE:FUNCTION of the source nearest to the call, not counting the shard reader."""
        frame = sys._getframe(2)
        while frame:
            path, name = os.path.relpath(frame.f_code.co_filename, ROOT), frame.f_code.co_name
            if not path.startswith("..") and path not in SHARD_READERS and name[0] != "<":
                return f"{path}:{name}"
            frame = frame.f_back
        return "a library"


def identity(path: str) -> tuple[str, int]:
    """(the file's identity, its number of names), for a hard link has another path."""
    try:
        status = os.stat(path)
    except OSError:  # it is about to be made
        return "", 0
    return f"{status.st_dev}:{status.st_ino}", status.st_nlink


def digest(tensors: dict[str, torch.Tensor]) -> str:
    """sha256, first digits, over every value."""
    hashed = hashlib.sha256()
    for name in sorted(tensors):
        hashed.update(tensors[name].detach().cpu().reshape(-1).view(torch.uint8).numpy())
    return hashed.hexdigest()[:16]


def largest(a: torch.Tensor, b: torch.Tensor) -> float:
    """The largest difference between logits; nan counts as infinite."""
    return (a - b).abs().nan_to_num(torch.inf).max().item() if a.numel() else 0.0


class Probe:
    """What is tried at each validation of one run.

    chunks(rows (B, T + 1)) yields logits (n, V) for the positions of rows[:, :-1].flatten().
    """

    def __init__(self, watch: Watch):
        self.watch, self.facts = watch, {"validations": []}

    def take_rows(self, rows: torch.Tensor, task) -> torch.Tensor:
        """Note which rows the validation uses; return the few that are probed."""
        self.vocab, self.start = task.vocab_size, task.document_start
        tokens = np.ascontiguousarray(rows.numpy(), "<u2")
        self.facts["validated_rows"] = [*rows.shape, hashlib.sha256(tokens).hexdigest()]
        self.rows = rows[:PROBED_ROWS].contiguous()
        self.watch.is_set_up = True
        return self.rows

    def around(self, validate, run, chunks, state) -> None:
        """Let the run validate, and compute the same loss before and after."""
        before, own = digest(state()), self.loss(chunks)
        validate()
        again, after = self.loss(chunks), digest(state())
        self.facts["validations"].append(
            {"step": run.step, "loss": own, "again": again, "reported": run.curve[-1][1],
             "weights": before, "weights_after": after})  # fmt: skip
        if run.step == run.hp.num_steps:
            weights = [t for name, t in state().items() if name.startswith("model.")]
            self.facts |= self.with_noise(chunks, weights)

    def loss(self, chunks) -> float:
        """Mean cross-entropy of the probed rows, nats per token, as the referee computes it."""
        targets, total, done = self.rows[:, 1:].flatten(), 0.0, 0
        for logits in chunks(self.rows):
            part = targets[done : done + len(logits)].to(logits.device)
            total += F.cross_entropy(logits.float(), part, reduction="sum").item()
            done += len(logits)
        return total / len(targets)

    def with_noise(self, chunks, weights: list) -> dict[str, float]:
        """Largest changes of logits, by what was changed, with noise on every weight."""
        rows, starts = with_starts(self.rows[:, : PROBED_TOKENS + 1], self.start)

        def logits(rows):
            return torch.cat([c.float() for c in chunks(rows)]).view(
                len(rows), rows.size(1) - 1, -1
            )

        trained, kept = logits(rows), [w.clone() for w in weights]
        for weight in weights:
            weight.add_(NOISE * torch.randn_like(weight))
        base = logits(rows)
        facts = {"weights_felt": largest(base, trained)}
        facts |= self.between_places(logits, rows, base, starts)
        facts |= self.between_documents(logits, rows)
        facts |= self.between_rows(logits, rows, base)
        for weight, old in zip(weights, kept, strict=True):
            weight.copy_(old)
        return facts

    def between_places(self, logits, rows, base, starts) -> dict[str, float]:
        """How much later tokens change logits, and how little; other places in each row."""
        B, T, _ = base.shape
        places, future, felt = torch.arange(rows.size(1)), 0.0, torch.inf
        random_cuts = torch.randint(1, T, (CUTS, B), generator=SECRET)
        for cuts_B in (*random_cuts, starts + 1, torch.full((B,), T - 1)):
            later_BT = places >= cuts_B[:, None]
            changed = logits(self.replaced(rows, later_BT))
            differences_BT = (changed - base).abs().nan_to_num(torch.inf).amax(-1)
            later_BT = later_BT[:, :T]
            future = max(future, differences_BT.masked_fill(later_BT, 0).max().item())
            felt = min(felt, differences_BT.masked_fill(~later_BT, 0).amax(1).min().item())
        return {"future": future, "inputs_felt": felt}

    def between_documents(self, logits, rows) -> dict[str, float]:
        """How much the first of two documents in a row changes the logits of the second."""
        cut = rows.size(1) // 2 + 5  # no multiple of any length into which rows may be cut
        before = torch.arange(rows.size(1)) < cut
        two = self.replaced(rows, before)
        two[:, cut] = self.start
        other = self.replaced(two, before)
        return {"documents": largest(logits(two)[:, cut:], logits(other)[:, cut:])}

    def between_rows(self, logits, rows, base) -> dict[str, float]:
        alone = torch.cat([logits(row[None]) for row in rows])
        pairs = torch.cat([logits(part) for part in rows.split(2)])
        return {"rows": largest(alone, base), "grouping": largest(pairs, base),
                "order": largest(logits(rows.flip(0)).flip(0), base)}  # fmt: skip

    def replaced(self, rows: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        """Rows with other random tokens, of which none opens a document, where places is true."""
        vocab, next_one = self.vocab, self.start + 1
        tokens = (rows + torch.randint(1, vocab, rows.shape, generator=SECRET)) % vocab
        instead = (next_one + (rows == next_one % vocab)) % vocab  # neither start nor the old one
        return torch.where(places, torch.where(tokens == self.start, instead, tokens), rows)


def with_starts(rows: torch.Tensor, start: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(rows with one more document start in each, its places (B,)), which are random."""
    places = torch.randint(1, rows.size(1) - 2, (len(rows),), generator=SECRET)
    return rows.scatter(1, places[:, None], start), places


def wrap_referee(harness, probe: Probe) -> None:
    """Let the probe take part in the run."""
    carry_out, validate = harness.carry_out, harness.Run.validate

    def carry_out_probed(run, make_trainer):
        def make(*handed):  # in older records the run itself
            run.validation.rows = probe.take_rows(run.validation.rows, run.task)
            probe.trainer = make_trainer(*handed)
            return probe.trainer

        carry_out(run, make)

    def validate_probed(run, predict, batch_rows):
        @torch.no_grad()
        def chunks(rows):
            yield from predict(rows[:, :-1].contiguous().to(run.rt.device))

        probe.around(lambda: validate(run, predict, batch_rows), run, chunks, probe.trainer.state)

    harness.carry_out, harness.Run.validate = carry_out_probed, validate_probed


def main() -> int:
    entry, facts_path, *flags = sys.argv[1:]
    sys.argv[:] = [os.path.join(ROOT, entry), *flags]
    sys.addaudithook(watch := Watch())
    probe = Probe(watch)
    module = importlib.import_module(entry.removesuffix(".py").replace("/", "."))
    wrap_referee(sys.modules.get("referee.harness") or sys.modules["harness"], probe)
    code = module.main()
    seen = {kind: sorted(entries) for kind, entries in watch.seen.items()}
    Path(facts_path).write_text(json.dumps(probe.facts | seen), encoding="utf-8")
    return code


if __name__ == "__main__":
    sys.exit(main() if len(sys.argv) > 2 else "error: a part of tools/probe.py; run that")
