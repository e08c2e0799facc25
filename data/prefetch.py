"""Training batches, fetched ahead of the step that needs them."""

import queue
import threading
from collections.abc import Iterator

from torch import Tensor

from referee.ranks import Runtime
from referee.shards import ShardError


class Prefetcher:
    """Runs an iterator of tensor pairs in a thread, ahead of the step that needs them."""

    def __init__(self, pairs: Iterator, rt: Runtime, depth: int = 4):
        self.rt, self.ready = rt, queue.Queue(depth)
        threading.Thread(target=self.fill, args=(pairs,), daemon=True).start()

    def fill(self, pairs):
        try:
            for pair in pairs:
                self.ready.put([t.pin_memory() for t in pair] if self.rt.is_gpu else pair)
            raise ShardError("the data ended before the last step", "get more shards")
        except Exception as error:
            self.ready.put(error)

    def __next__(self) -> list[Tensor]:
        if isinstance(item := self.ready.get(), Exception):
            raise item
        return [t.to(self.rt.device, non_blocking=True) for t in item]
