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

Where a few weights are large, cutting them off makes the steps of all others finer. Of some
clipping ratios, each group takes the one with the least squared error. Rounding is to nearest, and
nothing but the weights is looked at. The linears of the blocks are quantized, and the embedding and
the head, which are read at each step, too: in 8 bits, unless `head_bits` says 4, or 16 for as they
are. A column of the embedding is turned back into numbers when its token comes.

Decoding unpacks in registers, in the pass that skips. On a CPU whose instructions multiply bytes
the activations are rounded to 8 bits as well, eight with a scale (see below, C); elsewhere, and
with --float-activations, they keep their 16 or 32 bits. The activations of a quantized model differ
a little, so it is calibrated anew.

The seams: `sparsify(model, thresholds, make=...)` makes a `QuantizedLinear`, which is a
SparseLinear; its products stand in `kernel.BACKENDS`, as codes-c, codes-triton and codes-torch;
`model.QUANTIZED` reads the folders that are written here, when this file is imported.

    python -m beyond.quantize                                 size and error of the demo model
    python -m beyond.quantize --model FOLDER --bits 4 --out FOLDER     writes a quantized checkpoint
    python -m beyond.quantize --table          bits against sparsity: perplexity, MB a token, speed
    python -m beyond.quantize --rounding       what rounding the activations adds
"""
import ctypes
import functools
import itertools
import statistics
import time
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

import kernel
from beyond import fused, record
from beyond.folders import check_new_folder, is_quantized, rewrite_checkpoint
from calibrate import SINKS, calibrate, load_calibration
from generate import generate
from model import (DEMO, QUANTIZED, Config, Llama, Parser, block_linears, command_line,
                   default_context, linear_names, load_model, load_tokenizer, natural, note,
                   progress, read_tokens, require, windows_of)
from sparsify import (SparseLinear, TransposedEmbedding, realised_sparsity, reset_counts,
                      sparse_mode, sparsify)

GROUPS = (128, 96, 64, 32)                 # inputs that share a scale: the first that fits
CLIPPING = (1.0, 0.95, 0.9, 0.85, 0.8)     # of a group's range: those tried
AT_ONCE = 1 << 14                          # outputs that are rounded at a time: whole words
METHOD = "minteal"                         # what config.json calls a checkpoint of this file
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
        for name, tensor in list(self.named_buffers()):
            setattr(self, name, tensor.to(device))
        return self

    @property
    def device(self):
        return self.codes.device

    @property
    def nbytes(self):
        return sum(tensor.nbytes for tensor in self.buffers())

    def dequantized(self, dtype):
        """Return the weight (in, out) that is multiplied with, in floating point."""
        codes = unpack_codes(self.codes, self.bits, self.shape[1])              # (in, out)
        return self._numbers(codes, slice(None), dtype)

    def t(self):
        """Return what is multiplied with, transposed: (out, in) float32, as of a tensor."""
        return self.dequantized(torch.float32).t()

    def index_select(self, dimension, outputs):
        """Return the columns `outputs` (n,) as (in, n) float32, as a tensor's index_select(1, ...).

        For sparsify.TransposedEmbedding: a column is the embedding of a token.
        """
        block, inside = outputs // (16 * 32 // self.bits), outputs % (16 * 32 // self.bits)
        words = self.codes.index_select(1, 16 * block + inside % 16)            # (in, n)
        codes = words >> self.bits * (inside // 16) & (1 << self.bits) - 1
        return self._numbers(codes, outputs, torch.float32)

    def _numbers(self, codes, outputs, dtype):
        """Return what codes (in, n) of some outputs stand for, (in, n)."""
        wide = torch.promote_types(dtype, torch.float32)
        scales = self.scales[..., outputs].to(wide)
        if self.bits == 8:
            return ((codes - 128).to(wide) * scales).to(dtype)
        codes = codes.unflatten(0, (-1, self.group))                            # (groups, group, n)
        zeros = self.zeros[:, None, outputs].int()
        return ((codes - zeros).to(wide) * scales[:, None]).flatten(0, 1).to(dtype)

    @staticmethod
    def empty(inputs, outputs, bits, group):
        """Return one on the meta device, without memory: shapes to check tensors against."""
        with torch.device("meta"):
            codes = torch.empty(inputs, words_of(outputs, bits), dtype=torch.int32)
            if bits == 8:
                return QuantizedWeight(codes, torch.empty(outputs, dtype=torch.float32))
            groups = inputs // group
            return QuantizedWeight(codes, torch.empty(groups, outputs, dtype=torch.bfloat16),
                                   torch.empty(groups, outputs, dtype=torch.uint8), group)


def words_of(outputs, bits):
    """Return how many words hold the codes of so many outputs, as pack_codes lays them out."""
    return -(-outputs // (16 * (32 // bits))) * 16


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
    """Return the QuantizedWeight of `weight` (out, in), rounded to nearest.

    bits: 8, or 4 with groups of `group` inputs. clipping: ratios of a group's range, of which the
    best is taken (int4). Raises InputError, with `name`, for what check_weight refuses.
    """
    check_weight(weight, bits, group, name)
    if len(weight) > AT_ONCE:            # a head: outputs go their own ways
        parts = [quantize_weight(part, bits, group, clipping) for part in weight.split(AT_ONCE)]
        tensors = zip(*(part.buffers() for part in parts))
        return QuantizedWeight(*(torch.cat(tensor, -1) for tensor in tensors),
                               **({} if bits == 8 else {"group": group}))
    weight_t = weight.t().float()                                               # (in, out)
    if bits == 8:
        smallest = torch.finfo(torch.float32).tiny
        scales = (weight_t.abs().amax(0) / 127).clamp(min=smallest)             # (out,)
        codes = (weight_t / scales).round().int() + 128
        return QuantizedWeight(pack_codes(codes, 8), scales)
    parts = weight_t.unflatten(0, (-1, group))                                # (groups, group, out)
    low = parts.amin(1).clamp(max=0)                       # zero is always among the values
    high = parts.amax(1).clamp(min=0)                                           # (groups, out)
    least = torch.full_like(low, float("inf"))
    scales = zeros = torch.zeros_like(low)
    codes = torch.zeros_like(parts)
    for ratio in clipping:
        scale = ((high - low) * ratio / 15).clamp(min=1e-30)
        scale = scale.bfloat16().float()                   # as it will be stored
        zero = (-low * ratio / scale).round().clamp(0, 15)
        code = (parts / scale[:, None] + zero[:, None]).round().clamp(0, 15)
        error = ((code - zero[:, None]) * scale[:, None] - parts).square().sum(1)
        better = error < least
        least = torch.where(better, error, least)
        scales = torch.where(better, scale, scales)
        zeros = torch.where(better, zero, zeros)
        codes = torch.where(better[:, None], code, codes)
    return QuantizedWeight(pack_codes(codes.flatten(0, 1).int(), 4), scales.bfloat16(),
                           zeros.to(torch.uint8), group)


def check_weight(weight, bits, group, name):
    """Raise InputError for a weight (out, in) that cannot be quantized so."""
    require(bits in (4, 8), f"bits is {bits}, expected 4 or 8")
    require(bool(torch.isfinite(weight).all()), f"{name}: holds NaN or infinity, which has no code")
    require(bits == 8 or is_group(group, weight.shape[1]),
            f"{name}: groups of {group}, expected a multiple of 32 that divides its "
            f"{weight.shape[1]} inputs")


def is_group(group, inputs):
    """Return whether `inputs` can be quantized in groups of so many."""
    return group >= 1 and group % 32 == 0 and inputs % group == 0


def fitting_group(model):
    """Return the first of GROUPS that fits all linears of a Llama's blocks; if none does, 128."""
    inputs = {model.get_submodule(name).weight.shape[1] for name in linear_names(model.config)}
    return next((group for group in GROUPS if all(is_group(group, size) for size in inputs)),
                GROUPS[0])


