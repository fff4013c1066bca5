"""Fewer launches on a GPU: what reads the same input is computed together.

On a GPU a decode step is a row of kernels, one after the other, and each of them takes a few
microseconds to begin and to end, in which the memory is idle. The seven linears of a block read
only four inputs. So those that share one share a launch:

    q_proj ┐                                gate_proj ┐
    k_proj ├─ x    one launch, not three    up_proj   ┴─ x    one launch, and silu(gate) * up where
    v_proj ┘                                                  the partial sums are added

What follows q, k and v is one launch, not eight: q and k are rotated by their positions, k and v
written to the cache.

The kernel is that of kernel.py for up to three linears side by side: the first tiles belong to the
first linear, the next ones to the second. Each has its own threshold. Their weights may also be
codes of 8 or 4 bits, which quantize.py explains; it uses this kernel for single linears, too. The
matrix units multiply the codes themselves, which 16 bits hold exactly.

    tiles of outputs    │ q  q  q  q │ k  k │ v  v │         tile 5 is the second one of k
    splits of channels  │ q  q  q  q │ k  k │ v  v │

The seam: `Attention.qkv` and `MLP.gated` compute the projections that share an input, and
`Attention.forward` what follows. `fuse(model)` gives the attentions and MLPs of a model other ones.
This is a second copy of what model.py and sparsify.py do, so it looks at their code first: where
that has changed it says so, and steps aside.
"""
import ast
import inspect
import textwrap

import torch

import kernel
import model as llama
from generate import StaticCache
from kernel import is_interpreted, triton
from model import MLP, Attention, note
from sparsify import SparseLinear

