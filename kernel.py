"""How skipped columns become time: the sparse matrix-vector product.

Decoding one token multiplies every weight matrix by one vector. Each weight is read from memory, used in one
multiplication and not seen again until the next token, so the time is the bytes read over the bandwidth of the
memory; arithmetic is free. The only way to be faster is to read less, and a channel whose input is zero needs
no weights at all:

    y = W x = Σ_i x_i · (column i of W)          with |x_i| ≤ threshold, column i is not read

Why the weight is stored transposed. PyTorch keeps W as (out, in), row by row; a column is then one number every
`in` numbers, and memory hands out whole lines of 64 bytes or more: skipping it saves nothing. Transposed, as
`weight_t` (in, out), a column of W is one contiguous row, and skipping it skips real memory:

                  W (out, in)                        weight_t (in, out)
            x:  ■ · ■ ■ · · ■ ·                 x:
                ▓ ░ ▓ ▓ ░ ░ ▓ ░                 ■   ▓▓▓▓▓▓▓▓▓▓▓▓   read
                ▓ ░ ▓ ▓ ░ ░ ▓ ░                 ·   ────────────   never touched
                ▓ ░ ▓ ▓ ░ ░ ▓ ░                 ■   ▓▓▓▓▓▓▓▓▓▓▓▓   read
                ▓ ░ ▓ ▓ ░ ░ ▓ ░                 ■   ▓▓▓▓▓▓▓▓▓▓▓▓   read
            every line is fetched anyway        ·   ────────────   never touched

So y is a weighted sum of the rows whose input is large. Two things are left to arrange.

Who adds up what. On a CPU each thread owns a range of outputs and walks down all kept rows; its outputs stay in
the first cache. A GPU has ten thousand threads and a 4096 x 4096 layer only 32 tiles of 128 outputs, so the rows
are divided too ("split-K"): tile (j, s) sums the s-th part of the rows for the j-th range of outputs and writes
its partial sum to a buffer of its own; a second, small kernel adds the parts in a fixed order. No output is made of atomics, so
the same input gives the same bits on every run.

Several tokens. From 2 to 8 rows of x (the guesses that a sparse verifier checks) a weight row is read once if any
token keeps its channel, and each token adds it with its own mask.

The limit is bytes of kept rows / memory bandwidth. `python kernel.py` shows how near to it we are (timing.py).

Three backends compute the same function: "triton" (GPU), "c" (CPU, where a C compiler is found), "torch" (anywhere).
Thresholds are compared, and sums are taken, in float32 ("torch" rounds each bag of a 16-bit sum once); a float64
input stays float64 and takes "torch".

    python kernel.py                                          dense against sparse at Llama-2-7B's shapes
    python kernel.py --shapes llama-3-8b --dtype bfloat16 --sparsity 0 0.5
"""
import ctypes
import functools

import torch
import torch.nn.functional as F

from cc import compiled

try:
    import triton
    import triton.language as tl
except ImportError:                                        # there is no Triton for macOS, which has no CUDA either
    triton = None

MAX_ROWS = 8             # more rows than this are a matrix product, bound by arithmetic, not a few vectors


class QuantizedWeight(torch.nn.Module):
    """A transposed weight (in, out) in 8 or 4 bits; quantize.py makes it, this file multiplies with it.

    8 bits: weight[i, j] = scales[j] * (code[i, j] - 128), code from 1 to 255; scales (out,) float32, zeros None
    4 bits: groups of `group` channels share a scale and a zero point for each output:
            weight[i, j] = scales[i // group, j] * (code[i, j] - zeros[i // group, j]), code from 0 to 15
            scales (groups, out) bfloat16, zeros (groups, out) uint8
    codes: (in, words) int32, four or eight to a word, as pack_codes lays them out: a channel is one contiguous run
    """

    def __init__(self, codes, scales, zeros=None, group=None):
        super().__init__()
        for name, tensor in (("codes", codes), ("scales", scales), ("zeros", zeros)):
            self.register_buffer(name, tensor)
        self.group, self.bits, self.shape = group, 4 if group else 8, torch.Size((codes.shape[0], scales.shape[-1]))

    def _apply(self, move, recurse=True):
        """Moves to another device as any module does, but keeps its dtypes whatever the model is cast to."""
        for name, tensor in list(self.named_buffers()):
            setattr(self, name, move(tensor).to(tensor.dtype) if not tensor.is_floating_point() else tensor.to(move(tensor).device))
        return self

    @property
    def device(self):
        return self.codes.device

    def dequantized(self, dtype):
        """The weight (in, out) as it is multiplied with, in floating point."""
        codes, wide = unpack_codes(self.codes, self.bits, self.shape[1]), torch.promote_types(dtype, torch.float32)
        if not self.group:
            return ((codes - 128).to(wide) * self.scales.to(wide)).to(dtype)
        codes = codes.unflatten(0, (-1, self.group)) - self.zeros.int()[:, None]            # (groups, group, out)
        return (codes.to(wide) * self.scales.to(wide)[:, None]).flatten(0, 1).to(dtype)