def relative_error(weight, quantized):
    """Return ‖w - w'‖ / ‖w‖ of a weight (out, in) and its QuantizedWeight."""
    difference = quantized.t() - weight.float()
    return (difference.norm() / weight.float().norm().clamp(min=1e-30)).item()


# --------------------------------------------------------------------------------------------------
# Products. A backend for codes is as one of kernel.py, with a QuantizedWeight for weight_t:
# function(x (B, in), weight, threshold () or (in,)) -> y (B, out).

def codes_gemv(x, weight, threshold, backend=None):
    """Return x with its small channels dropped, times a QuantizedWeight: kernel.sparse_gemv of it.

    x: (B, in), B from 1 to 8, floating point; threshold, backend: as in sparse_gemv
    Returns (B, out) in x's dtype. Raises ValueError for shapes and devices that do not fit.
    """
    if x.ndim != 2 or not 1 <= x.shape[0] <= kernel.MAX_ROWS or not x.is_floating_point():
        raise ValueError(f"x is {x.dtype} {tuple(x.shape)}, expected floating point (1 to "
                         f"{kernel.MAX_ROWS}, in)")
    if weight.shape[0] != x.shape[1] or weight.device != x.device:
        raise ValueError(f"the weight is {weight.bits} bits, {tuple(weight.shape)} on "
                         f"{weight.device}, expected ({x.shape[1]}, out) on {x.device}, as x is")
    name = f"codes-{backend or kernel.best_backend(x)}"
    if name not in kernel.BACKENDS:
        raise ValueError(f'backend is "triton", "c", "torch" or None, not {backend!r}')
    return kernel.BACKENDS[name](x.contiguous(), weight, kernel.as_threshold(threshold, x))


def codes_dense(x, weight):
    """Return x (..., in) times a QuantizedWeight, nothing dropped: kernel.dense of it."""
    rows = x.numel() // x.shape[-1]
    backend = kernel.best_backend(x)
    # To write a weight out in floating point takes longer than a few passes that unpack it, and
    # products of bytes are as fast as any of the library's.
    most = {"c": 8 * kernel.MAX_ROWS, "triton": kernel.MAX_ROWS, "torch": 0}[backend]
    if rows > most and not (backend == "c" and rounds(x, weight)) or x.requires_grad:
        return kernel.dense(x, weight.dequantized(x.dtype))
    keep_all = kernel.KEEP_ALL if backend == "c" else -1.0
    parts = x.reshape(rows, -1).split(kernel.MAX_ROWS)
    parts = [codes_gemv(part, weight, keep_all) for part in parts]
    return (parts[0] if len(parts) == 1 else torch.cat(parts)).view(*x.shape[:-1], -1)


def torch_codes(x, weight, threshold):
    """Compute codes_gemv in PyTorch: the whole weight in floating point, slow but right."""
    weight_t = weight.dequantized(threshold.dtype)
    return kernel.torch_gemv(x.to(threshold.dtype), weight_t, threshold).to(x.dtype)


def triton_codes(x, weight, threshold):
    """Compute codes_gemv by the kernel that fused.py has for one to three linears."""
    return fused.joint_gemv(x, [weight], [threshold])


# C. It works as in kernel.py, whose source this one is appended to: `type` is that of x and y. Kept
# channels are listed by spans, and taken eight at a time. To unpack a weight, make it a float and
# multiply would take longer than to read it. So the activations are rounded to bytes, too, eight
# with a scale: a processor multiplies four pairs of bytes in each 32 bits of a register and adds
# them, in one instruction. The four weights must meet in those 32 bits, but they are of four
# channels, which lie in four rows of memory. Two rounds of interleaving bring them together, here
# for sixteen outputs a to p of the channels 1 to 4:
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
# Sums are finished after each span of channels. With int4 a span is a group, which has one scale.