if triton is not None:
    import triton.language as tl

    from kernel import add_kept, add_parts, add_product, is_last, is_number, list_kept

    @triton.jit
    def joint_product_kernel(x_ptr, weight0_ptr, weight1_ptr, weight2_ptr,
                             scale0_ptr, scale1_ptr, scale2_ptr, zero0_ptr, zero1_ptr, zero2_ptr,
                             threshold0_ptr, threshold1_ptr, threshold2_ptr, channel_ptr, input_ptr,
                             partial_ptr, ticket_ptr, y_ptr, rows, channels, outputs0, outputs1,
                             outputs2, channels_per_split, STEP: tl.constexpr, ROWS: tl.constexpr,
                             SPAN: tl.constexpr, BLOCK_IN: tl.constexpr, BLOCK_OUT: tl.constexpr,
                             STAGES: tl.constexpr, BITS: tl.constexpr, GATED: tl.constexpr):
        """y[row, j] = sum over channels of kept x[row, i] * weight[i, j], for linears side by side.

        grid (tiles of all linears, splits). y (rows, outputs0 + outputs1 + outputs2); GATED:
        (rows, outputs0), silu(first) * second. x, thresholds, and what is room for each program:
        as in kernel.sparse_product_kernel; partial float32 (splits, rows, outputs of all).
        BITS 0: weight_l (channels, outputs_l), scale_l and zero_l not read. BITS 8 or 4: they are
        the codes, scales and zeros of a QuantizedWeight; for 4 a split is a group. The zero point
        and the scale are applied to a sum: scale * (sum of x * code - zero * sum of x).
        """
        LANES: tl.constexpr = 32 // BITS if BITS else 1    # weights in a word
        WORDS: tl.constexpr = BLOCK_OUT // LANES
        tile = tl.program_id(0)
        split = tl.program_id(1)
        splits = tl.num_programs(1)
        program = split * tl.num_programs(0) + tile
        # Which of the linears is this tile's?
        tiles0 = tl.cdiv(outputs0, BLOCK_OUT)
        tiles1 = tl.cdiv(outputs1, BLOCK_OUT)
        first_tile = 0
        first_output = 0
        outputs = outputs0
        weight_ptr, scale_ptr, zero_ptr = weight0_ptr, scale0_ptr, zero0_ptr
        threshold_ptr = threshold0_ptr
        if tile >= tiles0 + tiles1:
            first_tile = tiles0 + tiles1
            first_output = outputs0 + outputs1
            outputs = outputs2
            weight_ptr, scale_ptr, zero_ptr = weight2_ptr, scale2_ptr, zero2_ptr
            threshold_ptr = threshold2_ptr
        elif tile >= tiles0:
            first_tile = tiles0
            first_output = outputs0
            outputs = outputs1
            weight_ptr, scale_ptr, zero_ptr = weight1_ptr, scale1_ptr, zero1_ptr
            threshold_ptr = threshold1_ptr
        tile -= first_tile
        channel_ptr += program * SPAN
        input_ptr += program * SPAN * rows
        first = split * channels_per_split
        end = tl.minimum(first + channels_per_split, channels)
        count = list_kept(x_ptr, threshold_ptr, channel_ptr, input_ptr, first, end, rows, channels,
                          STEP, ROWS, SPAN)
        padded = tl.arange(0, 16)[:, None]                                      # rows, and zeros
        column = tl.arange(0, BLOCK_OUT)
        word = tile * WORDS + tl.arange(0, WORDS)                               # (WORDS,)
        if BITS == 0:
            output = tile * BLOCK_OUT + column                                  # (BLOCK_OUT,)
            pitch = outputs                                                     # words of a row
        else:                            # 16 words hold LANES runs of 16 outputs
            block = column // (16 * LANES) * 16 * LANES + column // LANES % 16
            output = tile * BLOCK_OUT + block + column % LANES * 16
            pitch = tl.cdiv(outputs, 16 * LANES) * 16
        sums = tl.zeros((16, BLOCK_OUT), tl.float32)
        total = tl.zeros((16,), tl.float32)                                     # of x
        for start in tl.range(0, count, BLOCK_IN, num_stages=STAGES):
            index = start + tl.arange(0, BLOCK_IN)
            channel = tl.load(channel_ptr + index)                              # (BLOCK_IN,)
            x = tl.load(input_ptr + padded * SPAN + index[None, :], mask=padded < rows, other=0.0)
            weight = tl.load(weight_ptr + channel.to(tl.int64)[:, None] * pitch + word[None, :],
                             mask=(channel >= 0)[:, None] & (word < pitch)[None, :], other=0)
            if BITS:                                                # (BLOCK_IN, WORDS, LANES)
                codes = weight[:, :, None] >> BITS * tl.arange(0, LANES)[None, None, :]
                codes = tl.reshape(codes & (1 << BITS) - 1, (BLOCK_IN, BLOCK_OUT))
                weight = codes.to(tl.float32).to(x.dtype)           # exact
                total += tl.sum(x.to(tl.float32), axis=1)
            sums = add_product(sums, x, weight)                                 # (16, BLOCK_OUT)
        if BITS == 0 and ROWS > 1:       # codes are numbers
            if tl.min((is_number(sums) | (padded >= rows)).to(tl.int32)) == 0:
                sums = add_kept(x_ptr, weight_ptr, threshold_ptr, channel_ptr, count, output, rows,
                                channels, outputs, STEP, BLOCK_OUT)
        real = output < outputs
        if BITS == 8:
            scale = tl.load(scale_ptr + output, mask=real, other=0.0)
            sums = scale[None, :] * (sums - 128 * total[:, None])
        if BITS == 4:
            group = split * outputs + output
            scale = tl.load(scale_ptr + group, mask=real, other=0.0).to(tl.float32)
            zero = tl.load(zero_ptr + group, mask=real, other=0).to(tl.float32)
            sums = scale[None, :] * (sums - zero[None, :] * total[:, None])
        width = outputs0 + outputs1 + outputs2
        tl.store(partial_ptr + (split * rows + padded) * width + first_output + output[None, :],
                 sums, mask=(padded < rows) & real[None, :])
        # Gate and up have the same outputs: the last of both adds up both.
        number = tile if GATED else tile + first_tile
        if is_last(ticket_ptr + number, 2 * splits if GATED else splits):
            row = tl.arange(0, ROWS)[:, None]
            final = tile * BLOCK_OUT + column[None, :]
            inside = (row < rows) & (final < outputs)                           # (ROWS, BLOCK_OUT)
            if GATED:
                place = row * width + final
                gate = add_parts(partial_ptr, place, inside, splits, rows * width, ROWS, BLOCK_OUT)
                up = add_parts(partial_ptr, place + outputs0, inside, splits, rows * width, ROWS,
                               BLOCK_OUT)
                y = gate / (1.0 + tl.exp(-gate)) * up
                place = row * outputs + final
            else:
                place = row * width + first_output + final
                y = add_parts(partial_ptr, place, inside, splits, rows * width, ROWS, BLOCK_OUT)
            tl.store(y_ptr + place, y.to(y_ptr.dtype.element_ty), mask=inside)

    @triton.jit
    def rotate_kernel(qkv_ptr, cos_ptr, sin_ptr, slot_ptr, query_ptr, key_ptr, value_ptr, tokens,
                      queries, groups, length, D: tl.constexpr, HALF: tl.constexpr):
        """Turn q and k by their positions, and write k and v to a cache.

        grid (B * tokens, queries + 2 * groups heads): a program has a head of D channels, with the
        pairs i and i + D / 2. qkv (B, tokens, heads, D); cos, sin (tokens, D); slot int64 (tokens,)
        query (B, queries, tokens, D); key and value (B, groups, length, D). HALF: D / 2, or the
        next power of 2.
        """
        text = tl.program_id(0) // tokens
        token = tl.program_id(0) % tokens
        head = tl.program_id(1)
        low = tl.arange(0, HALF)
        exists = low < D // 2
        high = low + D // 2
        qkv_ptr += (tl.program_id(0) * tl.num_programs(1) + head) * D
        x = tl.load(qkv_ptr + low, mask=exists, other=0.0).to(tl.float32)
        y = tl.load(qkv_ptr + high, mask=exists, other=0.0).to(tl.float32)
        new_x, new_y = x, y
        if head < queries + groups:
            table = token * D
            new_x = (x * tl.load(cos_ptr + table + low, mask=exists, other=0.0).to(tl.float32)
                     + y * tl.load(sin_ptr + table + low, mask=exists, other=0.0).to(tl.float32))
            new_y = (y * tl.load(cos_ptr + table + high, mask=exists, other=0.0).to(tl.float32)
                     + x * tl.load(sin_ptr + table + high, mask=exists, other=0.0).to(tl.float32))
        slot = tl.load(slot_ptr + token)
        place = ((text * queries + head) * tokens + token).to(tl.int64)
        result_ptr = query_ptr
        if head >= queries + groups:
            place = (text * groups + head - queries - groups) * length + slot
            result_ptr = value_ptr
        elif head >= queries:
            place = (text * groups + head - queries) * length + slot
            result_ptr = key_ptr
        result_ptr += place * D
        tl.store(result_ptr + low, new_x.to(query_ptr.dtype.element_ty), mask=exists)
        tl.store(result_ptr + high, new_y.to(query_ptr.dtype.element_ty), mask=exists)


