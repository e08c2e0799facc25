"""Checkpoints as folders: sharded tensors, and a config.json that says what they are.

A folder holds what torch.distributed.checkpoint wrote, a file or more for each rank, and
config.json: the trainer, its configuration, how far it came, the sha256 of every other file and,
last, of this text itself. Ranks must see one file system. It loads at any number of ranks.
"""

import hashlib
import json
import shutil
import warnings
from contextlib import contextmanager
from pathlib import Path

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor

from data.shards import file_sha256
from records.harness import RunError, Runtime

TRAINER = "train_gpt2"


class Folders:
    """The format of a Run's checkpoints; each save ends with the folder before it deleted."""

    def save(self, rt: Runtime, log_path: Path, tensors: dict[str, Tensor], facts: dict) -> Path:
        """Write tensors and facts, both by name, beside the log; return where."""
        folder = log_path.with_name(f"{log_path.stem}_step{facts['step']:07}")
        write_folder(folder, tensors, facts, rt)
        earlier = [f for f in log_path.parent.glob(f"{log_path.stem}_step*") if f != folder]
        rt.on_main(lambda: [shutil.rmtree(f, ignore_errors=True) for f in earlier])
        return folder

    def open(self, rt: Runtime, path: str):
        """Return (facts, function that fills tensors by name); RunError for anything else."""
        folder = Path(path)
        facts = verified_facts(folder, rt.rank, rt.world_size)
        return facts, lambda tensors: fill(folder, tensors)


def write_folder(folder: Path, tensors: dict[str, Tensor], facts: dict, rt: Runtime) -> None:
    """Write a folder under another name, then rename it. Every rank calls it."""
    part = folder.with_name(folder.name + ".part")
    rt.on_main(lambda: shutil.rmtree(part, ignore_errors=True))
    try:
        with no_warnings():
            dcp.save(tensors, checkpoint_id=part, no_dist=rt.world_size == 1)
        files = file_digests(part, rt.rank, rt.world_size)
        rt.on_main(lambda: write_config(part, {"trainer": TRAINER, **facts, "files": files}))
        rt.on_main(lambda: part.replace(folder))
    except (OSError, dcp.CheckpointException) as error:
        shutil.rmtree(part, ignore_errors=True)
        reason = str(error).strip().splitlines()[-1]
        raise RunError(f"cannot save {folder}: {reason}; free some space or give --log_dir",
                       rt.is_main) from None  # fmt: skip


@contextmanager
def no_warnings():
    """Without the one that says that there is a single process."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        yield


def write_config(folder: Path, config: dict) -> None:
    text = json.dumps({**config, "sha256": digest(config)}, indent=1)
    (folder / "config.json").write_text(text + "\n")


def digest(config: dict) -> str:
    return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()


def file_digests(folder: Path, rank: int, ranks: int) -> dict[str, str]:
    """sha256 of each file but config.json, by name; ranks share the work and all get the result."""
    names = sorted(p.name for p in folder.iterdir() if p.name != "config.json")
    mine = {name: file_sha256(folder / name) for name in names[rank::ranks]}
    parts = [mine] * ranks
    if ranks > 1:
        dist.all_gather_object(parts, mine)
    return {name: found for part in parts for name, found in part.items()}


def verified_facts(folder: Path, rank: int = 0, ranks: int = 1) -> dict:
    """What config.json says, if every file is as it was written; else RunError."""
    path, advice = folder / "config.json", "start from another checkpoint"
    try:
        facts = json.loads(path.read_text())
        trainer, said = facts["trainer"], facts.pop("sha256")
    except (OSError, ValueError, TypeError, KeyError):
        raise RunError(
            f"{folder} is no checkpoint of train_gpt2.py, which is a folder with a config.json; "
            "give one that its log names, or make one: python baselines/export_hf.py --import",
            rank == 0,
        ) from None
    if trainer != TRAINER:
        raise RunError(f"{folder} is a checkpoint of {trainer}, not of {TRAINER}; {advice}",
                       rank == 0)  # fmt: skip
    wrong = ["config.json"] if digest(facts) != said else []
    if not wrong:
        found, written = file_digests(folder, rank, ranks), facts["files"]
        wrong = [n for n in sorted(found | written) if found.get(n) != written.get(n)]
    if wrong:
        what = f"{folder / wrong[0]} is missing, truncated or was changed after it was written"
        raise RunError(f"{what}; {advice}", rank == 0)
    return facts


def fill(folder: Path, tensors: dict[str, Tensor]) -> None:
    """Load tensors by name, in place; sharded ones get their shard."""
    try:
        with no_warnings():
            dcp.load(tensors, checkpoint_id=folder, no_dist=not dist.is_initialized())
    except dcp.CheckpointException as error:
        reason = str(error).strip().splitlines()[-1]
        raise RunError(
            f"{folder} does not hold what is needed ({reason}); one made by export_hf.py has "
            "weights alone: sample or evaluate it"
        ) from None
