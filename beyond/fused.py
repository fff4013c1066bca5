"""Fewer launches on a GPU: a block in five of them.

On a GPU a decode step is a row of kernels, one after the other, and each of them takes a few
microseconds to begin and to end, in which the memory is idle. The seven linears of a block read
only four inputs, and what lies between them is small. So a block is

    q_proj, k_proj, v_proj       one launch: the products of one input
    attention                    one, PyTorch's
    o_proj                       one
    gate_proj, up_proj           one
    down_proj                    one

and the products do what lies between them, too. Where x is to be normed, every program norms the
channels of its split before it lists those that are kept. The last program of a tile adds up the
partial sums. There q and k are rotated, and k and v written to the cache; silu(gate) * up is
formed; or the residual is added, and the sum of the result's squares is left for the next norm.

The products are those of kernel.py, for up to three linears side by side: the first tiles belong to
the first linear, the next ones to the second. Each has its own threshold.

    tiles of outputs    │ q  q  q  q │ k  k │ v  v │         tile 5 is the second one of k
    splits of channels  │ q  q  q  q │ k  k │ v  v │

Their weights may also be codes of 8 or 4 bits, as codes.py packs them. The matrix units would want
these in another order, so they are multiplied one by one, in float32. A code becomes a number in
two operations: a shift, and the bits of an exponent around it. Read as a float32 that is 128 +
code, or 256 + code where a code has 8 bits.

The seam: `Block.forward`. `fuse(model)` gives a model's blocks another one, which takes and returns
what theirs does. It is a second copy of what model.py and sparsify.py do: where their code has
changed, fused.py says so and steps aside. A block with a module or method of a reader's, or
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
from model import MLP, Attention, Block, RMSNorm, note, rotate
from sparsify import SparseLinear

BLOCK_OUT = 128          # outputs of a tile; twice as many where one row meets codes
# No card has timed these two yet; lab/gpu.py does.
JOINED = True            # norms and rotation within the products; False: PyTorch's
AHEAD = False            # programmatic dependent launch (sm_90 and later)

if triton is not None:
    import triton.language as tl
    from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

    from kernel import add_parts, add_rows, is_last, list_kept, load_split

    @triton.jit
    def begin(AHEAD: tl.constexpr):
        """Wait for the end of the launch before, which this one overlaps; let the next begin."""
        if AHEAD:
            gdc_wait()
            gdc_launch_dependents()

    @triton.jit
    def linear_of(tile, outputs, BLOCK_OUT: tl.constexpr):
        """Return which of the linears side by side has a tile, its tile there, its first output."""
        linear = 0
        first_output = 0
        for i in tl.static_range(len(outputs) - 1):
            tiles = tl.cdiv(outputs[i], BLOCK_OUT)
            later = (linear == i) & (tile >= tiles)
            linear = tl.where(later, i + 1, linear)
            tile = tl.where(later, tile - tiles, tile)
            first_output += tl.where(later, outputs[i], 0)
        return linear, tile, first_output

    @triton.jit
    def choose(linear, values):
        """Return a linear's value of a tuple that has one for each."""
        chosen = values[0]
        for i in tl.static_range(1, len(values)):
            chosen = tl.where(linear == i, values[i], chosen)
        return chosen

    @triton.jit
    def normed(x, channel, norm, rows, channels, ROWS: tl.constexpr, PARTS: tl.constexpr):
        """Return x / sqrt(mean(x²) + eps) * gain of a split's channels, in x's dtype: (ROWS, SPAN).

        norm: squares float32 (rows, parts), over parts the sum of a row's x²; gain (channels,);
        parts; eps.
        """
        squares_ptr, gain_ptr, parts, eps = norm
        row = tl.arange(0, ROWS)[:, None]
        part = tl.arange(0, PARTS)[None, :]
        squares = tl.load(squares_ptr + row * parts + part, mask=(row < rows) & (part < parts),
                          other=0.0)
        scale = tl.rsqrt(tl.sum(squares, axis=1) / channels + eps)              # (ROWS,)
        gain = tl.load(gain_ptr + channel, mask=channel < channels, other=0.0).to(tl.float32)
        return (x.to(tl.float32) * scale[:, None] * gain[None, :]).to(x.dtype)

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
        place = output if BITS == 8 else group * outputs + output
        scale = tl.load(scale_ptr + place, mask=real, other=0.0).to(tl.float32)
        zero = 256.0 + 128
        if BITS == 4:
            zero = 128 + tl.load(zero_ptr + place, mask=real, other=0).to(tl.float32)
        return output, scale * (sums - zero * tl.sum(total, axis=0)[:, None])

    @triton.jit
    def store_heads(y, other, linear, output, out, real, rope, y_ptr, D: tl.constexpr):
        """Store a tile of q, k or v, q and k rotated, where joint_product_kernel says.

        y float32 (ROWS, BLOCK_OUT); other: of each channel the other one of its pair.
        """
        cos_ptr, sin_ptr, slot_ptr, keys_ptr, values_ptr, tokens, length = rope
        row = tl.arange(0, y.shape[0])[:, None]
        batch = row // tokens
        token = row % tokens
        channel = (output % D)[None, :]
        head = batch * (out // D) + (output // D)[None, :]
        if linear < 2:
            angle = token * D + channel
            cos = tl.load(cos_ptr + angle).to(tl.float32)
            y = y * cos + other * tl.load(sin_ptr + angle).to(tl.float32)
        if linear == 0:
            place = (head * tokens + token) * D + channel
            tl.store(y_ptr + place, y.to(y_ptr.dtype.element_ty), mask=real)
        else:
            cache_ptr = tl.where(linear == 1, keys_ptr, values_ptr)
            slot = (head * length + tl.load(slot_ptr + token)) * D + channel
            tl.store(cache_ptr + slot, y.to(cache_ptr.dtype.element_ty), mask=real)

    @triton.jit
    def joint_product_kernel(x_ptr, weights, scales, zeros, thresholds, outputs, norm, residual,
                             rope, channel_ptr, input_ptr, partial_ptr, ticket_ptr, y_ptr, rows,
                             channels, width, per_split, STEP: tl.constexpr, ROWS: tl.constexpr,
                             SPAN: tl.constexpr, BLOCK_OUT: tl.constexpr, BITS: tl.constexpr,
                             PARTS: tl.constexpr, GATED: tl.constexpr, D: tl.constexpr,
                             AHEAD: tl.constexpr):
        """y[row, j] = sum over channels of kept x[row, i] * weight[i, j], for linears side by side.

        grid (tiles of all linears, splits of per_split channels). x, thresholds, and what each
        program writes: as in kernel.sparse_product_kernel; partial float32 (splits, rows, width).
        Tuples, one for each linear: weights (channels, outputs), or with BITS 8 or 4 the codes of a
        QuantizedWeight, whose scales and zeros follow, and for 4 a split is a group; thresholds;
        outputs, of which `width` is the sum. y (rows, width). The next three are empty, or else:
        norm: x is normed first, see normed, with PARTS the parts rounded up to a power of 2.
        residual: what is added, like y; and squares float32 (rows, tiles), which are written.
        rope: cos, sin (tokens, D); slots int64 (tokens,); keys, values (B, groups, length, D) where
        k and v are written; tokens; length. The linears are q, k and v, and y is q, rotated,
        (B, queries, tokens, D); rows are (B, tokens), and D divides BLOCK_OUT.
        GATED: y is silu(first) * second, (rows, outputs of one).
        """
        split = tl.program_id(1)
        splits = tl.num_programs(1)
        linear, tile, first_output = linear_of(tl.program_id(0), outputs, BLOCK_OUT)
        out = choose(linear, outputs)
        weight_ptr = choose(linear, weights)
        begin(AHEAD)
        channel, inside, x = load_split(x_ptr, rows, channels, per_split, ROWS, SPAN)
        if len(norm) > 0:
            x = normed(x, channel, norm, rows, channels, ROWS, PARTS)
        channel_ptr, input_ptr, count = list_kept(channel, inside, x, choose(linear, thresholds),
                                                  channel_ptr, input_ptr, channels, STEP, ROWS,
                                                  SPAN)
        row = tl.arange(0, ROWS)[:, None]
        if BITS == 0:
            output = tile * BLOCK_OUT + tl.arange(0, BLOCK_OUT)                 # (BLOCK_OUT,)
            padded = tl.arange(0, 16)[:, None]
            sums = add_rows(weight_ptr, channel_ptr, input_ptr, count, output, out, ROWS, SPAN,
                            BLOCK_OUT)                                          # (16, BLOCK_OUT)
        else:
            padded = row
            output, sums = add_codes(weight_ptr, choose(linear, scales), choose(linear, zeros),
                                     channel_ptr, input_ptr, count, tile, split, out, ROWS, SPAN,
                                     BLOCK_OUT * BITS // 32, BITS)
        tl.store(partial_ptr + (split * rows + padded) * width + first_output + output[None, :],
                 sums, mask=(padded < rows) & (output < out)[None, :])
        # Gate and up have the same outputs: the last of both adds up both.
        ticket_ptr += tile if GATED else tl.program_id(0)
        if is_last(ticket_ptr, 2 * splits if GATED else splits):
            real = (row < rows) & (output < out)[None, :]                       # (ROWS, BLOCK_OUT)
            size = rows * width
            if GATED:
                first_output = 0
            place = row * width + first_output + output[None, :]
            y = add_parts(partial_ptr, place, real, splits, size, ROWS, BLOCK_OUT)
            y = y.to(y_ptr.dtype.element_ty).to(tl.float32)            # rounded as the model's is
            if GATED:
                up = add_parts(partial_ptr, place + out, real, splits, size, ROWS, BLOCK_OUT)
                y = y / (1.0 + tl.exp(-y)) * up
                place = row * out + output[None, :]
            if len(residual) > 0:
                y += tl.load(residual[0] + place, mask=real, other=0.0).to(tl.float32)
                y = y.to(y_ptr.dtype.element_ty).to(tl.float32)
                squares = tl.sum(y * y, axis=1)[:, None]
                tl.store(residual[1] + row * tl.num_programs(0) + tile, squares, mask=row < rows)
            if len(rope) > 0:
                place += tl.where(output % D < D // 2, D // 2, -(D // 2))[None, :]
                other = add_parts(partial_ptr, place, real, splits, size, ROWS, BLOCK_OUT)
                other = other.to(y_ptr.dtype.element_ty).to(tl.float32)
                store_heads(y, other, linear, output, out, real, rope, y_ptr, D)
            else:
                tl.store(y_ptr + place, y.to(y_ptr.dtype.element_ty), mask=real)


def ahead(x):
    """Return the arguments that let a launch on x's device begin early, or not."""
    begins_early = AHEAD and x.is_cuda and torch.cuda.get_device_capability(x.device) >= (9, 0)
    return {"AHEAD": True, "launch_pdl": True} if begins_early else {"AHEAD": False}


def kind_of(weight):
    """Return the (bits, group) of a weight's codes, or (0, None) of a tensor."""
    return (0, None) if isinstance(weight, torch.Tensor) else (weight.bits, weight.group)


def joint_gemv(x, weights, thresholds, gated=False, residual=None, norm=None, rope=None):
    """Return the sparse products of one to three linears with the same x, in one launch on a GPU.

    x: (..., in), 1 to 8 rows in all, contiguous; float32, float16 or bfloat16
    weights: for each linear (in, out_l); or for each a QuantizedWeight, all of one kind
    thresholds: for each a float32 tensor, all () or all (in,)
    gated: there are two linears of one width; return silu(first) * second, (..., out)
    residual: of one linear, (..., out) of x's dtype, contiguous, which is added; the result y has
        y.squares, float32 (rows, parts): over parts they add up to the squares of y's rows
    norm: (squares, gain (in,), eps): x is first normed; squares as above, of x
    rope: of q, k and v of x (B, T, in): cos, sin (T, D), slots int64 (T,), keys, values (B, G, S,
        D), all contiguous: v, and k rotated, are written to the slots. D divides BLOCK_OUT. Return
        q rotated, (B, H, T, D)
    Otherwise returns the outputs side by side, (..., sum of out_l), in x's dtype. Raises ValueError
    without Triton.
    """
    rows = x.shape[:-1].numel()
    bits, group = kind_of(weights[0])
    names = ("codes", "scales", "zeros" if group else "codes")
    pointers = ([tuple(getattr(weight, name) for weight in weights) for name in names] if bits
                else [tuple(weights), (), ()])
    outputs = tuple(weight.shape[1] for weight in weights)
    block = 2 * BLOCK_OUT if bits and rows == 1 else BLOCK_OUT
    y = x.new_empty(*x.shape[:-1], outputs[0] if gated else sum(outputs))
    parts = D = 0
    if norm is not None:
        squares, gain, eps = norm
        parts = squares.shape[1]
        norm = squares, gain, parts, eps
    if rope is not None:
        T, D = rope[0].shape
        y = x.new_empty(x.shape[0], outputs[0] // D, T, D)
        rope = *rope, T, rope[3].shape[2]
    if residual is not None:
        y.squares = x.new_empty(rows, triton.cdiv(outputs[0], block), dtype=torch.float32)
        residual = residual, y.squares
    kernel.launch_product(
        joint_product_kernel, x,
        (*pointers, tuple(thresholds), outputs, norm or (), residual or (), rope or ()), y, outputs,
        torch.float32 if bits else weights[0].dtype, block, group, STEP=thresholds[0].ndim,
        BITS=bits, PARTS=triton.next_power_of_2(parts), GATED=gated, D=D, **ahead(x))
    return y


# A backend like those of kernel.py, for a QuantizedWeight.
kernel.BACKENDS["codes-triton"] = (
    lambda x, weight, threshold: joint_gemv(x, [weight], [threshold]))


# --------------------------------------------------------------------------------------------------
# In the model

def product(x, *linears, norm=None, **more):
    """Return joint_gemv of x (B, T, in) and SparseLinears. norm: the RMSNorm before them, or None.

    The norm is PyTorch's where the product before has left no squares.
    """
    if norm is not None:
        # What the product before has left with x. It is stale once x was written to: PyTorch counts
        # that, but not in inference mode, nor what goes by x.data or a kernel of your own.
        squares = None if x.is_inference() or x._version else getattr(x, "squares", None)
        if JOINED and squares is not None:
            more["norm"] = squares, norm.weight, norm.eps
        else:
            x = norm(x)
    return joint_gemv(x, [linear.weight_t for linear in linears],
                      [linear.threshold for linear in linears], **more)


# The classes that a fused block may consist of, no subclass, and what nobody may have put on one.
KNOWN = {Attention, MLP, RMSNorm, SparseLinear, QuantizedLinear, QuantizedWeight}
METHODS = {"forward", "qkv", "gated", "product"}


class FusedBlock(Block):
    """A Block of five launches."""

    def forward(self, x, context):
        if not self.fits(x, context):
            return super().forward(x, context)
        attention, mlp, cache = self.self_attn, self.mlp, context.cache
        layer, D = attention.layer, attention.head_dim
        cos, sin = context.cos.contiguous(), context.sin.contiguous()
        keys, values = cache.keys[layer], cache.values[layer]
        linears = attention.q_proj, attention.k_proj, attention.v_proj
        x = x.contiguous()               # a transposed embedding's is not
        if JOINED and BLOCK_OUT % D == 0:                  # a tile holds whole heads
            q = product(x, *linears, norm=self.input_layernorm,
                        rope=(cos, sin, cache.slots, keys, values))
        else:
            heads = product(x, *linears, norm=self.input_layernorm).unflatten(-1, (-1, D))
            q, k, v = heads.transpose(1, 2).split([each.out_features // D for each in linears], 1)
            q = rotate(q, cos, sin)
            cache.append(layer, rotate(k, cos, sin), v)
        y = attention.attend(q, keys, values, context.mask).transpose(1, 2).flatten(2)
        x = product(y.contiguous(), attention.o_proj, residual=x)
        y = product(x, mlp.gate_proj, mlp.up_proj, norm=self.post_attention_layernorm, gated=True)
        return product(y, mlp.down_proj, residual=x)

    def fits(self, x, context):
        """Return whether the block is as this file knows it, in a sparse call of few rows."""
        attention, mlp, cache = self.self_attn, self.mlp, context.cache
        sites = ((attention.q_proj, attention.k_proj, attention.v_proj), (attention.o_proj,),
                 (mlp.gate_proj, mlp.up_proj), (mlp.down_proj,))
        inner = list(self.modules())[1:]
        B, T, _ = x.shape
        return (B * T <= kernel.MAX_ROWS
                and kernel.fits_triton(x)
                and type(cache) is StaticCache             # which says where its slots are
                and cache.keys.shape[1] == B and cache.slots.shape == (T,)
                and cache.keys.is_contiguous() and cache.values.is_contiguous()
                and context.cos.shape == (T, attention.head_dim)
                and all(type(module) in KNOWN for module in inner)
                and not any(module._forward_hooks or module._forward_pre_hooks
                            or vars(module).keys() & METHODS for module in (self, *inner))
                and mlp.activation is torch.nn.functional.silu
                and all(linear.bias is None and linear.state is not None
                        and linear.state.is_sparse() and not linear.state.dense_prefix
                        and linear.threshold.shape == (linear.in_features,)
                        for site in sites for linear in site)
                and all(len({kind_of(linear.weight_t) for linear in site}) == 1 for site in sites))


def fuse(model):
    """Let the blocks of a Llama run in five launches, where they can; return the model.

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
    "beyond.codes.QuantizedLinear.product": "b210762c",
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
