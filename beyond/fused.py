"""Fewer launches on a GPU: a block in eight of them.

On a GPU a decode step is a row of kernels, one after the other, and each of them takes a few
microseconds to begin and to end, in which the memory is idle. The seven linears of a block read
only four inputs, and what lies between them is small. So a block is

    norm                         one launch
    q_proj, k_proj, v_proj       one: the products of one input
    rotate q and k, append       one, to the cache
    attention                    one, PyTorch's
    o_proj                       one, and the residual sum where the partial sums are added
    norm                         one
    gate_proj, up_proj           one, and silu(gate) * up where the partial sums are added
    down_proj                    one, and the residual sum

The products are those of kernel.py, for up to three linears side by side: the first tiles belong to
the first linear, the next ones to the second. Each has its own threshold.

    tiles of outputs    │ q  q  q  q │ k  k │ v  v │         tile 5 is the second one of k
    splits of channels  │ q  q  q  q │ k  k │ v  v │

Their weights may also be codes of 8 or 4 bits, as codes.py packs them. The matrix units would want
these in another order, so they are multiplied one by one, in float32. To make a code a number costs
two operations: a shift, and the bits of an exponent around it, for which it reads 128 + code.

The seam: `Block.forward`. `fuse(model)` gives the blocks of a model another one, which takes and
returns what theirs does. It is a second copy of what model.py and sparsify.py do: where their code
has changed, fused.py says so and steps aside. A block with a module or method of a reader's, or
with a hook, as several processes have them (parallel.py), runs as model.py has it; so do calls that
are not sparse, or of many rows.

    python -m beyond.fused       prints the fingerprints of the code that is replaced
"""
import ast
import hashlib
import inspect
import pkgutil
import textwrap

import torch

import kernel
from beyond.codes import QuantizedLinear, QuantizedWeight
from generate import StaticCache
from kernel import triton
from model import MLP, Attention, Block, RMSNorm, note
from sparsify import SparseLinear

AHEAD = False            # programmatic dependent launch (sm_90 and later); no card has timed it yet

