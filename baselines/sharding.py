"""Models that lie in shards on many GPUs, and never whole in any one place (FSDP2)."""

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor, distribute_tensor

from referee.ranks import Runtime


def shard(model: nn.Module, rt: Runtime, cpu_offload: bool) -> None:
    """Cut every parameter of a model on the meta device over the ranks (FSDP: arXiv 2304.11277).

    The parameters of each of model.blocks are gathered while it runs, in the matmul's dtype, the
    others while the model does, in fp32: gradients of a token embedding are sums of many terms, for
    which bf16 is too coarse. All are averaged over the ranks in fp32. model.loss is the method that
    will be called.
    """
    if not dist.is_initialized():  # one GPU, whose parameters lie in host memory
        dist.init_process_group(store=dist.HashStore(), rank=0, world_size=1)
    mesh = init_device_mesh(rt.device.type, (rt.world_size,))
    offload = CPUOffloadPolicy(pin_memory=rt.is_gpu) if cpu_offload else OffloadPolicy()
    for module in (*model.blocks, model):
        dtype = torch.float32 if module is model else rt.matmul_dtype
        precision = MixedPrecisionPolicy(dtype, torch.float32, cast_forward_inputs=False)
        # True for the model, too: else validation would leave its parameters gathered, and stale.
        fully_shard(module, mesh=mesh, reshard_after_forward=True, mp_policy=precision,
                    offload_policy=offload)  # fmt: skip
    register_fsdp_forward_method(model, "loss")


@torch.no_grad()
def materialize(model: nn.Module, rt: Runtime, seed: int, cpu_offload: bool) -> None:
    """Give a model on the meta device memory, and the values that model.draw says.

    Each rank draws every parameter whole, from the same generator, and keeps its shard: the values
    are the same for any number of ranks, and one parameter at a time is whole.
    """
    model.to_empty(device="cpu" if cpu_offload else rt.device)
    generator = torch.Generator(rt.device).manual_seed(seed)
    for name, parameter in model.named_parameters():
        whole = torch.empty(parameter.shape, device=rt.device)
        model.draw(name, whole, generator)
        kept = parameter
        if isinstance(parameter, DTensor):
            mesh, placements = parameter.device_mesh, parameter.placements
            whole = distribute_tensor(whole, mesh, placements, src_data_rank=None).to_local()
            kept = parameter.to_local()
        kept.copy_(whole)
