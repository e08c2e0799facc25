"""To which account each second of a run is charged, and whose turn it is on a shared machine."""

import os
import stat
import time
from contextlib import contextmanager, suppress

import torch

from referee.flags import RunError

OTHER_ENDED = "the other run of the pair ended before its first step; see what it said"


class Turns:
    """Turns in which the two runs of a pair use the machine, never both; nothing for a lone run.

    A slowdown of the machine that lasts longer than a turn then slows both runs equally. Duet
    benchmarking (Bulej et al. 2020, doi:10.1145/3358960.3379132) runs both at once to that end;
    here they would disturb each other. A socket at stdin joins the two (tools/race.py --turns): a
    byte hands the machine over, and the end of a process leaves it to the other.
    """

    FIRST = b"1"  # race.py sends it to the run that begins; every later byte is b"."

    def __init__(self, steps: int):
        """steps: length of a turn; 0: a run on its own."""
        self.steps, self.other, self.is_first = steps, -1, False
        if not steps:
            return
        with suppress(OSError):  # of a closed stdin
            if stat.S_ISSOCK(os.fstat(0).st_mode) and "RANK" not in os.environ:
                # The bare descriptor: a socket object would be closed too early at exit. Moved off
                # 0, for children inherit 0 and would keep it open after this run.
                self.other = os.dup(0)
                with open(os.devnull, "rb") as nothing:
                    os.dup2(nothing.fileno(), 0)
                return
        raise RunError("--turn_steps needs a second run, of one process like this one; start "
                       "both: ./run.sh tools/race.py --turns 10 A B")  # fmt: skip

    def begin(self) -> None:
        """Wait until both have loaded their modules, and the second until the first is set up."""
        byte = self.wait()
        self.is_first = byte == self.FIRST
        if not (byte and self.hand_over()):
            raise RunError(OTHER_ENDED)

    def hand_over(self) -> bytes:
        """Let the other run work until it hands back; return its byte, or b"" if it has ended."""
        with suppress(ConnectionError):
            os.write(self.other, b".")
        return self.wait()

    def wait(self) -> bytes:
        with suppress(ConnectionError):
            return os.read(self.other, 1)
        return b""

    def end_at(self, step: int) -> bool:
        """Whether the machine changes hands after this step."""
        return self.steps > 0 and step % self.steps == 0


class Stopwatch:
    """Charges every second since start to one account; only `train` is a run's time.

    synchronize waits for the device, so that no work is charged to the next account.
    """

    def __init__(self, start: float, synchronize):
        self.synchronize = synchronize
        self.seconds = {"train": 0.0}
        self.carried_ms = 0.0  # train time before the checkpoint that a run was resumed from
        self.account, self.since = "startup", start
        self.cpu_seconds, self.cpu_since = 0.0, 0.0

    def switch(self, account: str) -> None:
        """Charge what follows to account."""
        self.synchronize()
        now, cpu_now = time.perf_counter(), time.process_time()
        self.seconds[self.account] = self.seconds.get(self.account, 0.0) + now - self.since
        if self.account == "train":
            self.cpu_seconds += cpu_now - self.cpu_since
        self.account, self.since, self.cpu_since = account, now, cpu_now

    @contextmanager
    def charged_to(self, account: str):
        previous = self.account
        self.switch(account)
        yield
        self.switch(previous)

    def train_ms(self) -> float:
        """Train milliseconds until now, without waiting for the device."""
        running = time.perf_counter() - self.since if self.account == "train" else 0.0
        return self.carried_ms + 1000 * (self.seconds["train"] + running)

    def cpu_share(self) -> float:
        """CPU time over wall time x threads while training: on a CPU, 1 on a quiet machine."""
        return self.cpu_seconds / max(self.seconds["train"] * torch.get_num_threads(), 1e-9)

    def ledger(self) -> str:
        """Seconds by account; all but train are untimed, and the sum is the wall time."""
        self.switch(self.account)
        accounts = " ".join(f"{name}:{seconds:.3f}s" for name, seconds in self.seconds.items())
        return f"ledger: {accounts} total:{sum(self.seconds.values()):.3f}s"
