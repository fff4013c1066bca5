"""Fewer bits a weight, together with fewer weights.

A weight of 16 bits can be rounded to 8 or 4, and the model hardly notices. Decoding is bound by the
bytes it reads, and skipping a column saves as large a share of 4 bits as of 16: the gains multiply.

    bytes a weight       dense    50 % sparse
    bfloat16             2        1
    int8                 1        0.5
    int4                 0.52     0.26           128 weights share a scale and a zero point, 3 bytes

int8, one scale for each output (a row of W, a column of the transposed weight):

    scale = max|w| / 127        code = round(w / scale)              w ≈ scale * code

int4 has sixteen values, too few for a whole row: each group of 128 inputs of an output has a range
of its own. (Of 96, 64 or 32 where 128 does not divide the inputs of all linears.)

    scale = (high - low) / 15   code = round((w - low) / scale)      w ≈ scale * (code - zero)

    weights of a group     low ─────┬───┬───┬───┬── 0 ──┬───┬───┬───┬───── high       sixteen steps
    clipped                    low ──┬──┬──┬──┬ 0 ┬──┬──┬──┬── high                   finer steps

Where a few weights are large, cutting them off makes the steps of all others finer: of some ratios,
each group takes the one with the least squared error. Quantized are the linears of the blocks and,
in 8 bits unless `head_bits` says otherwise, the embedding and the head.

Decoding unpacks in registers, in the pass that skips. On a CPU whose instructions multiply bytes
the activations are rounded to 8 bits as well (see C below); elsewhere, and with
--float-activations, they stay as they are. The activations of a quantized model differ a little, so
it is calibrated anew.

The seams: `sparsify(model, thresholds, make=...)` makes a `QuantizedLinear`, which is a
SparseLinear; its products stand in `kernel.BACKENDS`, as codes-c, codes-torch and, from fused.py,
codes-triton; folders.py calls `shape` for a folder that quantize.py has written.
"""
import ctypes
import functools

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import kernel
from beyond import record
from model import InputError, linear_names, progress, refusing, require
from sparsify import SparseLinear, TransposedEmbedding, sparsify

GROUPS = (128, 96, 64, 32)                 # inputs that share a scale: the first that fits
CLIPPING = (1.0, 0.95, 0.9, 0.85, 0.8)     # of a group's range: those tried
AT_ONCE = 1 << 12                          # outputs that are rounded at a time: whole words
METHOD = "minteal"                         # what config.json calls a checkpoint of quantize.py
VERSION = 2                                # 1: the head and the embedding are as they were
EMBEDDING = "model.embed_tokens"


# --------------------------------------------------------------------------------------------------
# Codes