C_SOURCE = r"""
#define EIGHTS 2                       // that are added in one pass over the sums
enum { CODES = 32 / BITS, OUTPUTS = 16 * CODES };          // in a word; in the 64 bytes of 16 words

#ifndef ROUNDED
const char *const instructions = "activations in floating point";

#elif defined __AVX512VNNI__ && defined __AVX512BW__ && !defined NARROW
const char *const instructions = "AVX-512 VNNI, activations rounded to 8 bits";
#include <immintrin.h>
#define WIDTH 64                       // bytes of a register
#define ZIP(half, bits, a, b) (bytes)_mm512_unpack##half##_epi##bits((__m512i)(a), (__m512i)(b))
#define DOT(sums, codes, x) \
    (ints)_mm512_dpbusd_epi32((__m512i)(sums), (__m512i)(codes), (__m512i)(x))
enum { MIDDLE = 128 };                 // of int8's codes, as DOT takes them: unsigned, or signed

#elif defined __AVX2__
const char *const instructions = "AVX2, activations rounded to 8 bits";
#include <immintrin.h>
#define WIDTH 32
#define ZIP(half, bits, a, b) (bytes)_mm256_unpack##half##_epi##bits((__m256i)(a), (__m256i)(b))
#define DOT(sums, codes, x) ((sums) + pairs((__m256i)(codes), (__m256i)(x)))
enum { MIDDLE = 0 };

#elif defined __ARM_FEATURE_DOTPROD
const char *const instructions = "NEON dot product, activations rounded to 8 bits";
#include <arm_neon.h>
#define WIDTH 16
#define lo 1
#define hi 2
#define ZIP(half, bits, a, b) ZIP_(half, bits, a, b)
#define ZIP_(half, bits, a, b) (bytes)vzip##half##q_u##bits((uint##bits##_t __attribute__(( \
    vector_size(16))))(a), (uint##bits##_t __attribute__((vector_size(16))))(b))
#define DOT(sums, codes, x) (ints)vdotq_s32((int32x4_t)(sums), (int8x16_t)(codes), (int8x16_t)(x))
enum { MIDDLE = 0 };

#else
#undef ROUNDED
const char *const instructions = "plain C, activations in floating point";
#endif

/* Eight channels of a token: what their weights are multiplied with. */
#ifdef ROUNDED
struct eight { int8_t x[8]; float scale; };                // x[i] * scale
#else
struct eight { float x[8]; };
#endif

struct span { int eights; int *channel; struct eight *x; float total[8]; };

/* Sets an eight to numbers, as near as it can hold them, and returns the sum of what it holds. What
   is not finite makes the scale NaN, and so each output. */
static float fill(struct eight *to, const float *number) {
    float sum = 0;
#ifdef ROUNDED
    float largest = 0, strange = 0;
    for (int i = 0; i < 8; i++) {
        largest = fabsf(number[i]) > largest ? fabsf(number[i]) : largest;
        strange += 0 * number[i];
    }
    to->scale = largest / 127 + strange;
    float factor = to->scale > 1e-30f ? 127 / largest : 0;                 // of NaN: 0
    for (int i = 0; i < 8; i++) {
        to->x[i] = factor ? (int)rintf(factor * number[i]) : 0;
        sum += to->x[i];
    }
    return to->scale * sum;
#else
    for (int i = 0; i < 8; i++) sum += to->x[i] = number[i];
    return sum;
#endif
}

/* Lists the channels [begin, end) that any token keeps, padded to whole eights with inputs of zero,
   as kernel.py's list_kept does. eights: [of a span][token]. total: for each token the sum of its
   inputs. */
static void list_span(struct span *span, const type *x, const float *threshold, long step,
                      long tokens, long in, long begin, long end) {
    float kept[tokens][end - begin + 8];
    int n = 0;
    for (long i = begin; i < end; i++) {
        int needed = 0;
        for (long t = 0; t < tokens; t++) {
            float value = to_float(x[t * in + i]);
            int keep = !(fabsf(value) <= threshold[i * step]);       // NaN is kept
            kept[t][n] = keep ? value : 0.0f;
            needed |= keep;
        }
        span->channel[n] = i;
        n += needed;
    }
    for (; n % 8; n++) {
        for (long t = 0; t < tokens; t++) kept[t][n] = 0;
        span->channel[n] = span->channel[n - 1];
    }
    span->eights = n / 8;
    for (long t = 0; t < tokens; t++) {
        span->total[t] = 0;
        for (int k = 0; k < span->eights; k++)
            span->total[t] += fill(&span->x[k * tokens + t], kept[t] + 8 * k);
    }
}

#ifdef ROUNDED
typedef uint8_t bytes __attribute__((vector_size(WIDTH), may_alias));
typedef bytes unaligned __attribute__((aligned(1)));
typedef int32_t ints __attribute__((vector_size(WIDTH), may_alias));
typedef float floats __attribute__((vector_size(WIDTH), may_alias));
enum { VECTOR = WIDTH / 4 };           // numbers of 32 bits in a register

#if defined __AVX2__ && WIDTH == 32
/* Returns the sums of four products of bytes. One instruction adds two of them in 16 bits, which
   may not overflow: 2 * 128 * 127 fits, so int8 lends its sign to x. */
static inline ints pairs(__m256i codes, __m256i x) {
#if BITS == 8
    x = _mm256_sign_epi8(x, codes);
    codes = _mm256_abs_epi8(codes);
#endif
    return (ints)_mm256_madd_epi16(_mm256_maddubs_epi16(codes, x), _mm256_set1_epi16(1));
}
#endif

/* The two rounds of the drawing: `bits` of a and b, of c and d; then twice as many of the two. */
#define MEET(bits, twice, a, b, c, d, to) do {                                  \
    bytes low_ab = ZIP(lo, bits, a, b), high_ab = ZIP(hi, bits, a, b);          \
    bytes low_cd = ZIP(lo, bits, c, d), high_cd = ZIP(hi, bits, c, d);          \
    (to)[0] = ZIP(lo, twice, low_ab, low_cd);                                   \
    (to)[1] = ZIP(hi, twice, low_ab, low_cd);                                   \
    (to)[2] = ZIP(lo, twice, high_ab, high_cd);                                 \
    (to)[3] = ZIP(hi, twice, high_ab, high_cd);                                 \
} while (0)

static inline ints four(struct eight of, int i) {
    int32_t x;
    memcpy(&x, of.x + 4 * i, 4);
    return x - (ints){0};
}

/* Adds some eights of rows to the sums of all tokens, `size` bytes of each row. next: the rows that
   follow, of which a processor does not know. sums: [token][register][half byte][part][lane]. */
static inline __attribute__((always_inline)) void add_eights(
        const int eights, const uint8_t *const *row, const uint8_t *const *next,
        const struct eight *x, float *sums, long size, long tokens, long stride) {
    for (long j = 0; j < size; j += WIDTH, sums += CODES * VECTOR) {
        bytes met[EIGHTS][2][4];
        for (int e = 0; e < 2 * eights; e++) {
            const uint8_t *const *of = row + 4 * e;
            for (int r = 0; r < 4; r++) __builtin_prefetch(next[4 * e + r] + j, 0, 2);
#define AT(r) *(const unaligned *)(of[r] + j)
            MEET(8, 16, AT(0), AT(1), AT(2), AT(3), met[e / 2][e % 2]);
        }
        for (long t = 0; t < tokens; t++)
            for (int half = 0; half < CODES / 4; half++)
                for (int part = 0; part < 4; part++) {
                    floats *sum = (floats *)(sums + t * stride) + 4 * half + part, total = *sum;
                    for (int e = 0; e < eights; e++) {
                        struct eight of = x[e * tokens + t];
                        ints products = {0};
                        for (int i = 0; i < 2; i++) {
                            bytes codes = met[e][i][part];
                            if (BITS == 8 && !MIDDLE) codes ^= 128;
                            if (BITS == 4 && half) codes >>= 4;
                            if (BITS == 4 && !half) codes &= 15;
                            products = DOT(products, codes, four(of, i));
                        }
                        total += of.scale * __builtin_convertvector(products, floats);
                    }
                    *sum = total;
                }
    }
}

/* Brings the sums of 64 bytes of codes into the order of the outputs. */
static inline void order(const float *sums, float *ordered) {
    const bytes *of = (const bytes *)sums;
    for (int j = 0; j < 64 / WIDTH; j++)
        for (int half = 0; half < CODES / 4; half++, of += 4) {
            bytes to[4];
            MEET(32, 64, of[0], of[1], of[2], of[3], to);
            for (int k = 0; k < 4; k++)
                memcpy(ordered + 16 * (CODES / 4 * k + half) + VECTOR * j, &to[k], WIDTH);
        }
}

#else
static inline __attribute__((always_inline)) void add_eights(
        const int eights, const uint8_t *const *row, const uint8_t *const *next,
        const struct eight *x, float *sums, long size, long tokens, long stride) {
    for (long j = 0; j < size; j += 64, sums += OUTPUTS)
        for (int e = 0; e < eights; e++) {
            for (int r = 0; r < 8; r++) __builtin_prefetch(next[8 * e + r] + j, 0, 2);
            for (long t = 0; t < tokens; t++)
                UNROLL
                for (int k = 0; k < CODES; k++)
                    VECTORIZE
                    for (int w = 0; w < 16; w++) {
                        float sum = 0;
                        UNROLL
                        for (int r = 0; r < 8; r++) {
                            int32_t codes = ((const word *)(row[8 * e + r] + j))[w];
                            sum += x[e * tokens + t].x[r]
                                   * (float)(codes >> BITS * k & ((1 << BITS) - 1));
                        }
                        sums[t * stride + 16 * k + w] += sum;
                    }
        }
}
enum { MIDDLE = 128 };
static inline void order(const float *sums, float *ordered) {
    memcpy(ordered, sums, OUTPUTS * sizeof(float));
}
#endif

/* result += scale * (sum - zero * total), for n outputs. */
static inline __attribute__((always_inline)) void scale(
        long n, const float *restrict sums, float *restrict result, const void *scales,
        const uint8_t *zeros, float total) {
    for (long i = 0; i < n; i++)
#if BITS == 8
        result[i] += ((const float *)scales)[i] * (sums[i] - MIDDLE * total);
#else
        result[i] += of_bfloat16(((const uint16_t *)scales)[i]) * (sums[i] - zeros[i] * total);
#endif
}

/* Adds the sums of one token over a span to its results, and clears them. scales, zeros: those of
   the span, from the first of these outputs on. */
static void finish(float *sums, float *result, long columns, const char *scales,
                   const uint8_t *zeros, float total) {
    for (long j = 0; j < columns; j += OUTPUTS) {
        float ordered[OUTPUTS] __attribute__((aligned(64)));
        const void *of = scales + (BITS == 8 ? 4 : 2) * j;
        order(sums + j, ordered);
        if (columns - j >= OUTPUTS) scale(OUTPUTS, ordered, result + j, of, zeros + j, total);
        else scale(columns - j, ordered, result + j, of, zeros + j, total);
    }
    memset(sums, 0, (columns + OUTPUTS - 1) / OUTPUTS * OUTPUTS * sizeof(float));
}

/* Points at the rows of the eights of a span from k on, and returns how many there are, at most
   EIGHTS; of fewer, the rows come again. */
static int point(const struct span *span, int k, const uint8_t *codes, long pitch,
                 const uint8_t **row) {
    int eights = span->eights - k < EIGHTS ? span->eights - k : EIGHTS;
    for (int r = 0; eights && r < 8 * EIGHTS; r++)
        row[r] = codes + span->channel[8 * k + r % (8 * eights)] * pitch;
    return eights;
}

/* Computes the outputs [begin, end) of all tokens over some spans, as many at a time as there is
   room for: all of y, or a part of its sums. */
static void codes_outputs(const struct span *spans, long count, const uint8_t *codes,
                          const char *scales, const uint8_t *zeros, type *y, float *part,
                          long tokens, long out, long begin, long end) {
    float sums[ROOM] __attribute__((aligned(64))), result[ROOM] __attribute__((aligned(64)));
    long most = ROOM / tokens / OUTPUTS * OUTPUTS, pitch = (out + OUTPUTS - 1) / OUTPUTS * 64;
    for (long first = begin; first < end; first += most) {
        long columns = end - first < most ? end - first : most;
        long size = (columns + OUTPUTS - 1) / OUTPUTS * 64;
        const uint8_t *start = codes + first * BITS / 8, *row[8 * EIGHTS], *next[8 * EIGHTS];
        float total[8] = {0};
        memset(sums, 0, sizeof sums);
        memset(result, 0, sizeof result);
        for (long s = 0; s < count; s++) {
            const struct span *span = &spans[s];
            for (int k = 0; k < span->eights; k += EIGHTS) {
                int eights = point(span, k, start, pitch, row);
                int more = k + EIGHTS < span->eights ? point(span, k + EIGHTS, start, pitch, next)
                           : s + 1 < count ? point(span + 1, 0, start, pitch, next) : 0;
                if (!more) memcpy(next, row, sizeof next);
                const struct eight *x = span->x + k * tokens;
                if (eights == 1) add_eights(1, row, next, x, sums, size, tokens, most);
                else add_eights(2, row, next, x, sums, size, tokens, most);
            }
            for (long t = 0; t < tokens; t++) {
                total[t] += span->total[t];
                if (BITS == 8 && s + 1 < count) continue;          // one scale for all spans
                finish(sums + t * most, result + t * most, columns,
                       scales + (BITS == 8 ? 4 * first : 2 * (s * out + first)),
                       zeros + s * out + first, total[t]);
                total[t] = 0;
            }
        }
        for (long t = 0; t < tokens; t++)
            for (long j = 0; j < columns; j++)
                if (part) part[t * out + first + j] = result[t * most + j];
                else y[t * out + first + j] = from_float(result[t * most + j]);
    }
}

/* y (tokens, out) = x (tokens, in), its small channels dropped, times a weight in codes. size: the
   channels of a span. threshold: one (step 0) or (in) (step 1). Returns 1 where memory ran out. */
int codes_product(const type *x, const uint8_t *codes, const void *scales, const uint8_t *zeros,
                  long size, const float *threshold, long step, type *y, long tokens, long in,
                  long out, int threads) {
    long count = (in + size - 1) / size, eights = (size + 7) / 8;
    int parts = tokens * out <= ROOM / 2 && count >= 2 * threads ? threads : 0;
    struct span *spans = malloc(count * (sizeof *spans + eights * 8 * sizeof(int)
                                         + eights * tokens * sizeof(struct eight))
                                + parts * tokens * out * sizeof(float));
    if (!spans) return 1;
    int *channel = (int *)(spans + count);
    struct eight *room = (struct eight *)(channel + count * 8 * eights);
    for (long s = 0; s < count; s++) {
        spans[s].channel = channel + s * 8 * eights;
        spans[s].x = room + s * eights * tokens;
    }
    // Threads share the outputs; but of few outputs the rows would be short runs of memory, so they
    // share the spans, and add up their sums in the end.
    float *part = (float *)(room + count * eights * tokens);
    long share = ((out + threads - 1) / threads + 127) / 128 * 128;
    #pragma omp parallel num_threads(threads)
    {
        #pragma omp for schedule(static)
        for (long s = 0; s < count; s++)
            list_span(&spans[s], x, threshold, step, tokens, in, s * size,
                      (s + 1) * size < in ? (s + 1) * size : in);
        #pragma omp for schedule(static)
        for (long m = 0; m < threads; m++) {
            long begin = m * count / threads, end = (m + 1) * count / threads;
            if (parts)
                codes_outputs(spans + begin, end - begin, codes,
                              (const char *)scales + (BITS == 8 ? 0 : 2 * begin * out),
                              zeros + begin * out, y, part + m * tokens * out, tokens, out, 0, out);
            else
                codes_outputs(spans, count, codes, scales, zeros, y, NULL, tokens, out, m * share,
                              (m + 1) * share < out ? (m + 1) * share : out);
        }
        #pragma omp for schedule(static)
        for (long j = 0; j < (parts ? tokens * out : 0); j++) {
            float sum = 0;
            for (long m = 0; m < parts; m++) sum += part[m * tokens * out + j];
            y[j] = from_float(sum);
        }
    }
    free(spans);
    return 0;
}
"""
SPAN = 512               # channels of a span of int8, which is listed by one thread
ROUND_ACTIVATIONS = True                   # where the processor has instructions for it