# By the bits of a code. A row of a tile has 256 bytes, or 128; the turns are short, since unpacked
# codes fill registers, and more of them are on their way.
TILE = {8: {"BLOCK_IN": 16, "BLOCK_OUT": 256, "STAGES": 7},
        4: {"BLOCK_IN": 16, "BLOCK_OUT": 256, "STAGES": 7}}


def joint_gemv(x, weights, thresholds, gated=False):
    """Return the sparse products of one to three linears with the same x, in one launch on a GPU.

    x: (B, in), B from 1 to 8, contiguous; float32, float16 or bfloat16
    weights: for each linear (in, out_l), of x's dtype; or for each a QuantizedWeight, of one kind
    thresholds: for each a float32 tensor () or (in,)
    gated: there are two linears of one width; return silu(first) * second, (B, out)
    Returns the outputs side by side, (B, sum of out_l), in x's dtype. Raises ValueError without
    Triton, and for what does not go together.
    """
    kernel.check_triton(x)
    if len({kind_of(weight) for weight in weights}) > 1:
        raise ValueError("weights of several kinds in one launch: expected all of one kind")
    bits, group = kind_of(weights[0])
    outputs = [weight.shape[1] for weight in weights]
    if gated and outputs[0] != outputs[1]:
        raise ValueError(f"gate has {outputs[0]} outputs, up has {outputs[1]}: expected as many")
    codes = scales = zeros = weights
    if bits:
        codes = [weight.codes for weight in weights]
        scales = [weight.scales for weight in weights]
        zeros = [weight.zeros for weight in weights] if group else codes
    rows, channels = x.shape
    if any(threshold.ndim for threshold in thresholds):
        thresholds = [threshold.expand(channels).contiguous() for threshold in thresholds]
    sizes = TILE[bits] if bits else kernel.TILE[x.itemsize]
    tiles = sum(triton.cdiv(out, sizes["BLOCK_OUT"]) for out in outputs)
    per_split = group or kernel.span(tiles, channels, kernel.multiprocessors(x.device))
    size = triton.next_power_of_2(per_split)
    splits = triton.cdiv(channels, per_split)
    width = sum(outputs)
    y = torch.empty(rows, outputs[0] if gated else width, device=x.device, dtype=x.dtype)
    absent = 3 - len(weights)            # linears without outputs, which no tile reaches

    def three(pointers):
        return [*pointers, *[pointers[0]] * absent]

    with torch.cuda.device_of(x):        # Triton launches on the current device
        joint_product_kernel[(tiles, splits)](
            x, *three(codes), *three(scales), *three(zeros), *three(thresholds),
            *kernel.room(x, tiles, splits, size, width), y, rows, channels, *outputs,
            *[0] * absent, per_split, STEP=thresholds[0].ndim, ROWS=triton.next_power_of_2(rows),
            SPAN=size, BITS=bits, GATED=gated, num_warps=4, **sizes)
    return y