def words_of(outputs, bits):
    """How many words hold the codes of so many outputs, as pack_codes lays them out."""
    return -(-outputs // (16 * (32 // bits))) * 16


def pack_codes(codes, bits):
    """codes (in, out), integers of 4 or 8 bits -> (in, words) int32.

    With n = 32 / bits codes to a word, 16 words hold 16 n neighbouring outputs: bits k * bits and up of word w are output
    16 k + w, so that shifting 16 words by k * bits gives 16 neighbours. The last 16 n outputs are padded with zeros.
    """
    lanes = 32 // bits
    blocks = F.pad(codes, (0, -codes.shape[1] % (16 * lanes))).unflatten(1, (-1, lanes, 16)).long()
    words = (blocks << torch.arange(0, 32, bits, device=codes.device)[:, None]).sum(2)      # (in, blocks, 16)
    return words.flatten(1).to(torch.uint32).view(torch.int32)


def unpack_codes(words, bits, out):
    """The inverse of pack_codes: (in, out) int32."""
    blocks = words.unflatten(1, (-1, 1, 16)) >> torch.arange(0, 32, bits, device=words.device, dtype=torch.int32)[:, None]
    return (blocks & (1 << bits) - 1).flatten(1)[:, :out]


def sparse_gemv(x, weight_t, threshold, backend=None, counts=None):
    """x with its small channels dropped, times the weight: where(|x| > threshold, x, 0) @ weight_t.

    x: (B, in), B from 1 to 8, floating point
    weight_t: (in, out), contiguous, of x's dtype: the transposed weight of a linear; or a QuantizedWeight
    threshold: a number, a 0-d tensor, or a tensor (in,), one a channel; below 0 keeps all
    backend: "triton", "c", "torch", or None for the fastest there is for the device and dtype
    NaN is never small: it is kept, so that it shows.
    counts: None, or a (2,) int64 tensor: the entries of x that are kept, and all of them, are added to it
    Returns (B, out) in x's dtype. Raises ValueError for shapes and dtypes that do not fit.
    """
    return _group(x, [weight_t], [threshold], backend, counts)


def sparse_gemv_group(x, weights_t, thresholds, backend=None, counts=None):
    """`sparse_gemv` for up to three linears that read the same x, in one launch on a GPU.

    weights_t: list of (in, out_l); thresholds: list, one for each, as in sparse_gemv;
    counts: None or (len(weights_t), 2) int64, contiguous. Returns the outputs side by side, (B, sum of out_l).
    """
    return _group(x, weights_t, thresholds, backend, counts)


def _group(x, weights_t, thresholds, backend, counts, gated=False):
    """The outputs of a group side by side, (B, sum of out_l), or with `gated` silu(first) * second, (B, out)."""
    _check(x, weights_t, counts)
    group = {"triton": _triton_group, "c": _c_group, "torch": _torch_group}.get(backend or best_backend(x))
    if group is None:
        raise ValueError(f'backend is "triton", "c", "torch" or None, not {backend!r}')
    return group(x, weights_t, _vectors(thresholds, x), counts, gated)


def sparse_gated(x, gate_t, up_t, gate_threshold, up_threshold, backend=None, counts=None):
    """silu(gate) * up, of two sparse products with the same x; on a GPU applied where the partial sums meet.

    Shapes as in sparse_gemv_group with two linears of one width; returns (B, out).
    """
    if gate_t.shape != up_t.shape:
        raise ValueError(f"gate is {tuple(gate_t.shape)}, up is {tuple(up_t.shape)}: expected one shape")
    return _group(x, [gate_t, up_t], [gate_threshold, up_threshold], backend, counts, gated=True)


def _gated(y):
    gate, up = y.chunk(2, dim=1)
    return F.silu(gate) * up


def dense(x, weight_t):
    """x (..., in) @ weight_t (in, out), by whichever way is fastest for so many rows; nothing is dropped.

    On a CPU the library's products are made for many rows: one to eight go through the C kernel, which reads the
    weight at the speed of memory. Its float16 products are done row by row with scalars, a hundred times too slow.
    """
    rows, quantized = x.numel() // x.shape[-1], isinstance(weight_t, QuantizedWeight)
    if torch.is_grad_enabled() and x.requires_grad:
        return x @ (weight_t.dequantized(x.dtype) if quantized else weight_t)
    if x.device.type == "cuda" and quantized and rows <= MAX_ROWS and triton is not None and x.dtype != torch.float64:
        return sparse_gemv(x.reshape(rows, -1), weight_t, -1.0).view(*x.shape[:-1], -1)
    if fits_c(x) and c_library() is not None:
        if rows <= MAX_ROWS or (quantized or x.dtype == torch.float16) and rows <= 8 * MAX_ROWS:
            keep_all, parts = torch.tensor(-1.0), x.reshape(rows, -1).split(MAX_ROWS)
            _check(parts[0], [weight_t])
            parts = [_c_group(part, [weight_t], [keep_all], None, gated=False) for part in parts]
            return torch.cat(parts).view(*x.shape[:-1], -1)
    wide = torch.float32 if x.device.type == "cpu" and x.dtype == torch.float16 else x.dtype
    return (x.to(wide) @ (weight_t.dequantized(wide) if quantized else weight_t.to(wide))).to(x.dtype)


def best_backend(x):
    """The name of the fastest backend for a tensor of x's device and dtype."""
    if x.dtype == torch.float64:
        return "torch"
    if x.device.type == "cuda" and triton is not None:
        return "triton"
    return "c" if x.device.type == "cpu" and c_library() is not None else "torch"


def _check(x, weights_t, counts=None):
    if x.ndim != 2 or not 1 <= x.shape[0] <= MAX_ROWS or not x.is_floating_point():
        raise ValueError(f"x is {x.dtype} {tuple(x.shape)}, expected floating point (1 to {MAX_ROWS}, in)")
    first = weights_t[0]
    for w in weights_t:
        if isinstance(w, QuantizedWeight) != isinstance(first, QuantizedWeight):
            raise ValueError("quantized and other weights in one group: expected all of one kind")
        if isinstance(w, QuantizedWeight):
            if w.shape[0] != x.shape[1] or w.device != x.device:
                raise ValueError(f"weight_t is {w.bits} bits, {tuple(w.shape)} on {w.device}, expected ({x.shape[1]}, out) "
                                 f"on {x.device}, as x is")
            if (w.bits, w.group) != (first.bits, first.group):
                raise ValueError(f"codes of {w.bits} and of {first.bits} bits, or of different groups, together: expected all of one kind")
            continue
        if w.ndim != 2 or w.shape[0] != x.shape[1] or w.dtype != x.dtype or w.device != x.device:
            raise ValueError(f"weight_t is {w.dtype} {tuple(w.shape)} on {w.device}, expected "
                             f"{x.dtype} ({x.shape[1]}, out) on {x.device}, as x is")
        if not w.is_contiguous():
            raise ValueError("weight_t is not contiguous: its rows must be the input channels, one after another")
    if counts is not None and (counts.dtype != torch.int64 or counts.device != x.device or not counts.is_contiguous()
                               or counts.numel() != 2 * len(weights_t)):
        raise ValueError(f"counts is {counts.dtype} {tuple(counts.shape)} on {counts.device}, expected contiguous int64 "
                         f"({len(weights_t)}, 2) on {x.device}")


def _vectors(thresholds, x):
    """Each threshold as a tensor of x's device and of the comparison's dtype: () or (in,)."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    vectors = []
    for t in thresholds:
        if not isinstance(t, torch.Tensor):
            t = torch.full((), t, device=x.device, dtype=dtype)    # a CUDA graph cannot replay a copy from the host
        elif t.dtype != dtype or t.device != x.device or not t.is_contiguous():
            t = t.to(x.device, dtype).contiguous()
        vectors.append(t)
    for t in vectors:
        if t.shape not in ((), (x.shape[1],)):
            raise ValueError(f"threshold is {tuple(t.shape)}, expected a number or ({x.shape[1]},)")
    return vectors


# ---------------------------------------------------------------------------------------------------------
# PyTorch: an embedding lookup is a gather of rows, and `embedding_bag` sums what it gathers with weights.

def _torch_group(x, weights_t, thresholds, counts, gated):
    y = torch.cat([_torch_gemv(x, weight_t, threshold, None if counts is None else counts.view(-1, 2)[i])
                   for i, (weight_t, threshold) in enumerate(zip(weights_t, thresholds))], dim=1)
    return _gated(y) if gated else y


def _torch_gemv(x, weight_t, threshold, counts):
    """One bag is one thread's work, so each row of x is cut into a few bags, added up at the end."""
    dtype = x.dtype
    if isinstance(weight_t, QuantizedWeight):              # whole, in float32: slow, but right
        weight_t = weight_t.dequantized(threshold.dtype)
        x = x.to(threshold.dtype)
    keep = ~(x.to(threshold.dtype).abs() <= threshold)                                      # (B, in)
    row, channel = keep.nonzero(as_tuple=True)
    if counts is not None:
        counts += torch.tensor([len(channel), x.numel()], device=counts.device)
    bags = 4 * torch.get_num_threads()
    ends = keep.sum(1).cumsum(0).tolist()
    starts = [begin + (end - begin) * bag // bags for begin, end in zip([0] + ends, ends) for bag in range(bags)]
    sums = F.embedding_bag(channel, weight_t, torch.tensor(starts, device=x.device), mode="sum",
                           per_sample_weights=x[row, channel])                              # (B * bags, out)
    return sums.view(len(x), bags, -1).sum(1, dtype=threshold.dtype).to(dtype)


# ---------------------------------------------------------------------------------------------------------
# C: first the kept channels are listed, then each thread walks down the listed rows over its range of outputs.
# A row is read in words of 32 bits. A word holds one weight or several, its lanes, and unpacking one lane of
# many words at once is a shift or two, which a compiler turns into vector instructions:
#     float32    one lane
#     bfloat16   two: the upper half of a float32 each: shift, or mask
#     float16    two: sign, exponent and mantissa moved to their places in a float32; that is the value / 2^112, which
#                the inputs make up for
#     int8       four, int4: eight: shift, mask and convert. What stands for zero comes off when a sum is finished, and so
#                does the scale: Σ x · scale · (code - zero) = scale · (Σ x · code - zero · Σ x)

C_SOURCE = r"""
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#ifdef _OPENMP
#include <omp.h>
#endif

#define BATCH 4          // kept rows added in one pass over the outputs, so that these are loaded and stored less
#define ROOM 8192        // sums a thread holds at a time, of all tokens (8 at most): 32 KB, which the first cache holds

typedef uint32_t __attribute__((aligned(1), may_alias)) word;
static inline float number(uint32_t bits) { float value; memcpy(&value, &bits, 4); return value; }

#define F32_LANE(w, k)   number(w)
#define BF16_LANE(w, k)  number(k ? (w) & 0xffff0000u : (w) << 16)
#define F16_LANE(w, k)   number((uint32_t)((int32_t)(k ? (w) : (w) << 16) >> 3) & 0x8fffe000u)
#define I8_LANE(w, k)    (float)(int32_t)((w) >> 8 * k & 255)
#define I4_LANE(w, k)    (float)(int32_t)((w) >> 4 * k & 15)

// What a sum becomes in the output j. total: Σ x, of the inputs kept.
#define AS_IT_IS(sum, j)   (sum)
#define I8_SCALED(sum, j)  (((const float *)scale)[j] * ((sum) - 128 * total))
#define I4_SCALED(sum, j)  (number((uint32_t)((const uint16_t *)scale)[j] << 16) * ((sum) - zero[j] * total))

// The channels that any token keeps, and their inputs. Channels come in spans, which are listed by different threads, and
// which are the groups of an int4 weight. A span is padded to whole groups of BATCH with inputs of zero. In each group the
// inputs stand token by token, so that one load serves a token:
//     channel  c0 c1 c2 c3 | c4 ...        input  (token 0: x[c0] x[c1] x[c2] x[c3]) (token 1: ...) | ...
// A token that does not keep a channel which another one keeps has zero there.
struct kept { long room; int *channel; float *input; int *n; float *total; int64_t *entries; };    // room: of one span

static void list_kept(struct kept *list, long span, long s, const float *x, float factor, const float *threshold, long step,
                      long tokens, long in) {
    int *channel = list->channel + s * list->room, n = 0;
    float *input = list->input + s * list->room * tokens;
    int64_t entries = 0;
    for (long i = s * span; i < (s + 1) * span && i < in; i++) {
        float *place = input + n / BATCH * BATCH * tokens + n % BATCH;
        int needed = 0;
        for (long t = 0; t < tokens; t++) {
            int keep = !(fabsf(x[t * in + i]) <= threshold[i * step]);       // NaN is kept
            place[t * BATCH] = keep ? factor * x[t * in + i] : 0.0f;
            needed |= keep;
            entries += keep;
        }
        channel[n] = i;
        n += needed;
    }
    for (; n % BATCH; n++) {
        channel[n] = channel[n - 1];
        for (long t = 0; t < tokens; t++) input[n / BATCH * BATCH * tokens + t * BATCH + n % BATCH] = 0.0f;
    }
    for (long t = 0; t < tokens; t++) {
        float total = 0;                               // what a zero point is multiplied by
        for (long k = 0; k < n; k++) total += input[k / BATCH * BATCH * tokens + t * BATCH + k % BATCH];
        list->total[s * tokens + t] = total;
    }
    list->n[s] = n;
    list->entries[s] = entries;
}

// Memory that the calling thread keeps from call to call: fresh pages cost more than the list that is written to them.
static char *scratch(size_t size) {
    static _Thread_local char *held;
    static _Thread_local size_t room;
    if (size > room) {
        free(held);
        held = malloc(size);
        room = held ? size : 0;
    }
    return held;
}

/* BITS of a weight; FACTOR on the inputs. Where weights are CODES, 16 words hold LANES runs of 16 outputs, lane by lane, and
   sums are finished span by span; else a word holds LANES neighbours. */
#define DEFINE(NAME, BITS, LANE, FACTOR, FINISH, CODES)                                                           \
enum { NAME##_LANES = 32 / BITS, NAME##_STEP = CODES ? 1 : NAME##_LANES };                                        \
                                                                                                                  \
/* sums[t][k][j] += input[t][r] * lane k of row[r][j] for BATCH rows; TOKENS is a constant where this is inlined. \
   The last word may be cut short: `tail` lanes of it. */                                                         \
static inline __attribute__((always_inline)) void NAME##_add(const int TOKENS, const char *const *rows,           \
        const float *restrict input, float *restrict sums, long words, long tail, long lane, long stride) {       \
    const word *row[BATCH];                                                                                       \
    for (int r = 0; r < BATCH; r++) row[r] = (const word *)rows[r];                                               \
    VECTORIZE                                                                                                     \
    for (long j = 0; j < words; j++)                                                                              \
        UNROLL                                                                                                    \
        for (int k = 0; k < NAME##_LANES; k++)                                                                    \
            UNROLL                                                                                                \
            for (int t = 0; t < TOKENS; t++) {                                                                    \
                float sum = 0;                                                                                    \
                UNROLL                                                                                            \
                for (int r = 0; r < BATCH; r++) sum += input[t * BATCH + r] * LANE(row[r][j], k);                 \
                sums[t * stride + k * lane + j] += sum;                                                           \
            }                                                                                                     \
    for (int r = 0; tail && r < BATCH; r++) {                                                                     \
        uint32_t last = 0;                                                                                        \
        memcpy(&last, row[r] + words, (tail * BITS + 7) / 8);                                                     \
        for (int t = 0; t < TOKENS; t++)                                                                          \
            for (int k = 0; k < tail; k++) sums[t * stride + k * lane + words] += input[t * BATCH + r] * LANE(last, k); \
    }                                                                                                             \
}                                                                                                                 \
                                                                                                                  \
/* Adds the sums (LANES, lane) of one token to its outputs `to` (columns), and clears them. */                    \
static void NAME##_finish(float *restrict sums, float *restrict to, long columns, long lane, const void *scale,   \
                          const uint8_t *zero, float total) {                                                     \
    for (long j = 0; NAME##_LANES * j < columns; j += 16)                                                         \
        for (int k = 0; k < NAME##_LANES; k++) {                                                                  \
            long first = NAME##_LANES * j + (CODES ? 16 : 1) * k;                                                 \
            long count = (columns - first + NAME##_STEP - 1) / NAME##_STEP;                                       \
            float *restrict of = sums + k * lane + j;                                                             \
            if (count >= 16)                                                                                      \
                for (int i = 0; i < 16; i++) { to[first + NAME##_STEP * i] += FINISH(of[i], first + NAME##_STEP * i); of[i] = 0; } \
            else                                                                                                  \
                for (int i = 0; i < count; i++) { to[first + NAME##_STEP * i] += FINISH(of[i], first + NAME##_STEP * i); of[i] = 0; } \
        }                                                                                                         \
}                                                                                                                 \
                                                                                                                  \
/* One thread's outputs [begin, end) of one linear: y[t][j], rows of y `width` apart. */                          \
static void NAME##_range(const struct kept *list, long spans, const char *weight, const char *scale, const uint8_t *zero, \
                         float *y, long width, long tokens, long out, long begin, long end) {                     \
    float sums[ROOM] __attribute__((aligned(64)));                                                                \
    long stride = ROOM / tokens, lane = stride / NAME##_LANES / 16 * 16;                                          \
    long pitch = CODES ? (out + 16 * NAME##_LANES - 1) / (16 * NAME##_LANES) * 64 : out * BITS / 8;    /* bytes of a row */ \
    for (long first = begin; first < end; first += NAME##_LANES * lane) {                                         \
        long columns = end - first < NAME##_LANES * lane ? end - first : NAME##_LANES * lane;                     \
        long words = CODES ? (columns + 16 * NAME##_LANES - 1) / (16 * NAME##_LANES) * 16 : columns / NAME##_LANES; \
        long tail = CODES ? 0 : columns % NAME##_LANES;                                                           \
        memset(sums, 0, sizeof sums);                                                                             \
        for (long t = 0; t < tokens; t++) memset(y + t * width + first, 0, columns * sizeof(float));              \
        for (long s = 0; s < spans; s++) {                                                                        \
            for (long k = 0; k < list->n[s]; k += BATCH) {                                                        \
                const char *rows[BATCH];                                                                          \
                for (int r = 0; r < BATCH; r++)                                                                   \
                    rows[r] = weight + list->channel[s * list->room + k + r] * pitch + first * BITS / 8;          \
                /* where the next rows begin is not foreseen by the processor, as what follows in a row is */     \
                for (int r = 0; k + BATCH < list->n[s] && r < 2 * BATCH; r++)                                     \
                    __builtin_prefetch(weight + list->channel[s * list->room + k + BATCH + r / 2] * pitch + first * BITS / 8 + r % 2 * 64); \
                /* four tokens at a time keep the sums in registers; the rows are in the cache by then */         \
                for (long t = 0; t < tokens; t += 4) {                                                            \
                    const float *input = list->input + (s * list->room + k) * tokens + t * BATCH;                 \
                    float *to = sums + t * stride;                                                                \
                    switch (tokens - t) {                                                                         \
                    case 1:  NAME##_add(1, rows, input, to, words, tail, lane, stride); break;                    \
                    case 2:  NAME##_add(2, rows, input, to, words, tail, lane, stride); break;                    \
                    case 3:  NAME##_add(3, rows, input, to, words, tail, lane, stride); break;                    \
                    default: NAME##_add(4, rows, input, to, words, tail, lane, stride);                           \
                    }                                                                                             \
                }                                                                                                 \
            }                                                                                                     \
            if (CODES ? list->n[s] > 0 : s == spans - 1)                                                          \
                for (long t = 0; t < tokens; t++)                                                                 \
                    NAME##_finish(sums + t * stride, y + t * width + first, columns, lane,                        \
                                  scale + (BITS == 4 ? 2 * (s * out + first) : 4 * first),                        \
                                  zero + s * out + first, list->total[s * tokens + t]);                           \
        }                                                                                                         \
    }                                                                                                             \
}                                                                                                                 \
                                                                                                                  \
/* x (tokens, in); of each linear l: weight[l] (in, out[l]), its scale[l] and zero[l] if it is quantized, threshold[l] \
   (in) or one, by step[l]; counts[l] (2); y (tokens, sum of out), the linears side by side. Channels in spans of `span`. \
   Returns 0, or 1 where memory ran out. */                                                                       \
int NAME(const float *x, int linears, const char *const *weight, const char *const *scale, const uint8_t *const *zero, \
         const float *const *threshold, const long *step, const long *out, float *y, long tokens, long in, long span, \
         int threads, int64_t *counts) {                                                                          \
    long spans = (in + span - 1) / span, padded = (span + BATCH - 1) / BATCH * BATCH, width = 0;                  \
    struct kept list[3];                                                                                          \
    for (int l = 0; l < linears; l++) width += out[l];                                                            \
    long each = spans * (sizeof(int64_t) + sizeof(int) * (1 + padded) + sizeof(float) * tokens * (1 + padded)) + 64;   \
    char *place = scratch(linears * each);                                                                        \
    if (!place) return 1;                                                                                         \
    for (int l = 0; l < linears; l++) {                                                                           \
        char *at = place + l * (each / 8 * 8);                                                                    \
        list[l].room = padded;                                                                                    \
        list[l].entries = (int64_t *)at;                                                                          \
        list[l].input = (float *)(list[l].entries + spans);                                                       \
        list[l].total = list[l].input + spans * padded * tokens;                                                  \
        list[l].channel = (int *)(list[l].total + spans * tokens);                                                \
        list[l].n = list[l].channel + spans * padded;                                                             \
    }                                                                                                             \
    PARALLEL                                                                                                      \
    {                                                                                                             \
        for (long each_span = MEMBER; each_span < linears * spans; each_span += TEAM) {                           \
            long l = each_span / spans;                                                                           \
            list_kept(&list[l], span, each_span % spans, x, FACTOR, threshold[l], step[l], tokens, in);           \
        }                                                                                                         \
        BARRIER                                                                                                   \
        for (long l = 0, offset = 0; l < linears; offset += out[l++]) {                                           \
            long share = ((out[l] + TEAM - 1) / TEAM + 127) / 128 * 128;                                          \
            long begin = MEMBER * share, end = begin + share < out[l] ? begin + share : out[l];                   \
            NAME##_range(&list[l], spans, weight[l], scale[l], zero[l], y + offset, width, tokens, out[l], begin, end); \
        }                                                                                                         \
    }                                                                                                             \
    for (int l = 0; l < linears; l++) {                                                                           \
        for (long s = 0; s < spans; s++) counts[2 * l] += list[l].entries[s];                                     \
        counts[2 * l + 1] += tokens * in;                                                                         \
    }                                                                                                             \
    return 0;                                                                                                     \
}

#define PRAGMA(text) _Pragma(#text)
#ifdef __clang__
#define VECTORIZE PRAGMA(clang loop vectorize(assume_safety))
#define UNROLL PRAGMA(clang loop unroll(full))
#else
#define VECTORIZE PRAGMA(GCC ivdep)
#define UNROLL PRAGMA(GCC unroll 8)
#endif
#ifdef _OPENMP
#define PARALLEL PRAGMA(omp parallel num_threads(threads))
#define BARRIER PRAGMA(omp barrier)
#define TEAM omp_get_num_threads()
#define MEMBER omp_get_thread_num()
#else
#define PARALLEL
#define BARRIER
#define TEAM 1
#define MEMBER 0
#endif

DEFINE(f32, 32, F32_LANE, 1.0f, AS_IT_IS, 0)
DEFINE(bf16, 16, BF16_LANE, 1.0f, AS_IT_IS, 0)
DEFINE(f16, 16, F16_LANE, 0x1p112f, AS_IT_IS, 0)
DEFINE(i8, 8, I8_LANE, 1.0f, I8_SCALED, 1)
DEFINE(i4, 4, I4_LANE, 1.0f, I4_SCALED, 1)
"""
C_NAMES = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16", 8: "i8", 4: "i4"}    # by dtype, or bits of a code
SPAN = 512               # channels that one thread lists at a time; of an int4 weight, its group


@functools.cache
def c_library():
    """C_SOURCE compiled for this processor, its functions declared, or None where no C compiler builds it."""
    library = compiled(C_SOURCE)
    if library is not None:
        pointer, long, integer = ctypes.c_void_p, ctypes.c_long, ctypes.c_int
        for name in C_NAMES.values():
            getattr(library, name).argtypes = [pointer, integer, *[pointer] * 7, long, long, long, integer, pointer]
    return library


def _c_group(x, weights_t, thresholds, counts, gated):
    if not fits_c(x) or c_library() is None:
        raise ValueError(f'backend "c" needs a C compiler and float32, float16 or bfloat16 on the CPU, not '
                         f'{x.dtype} on {x.device.type}')
    y = torch.empty(len(x), sum(w.shape[1] for w in weights_t), dtype=torch.float32)
    counts = torch.empty(len(weights_t), 2, dtype=torch.int64) if counts is None else counts
    wide = x.float().contiguous()
    function, arguments, _ = c_call(wide, len(x), weights_t, thresholds, counts, y)
    if function(*arguments):
        raise MemoryError("no memory for the list of kept channels")
    return (_gated(y) if gated else y).to(x.dtype)


def c_call(x, rows, weights_t, thresholds, counts, y):
    """What sets y (rows, sum of out_l) to the products of a group: (C function, its arguments, what must live until it is called).

    x (rows, in) and y: float32, contiguous; rows: an int, or a ctypes.c_long that may change between calls; weights_t, thresholds
    and counts as in sparse_gemv_group, checked, and tensors. The function returns 0, or 1 where memory ran out.
    """
    n, outs, first = len(weights_t), [w.shape[1] for w in weights_t], weights_t[0]
    # Channels come in spans, which the threads share out for listing. A span of int4 codes has one scale: it is their group.
    span, scales, zeros = SPAN, [], []
    if isinstance(first, QuantizedWeight):
        kind, span, codes = first.bits, first.group or SPAN, [w.codes for w in weights_t]
        scales, zeros = [w.scales for w in weights_t], [w.zeros for w in weights_t if w.group]
    else:
        kind, codes = first.dtype, [w.detach() for w in weights_t]

    def addresses(tensors):
        return (ctypes.c_void_p * n)(*[tensor.data_ptr() for tensor in tensors])

    longs = ctypes.c_long * n
    arguments = (x.data_ptr(), n, addresses(codes), addresses(scales), addresses(zeros), addresses(thresholds),
                 longs(*[t.ndim for t in thresholds]), longs(*outs), y.data_ptr(), rows, x.shape[1], span, torch.get_num_threads(),
                 counts.data_ptr())
    return getattr(c_library(), C_NAMES[kind]), arguments, (x, codes, scales, zeros, thresholds, counts, y)


def fits_c(x):
    """Whether a tensor's device and dtype are of those that the C kernel takes."""
    return x.device.type == "cpu" and x.dtype in (torch.float32, torch.bfloat16, torch.float16)


# ---------------------------------------------------------------------------------------------------------
# Triton: the same sum, cut into tiles. Program (tile, split) adds the rows of its split for its range of outputs;
# where a row is masked its load is not issued. Up to three linears stand side by side, one tile range behind another.

if triton is not None:

    @triton.jit
    def partial_sums_kernel(x_ptr, weight0_ptr, weight1_ptr, weight2_ptr, scale0_ptr, scale1_ptr, scale2_ptr,
                            zero0_ptr, zero1_ptr, zero2_ptr, threshold0_ptr, threshold1_ptr, threshold2_ptr,
                            partial_ptr, counts_ptr, rows, channels, out0, out1, out2, step0, step1, step2,
                            channels_per_split, ROWS: tl.constexpr, BLOCK_IN: tl.constexpr, BLOCK_OUT: tl.constexpr,
                            COUNT: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr):
        """partial[split, row, output] = sum over the split's channels of kept x[row, channel] * weight[channel, output]

        grid (tiles of all linears, splits). x (rows, channels); partial float32 (splits, rows, out0 + out1 + out2);
        threshold_l float32 (channels,) with step_l 1, or () with step_l 0. BITS 0: weight_l (channels, out_l), scale and zero
        not read. BITS 8 or 4: weight_l, scale_l and zero_l are the codes, scales and zeros of a QuantizedWeight, and
        GROUP its group, a multiple of BLOCK_IN.
        """
        LANES: tl.constexpr = 32 // BITS if BITS else 1    # weights in a word
        WORDS: tl.constexpr = BLOCK_OUT // LANES
        tile, split = tl.program_id(0), tl.program_id(1)
        tiles0, tiles1 = tl.cdiv(out0, BLOCK_OUT), tl.cdiv(out1, BLOCK_OUT)
        # Which of the linears is this tile's?
        linear, first_tile, first_output, outputs, step = 0, 0, 0, out0, step0
        weight_ptr, scale_ptr, zero_ptr, threshold_ptr = weight0_ptr, scale0_ptr, zero0_ptr, threshold0_ptr
        if tile >= tiles0 + tiles1:
            linear, first_tile, first_output, outputs, step = 2, tiles0 + tiles1, out0 + out1, out2, step2
            weight_ptr, scale_ptr, zero_ptr, threshold_ptr = weight2_ptr, scale2_ptr, zero2_ptr, threshold2_ptr
        elif tile >= tiles0:
            linear, first_tile, first_output, outputs, step = 1, tiles0, out0, out1, step1
            weight_ptr, scale_ptr, zero_ptr, threshold_ptr = weight1_ptr, scale1_ptr, zero1_ptr, threshold1_ptr
        row = tl.arange(0, ROWS)                                                            # (ROWS,)
        word, lane = tl.arange(0, WORDS), tl.arange(0, LANES)
        if BITS == 0:
            output = (tile - first_tile) * BLOCK_OUT + word[None, :] + lane[:, None]        # (1, WORDS)
            pitch = outputs
        else:                                              # 16 words hold LANES runs of 16 outputs
            output = (tile - first_tile) * BLOCK_OUT + (word // 16 * 16 * LANES + word % 16)[None, :] + 16 * lane[:, None]
            pitch = tl.cdiv(outputs, 16 * LANES) * 16      # (LANES, WORDS)
        column = (tile - first_tile) * WORDS + word                                         # (WORDS,)
        sums = tl.zeros((ROWS, BLOCK_IN, LANES, WORDS), tl.float32)      # added up over BLOCK_IN once, at the end
        kept = tl.zeros((ROWS, BLOCK_IN), tl.int32)
        seen = tl.zeros((ROWS, BLOCK_IN), tl.int32)
        for start in range(split * channels_per_split, (split + 1) * channels_per_split, BLOCK_IN):
            channel = start + tl.arange(0, BLOCK_IN)                                        # (BLOCK_IN,)
            inside = (row < rows)[:, None] & (channel < channels)[None, :]                  # (ROWS, BLOCK_IN)
            x = tl.load(x_ptr + row[:, None] * channels + channel[None, :], mask=inside, other=0.0).to(tl.float32)
            threshold = tl.load(threshold_ptr + channel * step, mask=channel < channels, other=0.0)
            keep = (tl.abs(x) <= threshold[None, :]) == 0                                   # so that NaN is kept
            keep = keep & inside
            needed = tl.max(keep.to(tl.int32), axis=0) > 0                                  # by any row
            words = tl.load(weight_ptr + channel.to(tl.int64)[:, None] * pitch + column[None, :],
                            mask=needed[:, None] & (column < pitch)[None, :], other=0)      # (BLOCK_IN, WORDS)
            if BITS == 0:
                weight = words[:, None, :].to(tl.float32)                                   # (BLOCK_IN, LANES, WORDS)
            else:
                codes = words[:, None, :] >> (BITS * lane)[None, :, None] & (1 << BITS) - 1
                if BITS == 8:
                    weight = (codes - 128).to(tl.float32)
                else:
                    place = tl.minimum(start, channels - 1) // GROUP * outputs + output     # (LANES, WORDS)
                    scale = tl.load(scale_ptr + place, mask=output < outputs, other=0.0).to(tl.float32)
                    zero = tl.load(zero_ptr + place, mask=output < outputs, other=0).to(tl.int32)
                    weight = (codes - zero[None, :, :]).to(tl.float32) * scale[None, :, :]
            sums += tl.where(keep, x, 0.0)[:, :, None, None] * weight[None, :, :, :]
            kept += keep.to(tl.int32)
            seen += inside.to(tl.int32)
        found = tl.sum(sums, axis=1)                                                        # (ROWS, LANES, WORDS)
        if BITS == 8:
            found *= tl.load(scale_ptr + output, mask=output < outputs, other=0.0)[None, :, :]
        place = (split * rows + row[:, None, None]) * (out0 + out1 + out2) + first_output + output[None, :, :]
        tl.store(partial_ptr + place, found, mask=(row < rows)[:, None, None] & (output < outputs)[None, :, :])
        if COUNT:
            if tile == first_tile:                         # one tile of each linear counts for all
                tl.atomic_add(counts_ptr + 2 * linear, tl.sum(tl.sum(kept, axis=1), axis=0).to(tl.int64))
                tl.atomic_add(counts_ptr + 2 * linear + 1, tl.sum(tl.sum(seen, axis=1), axis=0).to(tl.int64))

    @triton.jit
    def put_together_kernel(partial_ptr, y_ptr, rows, outputs, splits,
                            GATED: tl.constexpr, SPLITS: tl.constexpr, BLOCK: tl.constexpr):
        """y[row, output] = sum over splits of partial (splits, rows, outputs), in a fixed order.

        GATED: the outputs are gate and up, one behind the other, and y (rows, outputs / 2) is silu(gate) * up.
        """
        row = tl.program_id(1)
        width = outputs // 2 if GATED else outputs
        output = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)                             # (BLOCK,)
        split = tl.arange(0, SPLITS)                                                        # (SPLITS,)
        place = (split[:, None] * rows + row) * outputs + output[None, :]
        mask = (split < splits)[:, None] & (output < width)[None, :]
        y = tl.sum(tl.load(partial_ptr + place, mask=mask, other=0.0), axis=0)
        if GATED:
            up = tl.sum(tl.load(partial_ptr + place + width, mask=mask, other=0.0), axis=0)
            y = y / (1.0 + tl.exp(-y)) * up
        tl.store(y_ptr + row * width + output, y.to(y_ptr.dtype.element_ty), mask=output < width)


@functools.cache
def _programs(device):
    """How many programs fill the device: four for each of its multiprocessors."""
    if device.type == "cuda":
        return 4 * torch.cuda.get_device_properties(device).multi_processor_count
    return 16                                              # the interpreter runs them one by one


def tile(rows):
    """The channels and outputs of the weights a program holds at once, in 16-byte loads over 128 threads: 32 x 128, and
    fewer channels where there are more rows, whose sums need the registers."""
    return {"BLOCK_IN": max(32 // rows, 8), "BLOCK_OUT": 128}


def _triton_group(x, weights_t, thresholds, counts, gated):
    if triton is None or x.dtype == torch.float64:
        raise ValueError(f'backend "triton" needs Triton and float32, float16 or bfloat16, not {x.dtype}')
    if x.device.type != "cuda" and isinstance(partial_sums_kernel, triton.runtime.JITFunction):
        raise ValueError('backend "triton" needs a GPU, or TRITON_INTERPRET=1 set before triton is imported')
    (rows, channels), outs, first = x.shape, [w.shape[1] for w in weights_t], weights_t[0]
    bits, group, weights, scales, zeros = 0, 0, weights_t, weights_t, weights_t
    if isinstance(first, QuantizedWeight):
        bits, group, weights, scales = first.bits, first.group or 0, [w.codes for w in weights_t], [w.scales for w in weights_t]
        zeros = [w.zeros for w in weights_t] if group else weights
    padded = triton.next_power_of_2(rows)
    block_in, block_out = tile(padded).values()
    tiles = sum(triton.cdiv(out, block_out) for out in outs)
    splits = max(1, min(triton.cdiv(_programs(x.device), tiles), triton.cdiv(channels, block_in), 64))
    per_split = triton.cdiv(triton.cdiv(channels, splits), block_in) * block_in
    splits = triton.cdiv(channels, per_split)
    x = x.contiguous()
    partial = torch.empty(splits, rows, sum(outs), device=x.device, dtype=torch.float32)
    y = torch.empty(rows, outs[0] if gated else sum(outs), device=x.device, dtype=x.dtype)

    def three(given):                                      # absent linears have no outputs, so no tile reaches them
        return [*given, *[given[0]] * (3 - len(outs))]

    block = 64
    with torch.cuda.device_of(x):                          # Triton launches on the current device
        partial_sums_kernel[(tiles, splits)](
            x, *three(weights), *three(scales), *three(zeros), *three(thresholds), partial, partial if counts is None else counts,
            rows, channels, *outs, *[0] * (3 - len(outs)), *[t.ndim for t in three(thresholds)], per_split,
            ROWS=padded, BLOCK_IN=block_in, BLOCK_OUT=block_out, COUNT=counts is not None, BITS=bits, GROUP=group, num_warps=4)
        put_together_kernel[(triton.cdiv(y.shape[1], block), rows)](
            partial, y, rows, sum(outs), splits, GATED=gated, SPLITS=triton.next_power_of_2(splits), BLOCK=block, num_warps=4)
    return y


if __name__ == "__main__":
    from cli import command_line
    from timing import main
    command_line(main)