@functools.cache
def c_library(bits, dtype, rounded, narrow=False):
    """Return the C library for codes of so many bits and x of a dtype; None without a compiler.

    rounded: whether activations are, where the processor has instructions for that. narrow: without
    AVX-512, for tests.
    """
    defines = [kernel.C_TYPES[dtype], f"BITS {bits}"] + rounded * ["ROUNDED"] + narrow * ["NARROW"]
    library = kernel.compiled("".join(f"#define {define}\n" for define in defines)
                              + kernel.C_SOURCE + C_SOURCE)
    if library is not None:
        pointer, long = ctypes.c_void_p, ctypes.c_long
        library.codes_product.argtypes = [pointer, pointer, pointer, pointer, long, pointer, long,
                                          pointer, long, long, long, ctypes.c_int]
    return library


def instructions(x, bits):
    """Return what multiplies codes by x, as text: a backend, and in C the instructions."""
    backend = kernel.best_backend(x)
    if backend != "c":
        return f"{backend}, activations in floating point"
    library = c_library(bits, x.dtype, ROUND_ACTIVATIONS)
    return f"C, {ctypes.c_char_p.in_dll(library, 'instructions').value.decode()}"


def rounds(x, weight):
    """Return whether the C kernel rounds activations here."""
    return "floating point" not in instructions(x, weight.bits)


