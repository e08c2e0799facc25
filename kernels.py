"""Attention, the head's loss and the MLP: each has a definition, and on a GPU a kernel.

    attend            FlexAttention by blocks; on a CPU softmax by chunks, with the same may_attend
    head_loss         a Triton kernel by chunks; its definition is softcapped_loss
    relu_squared_mlp  a Triton kernel for up and ReLU squared; its definition is its last two lines

Who changes a definition must change its kernel and its backward pass as well; it is faster to try
an idea in plain torch, in train_gpt.py. tools/preflight.py compiles all kernels of a run without a
GPU, and names those that spill or need too much shared memory. docs/gpus.md has what was timed.

Shapes: B sequences, T tokens, N = B * T, H heads, K head_dim, V vocabulary, D model_dim, M mlp_dim,
J targets per token.
"""

from collections import namedtuple
from importlib.util import find_spec

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

HAS_TRITON = find_spec("triton") is not None
BLOCK = 128  # tokens per side of an attention block
SMALL_FLEX_BLOCKS = {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_M1": 32, "BLOCK_N1": 64,
                     "BLOCK_M2": 64, "BLOCK_N2": 32}  # fmt: skip
HEAD_CHUNK_TOKENS = 16384  # tokens whose logits are in memory at a time
# fp8 scales (value = stored value * scale) of x, of the weight (both e4m3, at most 448), and of the
# gradient of a token's loss by its logits (e5m2). The gradient is divided by N only after the
# matmul, because it would underflow before.
FP8_UNITS = (100 / 448, 1.6 / 448, 0.75 / 448)
# Two rows of 100 KB on each of 132 processors fit the L2 cache, where the second read finds them.
LOSS_TILE = dict(COLS=4096, num_warps=16)
TRANSPOSE_TILE = dict(ROWS=64, COLS=128)
TMA_TILE = dict(BLOCK_N=128, BLOCK_M=256, BLOCK_K=64, num_warps=8, num_stages=4)  # of 48 KiB
SMALL_TILE = dict(BLOCK_N=128, BLOCK_M=128, BLOCK_K=32, num_warps=8, num_stages=4)
Softcap = namedtuple("Softcap", "height shift slope")  # logit z: height * sigmoid((z+shift)/slope)

