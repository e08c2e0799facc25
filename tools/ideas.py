#!/usr/bin/env python3
"""Try ideas one after the other, each against the best so far; keep a ledger of all of them.

    ideas.py begin FOLDER --num_steps 200   this checkout is the first best; flags are for all runs
    ideas.py test FOLDER -m "wider MLP"     race this checkout, changed, against the best
    ideas.py list FOLDER                    print the ledger, and draw it in FOLDER/ideas.png
    ideas.py confirm FOLDER [FLAGS]         race the last best against the first, with new seeds

`test` probes the idea as probe.py does, then races it until the outcome is decided. If the idea
wins, it is the best that the next one must beat. If the same code was tested before, whatever its
comments, the tool prints what came out then. An idea may change train_gpt.py and kernels.py alone.
If a call was interrupted, the next one first finishes its idea. docs/ideas.md has a loop for
programs.

Exit code of test: 0 keep, 1 discard, 5 undecided, 2 if it could not be run.
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)  # the project's root
    from referee.start import finish

import argparse
import ast
import json
import math
import shutil
from collections import Counter
from dataclasses import asdict, dataclass, replace

import numpy as np

from referee.files import write_text
from referee.host import host_id
from referee.sources import sha256_of, source_texts
from tools import sources, stats
from tools.attempts import Attempt, lock_folder, require_own_flags, settle_dtype
from tools.cli import EXIT_MISUSE, ToolError, flag_parser
from tools.comparison import Arm, Comparison, signed
from tools.plots import plot_ideas
from tools.probe import both_runs, findings
from tools.race import print_verdict, run_all, run_until_decided
from tools.runs import find_logs, read_log
from tools.sources import ENTRIES, ROOT, keep_as_diff, kept_texts

EXIT_CODES = {"keep": 0, "discard": 1, "undecided": 5}
# By what a campaign judges: the gain worth having, a share of the time or nats per token.
LEAST = {"time": 0.01, "target": 0.01, "loss": 0.002}
FIXED = ("referee", "tools", "data")  # folders that no idea may change
SEEDS = 1000  # idea k takes the seeds from 1000 k on; `confirm` takes those from 0 on


@dataclass(frozen=True)
class Idea:
    """A line of the ledger."""

    number: int
    message: str
    code: str  # its hash
    against: int  # number of the best that it had to beat
    decision: str = ""  # keep, discard or undecided; empty until then
    why: str = ""
    change: float | None = None  # of the figure judged by: a share of a time, or nats per token
    low: float | None = None  # 95% interval, which allows for a look after every pair
    high: float | None = None
    pairs: int = 0
    seconds: float = 0.0  # of its runs, with start-up and validations


class Campaign:
    """A folder with campaign.json and a folder per idea: idea.json, and the attempts A and B."""

    def __init__(self, folder: Path, to_change: bool):
        """ToolError if the folder holds no campaign, or another process changes it."""
        if not (folder / "campaign.json").exists():
            raise ToolError(f"{folder} is no campaign; ./run.sh tools/ideas.py begin {folder}")
        if to_change:
            lock_folder(folder)
        self.folder = folder
        self.rules = read_json(folder / "campaign.json")
        self.ideas = [Idea(**read_json(path)) for path in sorted(folder.glob("[0-9]*/idea.json"))]

    def place(self, number: int) -> Path:
        return self.folder / f"{number:03}"

    @property
    def best(self) -> Idea:
        return [idea for idea in self.ideas if idea.decision == "keep"][-1]

    def save(self, idea: Idea) -> None:
        """Write a new idea, or what became of the last one."""
        write_json(self.place(idea.number) / "idea.json", asdict(idea))
        self.ideas[idea.number :] = [idea]

    def attempt(self, number: int, name: str, folder: Path, flags: list[str]) -> Attempt:
        """An attempt in a folder with the source of an idea."""
        attempt = Attempt(name, folder, kept_texts(self.place(number) / "B"), flags)
        attempt.most_s = self.rules["most_s"]
        attempt.freeze()
        return attempt


def read_json(path: Path) -> dict:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ToolError(f"{path} is damaged: {error}; take it from a copy") from None


def write_json(path: Path, fields: dict) -> None:
    write_text(path, json.dumps(fields, indent=1) + "\n")


def code_of(texts: dict[str, str]) -> str:
    """A hash of the syntax trees of a source: comments and layout do not count."""
    return sha256_of("".join(path + ast.dump(ast.parse(texts[path])) for path in sorted(texts)))


def fixed_files() -> dict[str, str]:
    """sha256 by path of the files that no idea may change."""
    files = [file for folder in FIXED for file in (ROOT / folder).glob("*.py")]
    return {str(file.relative_to(ROOT)): sha256_of(file.read_text(encoding="utf-8"))
            for file in files}  # fmt: skip


# ------------------------------------------------------------------------------ One idea


def times_to_target(arm: Arm) -> np.ndarray:
    return arm.values(lambda run: run.number("time_to_target"))


def difference(c: Comparison, judge: str) -> stats.Difference:
    """What B changes in the figure that the campaign judges by."""
    if judge != "target":
        return c.time if judge == "time" else c.loss
    return stats.relative(times_to_target(c.a), times_to_target(c.b), c.in_pairs, c.level)


def decide(c: Comparison, judge: str) -> tuple[str, str]:
    """(keep, discard, undecided for good, or empty while more pairs may tell; why)."""
    found, verdict = difference(c, judge), f"{c.verdict} {c.reason}"
    if unfinished := c.a.unfinished + c.b.unfinished:
        return "discard", f"a run {next(iter(unfinished))}"
    if judge == "target" and np.isnan(times_to_target(c.b)).any():
        return "discard", "a run missed the target"
    if c.verdict == "NOT COMPARABLE":
        return "discard", verdict
    if c.objections:
        return "undecided", "; ".join(c.objections)
    if judge == "time" and c.verdict != "INCONCLUSIVE":
        return "keep" if c.verdict == "FASTER" else "discard", verdict
    if judge != "time" and found.p < c.level and found.change < 0:
        return "keep", f"time {signed(c.time, 2)}, loss {c.loss.change:+.4f}"
    if found.low > -LEAST[judge]:
        return "discard", f"a gain of {LEAST[judge]} is excluded"
    return "", verdict


def finish_idea(campaign: Campaign, idea: Idea) -> Idea:
    """Probe an idea, run pairs until it is decided, and write down what came out."""
    rules, place = campaign.rules, campaign.place(idea.number)
    a = campaign.attempt(idea.against, f"best{idea.against}", place / "A", rules["flags"])
    b = campaign.attempt(idea.number, f"idea{idea.number}", place / "B", rules["flags"])
    a.first_seed = b.first_seed = SEEDS * idea.number
    set_aside(place)
    if not b.log_paths and (faults := probe_faults(b)):
        idea = replace(idea, decision="discard", why=faults)
    else:
        settle_dtype([a, b])
        c = run_until_decided([a, b], stats.MOST_LOOKS, rules["turns"],
                              lambda c: decide(c, rules["judge"])[0])  # fmt: skip
        decision, why = decide(c, rules["judge"])
        seconds = sum(run.ledger.get("total", 0) for run in c.a.runs + c.b.runs)
        idea = replace(idea, decision=decision or "undecided", why=why, pairs=len(c.b.runs),
                       seconds=round(seconds, 1))  # fmt: skip
        found = difference(c, rules["judge"])
        if math.isfinite(found.low):
            idea = replace(idea, change=found.change, low=found.low, high=found.high)
    campaign.save(idea)
    for attempt in (a, b):
        keep_as_diff(attempt.folder, campaign.place(idea.against) / "B")
    return idea


def set_aside(place: Path) -> None:
    """Take the logs of an interrupted pair, and those of another host, out of an idea's race."""
    runs = [read_log(path) for arm in "AB" for path in find_logs(place / arm)]
    ended = Counter(run.seed for run in runs if run.finished and run.host == host_id())
    for run in runs:
        if ended[run.seed] < 2:
            (place / "set_aside").mkdir(exist_ok=True)
            run.path.replace(place / "set_aside" / run.path.name)


