"""Models that lie in shards on many GPUs, and never whole on any of them (FSDP2)."""

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import fsdp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, distribute_tensor

from referee.ranks import Runtime


def shard(model: nn.Module, rt: Runtime, cpu_offload: bool) -> None:
    """Shard every parameter of a model on the meta device over the ranks (FSDP: arXiv 2304.11277).

    Each of model.blocks gathers its parameters while it runs, in the matmul's dtype. The model
    gathers the others in fp32: the gradient of a token embedding sums many terms, for which bf16 is
    too coarse. Gradients are averaged over the ranks in fp32. Training calls model.loss.
    """
    if not dist.is_initialized():  # one process, whose parameters lie in host memory
        dist.init_process_group(store=dist.HashStore(), rank=0, world_size=1)
    mesh = init_device_mesh(rt.device.type, (rt.world_size,))
    offload = fsdp.OffloadPolicy()
    if cpu_offload:
        offload = fsdp.CPUOffloadPolicy(pin_memory=rt.is_gpu)
    for module in (*model.blocks, model):
        dtype = torch.float32 if module is model else rt.matmul_dtype
        precision = fsdp.MixedPrecisionPolicy(dtype, torch.float32, cast_forward_inputs=False)
        # True for the model, too: else validation would leave its parameters gathered, and stale.
        fsdp.fully_shard(module, mesh=mesh, reshard_after_forward=True, mp_policy=precision,
                         offload_policy=offload)  # fmt: skip
    fsdp.register_fsdp_forward_method(model, "loss")


def copy_shard(parameter: DTensor, whole: Tensor) -> None:
    """Copy this rank's shard of whole, which is the same on every rank, into parameter."""
    mesh, placements = parameter.device_mesh, parameter.placements
    own = distribute_tensor(whole, mesh, placements, src_data_rank=None)
    parameter.to_local().copy_(own.to_local())