if HAS_TRITON:
    import triton
    import triton.language as tl

    INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)  # which knows no assembly

    @triton.jit
    def sigmoid(x):
        """By tanh, which a GPU has as one instruction; its error is 2**-11 of tanh's value."""
        if INTERPRETED:
            return tl.sigmoid(x)
        asm: tl.constexpr = "tanh.approx.f32 $0, $1;"
        tanh = tl.inline_asm_elementwise(asm, "=f,f", [0.5 * x], tl.float32, is_pure=True, pack=1)
        return 0.5 + 0.5 * tanh

    @triton.jit
    def squashed(logit_ptr, mask, shift, factor):
        z = tl.load(logit_ptr, mask=mask, other=0.0).to(tl.float32)
        return sigmoid((z + shift) * factor)

    @triton.jit
    def softcapped_loss_kernel(
        logits_ptr, targets_ptr, weights_ptr, loss_ptr, grad_ptr, V, stride, grad_stride,
        height, shift, slope, grad_scale, J: tl.constexpr, COLS: tl.constexpr,
    ):  # fmt: skip
        """softcapped_loss of one row, and grad_scale times its gradient, perhaps in place.

        Any float: logits and gradient (N, V) of these row strides. Targets (N, J) int64; weights
        (J,), loss (N,) fp32. Tested in fp32 to 1e-5 where the sigmoid is exact, else to 1e-3.
        """
        # 64 bits, for row 42,690 of 50,304 logits passes the end of 32.
        row = tl.program_id(0).to(tl.int64)
        logits_ptr += row * stride
        grad_ptr += row * grad_stride
        factor = 1 / slope
        weight_sum = 0.0
        target_sum = 0.0
        # These logits are read before any is replaced: the sum of exponentials ends in a barrier.
        for j in tl.static_range(J):
            target = tl.load(targets_ptr + row * J + j)
            weight = tl.where(target >= 0, tl.load(weights_ptr + j), 0.0)
            share = squashed(logits_ptr + target, target >= 0, shift, factor)
            weight_sum += weight
            target_sum += weight * height * share
        # Capped logits are at most height, whose exponentials fp32 can sum: no running maximum.
        exp_sums = tl.zeros((COLS,), tl.float32)
        for start in range(0, V, COLS):
            cols = start + tl.arange(0, COLS)
            shares = squashed(logits_ptr + cols, cols < V, shift, factor)
            exp_sums += tl.where(cols < V, tl.exp(height * shares), 0.0)
        log_sum = tl.log(tl.sum(exp_sums))
        tl.store(loss_ptr + row, weight_sum * log_sum - target_sum)
        for start in range(0, V, COLS):
            cols = start + tl.arange(0, COLS)
            shares = squashed(logits_ptr + cols, cols < V, shift, factor)
            grad = weight_sum * tl.exp(height * shares - log_sum)
            for j in tl.static_range(J):
                target = tl.load(targets_ptr + row * J + j)
                grad -= tl.where(target == cols, tl.load(weights_ptr + j), 0.0)
            grad *= grad_scale * height * factor * shares * (1 - shares)
            tl.store(grad_ptr + cols, grad, mask=cols < V)

    @triton.jit
    def transpose_kernel(in_ptr, out_ptr, N, M, ROWS: tl.constexpr, COLS: tl.constexpr):
        """out (M, N) = in (N, M).T, contiguous elements of one byte."""
        rows = tl.program_id(1) * ROWS + tl.arange(0, ROWS).to(tl.int64)
        cols = tl.program_id(0) * COLS + tl.arange(0, COLS).to(tl.int64)
        inside = (rows < N)[:, None] & (cols < M)[None, :]
        tile = tl.load(in_ptr + rows[:, None] * M + cols[None, :], mask=inside)
        turned = (cols < M)[:, None] & (rows < N)[None, :]
        tl.store(out_ptr + cols[:, None] * N + rows[None, :], tl.trans(tile), mask=turned)

    @triton.jit
    def relu_squared_kernel(
        A_ptr, B_ptr, post_ptr, out_ptr, N, M, K,
        BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
    ):  # fmt: skip
        """As in relu_squared: relu(A @ B.T)**2, or with post: A @ B.T * 2 sqrt(post).

        A (N, K), B (M, K), post, out (N, M) contiguous, bf16 or fp16. Tested to 1e-3 in fp16.
        """
        # Consecutive programs share rows of A and walk through all of B, which the L2 cache holds.
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

    @triton.jit
    def relu_squared_tma_kernel(
        A_ptr, B_ptr, post_ptr, out_ptr, N, M, K,
        BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
    ):  # fmt: skip
        """relu_squared_kernel for GPUs that copy tiles by tensor descriptors (TMA).

        Each program computes tiles in turn, and loads the next one's operands while it stores one.
        M and K divide by 8, so that rows begin at multiples of 16 bytes.
        """
        HALF: tl.constexpr = BLOCK_M // 2  # stored in halves: a whole tile would fill the memory
        A_tiles = tl.make_tensor_descriptor(A_ptr, [N, K], [K, 1], [BLOCK_N, BLOCK_K])
        B_tiles = tl.make_tensor_descriptor(B_ptr, [M, K], [K, 1], [BLOCK_M, BLOCK_K])
        out_halves = tl.make_tensor_descriptor(out_ptr, [N, M], [M, 1], [BLOCK_N, HALF])
        if post_ptr is not None:
            post_halves = tl.make_tensor_descriptor(post_ptr, [N, M], [M, 1], [BLOCK_N, HALF])
        across = tl.cdiv(M, BLOCK_M)
        tiles = tl.cdiv(N, BLOCK_N) * across
        for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=True):
            row = tile // across * BLOCK_N
            col = tile % across * BLOCK_M
            total = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
            for k in range(0, K, BLOCK_K):
                total = tl.dot(A_tiles.load([row, k]), B_tiles.load([col, k]).T, total)
            halves = tl.permute(tl.reshape(total, (BLOCK_N, 2, HALF)), (0, 2, 1)).split()
            for i in tl.static_range(2):
                half = halves[i]
                if post_ptr is None:
                    half = tl.maximum(half, 0.0)
                    half *= half
                else:
                    half *= 2 * tl.sqrt(post_halves.load([row, col + i * HALF]).to(tl.float32))
                out_halves.store([row, col + i * HALF], half.to(out_ptr.dtype.element_ty))