def probe_faults(attempt: Attempt) -> str:
    """Why the losses of a source cannot be believed, or why it does not run; empty if neither.

    A campaign may validate on fewer rows than its track: no idea can change which.
    """
    try:
        found = dict(findings(*both_runs(attempt), across_documents=False))
    except ToolError as error:
        return str(error)
    found.pop("validation rows")
    return "; ".join(f"{name}: {fault}" for name, fault in found.items() if fault)


# ------------------------------------------------------------------------------ Commands


def begin(args, flags: list[str]) -> None:
    if (args.folder / "campaign.json").exists():
        raise ToolError(f"{args.folder} is a campaign already; name a new folder")
    texts = source_texts(ROOT, ENTRIES[0])
    if faults := probe_faults(Attempt("first", args.folder / "000/B", texts, flags)):
        raise ToolError(f"no campaign can begin with this checkout and these flags: {faults}")
    shutil.rmtree(args.folder / "000", ignore_errors=True)  # of a call that was interrupted
    sources.write_texts(texts, args.folder / "000/B/source")
    first = Idea(0, "the first best", code_of(texts), 0, "keep")
    write_json(args.folder / "000/idea.json", asdict(first))
    rules = {"judge": args.judge, "turns": args.turns, "most_s": args.most_s, "flags": flags}
    write_json(args.folder / "campaign.json", {**rules, "fixed": fixed_files()})