if triton is not None:
    import triton.language as tl
    from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

    from kernel import add_parts, add_rows, is_last, list_kept

    @triton.jit
    def begin(AHEAD: tl.constexpr):
        """Wait for the launch before this one, under whose end this one may begin, to be over."""
        if AHEAD:
            gdc_wait()
            gdc_launch_dependents()

    @triton.jit
    def one_of(tile, tiles0, tiles1, first, second, third):
        """Return what belongs to the linear of a tile."""
        return tl.where(tile < tiles0, first, tl.where(tile < tiles0 + tiles1, second, third))

    @triton.jit
    def add_codes(codes_ptr, scale_ptr, zero_ptr, channel_ptr, input_ptr, count, tile, group,
                  outputs, ROWS: tl.constexpr, SPAN: tl.constexpr, WORDS: tl.constexpr,
                  BITS: tl.constexpr):
        """Return the outputs (BLOCK_OUT,) of a tile of WORDS words, and sums (ROWS, BLOCK_OUT).

        The sums are of input, float32, times weight over `count` listed channels, of one group.

        The zero point and the scale are applied to a sum:
            sum of x * scale * (code - zero) = scale * (sum of x * code - zero * sum of x)
        """
        LANES: tl.constexpr = 32 // BITS                   # codes of a word
        BLOCK_IN: tl.constexpr = 16 if ROWS <= 2 else 8    # channels of a turn
        word = tile * WORDS + tl.arange(0, WORDS)
        words_of_channel = tl.cdiv(outputs, 16 * LANES) * 16
        row = tl.arange(0, ROWS)
        sums = tl.zeros((BLOCK_IN, WORDS, LANES, ROWS), tl.float32)
        total = tl.zeros((BLOCK_IN, ROWS), tl.float32)
        for start in tl.range(0, count, BLOCK_IN, num_stages=4):
            index = start + tl.arange(0, BLOCK_IN)
            channel = tl.load(channel_ptr + index)                              # (BLOCK_IN,)
            x = tl.load(input_ptr + row[None, :] * SPAN + index[:, None])       # (BLOCK_IN, ROWS)
            words = tl.load(codes_ptr + channel.to(tl.int64)[:, None] * words_of_channel + word,
                            mask=(channel >= 0)[:, None] & (word < words_of_channel), other=0)
            # Each code comes to the upper bits of a mantissa. A thread has all codes of its words:
            # `join` puts two tensors side by side in registers.
            if BITS == 4:
                bits = tl.join(words << 16, words)
                bits = tl.join(bits, bits >> 8)
                bits = tl.join(bits, bits >> 4) & 0xF0000 | 0x43000000          # 128 + code
            else:
                bits = tl.join(words << 15, words >> 1)
                bits = tl.join(bits, bits >> 8) & 0x7F8000 | 0x43800000         # 256 + code
            for i in tl.static_range(3):
                if ROWS >> i > 1:
                    bits = tl.join(bits, bits)
            number = tl.reshape(bits.to(tl.float32, bitcast=True), (BLOCK_IN, WORDS, LANES, ROWS))
            sums += x[:, None, None, :] * number
            total += x
        sums = tl.sum(tl.reshape(sums, (BLOCK_IN, WORDS * LANES * ROWS)), axis=0)
        sums = tl.reshape(sums, (WORDS * LANES, ROWS)).trans()                  # (ROWS, BLOCK_OUT)
        # Sixteen words hold LANES runs of sixteen outputs.
        output = (word // 16 * 16 * LANES + word % 16)[:, None] + 16 * tl.arange(0, LANES)
        output = tl.reshape(output, (WORDS * LANES,))
        real = output < outputs
        if BITS == 8:
            scale = tl.load(scale_ptr + output, mask=real, other=0.0)
            zero = tl.full((WORDS * LANES,), 256 + 128, tl.float32)
        else:
            place = group * outputs + output
            scale = tl.load(scale_ptr + place, mask=real, other=0.0).to(tl.float32)
            zero = 128 + tl.load(zero_ptr + place, mask=real, other=0).to(tl.float32)
        return output, scale * (sums - zero * tl.sum(total, axis=0)[:, None])

    @triton.jit
    def joint_product_kernel(x_ptr, residual_ptr, weight0_ptr, weight1_ptr, weight2_ptr,
                             scale0_ptr, scale1_ptr, scale2_ptr, zero0_ptr, zero1_ptr, zero2_ptr,
                             threshold0_ptr, threshold1_ptr, threshold2_ptr, channel_ptr, input_ptr,
                             partial_ptr, ticket_ptr, y_ptr, rows, channels, outputs0, outputs1,
                             outputs2, per_split, STEP: tl.constexpr, ROWS: tl.constexpr,
                             SPAN: tl.constexpr, BLOCK_OUT: tl.constexpr, BITS: tl.constexpr,
                             GATED: tl.constexpr, RESIDUAL: tl.constexpr, AHEAD: tl.constexpr):
        """y[row, j] = sum over channels of kept x[row, i] * weight[i, j], for linears side by side.

        grid (tiles of all linears, splits of per_split channels). y (rows, outputs0 + outputs1 +
        outputs2); GATED: (rows, outputs0), silu(first) * second. RESIDUAL: residual, like y, is
        added. x, thresholds, and what each program writes: as in kernel.sparse_product_kernel;
        partial float32 (splits, rows, outputs of all). BITS 0: weight_l (channels, outputs_l),
        scale_l and zero_l not read. BITS 8 or 4: they are the codes, scales and zeros of a
        QuantizedWeight; for 4 a split is a group.
        """
        tile = tl.program_id(0)
        split = tl.program_id(1)
        splits = tl.num_programs(1)
        tiles0 = tl.cdiv(outputs0, BLOCK_OUT)
        tiles1 = tl.cdiv(outputs1, BLOCK_OUT)
        outputs = one_of(tile, tiles0, tiles1, outputs0, outputs1, outputs2)
        first_output = one_of(tile, tiles0, tiles1, 0, outputs0, outputs0 + outputs1)
        first_tile = one_of(tile, tiles0, tiles1, 0, tiles0, tiles0 + tiles1)
        weight_ptr = one_of(tile, tiles0, tiles1, weight0_ptr, weight1_ptr, weight2_ptr)
        scale_ptr = one_of(tile, tiles0, tiles1, scale0_ptr, scale1_ptr, scale2_ptr)
        zero_ptr = one_of(tile, tiles0, tiles1, zero0_ptr, zero1_ptr, zero2_ptr)
        threshold_ptr = one_of(tile, tiles0, tiles1, threshold0_ptr, threshold1_ptr, threshold2_ptr)
        tile -= first_tile
        begin(AHEAD)
        channel_ptr, input_ptr, count = list_kept(x_ptr, threshold_ptr, channel_ptr, input_ptr,
                                                  rows, channels, per_split, STEP, ROWS, SPAN)
        row = tl.arange(0, ROWS)[:, None]
        if BITS == 0:
            output = tile * BLOCK_OUT + tl.arange(0, BLOCK_OUT)                 # (BLOCK_OUT,)
            padded = tl.arange(0, 16)[:, None]
            sums = add_rows(weight_ptr, channel_ptr, input_ptr, count, output, outputs, ROWS, SPAN,
                            BLOCK_OUT)                                          # (16, BLOCK_OUT)
        else:
            padded = row
            output, sums = add_codes(weight_ptr, scale_ptr, zero_ptr, channel_ptr, input_ptr, count,
                                     tile, split, outputs, ROWS, SPAN, BLOCK_OUT * BITS // 32,
                                     BITS)
        width = outputs0 + outputs1 + outputs2
        tl.store(partial_ptr + (split * rows + padded) * width + first_output + output[None, :],
                 sums, mask=(padded < rows) & (output < outputs)[None, :])
        # Gate and up have the same outputs: the last of both adds up both.
        number = tile if GATED else tile + first_tile
        if is_last(ticket_ptr + number, 2 * splits if GATED else splits):
            real = (row < rows) & (output < outputs)[None, :]                   # (ROWS, BLOCK_OUT)
            place = row * width + output[None, :]
            if GATED:
                gate = add_parts(partial_ptr, place, real, splits, rows * width, ROWS, BLOCK_OUT)
                up = add_parts(partial_ptr, place + outputs0, real, splits, rows * width, ROWS,
                               BLOCK_OUT)
                y = gate / (1.0 + tl.exp(-gate)) * up
                place = row * outputs + output[None, :]
            else:
                place += first_output
                y = add_parts(partial_ptr, place, real, splits, rows * width, ROWS, BLOCK_OUT)
            if RESIDUAL:                 # rounded before, as the model's is
                y = y.to(y_ptr.dtype.element_ty).to(tl.float32)
                y += tl.load(residual_ptr + place, mask=real, other=0.0).to(tl.float32)
            tl.store(y_ptr + place, y.to(y_ptr.dtype.element_ty), mask=real)

    @triton.jit
    def rotate_kernel(qkv_ptr, cos_ptr, sin_ptr, slot_ptr, query_ptr, key_ptr, value_ptr, tokens,
                      queries, groups, length, D: tl.constexpr, BLOCK: tl.constexpr,
                      AHEAD: tl.constexpr):
        """Turn q and k by their positions, and write k and v to a cache.

        grid (B * tokens, queries + 2 * groups heads): a program has a head of D channels, in BLOCK,
        the next power of 2. qkv (B, tokens, heads, D); cos, sin (tokens, D); slot int64 (tokens,)
        query (B, queries, tokens, D); key and value (B, groups, length, D).
        """
        text = tl.program_id(0) // tokens
        token = tl.program_id(0) % tokens
        head = tl.program_id(1)
        channel = tl.arange(0, BLOCK)
        exists = channel < D
        qkv_ptr += (tl.program_id(0) * tl.num_programs(1) + head) * D
        begin(AHEAD)
        x = tl.load(qkv_ptr + channel, mask=exists, other=0.0).to(tl.float32)
        slot = tl.load(slot_ptr + token)
        if head < queries + groups:
            other = tl.load(qkv_ptr + (channel + D // 2) % D, mask=exists, other=0.0)  # of the pair
            cos = tl.load(cos_ptr + token * D + channel, mask=exists, other=0.0)
            sin = tl.load(sin_ptr + token * D + channel, mask=exists, other=0.0)
            x = x * cos.to(tl.float32) + other.to(tl.float32) * sin.to(tl.float32)
        if head < queries:
            query_ptr += ((text * queries + head) * tokens + token).to(tl.int64) * D
            tl.store(query_ptr + channel, x.to(query_ptr.dtype.element_ty), mask=exists)
        elif head < queries + groups:
            key_ptr += ((text * groups + head - queries) * length + slot) * D
            tl.store(key_ptr + channel, x.to(key_ptr.dtype.element_ty), mask=exists)
        else:
            value_ptr += ((text * groups + head - queries - groups) * length + slot) * D
            tl.store(value_ptr + channel, x.to(value_ptr.dtype.element_ty), mask=exists)

    @triton.jit
    def norm_kernel(x_ptr, weight_ptr, y_ptr, size, eps, BLOCK: tl.constexpr, AHEAD: tl.constexpr):
        """y = x / sqrt(mean(x²) + eps) * weight.

        grid (rows,): a program has a row of `size` channels, in BLOCK, the next power of 2.
        """
        channel = tl.arange(0, BLOCK)
        exists = channel < size
        place = tl.program_id(0) * size + channel
        begin(AHEAD)
        x = tl.load(x_ptr + place, mask=exists, other=0.0).to(tl.float32)
        scale = tl.rsqrt(tl.sum(x * x) / size + eps)
        y = x * scale * tl.load(weight_ptr + channel, mask=exists, other=0.0).to(tl.float32)
        tl.store(y_ptr + place, y.to(y_ptr.dtype.element_ty), mask=exists)


def ahead(x):
    """Return what every launch of this file is given, for a tensor's device."""
    begins_early = AHEAD and torch.cuda.get_device_capability(x.device) >= (9, 0)
    return {"AHEAD": True, "launch_pdl": True} if begins_early else {"AHEAD": False}


def kind_of(weight):
    """Return the (bits, group) of a weight's codes, or (0, None) of a tensor."""
    return (0, None) if isinstance(weight, torch.Tensor) else (weight.bits, weight.group)


def joint_gemv(x, weights, thresholds, gated=False, residual=None):
    """Return the sparse products of one to three linears with the same x, in one launch on a GPU.

    x: (..., in), 1 to 8 rows in all, contiguous; float32, float16 or bfloat16
    weights: for each linear (in, out_l); or for each a QuantizedWeight, all of one kind
    thresholds: for each a float32 tensor, all () or all (in,)
    gated: there are two linears of one width; return silu(first) * second, (..., out)
    residual: of one linear, (..., out) of x's dtype, contiguous, which is added
    Returns the outputs side by side, (..., sum of out_l), in x's dtype. Raises ValueError without
    Triton.
    """
    rows = x.shape[:-1].numel()
    bits, group = kind_of(weights[0])
    absent = 3 - len(weights)            # linears without outputs, which no tile reaches
    outputs = [weight.shape[1] for weight in weights] + [0] * absent
    weights = [*weights, *[weights[0]] * absent]
    thresholds = [*thresholds, *[thresholds[0]] * absent]
    names = ("codes", "scales", "zeros" if group else "codes")
    pointers = ([getattr(weight, name) for name in names for weight in weights] if bits
                else 3 * weights)
    y = x.new_empty(*x.shape[:-1], outputs[0] if gated else sum(outputs))
    kernel.launch_product(
        joint_product_kernel, x, (x if residual is None else residual, *pointers, *thresholds), y,
        outputs, torch.float32 if bits else weights[0].dtype, 256 if bits and rows == 1 else 128,
        group, STEP=thresholds[0].ndim, BITS=bits, GATED=gated, RESIDUAL=residual is not None,
        **ahead(x))
    return y


# A backend like those of kernel.py, for a QuantizedWeight.
kernel.BACKENDS["codes-triton"] = (
    lambda x, weight, threshold: joint_gemv(x, [weight], [threshold]))


# --------------------------------------------------------------------------------------------------
# In the model

def product(x, *linears, **more):
    """Return joint_gemv of x (..., in) and SparseLinears."""
    return joint_gemv(x, [linear.weight_t for linear in linears],
                      [linear.threshold for linear in linears], **more)


def norm(x, module):
    """Return an RMSNorm of x (B, T, hidden)."""
    y = torch.empty_like(x)
    size = x.shape[-1]
    kernel.launch(norm_kernel, (x.numel() // size,), x, module.weight, y, size, module.eps,
                  BLOCK=triton.next_power_of_2(size), num_warps=8, **ahead(x))
    return y


def rotate_and_append(y, attention, context):
    """Return q (B, H, T, D), rotated, and a StaticCache's k and v (B, G, S, D) with the new ones.

    y: (B, T, (H + 2 G) * D), q, k and v of new tokens. context: their model.Context.
    """
    B, T, width = y.shape
    D, cache = attention.head_dim, context.cache
    keys, values = cache.keys[attention.layer], cache.values[attention.layer]
    groups = keys.shape[1]
    q = y.new_empty(B, width // D - 2 * groups, T, D)
    kernel.launch(rotate_kernel, (B * T, width // D), y, context.cos, context.sin, cache.slots, q,
                  keys, values, T, q.shape[1], groups, keys.shape[2], D=D,
                  BLOCK=triton.next_power_of_2(D), num_warps=1, **ahead(y))
    return q, keys, values


# What a block that runs fused consists of: not of subclasses, nor with methods put on an instance.
KNOWN = {Attention, MLP, RMSNorm, SparseLinear, QuantizedLinear, QuantizedWeight}
METHODS = {"forward", "qkv", "gated", "product"}


class FusedBlock(Block):
    """A Block of eight launches."""

    def forward(self, x, context):
        if not self.is_whole(x, context):
            return super().forward(x, context)
        attention, mlp = self.self_attn, self.mlp
        x = x.contiguous()               # a transposed embedding's is not
        y = norm(x, self.input_layernorm)
        y = product(y, attention.q_proj, attention.k_proj, attention.v_proj)
        y = attention.attend(*rotate_and_append(y, attention, context), context.mask)
        x = product(y.transpose(1, 2).flatten(2), attention.o_proj, residual=x)
        y = norm(x, self.post_attention_layernorm)
        y = product(y, mlp.gate_proj, mlp.up_proj, gated=True)
        return product(y, mlp.down_proj, residual=x)

    def is_whole(self, x, context):
        """Return whether the block is as this file knows it, and sparse in a call of few rows."""
        attention, mlp = self.self_attn, self.mlp
        parts = ((attention.q_proj, attention.k_proj, attention.v_proj), (attention.o_proj,),
                 (mlp.gate_proj, mlp.up_proj), (mlp.down_proj,))
        inner = list(self.modules())[1:]
        return (x.shape[0] * x.shape[1] <= kernel.MAX_ROWS
                and type(context.cache) is StaticCache     # which says where its slots are
                and all(type(module) in KNOWN for module in inner)
                and not any(module._forward_hooks or module._forward_pre_hooks
                            or vars(module).keys() & METHODS for module in (self, *inner))
                and mlp.activation is torch.nn.functional.silu
                and all(linear.bias is None and linear.state is not None
                        and linear.state.is_sparse() and not linear.state.dense_prefix
                        for part in parts for linear in part)
                and all(len({kind_of(linear.weight_t) for linear in part}) == 1 for part in parts))


def fuse(model):
    """Let the blocks of a Llama run in eight launches, where they can; return the model.

    That is so in sparse calls of few rows, on a GPU or in Triton's interpreter. All else runs as
    before. The model may be made sparse before or after. Where the code that is replaced is not
    that of FINGERPRINTS, one line on standard error says so, and the model stays as it is.
    """
    if not kernel.fits_triton(model.model.norm.weight):
        return model
    changed = [name for name, mark in FINGERPRINTS.items() if fingerprint(name) != mark]
    if changed:
        note(f"fused.py steps aside, each linear has a launch of its own: {changed[0]} is not what "
             f"it was written for")
        return model
    for block in model.model.layers:
        if type(block) is Block:
            block.__class__ = FusedBlock     # the same module, another forward
    return model


# --------------------------------------------------------------------------------------------------
# What this file was written for. Where one of these functions has changed, the launches above would
# still compute the old one. Change them as well, and then the marks here.

FINGERPRINTS = {
    "model.rotate": "388ecb7f",
    "model.Attention.qkv": "a8b9f5c6",
    "model.Attention.forward": "5e84557b",
    "model.MLP.gated": "dc689909",
    "model.MLP.forward": "82d8533b",
    "model.Block.forward": "95742f27",
    "model.RMSNorm.forward": "0976a305",
    "generate.StaticCache.append": "f67c63f8",
    "sparsify.SparseLinear.forward": "b269e4b9",
    "sparsify.SparseLinear.product": "f7aafd13",
    "kernel.kept": "86747180",
}


def fingerprint(name):
    """Return a short mark of a function's code, without comments and docstring."""
    try:
        source = inspect.getsource(pkgutil.resolve_name(name))
    except (OSError, TypeError):
        return ""
    node = ast.parse(textwrap.dedent(source)).body[0]
    if ast.get_docstring(node) is not None:
        del node.body[0]
    return hashlib.sha256(ast.unparse(node).encode()).hexdigest()[:8]


if __name__ == "__main__":
    for name in FINGERPRINTS:
        print(f'    "{name}": "{fingerprint(name)}",')