def rotate_and_append(y, attention, context):
    """Return q (B, H, T, D), rotated, and a StaticCache's k and v (B, G, S, D) with the new ones.

    y: (B, T, (H + 2 G) * D), q, k and v of new tokens. context: their model.Context.
    """
    D = attention.head_dim
    B, T, width = y.shape
    keys, values = context.cache.keys[attention.layer], context.cache.values[attention.layer]
    groups = keys.shape[1]
    heads = width // D
    q = y.new_empty(B, heads - 2 * groups, T, D)
    with torch.cuda.device_of(y):        # Triton launches on the current device
        rotate_kernel[(B * T, heads)](
            y, context.cos, context.sin, context.cache.slots, q, keys, values, T, q.shape[1],
            groups, keys.shape[2], D=D, HALF=triton.next_power_of_2(D // 2), num_warps=1)
    return q, keys, values


def kind_of(weight):
    """Return the (bits, group) of a weight's codes, or (0, None) of a tensor."""
    return (0, None) if isinstance(weight, torch.Tensor) else (weight.bits, weight.group)


# --------------------------------------------------------------------------------------------------
# In the model

FUSABLE = {SparseLinear}     # the linears whose work is done here; quantize.py adds its own


def share_launch(linears, x):
    """Return whether linears compute their products of x (B, T, in) in one launch, this time.

    All of them are sparse now, in one way, without exception, and nobody looks on.
    """
    if not all(type(linear) in FUSABLE and linear.state is not None for linear in linears):
        return False
    state = linears[0].state
    exempt = state.mode == "all" and state.dense_prefix
    few = x.shape[0] * x.shape[1] <= kernel.MAX_ROWS and not exempt
    hooks = any(linear._forward_hooks or linear._forward_pre_hooks for linear in linears)
    kinds = {kind_of(linear.weight_t) for linear in linears}
    return state.is_sparse() and few and not hooks and len(kinds) == 1


def joint_product(linears, x, gated=False):
    """Return joint_gemv of linears with x (B, T, in), as (B, T, out); count what they keep."""
    for linear in linears:
        if linear.state.counting:
            linear.count(x)
    y = joint_gemv(x.flatten(0, 1).contiguous(), [linear.weight_t for linear in linears],
                   [linear.threshold for linear in linears], gated)
    return y.view(*x.shape[:-1], -1)


class FusedAttention(Attention):
    """An Attention whose q, k and v share a launch, and what follows them another."""

    def forward(self, x, context):
        linears = (self.q_proj, self.k_proj, self.v_proj)
        biased = any(linear.bias is not None for linear in linears)
        static = type(context.cache) is StaticCache        # which says where its slots are
        if biased or not static or not share_launch(linears, x):
            return super().forward(x, context)
        q, k, v = rotate_and_append(joint_product(linears, x), self, context)
        y = self.attend(q, k, v, context.mask)                                        # (B, H, T, D)
        return self.o_proj(y.transpose(1, 2).flatten(2))

    def qkv(self, x):
        linears = (self.q_proj, self.k_proj, self.v_proj)
        if not share_launch(linears, x):
            return super().qkv(x)
        y = joint_product(linears, x)                                       # (B, T, sum of outputs)
        parts = y.split([linear.out_features for linear in linears], dim=-1)
        return tuple(part if linear.bias is None else part + linear.bias
                     for linear, part in zip(linears, parts))


class FusedMLP(MLP):
    """An MLP whose gate and up share a launch, which ends with silu(gate) * up."""

    def gated(self, x):
        linears = (self.gate_proj, self.up_proj)
        biased = any(linear.bias is not None for linear in linears)    # it comes before the silu
        if biased or not share_launch(linears, x):
            return super().gated(x)
        return joint_product(linears, x, gated=True)


def fuse(model):
    """Let the attentions and MLPs of a Llama launch what shares an input as one; return the model.

    That is so in sparse calls of few rows, on a GPU or in Triton's interpreter. All else runs as
    before. The model may be made sparse before or after. Where the code that is replaced is not
    that of REPLACED, one line on standard error says so, and the model stays as it is.
    """
    usable = triton is not None and (model.device.type == "cuda" or is_interpreted())
    if not usable or model.dtype == torch.float64:
        return model
    changed = what_changed(model)
    if changed:
        note(f"fused.py steps aside, each linear has a launch of its own: {changed} is not what "
             f"it was written for")
        return model
    for block in model.model.layers:
        block.self_attn.__class__ = FusedAttention         # the same module, another forward
        block.mlp.__class__ = FusedMLP
    return model


# --------------------------------------------------------------------------------------------------
# What this file was written for. Where one of these functions has changed, the launches above would
# still compute the old one. Change them as well, and then the text here.

REPLACED = {
    Attention: """
        def qkv(self, x):
            return self.q_proj(x), self.k_proj(x), self.v_proj(x)

        def forward(self, x, context):
            B, T, _ = x.shape
            q, k, v = (y.view(B, T, -1, self.head_dim).transpose(1, 2) for y in self.qkv(x))
            q = rotate(q, context.cos, context.sin)
            k = rotate(k, context.cos, context.sin)
            if context.cache is not None:
                k, v = context.cache.append(self.layer, k, v)
            y = self.attend(q, k, v, context.mask)
            return self.o_proj(y.transpose(1, 2).reshape(B, T, -1))
        """,
    llama: """
        def rotate(x, cos, sin):
            return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin)
        """,
    StaticCache: """
        def append(self, layer, k, v):
            keys, values = self.keys[layer], self.values[layer]
            keys.index_copy_(2, self.slots, k)
            values.index_copy_(2, self.slots, v)
            return keys, values
        """,
    MLP: """
        def gated(self, x):
            return self.activation(self.gate_proj(x)) * self.up_proj(x)
        """,
    SparseLinear: """
        def forward(self, x):
            y = (self.sparse(x) if self.state is not None and self.state.is_sparse()
                 else self.dense(x))
            return y if self.bias is None else y + self.bias

        def sparse(self, x):
            state = self.state
            prefix = state.dense_prefix if state.mode == "all" else 0
            rows = x.shape[0] * x.shape[1]
            few = rows <= kernel.MAX_ROWS and not prefix
            if few:
                if state.counting:
                    self.count(x)
                return self.product(x.view(rows, -1)).view(*x.shape[:-1], -1)
            keep = self.count(x, prefix)
            keep[:, :prefix] = True
            return self.dense(x * keep)

        def product(self, x):
            return kernel.sparse_gemv(x, self.weight_t, self.threshold)
        """,
}


def what_changed(model):
    """Return the name of what is replaced and is not as in REPLACED, or None."""
    for kind, text in REPLACED.items():
        for expected in ast.parse(textwrap.dedent(text)).body:
            method = expected.name
            if code_of(getattr(kind, method)) != without_name(expected):
                return f"{kind.__name__}.{method}"
    for i, block in enumerate(model.model.layers):
        for name, kinds, method in (("self_attn", (Attention, FusedAttention), "qkv"),
                                    ("mlp", (MLP, FusedMLP), "gated")):
            module = block.get_submodule(name)
            if type(module) not in kinds or method in vars(module):
                return f"model.layers.{i}.{name}"
        if block.mlp.activation is not torch.nn.functional.silu:
            return f"the activation of model.layers.{i}.mlp"
    return None


def code_of(function):
    """Return the code of a Python function as text, without comments; "" if it is not known."""
    try:
        node = ast.parse(textwrap.dedent(inspect.getsource(function))).body[0]
    except (OSError, TypeError, SyntaxError):
        return ""
    return without_name(node) if isinstance(node, ast.FunctionDef) else ""


def without_name(node):
    """Return the code of a function's definition as text, without its name and docstring."""
    node.name = "_"
    if ast.get_docstring(node) is not None:
        del node.body[0]
    return ast.unparse(node)