def test(args, campaign: Campaign) -> int:
    """Finish an open idea, then test this checkout's."""
    before, now = campaign.rules["fixed"], fixed_files()
    if changed := sorted(path for path in now | before if now.get(path) != before.get(path)):
        raise ToolError("an idea may change train_gpt.py and kernels.py alone; this checkout has "
                        f"another {', '.join(changed)}: undo that, or begin anew")  # fmt: skip
    if not campaign.ideas[-1].decision:
        report([finish_idea(campaign, campaign.ideas[-1])], args.json)
    texts = source_texts(ROOT, ENTRIES[0])
    code, number = code_of(texts), len(campaign.ideas)
    idea = next((idea for idea in campaign.ideas if idea.code == code), None)
    if not idea:
        idea = Idea(number, args.message, code, campaign.best.number)
        shutil.rmtree(campaign.place(number), ignore_errors=True)  # of an interrupted call
        sources.write_texts(texts, campaign.place(number) / "B/source")
        campaign.save(idea)
        idea = finish_idea(campaign, idea)
    report([idea], args.json)
    return EXIT_CODES[idea.decision]


def confirm(args, campaign: Campaign, flags: list[str]) -> int:
    """Race the last best against the first one, with seeds that chose nothing."""
    best, flags = campaign.best.number, flags or campaign.rules["flags"]
    if not best:
        raise ToolError(f"{campaign.folder} has kept no idea yet: there is nothing to confirm")
    place = campaign.folder / f"confirm_{best:03}"
    a = campaign.attempt(0, "first", place / "A", flags)
    b = campaign.attempt(best, f"idea{best}", place / "B", flags)
    settle_dtype([a, b])
    run_all([a, b], args.n, campaign.rules["turns"], declared=args.n)
    for attempt in (a, b):
        keep_as_diff(attempt.folder, campaign.place(0) / "B")
    return print_verdict([Arm.read(attempt.logs, name=attempt.name) for attempt in (a, b)])


def report(ideas: list[Idea], as_json: bool) -> None:
    """Print lines of the ledger."""
    for idea in ideas:
        if as_json:
            print(json.dumps(asdict(idea)))
            continue
        known = idea.change is not None
        found = f"{idea.change:+.4f} [{idea.low:+.4f}, {idea.high:+.4f}]" if known else ""
        print(f"{idea.number:3} {idea.decision or 'open':9} {found:27} {idea.pairs:2} pairs "
              f"{idea.seconds:6.0f} s  {idea.message}: {idea.why}")  # fmt: skip


def parse() -> tuple[argparse.Namespace, list[str]]:
    """(the command and its arguments, the trainer's flags)."""
    parser = flag_parser(__doc__, "ideas.py begin|test|list|confirm FOLDER [...]")
    add = parser.add_argument
    add("command", choices=("begin", "test", "list", "confirm"))
    add("folder", type=Path)
    add("-m", "--message", help="of test: what the idea is")
    add("--json", action="store_true", help="of test and list: a line of JSON per idea")
    add("-n", type=int, default=10, help="of confirm: pairs (default: %(default)s)")
    add("--judge", choices=LEAST, default="time", help="of begin: keep what saves time at a loss "
        "that is not higher, time to the target, or loss (default: %(default)s)")  # fmt: skip
    add("--turns", type=int, default=10, help="of begin: as in race.py (default: %(default)s)")
    add("--most_s", type=float, help="of begin: seconds that a run may take, waiting included")
    args, flags = parser.parse_known_args()
    if flags and args.command in ("test", "list"):
        parser.error(f"{flags[0]}: `begin` settles the flags of all runs")
    if args.command == "test" and not args.message:
        parser.error("test needs -m MESSAGE: what the idea is")
    if args.turns < 0 or args.n < 1 or not (args.most_s is None or args.most_s > 0):
        parser.error("--turns must be at least 0, -n at least 1, --most_s above 0")
    require_own_flags(flags)
    return args, flags


def main() -> int | None:
    args, flags = parse()
    if args.command == "begin":
        return begin(args, flags)
    campaign = Campaign(args.folder, to_change=args.command != "list")
    if args.command == "list":
        report(campaign.ideas, args.json)
        return plot_ideas(campaign.ideas, campaign.rules["judge"], campaign.folder / "ideas.png")
    return test(args, campaign) if args.command == "test" else confirm(args, campaign, flags)


if __name__ == "__main__":
    finish(main, failed=EXIT_MISUSE, interrupted="interrupted; the next `test` goes on with it")