def c_call(x, weight, threshold, y):
    """Return the C function and the arguments that set y (B, out) to the sparse product."""
    zeros = 0 if weight.zeros is None else weight.zeros.data_ptr()
    return c_library(weight.bits, x.dtype, ROUND_ACTIVATIONS).codes_product, (
        x.data_ptr(), weight.codes.data_ptr(), weight.scales.data_ptr(), zeros,
        weight.group or SPAN, threshold.data_ptr(), threshold.ndim, y.data_ptr(), *x.shape,
        weight.shape[1], torch.get_num_threads())


def c_codes(x, weight, threshold):
    if not kernel.fits_c(x):
        raise ValueError(f'backend "codes-c" needs a C compiler and float32, float16 or bfloat16 '
                         f'on the CPU, not {x.dtype} on {x.device.type}')
    y = x.new_empty(len(x), weight.shape[1])
    function, arguments = c_call(x, weight, threshold, y)
    if function(*arguments):
        raise MemoryError("no memory for the list of kept channels")
    return y


kernel.BACKENDS |= {"codes-triton": triton_codes, "codes-c": c_codes, "codes-torch": torch_codes}
kernel.C_CALLS["codes-c"] = c_call


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


fused.FUSABLE.add(QuantizedLinear)


def bits_by_name(config, bits, head_bits=8):
    """Return {name of a linear, or EMBEDDING: bits} of what is quantized in a Llama of a Config.

    With a tied head EMBEDDING stands for both.
    """
    bits_of = dict.fromkeys(linear_names(config), bits)
    if head_bits < 16:
        bits_of |= {EMBEDDING: head_bits}
        if not config.tie_word_embeddings:
            bits_of |= {"lm_head": head_bits}
    return bits_of


