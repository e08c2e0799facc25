"""The head's loss and the MLP: each by its definition, and on a GPU by a Triton kernel.

`head_loss` and `relu_squared_mlp`, at the end, are what the model calls, and show the definitions;
a first reading may stop there. Shapes: N tokens, V vocabulary, D model_dim, M mlp_dim, J targets a
token. Speed-ups over the definitions: not measured yet. tools/compile_kernels.py compiles every
kernel without a GPU and prints registers, spills and shared memory.
"""

from collections import namedtuple
from functools import partial
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch import Tensor

HAS_TRITON = find_spec("triton") is not None
HEAD_CHUNK_ROWS = 16384  # tokens whose logits are in memory at a time
# What 1 stands for in fp8: in x and weight (e4m3), and in the gradient of a token's loss (e5m2),
# which the 1/N of the mean would push below the least that e5m2 can hold.
FP8_UNITS = (100 / 448, 1.6 / 448, 0.75 / 448)
LARGE_TILE = dict(BLOCK_N=128, BLOCK_M=256, BLOCK_K=64, num_warps=8, num_stages=4)  # 192 KiB
SMALL_TILE = dict(BLOCK_N=128, BLOCK_M=128, BLOCK_K=32, num_warps=8, num_stages=4)
Softcap = namedtuple("Softcap", "height shift slope")  # logit z: height * sigmoid((z+shift)/slope)

