"""Checkpoints: folders that are written completely or not at all, and verified before loading.

A folder holds what torch.distributed.checkpoint wrote, one file or more per rank, and config.json,
which says what they are: step, configuration, data, the sha256 of every other file and of its own
contents. It is written under another name and then renamed. It loads at any number of ranks, which
must see one file system.
"""

import dataclasses
import fcntl
import json
import math
import os
import shlex
import shutil
import warnings
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from referee.files import write_text
from referee.flags import RunError, as_flag
from referee.shards import file_sha256
from referee.sources import sha256_of

ITS_SOURCE = "check out the source that its log holds"
FACTS = {"trainer": str, "sources": dict, "step": int, "config": dict, "files": dict,
         "arithmetic": dict}  # fmt: skip


def write_checkpoint(folder: Path, tensors: dict[str, Tensor], facts: dict, rt) -> None:
    """Write tensors and facts, both by name. Every rank calls it, and gets the same RunError."""
    import torch.distributed.checkpoint as dcp  # takes a second to load

    part = part_of(folder)
    rt.on_main(lambda: shutil.rmtree(part, ignore_errors=True))
    try:
        with no_dist_warning():
            dcp.save(tensors, checkpoint_id=part, no_dist=rt.world_size == 1)
        files = file_digests(part, os.listdir(part), rt)
        rt.on_main(lambda: write_facts(part, {**facts, "files": files}))
        rt.on_main(lambda: part.replace(folder))
    except (OSError, RuntimeError, RunError, dcp.CheckpointException) as error:
        raise RunError(f"cannot save {folder}: {reason_of(error)}; free some space or give "
                       "--log_dir") from None  # fmt: skip
    finally:
        if rt.is_main:
            shutil.rmtree(part, ignore_errors=True)


def part_of(folder: Path) -> Path:
    """What a checkpoint is called until it is whole, and while it is deleted."""
    return folder.with_name(f"{folder.name}.part")


def reason_of(error: Exception) -> str:
    """The first cause of an error, in one line."""
    if failures := getattr(error, "failures", None):  # of torch.distributed.checkpoint, by rank
        error = next(iter(failures.values()))[0]
    while error.__context__ is not None:  # torch's zip writer hides why it could not write
        error = error.__context__
    lines = (getattr(error, "strerror", None) or str(error)).strip().splitlines()
    return lines[-1] if lines else type(error).__name__


def delete_checkpoint(folder: Path) -> None:
    """A kill on the way leaves nothing that looks whole."""
    shutil.rmtree(folder.replace(part_of(folder)), ignore_errors=True)


def delete_parts(folder: Path) -> None:
    """Delete what killed runs left in a folder of logs; a run that lives holds its log's lock."""
    for part in folder.glob("*_step*.part"):
        log = folder / f"{part.name.rpartition('_step')[0]}.txt"
        if not is_locked(log):
            shutil.rmtree(part, ignore_errors=True)


def is_locked(log: Path) -> bool:
    """Whether a run is writing this log."""
    try:
        with log.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except OSError:
        return True
    return False