def replace_linear(model, name, weight_of):
    """Put the QuantizedWeight weight_of(weight (out, in)) in the place of a linear or EMBEDDING."""
    def make(weight_t, bias):
        return QuantizedLinear(weight_of(weight_t.t()), bias)

    if name != EMBEDDING:
        sparsify(model, {name: None}, make)
    elif model.config.tie_word_embeddings:
        sparsify(model, {"lm_head": None}, make)           # the embedding reads the head's weight
    else:
        model.model.embed_tokens = TransposedEmbedding(weight_of(model.model.embed_tokens.weight))


@torch.no_grad()
def quantize(model, bits, group=None, clipping=CLIPPING, head_bits=8):
    """Quantize the linears of a Llama in place, one by one, and return the model, dense.

    bits: 8 or 4, of the blocks' linears; head_bits: 16, 8 or 4, of the head and the embedding.
    group: of inputs, at 4 bits; None: `fitting_group`. Raises InputError, and changes nothing, for
    a model that is sparse or quantized already, and for weights that cannot be quantized.
    """
    require(not any(isinstance(module, SparseLinear) for module in model.modules()),
            "the model is quantized or sparse already; quantize it first, then make it sparse")
    group = group or fitting_group(model)
    bits_of = bits_by_name(model.config, bits, head_bits)
    for name, number in bits_of.items():
        check_weight(model.get_submodule(name).weight, number, group, name)
    for name in progress(list(bits_of), f"quantizing to int{bits}"):
        replace_linear(model, name,
                       lambda weight: quantize_weight(weight, bits_of[name], group, clipping))
    settings = quantization_config(bits, group, head_bits)
    model.config = replace(model.config, quantization_config=settings)
    return model


def follow(arguments, model, name):
    """Do what the options say, to a model that was loaded as `name`; say what multiplies it.

    The options are allocate.add_quantize's: --quantize, --head-bits, --float-activations.
    """
    global ROUND_ACTIVATIONS
    ROUND_ACTIVATIONS = not arguments.float_activations
    require(arguments.quantize or arguments.head_bits is None, "--head-bits is for --quantize")
    if arguments.quantize:
        quantize_now(model, name, arguments.quantize, arguments.head_bits)
    settings = model.config.quantization_config
    if settings:
        head = settings.get("head_bits", 16)
        note(f"{settings['bits']} bits a weight, the head's {head}; products by "
             f"{instructions(model.model.norm.weight, settings['bits'])}")


def quantize_now(model, name, kind, head_bits=None):
    """Quantize a model that was loaded as `name` to `kind`, "int8" or "int4", for --quantize."""
    require(not model.config.quantization_config,
            f"{name}: is quantized already, --quantize is for weights in floating point")
    # Random weights lose nothing where no clipping is tried.
    clipping = (1.0,) if str(name).startswith("random:") else CLIPPING
    return quantize(model, int(kind.removeprefix("int")), clipping=clipping,
                    head_bits=head_bits or 8)


# --------------------------------------------------------------------------------------------------
# The folder: a linear's `NAME.weight` becomes `NAME.weight_t.codes`, `.scales` and `.zeros`

def quantization_config(bits, group, head_bits):
    """Return what config.json says of a quantized checkpoint."""
    return {"quant_method": METHOD, "version": VERSION, "bits": bits, "head_bits": head_bits,
            "group": group if 4 in (bits, head_bits) else None}


def shape_linears(model, folder):
    """Put linears without memory, quantized as its config says, into a Llama on the meta device.

    For Llama.from_pretrained. Raises InputError for a config that this file did not write.
    """
    what = f"{Path(folder) / 'config.json'}: quantization_config"
    settings = {"head_bits": 16} | model.config.quantization_config
    version, bits, head_bits, group = (settings.get(key)
                                       for key in ("version", "bits", "head_bits", "group"))
    require(version in (1, VERSION), f"{what}: version is {version!r}, known is {VERSION}")
    require(type(bits) is int and bits in (4, 8), f"{what}: bits is {bits!r}, expected 4 or 8")
    require(type(head_bits) is int and head_bits in (4, 8, 16),
            f"{what}: head_bits is {head_bits!r}, expected 16, 8 or 4")
    grouped = 4 in (bits, head_bits)
    require(type(group) is (int if grouped else type(None)),
            f"{what}: {bits} bits, the head {head_bits}, with group {group!r}, expected "
            f"{'a number' if grouped else 'null'}")
    for name, number in bits_by_name(model.config, bits, head_bits).items():
        inputs = model.get_submodule(name).weight.shape[1]
        require(number == 8 or is_group(group, inputs),
                f"{what}: groups of {group}, expected a multiple of 32 that divides the {inputs} "
                f"inputs of {name}")
        replace_linear(model, name, lambda weight: QuantizedWeight.empty(*weight.t().shape, number,
                                                                         group))