if HAS_TRITON:
    import triton
    import triton.language as tl

    @triton.jit
    def squashed(logit_ptr, mask, shift, slope):
        z = tl.load(logit_ptr, mask=mask, other=0.0).to(tl.float32)
        return tl.sigmoid((z + shift) / slope)

    @triton.jit
    def softcapped_loss_kernel(
        logits_ptr, targets_ptr, weights_ptr, loss_ptr, grad_ptr, grad_T_ptr, N, V, stride,
        height, shift, slope, grad_scale, J: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
    ):  # fmt: skip
        """softcapped_loss of ROWS rows, and its gradient, which may replace the logits.

        Any float: logits (N, V), gradient (N, V) or None, both of this row stride, its transpose
        (V, N) or None. Targets (N, J) int64; weights (J,), loss (N,) fp32. Tested to 1e-5 in fp32.
        """
        # 64 bits, for row 42,690 of 50,304 logits passes the end of 32.
        rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
        weight_sum = tl.zeros((ROWS, 1), tl.float32)
        target_sum = tl.zeros((ROWS, 1), tl.float32)
        # These logits are read before any is replaced: the sum of exponentials ends in a barrier.
        for j in tl.static_range(J):
            target = tl.load(targets_ptr + rows * J + j, mask=rows < N, other=-1)
            weight = tl.where(target >= 0, tl.load(weights_ptr + j), 0.0)
            share = squashed(logits_ptr + rows * stride + target, target >= 0, shift, slope)
            weight_sum += weight
            target_sum += weight * height * share
        # Capped logits are at most height, whose exponentials fp32 can sum: no running maximum.
        exp_sums = tl.zeros((ROWS, COLS), tl.float32)
        for start in range(0, V, COLS):
            cols = start + tl.arange(0, COLS)[None, :]
            inside = (rows < N) & (cols < V)
            shares = squashed(logits_ptr + rows * stride + cols, inside, shift, slope)
            exp_sums += tl.where(inside, tl.exp(height * shares), 0.0)
        log_sum = tl.log(tl.sum(exp_sums, 1, keep_dims=True))
        tl.store(loss_ptr + rows, weight_sum * log_sum - target_sum, mask=rows < N)
        if grad_ptr is not None:
            for start in range(0, V, COLS):
                cols = start + tl.arange(0, COLS)[None, :]
                inside = (rows < N) & (cols < V)
                shares = squashed(logits_ptr + rows * stride + cols, inside, shift, slope)
                grad = weight_sum * tl.exp(height * shares - log_sum)
                for j in tl.static_range(J):
                    target = tl.load(targets_ptr + rows * J + j, mask=rows < N, other=-1)
                    grad -= tl.where(target == cols, tl.load(weights_ptr + j), 0.0)
                grad *= grad_scale * height / slope * shares * (1 - shares)
                tl.store(grad_ptr + rows * stride + cols, grad, mask=inside)
                if grad_T_ptr is not None:
                    tl.store(grad_T_ptr + cols.to(tl.int64) * N + rows, grad, mask=inside)

    @triton.jit
    def relu_squared_kernel(
        A_ptr, B_ptr, post_ptr, out_ptr, N, M, K,
        BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
    ):  # fmt: skip
        """relu(A @ B.T)**2, or where post, such a result, is given: A @ B.T * 2 sqrt(post).

        A (N, K), B (M, K), post, out (N, M) contiguous, bf16 or fp16. Tested to 1e-3 in fp16.
        """
        # Programs in a row share rows of A and walk through all of B, which the L2 cache holds.
        first_row = (tl.program_id(0) // tl.cdiv(M, BLOCK_M)).to(tl.int64) * BLOCK_N
        rows = tl.arange(0, BLOCK_N)[:, None]
        cols = tl.program_id(0) % tl.cdiv(M, BLOCK_M) * BLOCK_M + tl.arange(0, BLOCK_M)[None, :]
        total = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
        for start in range(0, K, BLOCK_K):
            k = start + tl.arange(0, BLOCK_K)
            A_mask = (rows < N - first_row) & (k < K)[None, :]
            A = tl.load(A_ptr + first_row * K + rows * K + k[None, :], mask=A_mask, other=0.0)
            B_mask = (cols < M) & (k < K)[:, None]
            B = tl.load(B_ptr + cols * K + k[:, None], mask=B_mask, other=0.0)
            total = tl.dot(A, B, total)
        inside = (rows < N - first_row) & (cols < M)
        if post_ptr is None:
            total = tl.maximum(total, 0.0)
            total *= total
        else:
            post = tl.load(post_ptr + first_row * M + rows * M + cols, mask=inside, other=0.0)
            total *= 2 * tl.sqrt(post.to(tl.float32))
        tl.store(out_ptr + first_row * M + rows * M + cols, total, mask=inside)


def linear(x: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
    """x (..., in) times weight (out, in), multiplied in dtype, in x's dtype again."""
    return F.linear(x.to(dtype), weight.to(dtype)).type_as(x)


def use_kernels(x: Tensor) -> bool:
    return HAS_TRITON and x.is_cuda


def softcapped(logits: Tensor, cap: Softcap) -> Tensor:
    return cap.height * torch.sigmoid((logits.float() + cap.shift) / cap.slope)


def softcapped_loss(logits_NV, targets_NJ, weights_J, cap: Softcap) -> Tensor:
    """Sum over j of weights_J[j] times the cross-entropy of target j, (N,) fp32: the definition.

    A target of -1 counts nothing. Several targets a token: arXiv 2404.19737.
    """
    capped_NV = softcapped(logits_NV, cap)
    capped_NJ = capped_NV.gather(1, targets_NJ.clamp(min=0))
    losses_NJ = capped_NV.logsumexp(1, keepdim=True) - capped_NJ
    return (weights_J * (targets_NJ >= 0) * losses_NJ).sum(1)


def loss_by_kernel(logits_NV, targets_NJ, weights_J, cap, grad_NV=None, grad_VN=None, scale=1.0):
    """softcapped_loss (N,), which also fills grad_NV and grad_VN with scale times its gradient.

    grad_NV may be logits_NV. The transposed one serves fp8, which is multiplied along rows only.
    """
    (N, V), J = logits_NV.shape, targets_NJ.size(1)
    loss_N = torch.empty(N, device=logits_NV.device)
    rows, cols, warps = (1, 2048, 4) if grad_VN is None else (32, 128, 8)
    softcapped_loss_kernel[(triton.cdiv(N, rows),)](
        logits_NV, targets_NJ.contiguous(), weights_J.contiguous(), loss_N, grad_NV, grad_VN,
        N, V, logits_NV.stride(0), *cap, scale, J=J, ROWS=rows, COLS=cols, num_warps=warps,
    )  # fmt: skip
    return loss_N


def product(A_NK: Tensor, B_MK: Tensor, unit: float, dtype: torch.dtype, fast=False) -> Tensor:
    """A @ B.T in dtype; of fp8 times unit, and if fast summed in fewer bits."""
    if A_NK.dtype.itemsize == 1:
        units = [torch.full((), u, device=A_NK.device) for u in (unit, 1.0)]
        return torch._scaled_mm(A_NK, B_MK.T, *units, out_dtype=dtype, use_fast_accum=fast)
    return A_NK @ B_MK.T if A_NK.dtype == dtype else torch.mm(A_NK, B_MK.T, out_dtype=dtype)


def head_loss_and_gradients(
    x_ND: Tensor, weight_VD: Tensor, targets_NJ: Tensor, weights_J: Tensor, cap: list[float],
    fp8: bool, with_grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Mean loss, and with_grad (which fp8 needs) the gradients of x and weight, by chunks of N."""
    N, dtype, number = len(x_ND), x_ND.dtype, torch.float8_e4m3fn if fp8 else x_ND.dtype
    loss = x_ND.new_zeros((), dtype=torch.float32)
    dx_ND, dW_VD = torch.empty_like(x_ND), torch.zeros_like(weight_VD)
    x_unit, W_unit, grad_unit = FP8_UNITS if fp8 else (1, 1, N)
    top = torch.finfo(number).max  # beyond it some versions of torch cast to NaN
    W_VD = (weight_VD / W_unit).clamp(-top, top).to(number)
    W_DV = W_VD.T.contiguous()
    for start in range(0, N, HEAD_CHUNK_ROWS):
        rows = slice(start, start + HEAD_CHUNK_ROWS)
        x = (x_ND[rows] / x_unit).clamp(-top, top).to(number)
        logits = product(x, W_VD, x_unit * W_unit, dtype, fast=True)
        grad_NV, grad_VN = logits if with_grad else None, None
        if fp8:
            grad_NV = torch.empty_like(logits, dtype=torch.float8_e5m2)
            grad_VN = grad_NV.new_empty(grad_NV.T.shape)
        chunk = (logits, targets_NJ[rows], weights_J, cap, grad_NV, grad_VN, 1 / grad_unit)
        loss += loss_by_kernel(*chunk).sum() / N
        if with_grad:
            grad_VN = logits.T if grad_VN is None else grad_VN
            dx_ND[rows] = product(grad_NV, W_DV, grad_unit * W_unit / N, dtype)
            dW_VD += product(grad_VN, x.T.contiguous(), grad_unit * x_unit / N, torch.float32)
    return loss, dx_ND, dW_VD


def relu_squared(A_NK: Tensor, B_MK: Tensor, post_NM: Tensor | None = None) -> Tensor:
    """relu(A @ B.T)**2, (N, M), or where post, such a result, is given: A @ B.T * 2 sqrt(post)."""
    (N, K), M, out_NM = A_NK.shape, len(B_MK), A_NK.new_empty(len(A_NK), len(B_MK))
    shared_bytes = torch.cuda.get_device_properties(A_NK.device).shared_memory_per_block_optin
    tile = LARGE_TILE if shared_bytes > 200_000 else SMALL_TILE
    programs = triton.cdiv(N, tile["BLOCK_N"]) * triton.cdiv(M, tile["BLOCK_M"])
    operands = (A_NK.contiguous(), B_MK.contiguous(), post_NM)
    relu_squared_kernel[(programs,)](*operands, out_NM, N, M, K, **tile)
    return out_NM


def mlp_and_hidden(x_ND: Tensor, up_MD: Tensor, down_MD: Tensor) -> tuple[Tensor, Tensor]:
    post_NM = relu_squared(x_ND, up_MD)
    return post_NM @ down_MD, post_NM


def keep_for_backward(ctx, inputs, output):
    """Keep what came beside the result; of the MLP, which returns two, its inputs too."""
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*output[1:], *(inputs if len(output) == 2 else ()))


def head_backward(ctx, grad_loss, *_):
    dx_ND, dW_VD = ctx.saved_tensors
    return grad_loss * dx_ND, grad_loss * dW_VD, *[None] * 5


def mlp_backward(ctx, dy_ND, _):
    post_NM, x_ND, up_MD, down_MD = ctx.saved_tensors
    dpre_NM = relu_squared_op(dy_ND, down_MD, post_NM)
    return dpre_NM @ up_MD, dpre_NM.T @ x_ND, post_NM.T @ dy_ND


# Operators that torch.compile takes as they are, by functions that give their shapes alone.
operator = partial(torch.library.custom_op, mutates_args=())
head_op = operator("photofinish::head_loss", head_loss_and_gradients)
head_op.register_fake(lambda x, W, *_: (x.new_empty((), dtype=torch.float32), x.clone(), W.clone()))
head_op.register_autograd(head_backward, setup_context=keep_for_backward)
relu_squared_op = operator("photofinish::relu_squared", relu_squared)
relu_squared_op.register_fake(lambda A, B, post=None: A.new_empty(len(A), len(B)))
mlp_op = operator("photofinish::relu_squared_mlp", mlp_and_hidden)
mlp_op.register_fake(lambda x, up, down: (x.new_empty(x.shape), x.new_empty(len(x), len(up))))
mlp_op.register_autograd(mlp_backward, setup_context=keep_for_backward)


def head_loss(x_ND, weight_VD, targets_NJ, weights_J, cap: Softcap, dtype, fp8: bool) -> Tensor:
    """Mean over N tokens of softcapped_loss of x @ weight.T, 0-D fp32, multiplied in dtype.

    weight is fp32. fp8: multiply in fp8 where gradients are wanted, on Hopper; N, V and D must
    divide by 16. On a GPU only the logits of one chunk are in memory.
    """
    x_ND = x_ND.to(dtype)
    if not use_kernels(x_ND):
        logits_NV = F.linear(x_ND, weight_VD.to(dtype))
        return softcapped_loss(logits_NV, targets_NJ, weights_J, cap).mean()
    with_grad = torch.is_grad_enabled() and (x_ND.requires_grad or weight_VD.requires_grad)
    settings = (list(cap), fp8 and with_grad, with_grad)
    return head_op(x_ND, weight_VD, targets_NJ, weights_J, *settings)[0]


def relu_squared_mlp(x_ND: Tensor, up_MD: Tensor, down_MD: Tensor, dtype) -> Tensor:
    """relu(x @ up.T)**2 @ down, (N, D), multiplied in dtype (arXiv 2109.08668)."""
    if use_kernels(x_ND) and dtype.itemsize == 2:
        return mlp_op(*(t.to(dtype) for t in (x_ND, up_MD, down_MD)))[0].type_as(x_ND)
    h_NM = F.relu(linear(x_ND, up_MD, dtype))
    return linear(h_NM * h_NM, down_MD.T, dtype)