def linear(x: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
    """x (..., in) times weight (out, in), multiplied in dtype; the result has x's dtype."""
    return F.linear(x.to(dtype), weight.to(dtype)).type_as(x)


def use_kernels(x: Tensor) -> bool:
    return HAS_TRITON and x.is_cuda


# ------------------------------------------------------------------------------ Attention


def may_attend(q_index, k_index, q_doc, k_doc, window):
    """Whether a query sees a key: causal, in the same document, within window tokens."""
    distance = q_index - k_index
    return (distance >= 0) & (distance < window) & (q_doc == k_doc)


def mean_visible_keys(rows_BT: np.ndarray, document_start: int, window: int) -> float:
    """Mean number of keys that a query of these rows sees through a window."""
    index = np.arange(rows_BT.shape[1])
    opened = np.maximum.accumulate(np.where(rows_BT == document_start, index, 0), axis=1)
    return float((index - opened + 1).clip(max=window).mean())


@torch.library.custom_op("photofinish::block_lists", mutates_args=())
def block_lists(chosen: Tensor) -> tuple[Tensor, Tensor]:
    """(B, rows, columns) bool to counts (B, 1, rows) and column indices, chosen ones first.

    A custom operator, so that Inductor keeps the strides. Else it would set that of the heads, of
    which there is one, to 0. FlexAttention goes from row to row of a batch by that stride, and
    would read the lists of row 0 for each.
    """
    order = chosen.to(torch.int32).argsort(dim=-1, descending=True, stable=True)
    return chosen.sum(-1, dtype=torch.int32)[:, None], order.to(torch.int32)[:, None]


@block_lists.register_fake
def _(chosen):
    B, rows, columns = chosen.shape
    shapes = (B, 1, rows), (B, 1, rows, columns)
    return tuple(chosen.new_empty(shape, dtype=torch.int32) for shape in shapes)


def block_mask(docs_BT: Tensor, window: Tensor) -> BlockMask:
    """The mask of may_attend by blocks, without a (T, T) tensor.

    docs_BT counts up along a row, so a block's first and last document tell what it meets. window
    is a tensor, so that one graph serves every window. Blocks that lie inside the mask as a whole
    are listed as full, and skip may_attend.
    """
    count = docs_BT.size(1) // BLOCK
    first_doc, last_doc = docs_BT[:, ::BLOCK], docs_BT[:, BLOCK - 1 :: BLOCK]
    block = torch.arange(count, device=docs_BT.device)
    distance = (block[:, None] - block[None, :]) * BLOCK  # from a key block to a query block
    shares_document = (first_doc[:, :, None] <= last_doc[:, None, :]) & (
        last_doc[:, :, None] >= first_doc[:, None, :]
    )
    one_document = (first_doc[:, :, None] == last_doc[:, None, :]) & (
        last_doc[:, :, None] == first_doc[:, None, :]
    )
    some = shares_document & (distance >= 0) & (distance - BLOCK + 1 < window)
    full = one_document & (distance > 0) & (distance + BLOCK - 1 < window)

    def mask_mod(b, h, q, k):
        return may_attend(q, k, docs_BT[b, q], docs_BT[b, k], window)

    return BlockMask.from_kv_blocks(
        *block_lists(some & ~full), *block_lists(full), BLOCK_SIZE=BLOCK, mask_mod=mask_mod
    )


def with_chunks_before(x_BHTK: Tensor, count: int) -> Tensor:
    """(B, H, T / C, (count + 1) C, K): each chunk of C tokens behind the count chunks before it."""
    T = x_BHTK.size(2)
    C = BLOCK if T % BLOCK == 0 else T
    padded = F.pad(x_BHTK, (0, 0, count * C, 0)).unflatten(2, (count + T // C, C))
    return torch.cat([padded[:, :, i : i + T // C] for i in range(count + 1)], dim=3)


def chunk_mask(docs_BT: Tensor, window: Tensor, longest: int) -> Tensor:
    """The mask of may_attend by chunks of C queries, bool (B, 1, T / C, C, (n + 1) C).

    A window of at most `longest` reaches n chunks back; what lies further is never computed.
    """
    T = docs_BT.size(1)
    C = BLOCK if T % BLOCK == 0 else T
    n = min(-(-(longest - 1) // C), T // C - 1)
    # int32, of which twice as many fit into a vector register; 0 is no document, but padding.
    docs_BnC = 1 + docs_BT.int().unflatten(1, (T // C, C))
    docs_k = with_chunks_before(1 + docs_BT.int()[:, None, :, None], n)[:, 0, ..., 0]
    q_index = torch.arange(n * C, (n + 1) * C, dtype=torch.int32, device=docs_BT.device)[:, None]
    k_index = torch.arange((n + 1) * C, dtype=torch.int32, device=docs_BT.device)
    seen = may_attend(q_index, k_index, docs_BnC[..., None], docs_k[:, :, None], window.int())
    return seen[:, None]


def attention_mask(docs_BT: Tensor, window: Tensor, longest: int) -> BlockMask | Tensor:
    """What attend takes. window: 0-D, so that no window compiles anew; longest: its maximum."""
    if docs_BT.is_cuda:
        return block_mask(docs_BT, window)
    return chunk_mask(docs_BT, window, longest)


def flex_options(shared_memory_bytes: int) -> dict | None:
    """FlexAttention's options on a GPU with so much shared memory per thread block; 0: a CPU."""
    if 0 < shared_memory_bytes < 160_000:  # a 4090, an L40S
        return SMALL_FLEX_BLOCKS
    # An A100 has 166,912 bytes. With torch's 4 warps the backward pass spills 416 B per thread.
    return {"bwd_num_warps": 8} if 0 < shared_memory_bytes < 200_000 else None


def attend(q_BHTK: Tensor, k_BHTK: Tensor, v_BHTK: Tensor, mask, kernel_options=None) -> Tensor:
    """Softmax attention (B, H, T, K) of scaled q: FlexAttention for a BlockMask, else by chunks."""
    if isinstance(mask, BlockMask):
        return flex_attention(q_BHTK, k_BHTK, v_BHTK, block_mask=mask, scale=1.0,
                              kernel_options=kernel_options)  # fmt: skip
    n, C = mask.size(-1) // mask.size(-2) - 1, mask.size(-2)
    k, v = with_chunks_before(k_BHTK, n), with_chunks_before(v_BHTK, n)
    scores = (q_BHTK.unflatten(2, (-1, C)) @ k.mT).masked_fill(~mask, -torch.inf)
    y = scores.softmax(-1, dtype=torch.float32).type_as(v) @ v
    return y.flatten(2, 3)


# ------------------------------------------------------------------------------ Head and loss


def softcapped(logits: Tensor, cap: Softcap) -> Tensor:
    return cap.height * torch.sigmoid((logits.float() + cap.shift) / cap.slope)


def softcapped_loss(logits_NV, targets_NJ, weights_J, cap: Softcap) -> Tensor:
    """Sum over j of weights_J[j] times the cross-entropy of target j, (N,) fp32: the definition.

    A target of -1 does not count. Several targets per token: arXiv 2404.19737.
    """
    capped_NV = softcapped(logits_NV, cap)
    capped_NJ = capped_NV.gather(1, targets_NJ.clamp(min=0))
    losses_NJ = capped_NV.logsumexp(1, keepdim=True) - capped_NJ
    return (weights_J * (targets_NJ >= 0) * losses_NJ).sum(1)


def loss_by_kernel(logits_NV, targets_NJ, weights_J, cap, scale=1.0, grad_NV=None):
    """softcapped_loss (N,). scale times its gradient fills grad_NV, or replaces logits_NV."""
    (N, V), J = logits_NV.shape, targets_NJ.size(1)
    loss_N = torch.empty(N, device=logits_NV.device)
    grad_NV = logits_NV if grad_NV is None else grad_NV
    softcapped_loss_kernel[(N,)](
        logits_NV, targets_NJ.contiguous(), weights_J.contiguous(), loss_N, grad_NV, V,
        logits_NV.stride(0), grad_NV.stride(0), *cap, scale, J=J, **LOSS_TILE,
    )  # fmt: skip
    return loss_N


def transposed(x_NM: Tensor) -> Tensor:
    """x.T; of fp8 a copy, as its products need. As bytes: Triton 3.6 turned fp8 itself wrongly."""
    if x_NM.dtype.itemsize != 1:
        return x_NM.T
    (N, M), out_MN = x_NM.shape, x_NM.new_empty(x_NM.shape[::-1])
    grid = (triton.cdiv(M, TRANSPOSE_TILE["COLS"]), triton.cdiv(N, TRANSPOSE_TILE["ROWS"]))
    operands = (t.view(torch.uint8) for t in (x_NM, out_MN))
    transpose_kernel[grid](*operands, N, M, **TRANSPOSE_TILE)
    return out_MN


def matmul_NT(A_NK: Tensor, B_MK: Tensor, scale: float, dtype: torch.dtype, fast=False) -> Tensor:
    """A @ B.T in dtype; of fp8 operands alone, times scale. fast: accumulate fp8 in fewer bits."""
    if A_NK.dtype.itemsize == 1:
        scales = [torch.full((), s, device=A_NK.device) for s in (scale, 1.0)]
        return torch._scaled_mm(A_NK, B_MK.T, *scales, out_dtype=dtype, use_fast_accum=fast)
    if A_NK.dtype == dtype:
        return A_NK @ B_MK.T
    return torch.mm(A_NK, B_MK.T, out_dtype=dtype)


def as_fp8(x: Tensor, unit: float) -> Tensor:
    """x / unit in e4m3; clamped, for beyond its range some versions of torch cast to NaN."""
    top = torch.finfo(torch.float8_e4m3fn).max
    return (x.detach() / unit).clamp(-top, top).to(torch.float8_e4m3fn)


def head_loss_and_gradients(
    x_ND: Tensor, weight_VD: Tensor, scaled_x_ND: Tensor, scaled_weight_VD: Tensor,
    targets_NJ: Tensor, weights_J: Tensor, cap: list[float], units: list[float],
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(mean loss, dx, dW / units[2]), by chunks of tokens. weight is there for autograd alone.

    scaled: x and weight over units[:2], perhaps in fp8, to multiply for logits and gradients.
    """
    N, dtype, (x_unit, W_unit, grad_unit) = len(x_ND), x_ND.dtype, units
    loss, dx_ND, dW_VD = x_ND.new_zeros((), dtype=torch.float32), torch.empty_like(x_ND), None
    fp8, scaled_weight_DV = scaled_x_ND.dtype != dtype, transposed(scaled_weight_VD)

    def loss_and_gradient(rows: slice) -> Tensor:
        """Add to the loss; return its gradient by the rows' logits, (n, V), over grad_unit."""
        logits = matmul_NT(scaled_x_ND[rows], scaled_weight_VD, x_unit * W_unit, dtype, fast=True)
        grad = torch.empty_like(logits, dtype=torch.float8_e5m2) if fp8 else logits
        chunk = (logits, targets_NJ[rows], weights_J, cap, 1 / (N * grad_unit), grad)
        loss.add_(loss_by_kernel(*chunk).sum() / N)
        return grad

    def add_chunk(rows: slice) -> Tensor:
        """A function of its own, so that a chunk's gradient is freed before the next one's."""
        grad = loss_and_gradient(rows)
        dx_ND[rows] = matmul_NT(grad, scaled_weight_DV, grad_unit * W_unit, dtype)
        x_DN = transposed(scaled_x_ND[rows])
        return matmul_NT(transposed(grad), x_DN, x_unit, torch.float32)

    for start in range(0, N, HEAD_CHUNK_TOKENS):
        dW = add_chunk(slice(start, start + HEAD_CHUNK_TOKENS))
        dW_VD = dW if dW_VD is None else dW_VD.add_(dW)
    return loss, dx_ND, dW_VD


def head_setup(ctx, inputs, output):
    _, dx_ND, dW_VD = output
    ctx.mark_non_differentiable(dx_ND, dW_VD)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(dx_ND, dW_VD)
    ctx.weight_dtype, ctx.grad_unit = inputs[1].dtype, inputs[-1][2]


def head_backward(ctx, grad_loss, *_):
    dx_ND, dW_VD = ctx.saved_tensors
    dW_VD = (grad_loss * ctx.grad_unit * dW_VD).to(ctx.weight_dtype)
    return grad_loss * dx_ND, dW_VD, *[None] * 6


# torch.compile takes such operators as they are; register_fake gives their results' shapes.
head_op = torch.library.custom_op(
    "photofinish::head_loss", head_loss_and_gradients, mutates_args=()
)
head_op.register_fake(
    lambda x, W, *_: (x.new_empty((), dtype=torch.float32), x.clone(), W.float().clone())
)
head_op.register_autograd(head_backward, setup_context=head_setup)


def head_loss(x_ND, weight_VD, targets_NJ, weights_J, cap: Softcap, dtype, fp8: bool) -> Tensor:
    """Mean over N tokens of softcapped_loss of x @ weight.T, 0-D fp32, multiplied in dtype.

    fp8: in fp8, where there is a kernel and N, V and D divide by 16. On a GPU the gradients are
    computed with the loss, and only one chunk of logits is in memory.
    """
    x_ND, cast_weight_VD = x_ND.to(dtype), weight_VD.to(dtype)
    if not use_kernels(x_ND):
        logits_NV = F.linear(x_ND, cast_weight_VD)
        return softcapped_loss(logits_NV, targets_NJ, weights_J, cap).mean()
    operands, units = (x_ND.detach(), cast_weight_VD.detach()), [1.0, 1.0, 1.0]
    if fp8 and all(size % 16 == 0 for size in (*x_ND.shape, len(weight_VD))):
        operands = map(as_fp8, (x_ND, weight_VD), FP8_UNITS)
        units = [*FP8_UNITS[:2], FP8_UNITS[2] / len(x_ND)]
    return head_op(x_ND, weight_VD, *operands, targets_NJ, weights_J, list(cap), units)[0]


# ------------------------------------------------------------------------------ MLP


def relu_squared(A_NK: Tensor, B_MK: Tensor, post_NM: Tensor | None = None) -> Tensor:
    """Forward, without post: relu(A @ B.T)**2, (N, M).

    Backward: post is the forward's result; A @ B.T times the derivative there, 2 sqrt(post).
    """
    (N, K), M, out_NM = A_NK.shape, len(B_MK), A_NK.new_empty(len(A_NK), len(B_MK))
    properties = torch.cuda.get_device_properties(A_NK.device)
    arguments = (A_NK.contiguous(), B_MK.contiguous(), post_NM, out_NM, N, M, K)
    if properties.shared_memory_per_block_optin > 200_000 and M % 8 == 0 and K % 8 == 0:
        # Set per call, because each thread has an allocator of its own, as the backward pass has.
        triton.set_allocator(lambda size, *_: A_NK.new_empty(size, dtype=torch.int8))
        tile = TMA_TILE | ({} if post_NM is None else {"num_stages": 3})  # post takes memory too
        programs = min(tiles(N, M, tile), properties.multi_processor_count)
        relu_squared_tma_kernel[(programs,)](*arguments, **tile)
    else:
        relu_squared_kernel[(tiles(N, M, SMALL_TILE),)](*arguments, **SMALL_TILE)
    return out_NM


def tiles(N: int, M: int, tile: dict) -> int:
    """Number of tiles that cover (N, M)."""
    return triton.cdiv(N, tile["BLOCK_N"]) * triton.cdiv(M, tile["BLOCK_M"])


def mlp_and_hidden(x_ND: Tensor, up_MD: Tensor, down_MD: Tensor) -> tuple[Tensor, Tensor]:
    post_NM = relu_squared(x_ND, up_MD)
    return post_NM @ down_MD, post_NM


def mlp_setup(ctx, inputs, output):
    _, post_NM = output
    ctx.mark_non_differentiable(post_NM)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(post_NM, *inputs)


def mlp_backward(ctx, dy_ND, _):
    post_NM, x_ND, up_MD, down_MD = ctx.saved_tensors
    dpre_NM = relu_squared_op(dy_ND, down_MD, post_NM)
    return dpre_NM @ up_MD, dpre_NM.T @ x_ND, post_NM.T @ dy_ND


relu_squared_op = torch.library.custom_op(
    "photofinish::relu_squared", relu_squared, mutates_args=()
)
relu_squared_op.register_fake(lambda A, B, post=None: A.new_empty(len(A), len(B)))
mlp_op = torch.library.custom_op("photofinish::relu_squared_mlp", mlp_and_hidden, mutates_args=())
mlp_op.register_fake(lambda x, up, down: (x.new_empty(x.shape), x.new_empty(len(x), len(up))))
mlp_op.register_autograd(mlp_backward, setup_context=mlp_setup)


def relu_squared_mlp(x_ND: Tensor, up_MD: Tensor, down_MD: Tensor, dtype) -> Tensor:
    """relu(x @ up.T)**2 @ down, (N, D), multiplied in dtype (arXiv 2109.08668)."""
    if use_kernels(x_ND) and dtype.itemsize == 2:
        return mlp_op(*(t.to(dtype) for t in (x_ND, up_MD, down_MD)))[0].type_as(x_ND)
    h_NM = F.relu(linear(x_ND, up_MD, dtype))
    return linear(h_NM * h_NM, down_MD.T, dtype)