QUANTIZED[METHOD] = shape_linears


def quantize_folder(folder, out, bits, group=None, head_bits=8):
    """Write the checkpoint in `folder`, its linears quantized, to the new folder `out`.

    It goes file by file. Arguments as of `quantize`. Returns {linear, or EMBEDDING: (relative
    error, bytes before, bytes after)}.
    """
    require(not is_quantized(folder), f"{folder}: is quantized already")
    model = Llama.shapes(Config.read(folder))
    group = group or fitting_group(model)
    bits_of = bits_by_name(model.config, bits, head_bits)
    measures = {}

    def change(path, tensors):
        changed = {}
        for name in progress(list(tensors), f"quantizing {path.name}"):
            tensor = tensors.pop(name)
            linear = name.removesuffix(".weight")
            if linear not in bits_of:
                changed[name] = tensor
                continue
            quantized = quantize_weight(tensor, bits_of[linear], group,
                                        name=f"{path}: tensor {name}")
            changed |= {f"{name}_t.{part}": values for part, values in quantized.named_buffers()}
            measures[linear] = measured(tensor, quantized)
        return changed

    rewrite_checkpoint(folder, model, out, change,
                       {"quantization_config": quantization_config(bits, group, head_bits)})
    return measures


def measured(weight, quantized):
    """Return (relative error, bytes before, bytes after) of a weight (out, in)."""
    return relative_error(weight, quantized), weight.nbytes, quantized.nbytes


# --------------------------------------------------------------------------------------------------
# The command

def main(allocate=None, judge=None):
    """allocate, judge: the modules of beyond, for --table."""
    parser = Parser(description="Prints size and error of a checkpoint at 8 and 4 bits a weight; "
                                "with --out, writes it so.")
    parser.add_argument("--model", default=str(DEMO),
                        help="checkpoint folder (default: the demo model)")
    parser.add_argument("--bits", type=int, choices=[4, 8], default=4,
                        help="of a weight in --out (default: 4)")
    parser.add_argument("--group", type=natural,
                        help="inputs that share a scale at 4 bits (default: 128, or as many of "
                             "96, 64 and 32 as divide the inputs of every linear)")
    parser.add_argument("--head-bits", type=int, choices=[16, 8, 4], default=8,
                        help="of the head and the embedding (default: 8)")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--out", metavar="FOLDER",
                      help="folder to write, which must not exist (default: only measure)")
    what.add_argument("--table", action="store_true",
                      help="measure perplexity and speed, bits against sparsity (default: no)")
    what.add_argument("--rounding", action="store_true",
                      help="measure what rounding the activations adds (default: no)")
    parser.add_argument("--held-out", metavar="FILE",
                        help="text for --table and --rounding (default: the demo's)")
    parser.add_argument("--tokens", type=natural, default=50_000,
                        help="of the held-out text for --table and --rounding (default: 50000)")
    arguments = parser.parse_args()
    folder, group = arguments.model, arguments.group
    if arguments.out:
        check_new_folder(arguments.out)
    require(group is None or group % 32 == 0, f"--group is {group}, expected a multiple of 32")
    require(not folder.startswith("random:"),
            f"{folder} has random weights: commands quantize it as they start, with --quantize")
    if Path(folder).is_dir():
        require(not is_quantized(folder), f"{folder}: is quantized already")
        group = group or fitting_group(Llama.shapes(Config.read(folder)))
    if arguments.table:
        table(folder, group, arguments.head_bits, arguments.tokens, arguments.held_out, allocate,
              judge)
        return
    if arguments.rounding:
        rounding_table(folder, group, arguments.head_bits, arguments.tokens, arguments.held_out)
        return
    if arguments.out:
        measures = quantize_folder(folder, arguments.out, arguments.bits, group,
                                   arguments.head_bits)
        print_errors(folder, arguments.bits, group, measures)
        print(f"{arguments.out}: written. Calibrate it with: python -m beyond.allocate "
              f"--model {arguments.out}")
        return
    model, _ = load_model(folder)
    for bits in (8, 4):
        measures = {}
        bits_of = bits_by_name(model.config, bits, arguments.head_bits)
        for name, number in progress(list(bits_of.items()), f"quantizing to int{bits}"):
            weight = model.get_submodule(name).weight
            measures[name] = measured(weight, quantize_weight(weight, number, group, name=name))
        print_errors(folder, bits, group, measures)


def print_errors(folder, bits, group, measures):
    """Print {linear: (relative error, bytes before, bytes after)}, block by block."""
    config = Config.read(folder)
    blocks = linear_names(config)
    rest = [name for name in measures if name not in blocks]
    print(f"int{bits}{f', groups of {group}' if bits == 4 else ''}: "
          f"the blocks' linears {sizes_of(measures, blocks)}")
    if rest:
        errors = ", ".join(f"{100 * measures[name][0]:.2f}" for name in rest)
        print(f"{' and '.join(rest)}: {sizes_of(measures, rest)}, relative error {errors} percent")
    print("relative error of each weight of the blocks, in percent:")
    kinds = list(block_linears(config))
    print(f"{'block':>6}" + "".join(f"{kind.split('.')[1]:>11}" for kind in kinds))
    for layer in range(config.num_hidden_layers):
        errors = [measures[f"model.layers.{layer}.{kind}"][0] for kind in kinds]
        print(f"{layer:6}" + "".join(f"{100 * error:11.2f}" for error in errors))


def sizes_of(measures, names):
    """Return the sizes before and after of some linears, as text."""
    before, after = (sum(measures[name][i] for name in names) / 1e6 for i in (1, 2))
    return f"{before:,.1f} MB -> {after:,.1f} MB"


LEVELS = (0.0, 0.25, 0.4, 0.5, 0.65)       # of sparsity, in the table