class QuantizedWeight(nn.Module):
    """A transposed weight (in, out) in 8 or 4 bits.

    8 bits: weight[i, j] = scales[j] * (code[i, j] - 128), code from 1 to 255;
            scales (out,) float32, zeros None, group None
    4 bits: `group` neighbouring channels have a scale and a zero point for each output:
            weight[i, j] = scales[i // group, j] * (code[i, j] - zeros[i // group, j]), code 0 to 15
            scales (groups, out) bfloat16, zeros (groups, out) uint8
    codes: (in, words) int32, as pack_codes lays them out: a channel is one contiguous run
    """

    def __init__(self, codes, scales, zeros=None, group=None):
        super().__init__()
        self.register_buffer("codes", codes)
        self.register_buffer("scales", scales)
        self.register_buffer("zeros", zeros)
        self.group = group
        self.bits = 4 if group else 8
        self.shape = torch.Size((codes.shape[0], scales.shape[-1]))

    def _apply(self, function, recurse=True):
        """Move as any module does, but keep the dtypes whatever the model is cast to."""
        device = function(self.scales[:0]).device
        return super()._apply(lambda tensor: tensor.to(device), recurse)

    @property
    def nbytes(self):
        return sum(tensor.nbytes for tensor in self.buffers())

    def dequantized(self, dtype):
        """Return the weight (in, out) in floating point."""
        return self.numbers(unpack_codes(self.codes, self.bits, self.shape[1]), slice(None), dtype)

    def t(self):
        """Return the weight in floating point, transposed: (out, in) float32, as of a tensor."""
        return self.dequantized(torch.float32).t()

    def index_select(self, dimension, outputs):
        """Return the columns `outputs` (n,) as (in, n) float32, as a tensor's index_select(1, ...).

        For sparsify.TransposedEmbedding: a column is the embedding of a token.
        """
        size = 16 * 32 // self.bits      # codes of a block, see pack_codes
        block, inside = outputs // size, outputs % size
        words = self.codes.index_select(1, 16 * block + inside % 16)            # (in, n)
        codes = words >> self.bits * (inside // 16) & (1 << self.bits) - 1
        return self.numbers(codes, outputs, torch.float32)

    def numbers(self, codes, outputs, dtype):
        """Return what codes (in, n) of some outputs stand for, (in, n)."""
        wide = torch.promote_types(dtype, torch.float32)
        scales = self.scales[..., outputs].to(wide)
        if self.bits == 8:
            return ((codes - 128).to(wide) * scales).to(dtype)
        codes = codes.unflatten(0, (-1, self.group))                            # (groups, group, n)
        zeros = self.zeros[:, None, outputs].int()
        return ((codes - zeros).to(wide) * scales[:, None]).flatten(0, 1).to(dtype)


def pack_codes(codes, bits):
    """Return codes (in, out), integers of 4 or 8 bits, as words (in, words) int32.

    With n = 32 / bits codes to a word, 16 words hold 16 n neighbouring outputs: bits k * bits and
    up of word w are output 16 k + w, so that shifting 16 words by k * bits gives 16 neighbours, a
    vector. The last 16 n outputs are padded with zeros.
    """
    lanes = 32 // bits
    padded = F.pad(codes, (0, -codes.shape[1] % (16 * lanes)))
    blocks = padded.unflatten(1, (-1, lanes, 16)).long()                       # (in, blocks, n, 16)
    shifts = torch.arange(0, 32, bits, device=codes.device)[:, None]
    words = (blocks << shifts).sum(2)                                           # (in, blocks, 16)
    return words.flatten(1).to(torch.uint32).view(torch.int32)


def unpack_codes(words, bits, outputs):
    """Return the codes (in, out) int32 in words (in, words): the inverse of pack_codes."""
    shifts = torch.arange(0, 32, bits, device=words.device, dtype=torch.int32)[:, None]
    blocks = words.unflatten(1, (-1, 1, 16)) >> shifts                         # (in, blocks, n, 16)
    return (blocks & (1 << bits) - 1).flatten(1)[:, :outputs]


# --------------------------------------------------------------------------------------------------
# Rounding

def quantize_weight(weight, bits, group=128, clipping=CLIPPING, name="the weight"):
    """Return the QuantizedWeight of `weight` (out, in), on the meta device one without memory.

    bits: 8, or 4 with groups of `group` inputs; clipping: ratios of a group's range, of which the
    best is taken. Raises InputError, with `name`, for weights that have no codes and groups that do
    not fit.
    """
    require(bits in (4, 8), f"bits is {bits}, expected 4 or 8")
    require(weight.is_meta or bool(torch.isfinite(weight).all()),
            f"{name}: holds NaN or infinity, which has no code")
    require(bits == 8 or group >= 32 and group % 32 == weight.shape[1] % group == 0,
            f"{name}: groups of {group}, expected a multiple of 32 that divides its "
            f"{weight.shape[1]} inputs")
    parts = [rounded(part, bits, group, clipping) for part in weight.split(AT_ONCE)]
    tensors = [torch.cat(tensor, -1) for tensor in zip(*parts)]
    return QuantizedWeight(*tensors, group=group if bits == 4 else None)


def rounded(weight, bits, group, clipping):
    """Return the tensors of the QuantizedWeight of some outputs: codes, scales and zeros."""
    weight_t = weight.t().float()                                               # (in, out)
    if bits == 8:
        smallest = torch.finfo(torch.float32).tiny
        scales = (weight_t.abs().amax(0) / 127).clamp(min=smallest)             # (out,)
        return pack_codes((weight_t / scales).round().int() + 128, 8), scales
    parts = weight_t.unflatten(0, (-1, group))                                # (groups, group, out)
    low = parts.amin(1, keepdim=True).clamp(max=0)         # zero is always among the values
    high = parts.amax(1, keepdim=True).clamp(min=0)                             # (groups, 1, out)
    best = None                          # squared error, scale, zero point and codes
    for ratio in clipping:
        scale = ((high - low) * ratio / 15).clamp(min=1e-30)
        scale = scale.bfloat16().float()                   # as it will be stored
        zero = (-low * ratio / scale).round().clamp(0, 15)
        code = (parts / scale + zero).round().clamp(0, 15)
        error = ((code - zero) * scale - parts).square().sum(1, keepdim=True)
        found = error, scale, zero, code
        best = found if best is None else [torch.where(error < best[0], new, old)
                                           for new, old in zip(found, best)]
    _, scale, zero, code = best
    return pack_codes(code.flatten(0, 1).int(), 4), scale[:, 0].bfloat16(), zero[:, 0].byte()


def fitting_group(model):
    """Return the first of GROUPS that fits all linears of a Llama's blocks; if none does, 128."""
    inputs = {model.get_submodule(name).weight.shape[1] for name in linear_names(model.config)}
    return next((group for group in GROUPS if not any(size % group for size in inputs)), 128)


# --------------------------------------------------------------------------------------------------
# Products. A backend for codes is as one of kernel.py, with a QuantizedWeight for weight_t:
# function(x (B, in), weight, threshold () or (in,)) -> y (B, out).

def codes_gemv(x, weight, threshold, backend=None):
    """Return x with its small channels dropped, times a QuantizedWeight: kernel.sparse_gemv of it.

    x: (..., in), 1 to 8 rows in all, floating point; threshold: as in sparse_gemv
    backend: "triton", "c", "torch", or None for the fastest there is
    Returns (..., out) in x's dtype. Raises ValueError for shapes and devices that do not fit.
    """
    if not (x.is_floating_point() and 1 <= x.shape[:-1].numel() <= kernel.MAX_ROWS
            and x.shape[-1:] == weight.shape[:1] and x.device == weight.codes.device):
        raise ValueError(f"x is {x.dtype} {tuple(x.shape)} on {x.device}, expected floating point "
                         f"(..., {weight.shape[0]}) of 1 to {kernel.MAX_ROWS} rows on "
                         f"{weight.codes.device}")
    name = f"codes-{backend or kernel.best_backend(x)}"
    y = kernel.multiply(name, x.reshape(-1, x.shape[-1]), weight, threshold)
    return y.view(*x.shape[:-1], -1)


def codes_dense(x, weight):
    """Return x (..., in) times a QuantizedWeight, nothing dropped: kernel.dense of it."""
    rows = x.shape[:-1].numel()
    # To write a weight out in floating point takes longer than a few passes that unpack it, and
    # products of bytes are as fast as any of the library's.
    few = rows <= kernel.MAX_ROWS * (8 if kernel.best_backend(x) == "c" else 1)
    if x.requires_grad or not few and not rounds(weight):
        # A backward pass turns the weight into numbers anew: no second copy of the model is kept.
        return checkpoint(lambda x: x @ weight.dequantized(x.dtype), x, use_reentrant=False)
    if rows <= kernel.MAX_ROWS:
        return codes_gemv(x, weight, -1.0)
    parts = x.reshape(rows, -1).split(kernel.MAX_ROWS)
    y = torch.cat([codes_gemv(part, weight, -1.0) for part in parts])
    return y.view(*x.shape[:-1], -1)


def torch_codes(x, weight, threshold):
    """Compute codes_gemv in PyTorch: the whole weight in floating point, slow but right."""
    weight_t = weight.dequantized(threshold.dtype)
    return kernel.torch_gemv(x.to(threshold.dtype), weight_t, threshold).to(x.dtype)


# C. Kept channels are listed first, as in kernel.py, and taken eight at a time. To unpack a weight,
# make it a float and multiply would take longer than to read it. So the activations are rounded to
# bytes, too, eight with a scale: a processor multiplies four pairs of bytes in each 32 bits of a
# register and adds them, in one instruction or three. The four weights must meet in those 32 bits,
# but they are of four channels, which lie in four rows of memory. Two rounds of interleaving bring
# them together, here for sixteen outputs a to p of the channels 1 to 4:
#
#     rows of memory       after 8 bits of one, 8 of the other      after 16 of one, 16 of the other
#     a1 b1 c1 d1 ...      a1 a2 b1 b2 c1 c2 d1 d2 ...              a1 a2 a3 a4 b1 b2 b3 b4 ...
#     a2 b2 c2 d2 ...      i1 i2 j1 j2 ...                          e1 e2 e3 e4 f1 ...
#     a3 b3 c3 d3 ...      a3 a4 b3 b4 c3 c4 d3 d4 ...              i1 i2 i3 i4 j1 ...
#     a4 b4 c4 d4 ...      i3 i4 j3 j4 ...                          m1 m2 m3 m4 n1 ...
#                                                                   └── · x1 x2 x3 x4, added up
#
# Bytes of int4 hold two outputs, and are split when they have met. The sums do not stand in the
# order of the outputs; the same two rounds with 32 and 64 bits bring them into it.
#
# The zero point and the scale are applied when a sum is finished:
#     Σ x · scale · (code - zero) = scale · (Σ x · code - zero · Σ x)
# With int4 sums are finished after each group, which has one scale.

C_SOURCE = record.C_NUMBERS + r"""
#include <stdlib.h>
#define UNROLL _Pragma("GCC unroll 8")
#define INLINE static inline __attribute__((always_inline))
#define ROOM 8192        // sums that a thread works on: 32 KB, what the first cache holds
#define WORTH (1 << 20)  // bytes of kept weights for which another thread is woken
enum { CODES = 32 / BITS, OUTPUTS = 16 * CODES };          // in a word; in the 64 bytes of 16 words

// WIDTH: bytes of a register. EIGHTS: as many eights of rows are added together as the registers
// hold. ZIP interleaves the lower or the upper halves of two registers. DOT adds the products of
// four codes, UNSIGNED or around zero, and four inputs. AVX2 has two steps for it, PAIRS and WIDEN:
// pairs are added in 16 bits, unsigned bytes by signed ones; so int8 lends its codes the signs of
// the inputs (FLIP).
#if defined ROUNDED && defined __AVX512VNNI__ && defined __AVX512BW__
#define NAME "AVX-512 VNNI"
#include <immintrin.h>
enum { WIDTH = 64, EIGHTS = 2, UNSIGNED = 1, FLIP = 0 };
#define ZIP(half, bits, a, b) (bytes)_mm512_unpack##half##_epi##bits((__m512i)(a), (__m512i)(b))
#define DOT(sums, codes, x) \
    (ints)_mm512_dpbusd_epi32((__m512i)(sums), (__m512i)(codes), (__m512i)(x))
#elif defined ROUNDED && defined __AVX2__
#include <immintrin.h>
#define ZIP(half, bits, a, b) (bytes)_mm256_unpack##half##_epi##bits((__m256i)(a), (__m256i)(b))
#if defined __AVXVNNI__
#define NAME "AVX-VNNI"
enum { WIDTH = 32, EIGHTS = 1, UNSIGNED = 1, FLIP = 0 };
#define DOT(sums, codes, x) \
    (ints)_mm256_dpbusd_avx_epi32((__m256i)(sums), (__m256i)(codes), (__m256i)(x))
#else
#define NAME "AVX2"
enum { WIDTH = 32, EIGHTS = 1, UNSIGNED = 0, FLIP = BITS == 8 };
#define PAIRS(a, b) _mm256_maddubs_epi16((__m256i)(a), (__m256i)(b))
#define WIDEN(pairs) (ints)_mm256_madd_epi16(pairs, _mm256_set1_epi16(1))
#endif
#elif defined ROUNDED && defined __ARM_FEATURE_DOTPROD
#define NAME "NEON dot product"
#include <arm_neon.h>
enum { WIDTH = 16, EIGHTS = 2, UNSIGNED = 0, FLIP = 0 };
#define lo 1
#define hi 2
#define ZIP(half, bits, a, b) ZIP_(half, bits, a, b)
#define ZIP_(half, bits, a, b) (bytes)vzip##half##q_u##bits((uint##bits##_t __attribute__(( \
    vector_size(16))))(a), (uint##bits##_t __attribute__((vector_size(16))))(b))
#define DOT(sums, codes, x) (ints)vdotq_s32((int32x4_t)(sums), (int8x16_t)(codes), (int8x16_t)(x))
#endif

#ifdef NAME
const char *const instructions = NAME ", activations rounded to 8 bits";

/* Eight inputs of a token: x[i] * scale; with FLIP, x is a magnitude, and flip[i] makes of a code
   code - 128, or 127 - code where the input is negative. */
struct eight { int8_t x[8]; uint8_t flip[8]; float scale; };

/* Sets an eight to numbers, as near as it can hold them. Returns what its sums have too much
   (int8), or what each unit of the zero point adds (int4). Infinity or NaN makes all outputs NaN.
*/
static inline float fill(struct eight *to, const float *values) {
    uint32_t largest = 0;
    int sum = 0;
    for (int i = 0; i < 8; i++) {
        uint32_t size = bits_of(values[i]) & 0x7fffffff;
        largest = size > largest ? size : largest;
    }
    to->scale = largest < 0x7f800000 ? number(largest) / 127 : NAN;
    float factor = to->scale > 1e-30f ? 127 / number(largest) : 0;         // of NaN: 0
    for (int i = 0; i < 8; i++) {
        int nearest = bits_of(factor * values[i] + 0x1.8p23f) - 0x4b400000;
        int turned = FLIP && nearest < 0;
        to->flip[i] = 128 - turned;
        to->x[i] = turned ? -nearest : nearest;
        sum += FLIP && !turned ? 0 : nearest;
    }
    return to->scale * sum * (BITS == 8 && !FLIP ? 128 * UNSIGNED : 1);
}

typedef uint8_t bytes __attribute__((vector_size(WIDTH), may_alias));
typedef bytes unaligned __attribute__((aligned(1)));
typedef int32_t ints __attribute__((vector_size(WIDTH), may_alias));
typedef float floats __attribute__((vector_size(WIDTH), may_alias));

static inline bytes four(const void *at) {
    int32_t x;
    memcpy(&x, at, 4);
    return (bytes)(x - (ints){0});
}

/* Returns the sums of eight products. a, b: codes of four channels each. */
INLINE ints dot(bytes a, bytes b, const struct eight *x) {
#if defined PAIRS && BITS == 8         // 127 * 128 twice fits 16 bits
    a ^= four(x->flip);
    b ^= four(x->flip + 4);
    return WIDEN(PAIRS(four(x->x), a)) + WIDEN(PAIRS(four(x->x + 4), b));
#elif defined PAIRS                    // 127 * 15 four times does, too
    return WIDEN(_mm256_add_epi16(PAIRS(a, four(x->x)), PAIRS(b, four(x->x + 4))));
#else
    if (BITS == 8 && !UNSIGNED) a ^= 128, b ^= 128;
    return DOT(DOT((ints){0}, a, four(x->x)), b, four(x->x + 4));
#endif
}

/* The two rounds of the drawing: `bits` of a and b, of c and d; then twice as many of the two. */
#define MEET(bits, twice, a, b, c, d, to) do {                                  \
    bytes low_ab = ZIP(lo, bits, a, b), high_ab = ZIP(hi, bits, a, b);          \
    bytes low_cd = ZIP(lo, bits, c, d), high_cd = ZIP(hi, bits, c, d);          \
    (to)[0] = ZIP(lo, twice, low_ab, low_cd);                                   \
    (to)[1] = ZIP(hi, twice, low_ab, low_cd);                                   \
    (to)[2] = ZIP(lo, twice, high_ab, high_cd);                                 \
    (to)[3] = ZIP(hi, twice, high_ab, high_cd);                                 \
} while (0)

/* Adds an eight of rows, or EIGHTS of them, to the sums of all tokens, `size` bytes of each row. As
   many rows follow in `row`, which come next: a processor does not know of them. sums: [token]
   [register of bytes][half byte][part][lane]. The upper half of an UNSIGNED byte needs no shift:
   what is summed up is 16 * upper + lower. */
INLINE void add_eights(
        const int eights, const uint8_t *const *row, const struct eight *x, float *sums, long size,
        const long tokens, long stride) {
    for (long j = 0; j < size; j += WIDTH, sums += WIDTH / 4 * CODES) {
        bytes met[2 * EIGHTS][4];
        for (int r = 8 * eights; r < 16 * eights && j % 64 == 0; r++)
            __builtin_prefetch(row[r] + j, 0, 2);
        for (int f = 0; f < 2 * eights; f++) {
#define AT(r) *(const unaligned *)(row[4 * f + r] + j)
            MEET(8, 16, AT(0), AT(1), AT(2), AT(3), met[f]);
        }
        UNROLL
        for (int unit = 0; unit < CODES / 4; unit++) {               // what the registers hold
            bytes codes[2 * EIGHTS][4];
            for (int f = 0; f < 2 * eights; f++)
                UNROLL
                for (int i = 0; i < 4; i++) {
                    codes[f][i] = met[f][BITS == 8 ? i : 2 * unit + i % 2];
                    if (BITS == 4 && i < 2) codes[f][i] &= 15;
                    if (BITS == 4 && i >= 2 && !UNSIGNED) codes[f][i] >>= 4;
                }
            for (long t = 0; t < tokens; t++)
                UNROLL
                for (int i = 0; i < 4; i++) {
                    floats *sum = (floats *)(sums + t * stride);
                    sum += BITS == 8 ? i : 4 * (i / 2) + 2 * unit + i % 2;
                    floats total = *sum;
                    for (int e = 0; e < eights; e++) {
                        const struct eight *of = x + e * tokens + t;
                        ints products = dot(codes[2 * e][i], codes[2 * e + 1][i], of);
                        total += of->scale * __builtin_convertvector(products, floats);
                    }
                    *sum = total;
                }
        }
    }
}

/* Brings the sums of 64 bytes of codes into the order of the outputs. */
static inline void order(const float *sums, float *ordered) {
    const floats *of = (const floats *)sums;
    for (int j = 0; j < 64 / WIDTH; j++)
        for (int half = 0; half < CODES / 4; half++, of += 4) {
            floats in[4];
            bytes to[4];
            for (int i = 0; i < 4; i++) {
                in[i] = of[i];
                if (half && UNSIGNED) in[i] = (in[i] - of[i - 4]) / 16;        // see add_eights
            }
            MEET(32, 64, in[0], in[1], in[2], in[3], to);
            for (int k = 0; k < 4; k++)
                memcpy(ordered + 16 * (CODES / 4 * k + half) + WIDTH / 4 * j, &to[k], WIDTH);
        }
}

#else
const char *const instructions = "plain C, activations in floating point";
enum { EIGHTS = 1 };
typedef int32_t __attribute__((aligned(1), may_alias)) word;
struct eight { float x[8]; };

static inline float fill(struct eight *to, const float *values) {
    float sum = 0;
    for (int i = 0; i < 8; i++) sum += to->x[i] = values[i];
    return BITS == 4 ? sum : 128 * sum;
}

INLINE void add_eights(
        const int eights, const uint8_t *const *row, const struct eight *x, float *sums, long size,
        const long tokens, long stride) {
    for (long j = 0; j < size; j += 64, sums += OUTPUTS) {
        for (int r = 8; r < 16; r++) __builtin_prefetch(row[r] + j, 0, 2);
        for (long t = 0; t < tokens; t++)
            UNROLL
            for (int k = 0; k < CODES; k++)
                #pragma omp simd
                for (int w = 0; w < 16; w++) {
                    float sum = 0;
                    UNROLL
                    for (int r = 0; r < 8; r++) {
                        int codes = ((const word *)(row[r] + j))[w];
                        sum += x[t].x[r] * (float)(codes >> BITS * k & ((1 << BITS) - 1));
                    }
                    sums[t * stride + 16 * k + w] += sum;
                }
    }
}

static inline void order(const float *sums, float *ordered) {
    memcpy(ordered, sums, OUTPUTS * sizeof(float));
}
#endif

/* What is multiplied. Kept channels are listed by spans; with int4 a span is a group, which has one
   scale. Span s has the eights begin[s] to begin[s + 1], of channels channel[8 * k] and on; x:
   [eight][token]; offset: [span][token]. */
struct product {
    const uint8_t *codes, *zeros;
    const void *scales;
    float *offset;
    struct eight *x;
    int *begin, *channel;
    long spans, tokens, out, pitch;                   // pitch: bytes of a row of codes
};

/* Lists the channels that any token keeps, each span padded to whole eights with zeros. */
static void list_kept(struct product *p, const float *x, const float *threshold, long step,
                      long in, long size) {
    float kept[p->tokens][size + 8];
    int eights = 0;
    for (long s = 0; s < p->spans; s++) {
        int *channel = p->channel + 8 * eights, n = 0;
        for (long i = s * size; i < (s + 1) * size && i < in; i++) {
            int needed = 0;
            for (long t = 0; t < p->tokens; t++) {
                float value = x[t * in + i];
                int keep = !(fabsf(value) <= threshold[i * step]);             // NaN is kept
                kept[t][n] = keep ? value : 0.0f;
                needed |= keep;
            }
            channel[n] = i;
            n += needed;
        }
        for (int last = n; n % 8; n++) {
            for (long t = 0; t < p->tokens; t++) kept[t][n] = 0;
            channel[n] = channel[last - 1];
        }
        p->begin[s] = eights;
        for (long t = 0; t < p->tokens; t++) {
            float *offset = &p->offset[s * p->tokens + t], sum = 0;
            for (int k = 0; k < n; k += 8)
                sum += fill(&p->x[(eights + k / 8) * p->tokens + t], kept[t] + k);
            *offset = sum;
        }
        eights += n / 8;
    }
    p->begin[p->spans] = eights;
    for (int r = 8 * eights; r < 8 * eights + 16 * EIGHTS; r++)      // what follows the last
        p->channel[r] = eights ? p->channel[8 * eights - 1] : 0;
}

/* Sets `columns` outputs of y (tokens, out), from `first` on, to the sums of the spans from `begin`
   to `end`. */
static void outputs(const struct product *p, float *y, long begin, long end, long first,
                    long columns) {
    long tokens = p->tokens, size = (columns + OUTPUTS - 1) / OUTPUTS * 64;
    long stride = size * CODES / 4;
    float sums[tokens * stride] __attribute__((aligned(64)));
    float ordered[OUTPUTS] __attribute__((aligned(64)));
    for (long t = 0; t < tokens; t++) memset(y + t * p->out + first, 0, columns * sizeof(float));
    for (long s = begin; s < end; s++) {
        int eights;
        if (BITS == 4 || s == begin) memset(sums, 0, sizeof sums);   // int8: one scale for all
        for (long k = p->begin[s]; k < p->begin[s + 1]; k += eights) {
            const uint8_t *row[16 * EIGHTS];
            const struct eight *x = p->x + k * tokens;
            eights = k + EIGHTS <= p->begin[s + 1] ? EIGHTS : 1;
            for (int r = 0; r < 16 * EIGHTS; r++)
                row[r] = p->codes + first * BITS / 8 + p->channel[8 * k + r] * p->pitch;
            if (eights == 1 && tokens == 1) add_eights(1, row, x, sums, size, 1, 0);
            else if (eights == 1) add_eights(1, row, x, sums, size, tokens, stride);
            else if (tokens == 1) add_eights(EIGHTS, row, x, sums, size, 1, 0);
            else add_eights(EIGHTS, row, x, sums, size, tokens, stride);
        }
        if (BITS == 8 && s + 1 < end) continue;
        for (long t = 0; t < tokens; t++) {
            float offset = 0;
            for (long i = BITS == 8 ? begin : s; i <= s; i++) offset += p->offset[i * tokens + t];
            for (long j = 0; j < columns; j += OUTPUTS) {
                long n = columns - j < OUTPUTS ? columns - j : OUTPUTS;
                long at = first + j + (BITS == 8 ? 0 : s * p->out);
                float *restrict to = y + t * p->out + first + j;
                order(sums + t * stride + j, ordered);
                for (long i = 0; i < n; i++) {
                    float scale = BITS == 8 ? ((const float *)p->scales)[at + i]
                                            : of_bfloat16(((const uint16_t *)p->scales)[at + i]);
                    to[i] += scale * (ordered[i] - (BITS == 8 ? 1 : p->zeros[at + i]) * offset);
                }
            }
        }
    }
}

/* y (tokens, out) = x (tokens, in), its small channels dropped, times a weight in codes. size: the
   channels of a span. threshold: one (step 0) or (in) (step 1). Returns 1 where memory ran out. */
int codes_product(const float *x, const uint8_t *codes, const void *scales, const uint8_t *zeros,
                  long size, const float *threshold, long step, float *y, long tokens, long in,
                  long out, long threads) {
    long spans = (in + size - 1) / size, most = spans * ((size + 7) / 8);      // eights
    struct product p = { codes, zeros, scales, .spans = spans, .tokens = tokens, .out = out,
                         .pitch = (out + OUTPUTS - 1) / OUTPUTS * 64 };
    p.x = malloc(most * tokens * sizeof *p.x + (8 * (most + 2 * EIGHTS) + spans + 1) * sizeof(int)
                 + spans * tokens * sizeof(float));
    if (!p.x) return 1;
    p.channel = (int *)(p.x + most * tokens);
    p.begin = p.channel + 8 * (most + 2 * EIGHTS);
    p.offset = (float *)(p.begin + spans + 1);
    list_kept(&p, x, threshold, step, in, size);
    long worth = 1 + p.begin[spans] * 8 * p.pitch / WORTH;
    if (threads > worth) threads = worth;
    // Blocks of outputs: the sums of one fit the cache. Short rows are not cut for more threads, as
    // memory is slow where little is read at a place: then the threads share the spans, each share
    // with a y of its own. There are as many parts for each thread.
    long blocks = 1 + (tokens * out - 1) / ROOM;
    while (threads % blocks && blocks % threads) blocks++;
    long shares = blocks < threads ? threads / blocks : 1;
    long columns = (out + blocks * 128 - 1) / (blocks * 128) * 128;
    if (shares > spans) shares = spans;
    float *partial = malloc((shares - 1) * tokens * out * sizeof *partial);
    if (!partial) shares = 1;
    #pragma omp parallel for schedule(dynamic) num_threads(threads) if (threads > 1)
    for (long part = 0; part < shares * blocks; part++) {
        long share = part % shares, first = part / shares * columns;
        if (first < out)
            outputs(&p, share ? partial + (share - 1) * tokens * out : y, share * spans / shares,
                    (share + 1) * spans / shares, first,
                    out - first < columns ? out - first : columns);
    }
    for (long share = 1; share < shares; share++)
        for (long i = 0; i < tokens * out; i++) y[i] += partial[(share - 1) * tokens * out + i];
    free(partial);
    free(p.x);
    return 0;
}
"""
SPAN = 512               # channels of int8 that are listed at a time
ROUND_ACTIVATIONS = True                   # where the processor has instructions for it


@functools.cache
def c_library(bits, rounded):
    """Return the C library for codes of so many bits; rounded: activations are, where that pays."""
    library = kernel.compiled(f"#define BITS {bits}\n" + "#define ROUNDED\n" * rounded + C_SOURCE)
    library.codes_product.argtypes = 12 * [ctypes.c_int64]           # addresses and sizes
    return library


def instructions(device, bits):
    """Return what multiplies codes on a device, as text: a backend, and in C the instructions."""
    backend = kernel.best_backend(torch.empty(0, device=device))
    if backend != "c":
        return f"{backend}, activations in floating point"
    library = c_library(bits, ROUND_ACTIVATIONS)
    return f"C, {ctypes.c_char_p.in_dll(library, 'instructions').value.decode()}"


def rounds(weight):
    """Return whether the activations that a weight is multiplied by are rounded."""
    return "floating point" not in instructions(weight.codes.device, weight.bits)


def c_call(x, weight, threshold, y):
    """Return the C function and the arguments that set y (B, out) to the sparse product.

    x, threshold and y are float32 and contiguous, on the CPU.
    """
    zeros = 0 if weight.zeros is None else weight.zeros.data_ptr()
    return c_library(weight.bits, ROUND_ACTIVATIONS).codes_product, (
        x.data_ptr(), weight.codes.data_ptr(), weight.scales.data_ptr(), zeros,
        weight.group or SPAN, threshold.data_ptr(), threshold.ndim, y.data_ptr(), *x.shape,
        weight.shape[1], kernel.THREADS)


def c_codes(x, weight, threshold):
    """Compute codes_gemv in C."""
    wide = x.float()
    if not kernel.fits_c(wide):
        raise ValueError(f'backend "c" needs a C compiler and tensors on the CPU, not on '
                         f'{x.device.type}')
    return kernel.run_c(c_call, wide, weight, threshold.float()).to(x.dtype)


kernel.BACKENDS |= {"codes-c": c_codes, "codes-torch": torch_codes}        # fused.py: codes-triton


# --------------------------------------------------------------------------------------------------
# The model

class QuantizedLinear(SparseLinear):
    """A SparseLinear whose weight_t is a QuantizedWeight. Without a threshold it is dense."""

    def __init__(self, weight, bias=None):
        super().__init__(torch.empty(weight.shape, device="meta"), bias)
        del self.weight_t                # a parameter, in whose place a module comes
        self.weight_t = weight

    def product(self, x):
        return codes_gemv(x, self.weight_t, self.threshold)

    def dense(self, x):
        return codes_dense(x, self.weight_t)


def bits_by_name(config, bits, head_bits):
    """Return {name of a linear, or EMBEDDING: bits} of what is quantized in a Llama of a Config.

    With a tied head EMBEDDING stands for both.
    """
    bits_of = dict.fromkeys(linear_names(config), bits)
    if head_bits < 16:
        head = () if config.tie_word_embeddings else ("lm_head",)
        bits_of |= dict.fromkeys((EMBEDDING, *head), head_bits)
    return bits_of


@torch.no_grad()
def quantize(model, bits, group=None, clipping=CLIPPING, head_bits=8):
    """Quantize the linears of a Llama in place, one by one, and return the model, dense.

    bits: 8 or 4, of the blocks' linears; head_bits: 16, 8 or 4, of the head and the embedding.
    group: of inputs, at 4 bits; None: `fitting_group`. model.quantization: the settings. Raises
    InputError for a model that is sparse or quantized already, and as quantize_weight does.
    """
    require(not any(isinstance(module, SparseLinear) for module in model.modules()),
            "the model is quantized or sparse already; quantize it first, then make it sparse")
    group = group or fitting_group(model)
    bits_of = bits_by_name(model.config, bits, head_bits)
    for name in progress(list(bits_of), f"quantizing to int{bits}"):
        weight = quantize_weight(model.get_submodule(name).weight, bits_of[name], group, clipping,
                                 name)
        if name == EMBEDDING and not model.config.tie_word_embeddings:
            model.model.embed_tokens = TransposedEmbedding(weight)
        else:                            # a tied embedding reads the head's weight
            name = "lm_head" if name == EMBEDDING else name
            sparsify(model, {name: None}, lambda _, bias: QuantizedLinear(weight, bias))
    model.quantization = settings_of(bits, group, head_bits)
    return model


# --------------------------------------------------------------------------------------------------
# The folder: a linear's `NAME.weight` becomes `NAME.weight_t.codes`, `.scales` and `.zeros`

def settings_of(bits, group, head_bits):
    """Return what config.json says of a quantized checkpoint, in quantization_config."""
    return {"quant_method": METHOD, "version": VERSION, "bits": bits, "head_bits": head_bits,
            "group": group if 4 in (bits, head_bits) else None}


def shape(model, settings):
    """Quantize a Llama on the meta device as `settings`, a folder's quantization_config, say.

    Raises InputError for what quantize.py does not write.
    """
    with refusing(f"config.json: quantization_config is {settings}", InputError, KeyError,
                  TypeError):
        require(settings["version"] in (1, VERSION), f"expected version 1 or {VERSION}")
        quantize(model, settings["bits"], settings["group"], (1.0,), settings.get("head_bits", 16))
