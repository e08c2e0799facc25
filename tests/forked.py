"""Python scripts in processes that are forked from one which has already imported torch.

A start then takes 0.1 s instead of 3. This file imports nothing of the project: a forked script
imports the project's files itself, from its own folder and with its own environment. But what torch
reads from the environment when it is imported (CXX, TORCHINDUCTOR_CACHE_DIR) cannot be changed.
"""

import multiprocessing
import os
import resource
import runpy
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["torch._dynamo", "torch._inductor.exc", "tqdm", "triton",
                               "torch.distributed.checkpoint",
                               "torch.nn.attention.flex_attention"])  # fmt: skip


def clean_environment(**changes) -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    return {**kept, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **changes}


def run(words: list[str], root: Path, environment: dict, output: str, file_limit: int) -> None:
    """`python WORDS` with the modules of root; file_limit: the largest file in bytes, 0: any."""
    sys.modules.pop(__name__)  # which a log would name as a module from elsewhere
    os.environ.clear()
    os.environ.update(environment)
    for stream, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(f"{output}/{name}", os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
    if file_limit:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, file_limit))
    sys.path.insert(0, str(root))
    sys.argv = list(words)
    runpy.run_path(words[0], run_name="__main__")


class Forked:
    """`python WORDS` on so many ranks, each a forked process; used like a subprocess.Popen."""

    def __init__(self, words: list, ranks: int = 1, root=ROOT, file_limit: int = 0, **changes):
        self.args, self.output = [sys.executable, *words], tempfile.TemporaryDirectory()
        environment = clean_environment(**changes)
        if ranks > 1:  # the store that torchrun would keep
            from torch.distributed import TCPStore

            self.store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
            environment |= {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks),
                            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(self.store.port),
                            "TORCHELASTIC_USE_AGENT_STORE": "True",
                            "TORCHELASTIC_RESTART_COUNT": "0"}  # fmt: skip
        self.ranks = []
        for rank in range(ranks):
            own = {"RANK": str(rank), "LOCAL_RANK": str(rank)} if ranks > 1 else {}
            arguments = words, root, environment | own, self.output.name, file_limit
            self.ranks.append(SERVER.Process(target=run, args=arguments, daemon=True))
            self.ranks[-1].start()

    @property
    def returncode(self) -> int | None:
        """The first exit code that is not 0; None while a rank runs."""
        codes = [process.exitcode for process in self.ranks]
        return None if None in codes else next(filter(None, codes), 0)

    def poll(self) -> int | None:
        return self.returncode

    def send_signal(self, number: int) -> None:
        for process in self.ranks:
            os.kill(process.pid, number)

    def communicate(self, timeout: float = 180) -> tuple[str, str]:
        """What all ranks printed until their end, on stdout and on stderr."""
        for process in self.ranks:
            process.join(timeout)
        files = [Path(self.output.name, name) for name in ("stdout", "stderr")]
        stdout, stderr = (path.read_text(encoding="utf-8") for path in files)
        if self.returncode is None:
            raise subprocess.TimeoutExpired(self.args, timeout, stdout, stderr)
        return stdout, stderr


def run_forked(words: list, ranks: int = 1, **options) -> subprocess.CompletedProcess:
    """subprocess.run of `python WORDS`, in forked processes; options: of Forked."""
    process = Forked(words, ranks, **options)
    stdout, stderr = process.communicate()
    return subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr)
