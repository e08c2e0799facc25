"""The validation loss, from logits that a trainer yields."""

from functools import partial

import numpy as np
import torch
import torch.nn.functional as F

from referee.flags import RunError
from referee.ranks import Runtime
from referee.task import Task, validation_rows


class Validation:
    """This rank's share of a task's validation rows, and the mean loss over all of them."""

    logits_type = torch.Tensor  # itself, for another class could answer for its own loss

    def __init__(self, task: Task, rt: Runtime):
        """ShardError as in validation_rows."""
        self.task, self.rt = task, rt
        mine = validation_rows(task, rt.world_size)[rt.rank :: rt.world_size]
        self.rows = torch.from_numpy(mine.astype(np.int64))  # (rows, val_seq_len + 1)

    @torch.no_grad()
    def loss(self, predict, batch_rows: int) -> float:
        """Mean cross-entropy over the rows of all ranks, nats per token.

        predict(inputs (batch_rows, T) int64, on the device) yields logits (n, V) for the positions
        of inputs.flatten() in order, any n per chunk; only one chunk need be in memory at a time.
        """
        total = torch.zeros((), device=self.rt.device, dtype=torch.float64)
        for batch in self.rows.split(batch_rows):
            # Copies, so that strides do not depend on the number of rows: they would recompile.
            kept = partial(torch.clone, memory_format=torch.contiguous_format)
            inputs_BT, targets_BT = kept(batch[:, :-1]), kept(batch[:, 1:])
            targets_N, done = targets_BT.flatten().to(self.rt.device), 0
            for logits_NV in predict(inputs_BT.to(self.rt.device)):
                if type(logits_NV) is not self.logits_type:
                    raise RunError(f"logits are of {type(logits_NV).__name__}, not of Tensor "
                                   "itself; mend what the trainer yields")  # fmt: skip
                modes = torch._C._len_torch_function_stack() + torch._C._len_torch_dispatch_stack()
                if modes and self.logits_type is torch.Tensor:  # a dry run has its own
                    raise RunError("a mode of torch is on, which could see the targets; leave it "
                                   "before logits are yielded")  # fmt: skip
                logits_NV = torch.Tensor.detach(logits_NV)  # without methods of its own
                end = done + len(logits_NV)
                if end > len(targets_N) or logits_NV.size(1) < self.task.vocab_size:
                    raise RunError(f"logits {tuple(logits_NV.shape)} at position {done} do not fit "
                                   f"{len(targets_N)} positions and {self.task.vocab_size} tokens; "
                                   "fix what the trainer yields")  # fmt: skip
                losses_N = F.cross_entropy(logits_NV.float(), targets_N[done:end], reduction="none")
                total += losses_N.double().sum()
                done = end
            if done < len(targets_N):
                raise RunError(f"logits of {done} of {len(targets_N)} positions were yielded; mend "
                               "what the trainer yields in validation")  # fmt: skip
        self.rt.average([total])
        return total.item() / (len(self.rows) * self.task.val_seq_len)