def table(folder, group, head_bits, count, held_out, allocate, judge):
    """Print perplexity, bytes a token and tokens a second, 16, 8 and 4 bits against sparsity.

    Each is calibrated on its own, on 20,000 tokens, without the priced allocation, which would take
    minutes more. Tokens a second are of decoding alone. Activations are rounded as they are in
    decoding; `rounding_table` shows what that adds. held_out: a path, or None for the demo's text;
    allocate, judge: the modules.
    """
    print(f"{folder}, torch {torch.__version__}, {torch.get_num_threads()} threads; products by "
          f"{instructions(torch.empty(0, dtype=torch.bfloat16), 8)}")
    print(f"{'bits':>5} {'sparsity':>9} {'realised':>9} {'perplexity':>11} {'at target':>10} "
          f"{'MB a token':>11} {'tokens/s':>9}")
    tokenizer = load_tokenizer(folder)
    train = read_tokens(tokenizer, None, "train")[0][:20_000]
    held_out = read_tokens(tokenizer, held_out, "held-out")[0][:count]
    for bits in (16, 8, 4):
        model, _ = load_model(folder, dtype="bfloat16")
        if bits < 16:
            quantize(model, bits, group, head_bits=head_bits)
        calibration = calibrate(model, train)
        allocate.add_allocations(calibration, model, train)
        whole = bytes_a_token(model)
        linears = sum(tensor.nbytes for name in linear_names(model.config)
                      for tensor in tensors_of(model.get_submodule(name)))
        sparsify(model, calibration.thresholds(0.0) | {"lm_head": None})
        settings = [judge.Setting("balanced", level, calibration.thresholds(level, "balanced"))
                    for level in LEVELS if level]
        rows = judge.judge(model, held_out, settings)
        judge.at_target(rows)
        for row, level in zip(rows, LEVELS):
            mode = "decode" if level else "off"
            with sparse_mode(model, mode, calibration.thresholds(level, "balanced")):
                reset_counts(model)
                rate = tokens_a_second(model, held_out[:64].tolist())
                read = whole - realised_sparsity(model) * linears
            at = row["perplexity_at_target"]
            at = f"{at:10.3f}" if at else f"{'-':>10}"
            print(f"{bits:5} {level:9.0%} {row['sparsity']:9.1%} {row['perplexity']:11.3f} {at} "
                  f"{read / 1e6:11.3f} {rate:9.1f}", flush=True)


@torch.no_grad()
def rounding_table(folder, group, head_bits, count, held_out, levels=(0.0, 0.5, 0.65)):
    """Print what rounding the activations to 8 bits adds to what rounding the weights does.

    KL is the divergence from the model as the folder has it, dense, in nats a token. Thresholds are
    those of the folder's calibration, the first tokens of a window dense, as in decoding. held_out:
    a path, or None for the demo's text.
    """
    global ROUND_ACTIVATIONS
    original, tokenizer = load_model(folder)
    calibration = load_calibration(original, folder, None)
    models = {bits: quantize(load_model(folder)[0], bits, group, head_bits=head_bits)
              for bits in (8, 4)}
    for model in models.values():
        sparsify(model, calibration.thresholds(0.5, "uniform") | {"lm_head": None})
    tokens = read_tokens(tokenizer, held_out, "held-out")[0][:count]
    windows = windows_of(tokens, min(512, default_context(original)))
    sums = {}                            # {(bits, level, rounded): (loss, KL)}, summed over windows
    for window in progress(windows, "rounding activations"):
        inputs, targets = window[None, :-1], window[1:]
        exact = original(inputs)[0].log_softmax(-1)
        for bits, level, rounded in itertools.product(models, levels, (False, True)):
            ROUND_ACTIVATIONS = rounded
            thresholds = calibration.thresholds(level, "uniform") if level else None
            with sparse_mode(models[bits], "all" if level else "off", thresholds, SINKS):
                log_p = models[bits](inputs)[0].log_softmax(-1)
            measures = torch.stack((F.nll_loss(log_p, targets),
                                    F.kl_div(log_p, exact, reduction="batchmean", log_target=True)))
            sums[bits, level, rounded] = sums.get((bits, level, rounded), 0) + measures
    ROUND_ACTIVATIONS = True
    print(f"{folder}: {len(windows)} windows of {len(windows[0]) - 1} tokens; products by "
          f"{instructions(original.model.norm.weight, 8)}")
    print(f"{'':>14} {'activations as they are':>25} {'rounded to 8 bits':>25}")
    print(f"{'bits':>5} {'dropped':>8} {'perplexity':>14} {'KL':>10} {'perplexity':>14} {'KL':>10}"
          f" {'added':>8}")
    for bits, level in itertools.product(models, levels):
        (loss, kl), (loss_rounded, kl_rounded) = (sums[bits, level, rounded] / len(windows)
                                                  for rounded in (False, True))
        print(f"{bits:5} {level:8.0%} {loss.exp():14.3f} {kl:10.5f} {loss_rounded.exp():14.3f} "
              f"{kl_rounded:10.5f} {kl_rounded / kl - 1:+8.1%}")


def tensors_of(module):
    """Return all tensors of a module, each once."""
    return {tensor.data_ptr(): tensor for tensor in [*module.parameters(), *module.buffers()]
            }.values()


def bytes_a_token(model):
    """Return the bytes of weights that one dense step reads: of an untied embedding one row."""
    embedding = sum(tensor.nbytes for tensor in tensors_of(model.model.embed_tokens))
    unread = 0 if model.config.tie_word_embeddings else embedding
    row = embedding // model.config.vocab_size
    return sum(tensor.nbytes for tensor in tensors_of(model)) - unread + row


def tokens_a_second(model, prompt, tokens=200, make_step=record.make_step):
    """Return the median rate at which so many tokens follow a prompt."""
    times = []
    for _ in generate(model, prompt, tokens, make_step=make_step):
        times.append(time.perf_counter())
    return 1 / statistics.median(end - begin for begin, end in zip(times, times[1:]))


if __name__ == "__main__":
    from beyond import allocate, judge   # for --table; they import this file
    command_line(lambda: main(allocate, judge))
