#!/usr/bin/env python3
"""Convert a checkpoint of train_gpt2.py to a GPT2LMHeadModel of transformers, or back.

    ./run.sh baselines/export_hf.py CHECKPOINT OUT             OUT: config.json, model.safetensors
    ./run.sh baselines/export_hf.py --import HF_FOLDER CHECKPOINT

An imported checkpoint has weights and no optimizer state: sample or evaluate it.
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)  # the project's root
    from referee.start import finish

import argparse
import json
from dataclasses import asdict, replace

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from baselines.train_gpt2 import GPT2, TRACKS, Hyperparameters, load_gpt2, weights
from referee.checkpoints import check_source, read_checkpoint, write_checkpoint
from referee.environment import ROOT
from referee.files import whole
from referee.flags import RunError, boolean
from referee.ranks import Runtime
from referee.sources import read_source, sha256_of
from referee.task import TASKS

TRAINER = "baselines/train_gpt2.py"
NETWORK = {TRAINER: sha256_of(read_source(ROOT / TRAINER))}
THEIRS = {  # their names by ours
    "embed": "wte.weight", "positions": "wpe.weight", "blocks": "h", "norm": "ln_f",
    "norm1": "ln_1", "qkv": "attn.c_attn", "out": "attn.c_proj",
    "norm2": "ln_2", "up": "mlp.c_fc", "down": "mlp.c_proj",
}  # fmt: skip
SIZES = {  # our names by theirs
    "vocab_size": "embed_rows", "n_positions": "seq_len", "n_embd": "model_dim",
    "n_layer": "num_layers", "n_head": "num_heads", "n_inner": "mlp_dim",
}  # fmt: skip
PUBLISHED = {  # GPT-2's settings; a model with others is not GPT-2
    "model_type": "gpt2",
    "activation_function": "gelu_new",
    "layer_norm_epsilon": 1e-5,
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "tie_word_embeddings": True,
    "add_cross_attention": False,
}


def their_name(name: str) -> str:
    """model.blocks.3.qkv.weight is their h.3.attn.c_attn.weight."""
    words = name.removeprefix("model.").split(".")
    return ".".join(THEIRS.get(word, word) for word in words)


def transposed(name: str, tensor: Tensor) -> Tensor:
    """A tensor in the other's layout: they store a block's matrices as (in, out), we (out, in)."""
    return tensor.T.contiguous() if "blocks" in name and tensor.ndim == 2 else tensor


def export(source: Path, out: Path, other_source: bool = False) -> None:
    """Write the checkpoint at source to the folder out, its configuration last."""
    facts = read_checkpoint(source, Runtime())
    if not other_source:
        check_source(source, facts, NETWORK, "other code then reads the model")
    model, document_start = load_gpt2(source, facts), facts["config"]["document_start"]
    files = out / "config.json", out / "model.safetensors"
    if any(path.exists() for path in files):
        raise RunError(f"{out} holds a model already; name a new folder")
    tensors = {f"transformer.{their_name(n)}": transposed(n, t) for n, t in weights(model).items()}
    config = {
        "architectures": ["GPT2LMHeadModel"],
        **PUBLISHED,
        **{theirs: getattr(model.hp, ours) for theirs, ours in SIZES.items()},
        "bos_token_id": document_start,
        "eos_token_id": document_start,
        **{f"{place}_pdrop": 0.0 for place in ("attn", "embd", "resid")},
        "dtype": "float32",
    }
    out.mkdir(parents=True, exist_ok=True)
    with whole(files[0]) as config_part, whole(files[1]) as part:
        config_part.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        try:
            save_file(tensors, part, {"format": "pt"})
        except SafetensorError as error:
            raise OSError(error) from None


def read_config(folder: Path) -> tuple[Hyperparameters, int]:
    """(hyperparameters, document start): the model's shape, else those of the track 124M."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        config["n_inner"] = config.get("n_inner") or 4 * config["n_embd"]
        shape = {ours: int(config[theirs]) for theirs, ours in SIZES.items()}
        start = config.get("bos_token_id")
        start = TASKS["fineweb"].document_start if start is None else int(start)
    except (OSError, ValueError, TypeError, KeyError):
        raise RunError(f"{folder} has no config.json of a GPT-2 model; give a folder that "
                       "GPT2LMHeadModel.save_pretrained wrote") from None  # fmt: skip
    for key, value in PUBLISHED.items():
        if (found := config.get(key, value)) != value:
            raise RunError(f"{folder} is no GPT-2 as published: its {key} is {found!r}, not "
                           f"{value!r}; import another model")  # fmt: skip
    return replace(TRACKS["124M"], **shape, batch_tokens=512 * shape["seq_len"]), start


def read_tensors(folder: Path, hp: Hyperparameters) -> dict[str, Tensor]:
    """Our tensors by name, fp32, from model.safetensors; its names may lack their prefix."""
    path = folder / "model.safetensors"
    try:
        found = {name.removeprefix("transformer."): t for name, t in load_file(path).items()}
    except (OSError, SafetensorError) as error:
        raise RunError(f"{path} cannot be read ({error}); copy the model again, as one "
                       "file model.safetensors") from None  # fmt: skip
    with torch.device("meta"):
        tensors = weights(GPT2(hp))
    for name, expected in tensors.items():
        theirs, shape = their_name(name), "not there"
        if theirs in found:
            tensors[name] = transposed(name, found[theirs].float())
            shape = list(tensors[name].shape)
        if shape != list(expected.shape):
            raise RunError(f"{path} does not fit its config.json: {theirs} is {shape}, not "
                           f"{list(expected.shape)}; copy the model again")  # fmt: skip
    return tensors


def import_hf(source: Path, out: Path) -> None:
    """Write the model that transformers saved in the folder source as a checkpoint of step 0."""
    hp, document_start = read_config(source)
    tensors = read_tensors(source, hp)
    if out.exists():
        raise RunError(f"{out} is there already; name a new folder")
    config = {**asdict(hp), "document_start": document_start}
    facts = {"trainer": TRAINER, "sources": NETWORK, "step": 0,
             "data_sha256": "", "config": config}  # fmt: skip
    write_checkpoint(out, tensors, facts, Runtime())


def main() -> None:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    add = parser.add_argument
    add("source", type=Path, metavar="SOURCE", help="folder to read")
    add("out", type=Path, metavar="OUT", help="folder to write")
    add("--import", dest="importing", action="store_true", help="from transformers to a checkpoint")
    add("--other_source", type=boolean, default=False, metavar="true|false",
        help="export it even if its source has changed since (default: false)")  # fmt: skip
    args = parser.parse_args()
    if args.importing:
        import_hf(args.source, args.out)
    else:
        export(args.source, args.out, args.other_source)
    print(args.out)


if __name__ == "__main__":
    finish(main, interrupted="interrupted")
