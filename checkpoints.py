"""Checkpoints: folders that are written completely or not at all, and verified before loading.

A folder holds what torch.distributed.checkpoint wrote, one file or more per rank, and config.json,
which says what they are: step, configuration, data, the sha256 of every other file and of its own
contents. It is written under another name and then renamed. It loads at any number of ranks, which
must see one file system.
"""

import dataclasses
import hashlib
import json
import shutil
import warnings
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor

from data.shards import file_sha256
from flags import RunError


def write_checkpoint(folder: Path, tensors: dict[str, Tensor], facts: dict, rt) -> None:
    """Write tensors and facts, both by name. Every rank calls it."""
    part = folder.with_name(folder.name + ".part")
    rt.on_main(lambda: shutil.rmtree(part, ignore_errors=True))
    try:
        with no_dist_warning():
            dcp.save(tensors, checkpoint_id=part, no_dist=rt.world_size == 1)
        files = file_digests(part, rt)
        rt.on_main(lambda: write_facts(part, {**facts, "files": files}))
        rt.on_main(lambda: part.replace(folder))
    except (OSError, dcp.CheckpointException) as error:
        shutil.rmtree(part, ignore_errors=True)
        reason = str(error).strip().splitlines()[-1]
        raise RunError(
            f"cannot save {folder}: {reason}; free some space or give --log_dir", rt.is_main
        ) from None


@contextmanager
def no_dist_warning():
    """Without the warning that a single process saves or loads."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        yield


def write_facts(folder: Path, facts: dict) -> None:
    text = json.dumps({**facts, "sha256": facts_sha256(facts)}, indent=1)
    (folder / "config.json").write_text(text + "\n")


def facts_sha256(facts: dict) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def file_digests(folder: Path, rt) -> dict[str, str]:
    """sha256 of each file but config.json, by name; ranks share the work and all get the result."""
    names = sorted(p.name for p in folder.iterdir() if p.name != "config.json")
    mine = {name: file_sha256(folder / name) for name in names[rt.rank :: rt.world_size]}
    parts = [mine] * rt.world_size
    if rt.world_size > 1:
        dist.all_gather_object(parts, mine)
    return {name: digest for part in parts for name, digest in part.items()}


def read_checkpoint(folder: Path, rt) -> dict:
    """What config.json says, if every file is as it was written; else RunError."""
    try:
        facts = json.loads((folder / "config.json").read_text())
        said, written = facts.pop("sha256"), facts["files"]
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        raise RunError(
            f"{folder} is not a usable checkpoint (a folder with a config.json); give one that a "
            "log names, or start without it",
            rt.is_main,
        ) from None
    wrong = ["config.json"] if facts_sha256(facts) != said else []
    if not wrong:
        found = file_digests(folder, rt)
        wrong = [n for n in sorted(found | written) if found.get(n) != written.get(n)]
    if wrong:
        raise RunError(
            f"{folder / wrong[0]} is missing, truncated or was changed after it was written; "
            "start from another checkpoint, or without one",
            rt.is_main,
        )
    return facts


def restore(kind: type, folder: Path, facts: dict):
    """The hyperparameters, a dataclass of this kind, of the checkpoint that says facts of itself.

    RunError if its configuration lacks a field.
    """
    config, names = facts["config"], {f.name for f in dataclasses.fields(kind)}
    if missing := names - config.keys():
        raise RunError(f"{folder} is of another {Path(facts['trainer']).name}, without "
                       f"{min(missing)}; check out the source that its log holds")  # fmt: skip
    values = {name: config[name] for name in names}
    return kind(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})


def fill(folder: Path, tensors: dict[str, Tensor]) -> None:
    """Load tensors by name, in place; each must be there, in this shape and dtype."""
    saved = dcp.FileSystemReader(folder).read_metadata().state_dict_metadata
    for name, tensor in tensors.items():
        wanted = f"{tuple(tensor.size())} {tensor.dtype}"
        entry, found = saved.get(name), "not there"
        if entry is not None:
            found = f"{tuple(entry.size)} {entry.properties.dtype}"
        if found != wanted:
            raise RunError(
                f"{folder} is of another source: its {name} is {found}, and {wanted} is needed; "
                "check out the source that its log holds"
            )
    with no_dist_warning():
        dcp.load(tensors, checkpoint_id=folder, no_dist=not dist.is_initialized())


def load(folder: Path, names: set[str]) -> dict[str, Tensor]:
    """Tensors of a checkpoint on the CPU, by name, in the shape and dtype that they were saved in.

    RunError unless all of them are there.
    """
    saved = dcp.FileSystemReader(folder).read_metadata().state_dict_metadata
    if missing := sorted(names - saved.keys()):
        raise RunError(f"{folder} is of another source: {missing[0]} is not there; check out the "
                       "source that its log holds")  # fmt: skip
    tensors = {n: torch.empty(saved[n].size, dtype=saved[n].properties.dtype) for n in names}
    with no_dist_warning():
        dcp.load(tensors, checkpoint_id=folder, no_dist=True)
    return tensors