@contextmanager
def no_dist_warning():
    """Without the warning that a single process saves or loads."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        yield


def write_facts(folder: Path, facts: dict) -> None:
    text = json.dumps({**facts, "sha256": facts_sha256(facts)}, indent=1)
    write_text(folder / "config.json", text + "\n")


def digests(sources: dict[str, str]) -> dict[str, str]:
    """The sha256 of each source, by path; sources: texts by path."""
    return {path: sha256_of(text) for path, text in sources.items()}


def facts_sha256(facts: dict) -> str:
    return sha256_of(json.dumps(facts, sort_keys=True))


def file_digests(folder: Path, names, rt) -> dict[str, str]:
    """sha256 of each file that is there; ranks share the work and all get the result."""

    def share() -> dict[str, str]:
        paths = [folder / name for name in sorted(names)[rt.rank :: rt.world_size]]
        return {path.name: file_sha256(path) for path in paths if path.is_file()}

    return {name: digest for part in rt.on_ranks(share) for name, digest in part.items()}


def read_checkpoint(folder: Path, rt) -> dict:
    """What config.json says, if every file is as it was written; else RunError."""
    try:
        if not (folder / "config.json").is_file():  # but a pipe, for one, would be waited for
            raise FileNotFoundError
        facts = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        said = facts.pop("sha256")
        # Older ones lack the first three.
        complete = {"sources": {}, "tokenizer_sha256": "", "arithmetic": {}, **facts}
        if not all(isinstance(complete[name], kind) for name, kind in FACTS.items()):
            raise ValueError
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise RunError(
            f"{folder} is not a usable checkpoint (a folder with a config.json); give one that a "
            "log names, or start without it"
        ) from None
    wrong = ["config.json"] if facts_sha256(facts) != said else []
    if not wrong:
        written = facts["files"]  # others beside them were put there by file managers
        found = file_digests(folder, written, rt)
        wrong = [name for name in sorted(written) if found.get(name) != written[name]]
    if wrong:
        raise RunError(
            f"{folder / wrong[0]} is missing, truncated or was changed after it was written; "
            "start from another checkpoint, or without one"
        )
    return complete


def check_same_run(folder: Path, saved: dict, own: dict, other_source: bool) -> None:
    """RunError unless a run that states the facts own may go on from a checkpoint with those saved.

    other_source: the user insists that it may, though the source has changed.
    """
    if saved["trainer"] != own["trainer"]:
        raise RunError(f"{folder} is a checkpoint of {saved['trainer']}, not of {own['trainer']}; "
                       "start without it")  # fmt: skip
    if not other_source:
        check_source(folder, saved, own["sources"], "the run is then no record")
    if not has_types_of(saved, own):
        raise RunError(f"{folder} holds a model, and no state of a run; start without it")
    for name, value in own["arithmetic"].items():
        if saved["arithmetic"].get(name) != value:
            raise RunError(f"{folder} was computed with {name} {saved['arithmetic'].get(name)}, "
                           f"this run has {value}; add or leave out --fp32 true, or take such a "
                           "device")  # fmt: skip
    check_same_config(folder, saved["config"], own["config"], other_source)
    numbers = [saved["tokens"], saved["train_ms"], *(x for point in saved["curve"] for x in point)]
    if not (0 <= saved["step"] <= own["config"]["num_steps"]
            and all(0 <= x < math.inf for x in numbers)):  # fmt: skip
        raise RunError(f"{folder} says step {saved['step']} after {saved['tokens']} tokens and "
                       f"{saved['train_ms']} ms, or a loss, which no run can; start from another "
                       "checkpoint, or without one")  # fmt: skip


def has_types_of(saved: dict, own: dict) -> bool:
    """Whether saved facts have the types that a run states, and a curve of pairs of numbers."""
    return all(type(saved.get(name)) is type(value) for name, value in own.items()) and all(
        isinstance(point, list) and [isinstance(x, int | float) for x in point] == [True, True]
        for point in saved["curve"]
    )


def check_source(folder: Path, saved: dict, sources: dict[str, str], price: str) -> None:
    """RunError unless a checkpoint is of these sources, sha256 by path; price: of insisting."""
    known = saved["sources"]
    if changed := [path for path, sha256 in sources.items() if known.get(path) != sha256]:
        raise RunError(f"{folder} is of another source ({', '.join(changed)} changed since); check "
                       "out the one that its log holds, or add --other_source true: "
                       f"{price}")  # fmt: skip


def check_same_config(folder: Path, saved: dict, own: dict, other_source: bool) -> None:
    """RunError, with the flags that are needed, unless two configurations are equal."""
    own = json.loads(json.dumps(own))  # tuples become lists, as in a file
    if own.keys() != saved.keys() and not other_source:
        raise RunError(f"{folder} is of another source; {ITS_SOURCE}")
    other = {k: v for k, v in saved.items() if k in own and own[k] != v}
    if other:
        flags = " ".join(f"--{name}={shlex.quote(str(as_flag(v)))}" for name, v in other.items())
        raise RunError(f"{folder} was saved by another run; to resume it, add: {flags}")


def restore(kind: type, folder: Path, facts: dict):
    """The hyperparameters, a dataclass of this kind, of the checkpoint that says facts of itself.

    RunError if its configuration lacks a field.
    """
    config, names = facts["config"], {f.name for f in dataclasses.fields(kind)}
    if missing := names - config.keys():
        raise RunError(f"{folder} is of another {Path(facts['trainer']).name}, without "
                       f"{min(missing)}; {ITS_SOURCE}")  # fmt: skip
    values = {name: config[name] for name in names}
    return kind(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})


@contextmanager
def opened(folder: Path):
    """Yield (torch.distributed.checkpoint, what it knows of each saved tensor, by name).

    Whatever torch raises about a file that it cannot read becomes one line.
    """
    import torch.distributed.checkpoint as dcp

    try:
        with no_dist_warning():
            yield dcp, dcp.FileSystemReader(folder).read_metadata().state_dict_metadata
    except RunError:
        raise
    except (Exception, dcp.CheckpointException) as error:  # pickles and archives fail in many ways
        raise RunError(f"{folder} cannot be read ({type(error).__name__}: {reason_of(error)}); "
                       "start from another checkpoint, or without one") from None  # fmt: skip


def fill(folder: Path, tensors: dict[str, Tensor]) -> None:
    """Load tensors by name, in place; each must be there, in this shape and dtype."""
    with opened(folder) as (dcp, saved):
        for name, tensor in tensors.items():
            wanted, found = f"{tuple(tensor.size())} {tensor.dtype}", "not there"
            if entry := saved.get(name):
                found = f"{tuple(entry.size)} {entry.properties.dtype}"
            if found != wanted:
                raise RunError(f"{folder} is of another source: its {name} is {found}, and "
                               f"{wanted} is needed; {ITS_SOURCE}")  # fmt: skip
        dcp.load(tensors, checkpoint_id=folder, no_dist=not dist.is_initialized())


def load(folder: Path, names: set[str]) -> dict[str, Tensor]:
    """Tensors of a checkpoint on the CPU, by name, in the shape and dtype that they were saved in.

    RunError unless all of them are there.
    """
    with opened(folder) as (dcp, saved):
        if missing := sorted(names - saved.keys()):
            raise RunError(f"{folder} is of another source: {missing[0]} is not there; "
                           f"{ITS_SOURCE}")  # fmt: skip
        tensors = {n: torch.empty(saved[n].size, dtype=saved[n].properties.dtype) for n in names}
        dcp.load(tensors, checkpoint_id=folder, no_dist=True)
    return tensors
