"""How skipped columns become time: the sparse matrix-vector product.

Decoding one token multiplies every weight matrix by one vector. Each weight is read from memory,
used in one multiplication and not seen again until the next token, so the time is the bytes read
over the bandwidth of the memory; arithmetic is free. The only way to be faster is to read less, and
a channel whose input is dropped needs no weights at all:

    y = W x = Σ_i x_i · (column i of W)          with |x_i| ≤ threshold, column i is not read

Why the weight is stored transposed. PyTorch keeps W as (out, in), row by row; a column is then one
number every `in` numbers, and memory hands out whole lines of 64 bytes or more: skipping it saves
nothing. Transposed, as `weight_t` (in, out), a column of W is one contiguous row, and skipping it
skips real memory:

                  W (out, in)                        weight_t (in, out)
            x:  ■ · ■ ■ · · ■ ·                 x:
                ▓ ░ ▓ ▓ ░ ░ ▓ ░                 ■   ▓▓▓▓▓▓▓▓▓▓▓▓   read
                ▓ ░ ▓ ▓ ░ ░ ▓ ░                 ·   ────────────   never touched
                ▓ ░ ▓ ▓ ░ ░ ▓ ░                 ■   ▓▓▓▓▓▓▓▓▓▓▓▓   read
                ▓ ░ ▓ ▓ ░ ░ ▓ ░                 ■   ▓▓▓▓▓▓▓▓▓▓▓▓   read
            every line is fetched anyway        ·   ────────────   never touched

So y is a weighted sum of the rows whose input is large. Two things are left to arrange.

Who adds up what. On a CPU each thread owns a range of outputs and walks down all kept rows; its
sums stay in the first cache. A GPU has ten thousand threads and a 4096 x 4096 layer only 32 tiles
of 128 outputs, so the rows are divided too ("split-K"): program (tile, split) adds the rows of its
split for its range of outputs and writes its partial sum to a place of its own. The program of a
tile that finishes last adds the parts, always in the same order. No sum is made of atomics, so the
same input gives the same bits on every run.

Both list the kept channels first. Then every load that is issued is one of a row that counts, and
the next ones can be asked for long before they are needed.

Several tokens. From 2 to 8 rows of x (the guesses that a sparse verifier checks) a weight row is
read once if any token keeps its channel, and each token adds it with its own mask.

Three backends compute the same function: "triton" (GPU), "c" (CPU, where a C compiler is found),
"torch" (anywhere). Thresholds are compared, and sums are taken, in float32; a float64 input stays
float64 and takes "torch".

    python kernel.py                                       dense against sparse, Llama-2-7B's shapes
    python kernel.py --shapes llama-3-8b --dtype bfloat16 --sparsity 0 0.5
"""
import contextlib
import contextvars
import ctypes
import functools
import hashlib
import os
import platform
import shutil
import statistics
import subprocess
import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F

from model import PRESETS, Parser, block_linears, command_line, find_device, require, share

try:
    import triton
    import triton.language as tl
except ImportError:                  # there is no Triton for macOS, which has no CUDA either
    triton = None

MAX_ROWS = 8             # more rows than this are bound by arithmetic, and no longer a few vectors


def kept(x, threshold):
    """Return which entries of x (..., in) are kept, bool: those with |x| > threshold, and NaN.

    threshold: a tensor () or (in,), compared in its own dtype, float32 at least. NaN is kept, so
    that it shows. This is the rule of TEAL, section 4; the kernels below repeat it in their own
    languages.
    """
    return (x.to(threshold.dtype).abs() <= threshold).logical_not_()


def sparse_gemv(x, weight_t, threshold, backend=None):
    """Return x with its small channels dropped, times the weight: where(|x| > t, x, 0) @ weight_t.

    x: (B, in), B from 1 to 8, floating point
    weight_t: (in, out), contiguous, of x's dtype: the transposed weight of a linear
    threshold: a number, a 0-d tensor, or a tensor (in,), one a channel; below 0 keeps all
    backend: a name in BACKENDS, or None for the fastest there is for x's device and dtype
    Returns (B, out) in x's dtype. Raises ValueError for shapes and dtypes that do not fit.
    """
    if x.ndim != 2 or not 1 <= x.shape[0] <= MAX_ROWS or not x.is_floating_point():
        raise ValueError(f"x is {x.dtype} {tuple(x.shape)}, expected floating point (1 to "
                         f"{MAX_ROWS}, in)")
    if (weight_t.ndim != 2 or weight_t.shape[0] != x.shape[1]
            or weight_t.dtype != x.dtype or weight_t.device != x.device):
        raise ValueError(f"weight_t is {weight_t.dtype} {tuple(weight_t.shape)} on "
                         f"{weight_t.device}, expected {x.dtype} ({x.shape[1]}, out) on "
                         f"{x.device}, as x is")
    if not weight_t.is_contiguous():
        raise ValueError("weight_t is not contiguous: its rows must be the input channels, one "
                         "after another")
    name = backend or best_backend(x)
    if name not in BACKENDS:
        raise ValueError(f"backend is {', '.join(BACKENDS)} or None, not {backend!r}")
    return BACKENDS[name](x.contiguous(), weight_t.detach(), as_threshold(threshold, x))


def as_threshold(threshold, x):
    """Return a threshold as a tensor () or (in,), of x's device and of the comparison's dtype."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    if not isinstance(threshold, torch.Tensor):
        # not torch.tensor: a CUDA graph cannot replay a copy from the host
        threshold = torch.full((), threshold, device=x.device, dtype=dtype)
    elif threshold.dtype != dtype or threshold.device != x.device or not threshold.is_contiguous():
        threshold = threshold.to(x.device, dtype).contiguous()
    if threshold.shape not in ((), (x.shape[1],)):
        raise ValueError(f"threshold is {tuple(threshold.shape)}, expected a number or "
                         f"({x.shape[1]},)")
    return threshold


def best_backend(x):
    """Return the name of the fastest backend for a tensor of x's device and dtype."""
    if x.dtype == torch.float64:
        return "torch"
    if x.device.type == "cuda" and triton is not None:
        return "triton"
    return "c" if fits_c(x) else "torch"


def dense(x, weight_t):
    """Return x (..., in) @ weight_t (in, out) by what is fastest for so many rows; drop nothing.

    On a CPU the library's products are made for many rows: one to eight go through the C kernel,
    which reads the weight at the speed of memory. Its float16 products are done row by row with
    scalars, a hundred times too slow, so those go through float32, or through our kernel in parts.
    """
    rows = x.numel() // x.shape[-1]
    half = x.dtype == torch.float16
    if fits_c(x) and not x.requires_grad:
        if rows <= MAX_ROWS:
            y = sparse_gemv(x.reshape(rows, -1), weight_t, KEEP_ALL, "c")
            return y.view(*x.shape[:-1], -1)
        if half and rows <= 8 * MAX_ROWS:
            parts = x.reshape(rows, -1).split(MAX_ROWS)
            return torch.cat([dense(part, weight_t) for part in parts]).view(*x.shape[:-1], -1)
    if half and x.device.type == "cpu":
        return (x.float() @ weight_t.float()).half()
    return x @ weight_t


KEEP_ALL = torch.tensor(-1.0)        # no magnitude is below it


# --------------------------------------------------------------------------------------------------
# PyTorch: an embedding lookup is a gather of rows, and `embedding_bag` sums them with weights.

def torch_gemv(x, weight_t, threshold):
    """Compute sparse_gemv in PyTorch. A bag is one thread's work; a row of x makes a few."""
    keep = kept(x, threshold)                                                         # (B, in)
    row, channel = keep.nonzero(as_tuple=True)
    bags = 4 * torch.get_num_threads()
    ends = keep.sum(1).cumsum(0).tolist()
    starts = [begin + (end - begin) * bag // bags
              for begin, end in zip([0] + ends, ends) for bag in range(bags)]
    starts = torch.tensor(starts, device=x.device)
    sums = F.embedding_bag(channel, weight_t, starts, mode="sum",
                           per_sample_weights=x[row, channel])                  # (B * bags, out)
    return sums.view(len(x), bags, -1).sum(1, dtype=threshold.dtype).to(x.dtype)


# --------------------------------------------------------------------------------------------------
# C: first the kept channels are listed, then each thread walks down the listed rows over its range
# of outputs. A row is read in words of 32 bits. A word holds one weight or two, its lanes, and to
# unpack one lane of many words at once is a shift or two, which compilers make vectors of:
#     float32    one lane
#     bfloat16   two, each the upper half of a float32: shift, or mask
#     float16    two: sign, exponent and mantissa moved to their places in a float32; that is the
#                value / 2^112, and the input is multiplied by 2^112 to make up for it

C_NUMBERS = r"""
#include <math.h>
#include <stdint.h>
#include <string.h>

// Floats and the bits that stand for them in memory; rounding is to nearest, ties to even.
static inline float number(uint32_t bits) { float x; memcpy(&x, &bits, 4); return x; }
static inline uint32_t bits_of(float x) { uint32_t bits; memcpy(&bits, &x, 4); return bits; }

static inline float of_bfloat16(uint16_t bits) { return number((uint32_t)bits << 16); }
static inline uint16_t bfloat16_of(float x) {
    uint32_t bits = bits_of(x);
    return x != x ? 0x7fc0 : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}
static inline float of_float16(uint16_t bits) {
    uint32_t exponent = bits & 0x7c00, rest = (bits & 0x7fffu) << 13;
    float size = exponent == 0x7c00 ? number(0x7f800000 | rest)                  // infinity, NaN
               : exponent ? 0x1p112f * number(rest) : 0x1p-24f * (bits & 0x3ff); // steps of 2^-24
    return bits & 0x8000 ? -size : size;
}
static inline uint16_t float16_of(float x) {
    float size = fabsf(x);
    uint32_t sign = bits_of(x) >> 16 & 0x8000, bits = bits_of(0x1p-112f * size);
    if (!(size < 65520.0f)) return sign | (x == x ? 0x7c00 : 0x7e00);            // infinity, NaN
    if (size < 0x1p-14f) return sign | (bits_of(size + 0.5f) - bits_of(0.5f));   // steps of 2^-24
    return sign | (bits + 0xfff + (bits >> 13 & 1)) >> 13;
}
"""

C_SOURCE = C_NUMBERS + r"""
#include <stdlib.h>

#if defined FLOAT32
typedef uint32_t type;
enum { LANES = 1 };
#define FACTOR 1.0f
#define LANE(word, k) number(word)
#define to_float number
#define from_float bits_of

#elif defined BFLOAT16
typedef uint16_t type;
enum { LANES = 2 };
#define FACTOR 1.0f
#define LANE(word, k) number(k ? (word) & 0xffff0000u : (word) << 16)
#define to_float of_bfloat16
#define from_float bfloat16_of

#elif defined FLOAT16
typedef uint16_t type;
enum { LANES = 2 };
#define FACTOR 0x1p112f
#define LANE(word, k) number((uint32_t)((int32_t)(k ? (word) : (word) << 16) >> 3) & 0x8fffe000u)
#define to_float of_float16
#define from_float float16_of
#endif

#ifdef __clang__
#define VECTORIZE _Pragma("clang loop vectorize(assume_safety)")
#define UNROLL _Pragma("clang loop unroll(full)")
#else
#define VECTORIZE _Pragma("GCC ivdep")
#define UNROLL _Pragma("GCC unroll 8")
#endif

#define SPAN 512         // channels that one thread lists at a time
#define BATCH 4          // rows added in one pass over the sums, which are loaded and stored less
#define ROOM 8192        // sums that a thread holds: 32 KB, what the first cache holds

typedef uint32_t __attribute__((aligned(1), may_alias)) word;

/* Lists the channels of a span that any token keeps, padded to whole batches; returns how many.
   The inputs of a batch stand token by token, with zero for what a token drops:
       channel  c0 c1 c2 c3 | c4 ...
       input    (token 0: x[c0] x[c1] x[c2] x[c3]) (token 1: ...) | ... */
static int list_kept(const type *x, const float *threshold, long step, long tokens, long in,
                     long begin, int *channel, float *input) {
    int n = 0;
    for (long i = begin; i < begin + SPAN && i < in; i++) {
        float *place = input + n / BATCH * BATCH * tokens + n % BATCH;
        int needed = 0;
        for (long t = 0; t < tokens; t++) {
            float value = to_float(x[t * in + i]);
            int keep = !(fabsf(value) <= threshold[i * step]);       // NaN is kept
            place[t * BATCH] = keep ? FACTOR * value : 0.0f;
            needed |= keep;
        }
        channel[n] = i;
        n += needed;
    }
    for (; n % BATCH; n++) {
        float *place = input + n / BATCH * BATCH * tokens + n % BATCH;
        for (long t = 0; t < tokens; t++) place[t * BATCH] = 0.0f;
        channel[n] = channel[n - 1];
    }
    return n;
}

/* sums[t][k][j] += input[t][r] * lane k of row[r][j], for a batch of rows. TOKENS is a constant
   where this is inlined. tail: whether one weight is left over after the last whole word. next:
   the rows that follow. A processor foresees how a row goes on, but not which row comes next. */
static inline __attribute__((always_inline)) void add_batch(
        const int TOKENS, const type *const *rows, const type *const *next,
        const float *restrict input, float *restrict sums, long words, int tail, long lane,
        long stride) {
    const word *row[BATCH];
    for (int r = 0; r < BATCH; r++) row[r] = (const word *)rows[r];
    for (long line = 0; line < words; line += 16) {        // of 64 bytes
        long end = line + 16 < words ? line + 16 : words;
        for (int r = 0; r < BATCH; r++) __builtin_prefetch((const word *)next[r] + line, 0, 2);
        VECTORIZE
        for (long j = line; j < end; j++)
            UNROLL
            for (int k = 0; k < LANES; k++)
                UNROLL
                for (int t = 0; t < TOKENS; t++) {
                    float sum = 0;
                    UNROLL
                    for (int r = 0; r < BATCH; r++)
                        sum += input[t * BATCH + r] * LANE(row[r][j], k);
                    sums[t * stride + k * lane + j] += sum;
                }
    }
    for (int r = 0; tail && r < BATCH; r++)
        for (int t = 0; t < TOKENS; t++)
            sums[t * stride + words] += input[t * BATCH + r] / FACTOR
                                        * to_float(rows[r][LANES * words]);
}

struct list { long spans; int *n; int *channel; float *input; };

/* Computes the outputs [begin, end) of all tokens, as many at a time as there is room for. */
static void outputs(struct list kept, const type *weight, type *y, long tokens, long out,
                    long begin, long end) {
    float sums[ROOM] __attribute__((aligned(64)));
    long stride = ROOM / tokens, lane = stride / LANES / 16 * 16, most = LANES * lane;
    for (long first = begin; first < end; first += most) {
        long columns = end - first < most ? end - first : most;
        long words = columns / LANES, tail = columns % LANES;
        memset(sums, 0, sizeof sums);
        for (long s = 0; s < kept.spans; s++) {
            const int *channel = kept.channel + s * SPAN;
            const float *input = kept.input + s * SPAN * tokens;
            for (int k = 0; k < kept.n[s]; k += BATCH, channel += BATCH, input += BATCH * tokens) {
                const type *rows[BATCH], *next[BATCH];
                for (int r = 0; r < BATCH; r++) rows[r] = weight + channel[r] * out + first;
                const int *then = channel + BATCH;
                if (k + BATCH >= kept.n[s]) {
                    int more = s + 1 < kept.spans && kept.n[s + 1];
                    then = more ? kept.channel + (s + 1) * SPAN : channel;
                }
                for (int r = 0; r < BATCH; r++) next[r] = weight + then[r] * out + first;
                for (long t = 0; t < tokens; t += 4) {               // whose sums fit the registers
                    const float *x = input + t * BATCH;
                    float *to = sums + t * stride;
                    switch (tokens - t) {
                    case 1: add_batch(1, rows, next, x, to, words, tail, lane, stride); break;
                    case 2: add_batch(2, rows, next, x, to, words, tail, lane, stride); break;
                    case 3: add_batch(3, rows, next, x, to, words, tail, lane, stride); break;
                    default: add_batch(4, rows, next, x, to, words, tail, lane, stride);
                    }
                }
            }
        }
        for (long t = 0; t < tokens; t++)
            for (long k = 0; k < LANES; k++) {
                const float *of = sums + t * stride + k * lane;
                type *to = y + t * out + first + k;
                for (long j = 0; LANES * j + k < columns; j++) to[LANES * j] = from_float(of[j]);
            }
    }
}

/* y (tokens, out) = x (tokens, in), its small channels dropped, times weight (in, out).
   threshold: one (step 0) or (in) (step 1). Returns 0, or 1 where memory ran out. */
int sparse_product(const type *x, const type *weight, const float *threshold, long step, type *y,
                   long tokens, long in, long out, int threads) {
    struct list kept = { (in + SPAN - 1) / SPAN };
    kept.input = malloc(kept.spans * (SPAN * (tokens + 1) + 1) * 4);
    if (!kept.input) return 1;
    kept.channel = (int *)(kept.input + kept.spans * SPAN * tokens);
    kept.n = kept.channel + kept.spans * SPAN;
    long share = ((out + threads - 1) / threads + 127) / 128 * 128;
    #pragma omp parallel num_threads(threads)
    {
        #pragma omp for schedule(static)
        for (long s = 0; s < kept.spans; s++)
            kept.n[s] = list_kept(x, threshold, step, tokens, in, s * SPAN, kept.channel + s * SPAN,
                                  kept.input + s * SPAN * tokens);
        #pragma omp for schedule(static)
        for (long m = 0; m < threads; m++)
            outputs(kept, weight, y, tokens, out, m * share,
                    (m + 1) * share < out ? (m + 1) * share : out);
    }
    free(kept.input);
    return 0;
}
"""
C_TYPES = {torch.float32: "FLOAT32", torch.bfloat16: "BFLOAT16", torch.float16: "FLOAT16"}

# No -ffast-math: a library linked with it makes the whole process flush denormals. -march is for
# gcc and clang on x86, -mcpu for arm. Apple's compiler has no OpenMP: there C runs on one thread.
C_FLAGS = ["-O3 -fopenmp -march=native -mprefer-vector-width=512", "-O3 -fopenmp -march=native",
           "-O3 -fopenmp -mcpu=native", "-O3 -mcpu=native", "-O3"]


@functools.cache
def compiled(source):
    """Return C source compiled for this processor, a ctypes.CDLL, or None without a C compiler.

    It is built on first use into MINTEAL_CACHE or ~/.cache/minteal, under a name that carries a
    hash of source, flags, compiler and processor. Set MINTEAL_CACHE to "off" to do without.
    """
    compiler = os.environ.get("CC") or next(filter(shutil.which, ("cc", "gcc", "clang")), None)
    if os.environ.get("MINTEAL_CACHE") == "off" or compiler is None:
        return None
    try:
        folder = Path(os.environ.get("MINTEAL_CACHE") or Path.home() / ".cache" / "minteal")
        folder.mkdir(parents=True, exist_ok=True)
        version = subprocess.run([*compiler.split(), "--version"], capture_output=True).stdout
        for flags in C_FLAGS:
            identity = f"{source}\n{flags}\n{version}\n{_processor()}"
            library = folder / f"{hashlib.sha256(identity.encode()).hexdigest()[:16]}.so"
            loaded = _load(library)
            if loaded is None and _build(compiler, flags, source, library):
                loaded = _load(library)
            if loaded is not None:
                return loaded
    except (OSError, RuntimeError):                        # no folder to write to, no home
        pass
    return None


def _build(compiler, flags, source, library):
    """Compile C to the file `library`, whole or not at all; return whether that worked."""
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        result = Path(folder) / library.name
        command = [*compiler.split(), *flags.split(), "-shared", "-fPIC", "-x", "c", "-",
                   "-o", str(result), "-lm"]
        done = subprocess.run(command, input=source, capture_output=True, text=True)
        if done.returncode == 0:
            os.replace(result, library)
    return done.returncode == 0


def _load(library):
    """Return the library at a path, or None if there is none that loads."""
    try:
        return ctypes.CDLL(str(library))
    except OSError:
        return None


def _processor():
    """Return what -march=native looks at, near enough: machines may share a cache folder."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    signs = ("model name", "flags", "Features", "CPU part")
    lines = sorted({line for line in lines if line.startswith(signs)})
    return platform.machine() + platform.processor() + "".join(lines)


@functools.cache
def c_function(dtype):
    """Return the C function for weights of a dtype, or None where no C compiler builds it."""
    library = compiled(f"#define {C_TYPES[dtype]}\n{C_SOURCE}")
    if library is None:
        return None
    pointer, long = ctypes.c_void_p, ctypes.c_long
    library.sparse_product.argtypes = [pointer, pointer, pointer, long, pointer, long, long, long,
                                       ctypes.c_int]
    return library.sparse_product


def fits_c(x):
    """Return whether the C kernel takes tensors of x's device and dtype here."""
    return x.device.type == "cpu" and x.dtype in C_TYPES and c_function(x.dtype) is not None


def c_call(x, weight_t, threshold, y):
    """Return the C function and the arguments that set y (B, out) to the sparse product."""
    return c_function(x.dtype), (x.data_ptr(), weight_t.data_ptr(), threshold.data_ptr(),
                                 threshold.ndim, y.data_ptr(), *x.shape, weight_t.shape[1],
                                 torch.get_num_threads())


def c_gemv(x, weight_t, threshold):
    """Compute sparse_gemv in C."""
    if not fits_c(x):
        raise ValueError(f'backend "c" needs a C compiler and float32, float16 or bfloat16 on the '
                         f'CPU, not {x.dtype} on {x.device.type}')
    y = x.new_empty(len(x), weight_t.shape[1])
    function, arguments = c_call(x, weight_t, threshold, y)
    if function(*arguments):
        raise MemoryError("no memory for the list of kept channels")
    return y


# --------------------------------------------------------------------------------------------------
# Triton: the same sum, cut into tiles. What a GPU needs to be busy is bytes on their way: an H100
# 3.35 TB/s x 0.7 us, 17 KB for each of its 132 multiprocessors, all the time. So a program
#     1. lists the channels of its split that any row keeps, and their inputs, in memory of its own
#     2. walks down the list. The loop is a pipeline: while the matrix units take one turn's rows,
#        those of the next turns are being copied to shared memory, without a register
#     3. writes its part; the last program of a tile adds the parts
# The matrix units want 16 rows of x. Those that are not there are zeros, and cost no time, since
# time is bytes: one row or eight take the same. `python -m beyond.design` shows the numbers.

if triton is not None:
    INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)

    @triton.jit
    def list_kept(x_ptr, threshold_ptr, channel_ptr, input_ptr, first, end, rows, channels,
                  STEP: tl.constexpr, ROWS: tl.constexpr, SPAN: tl.constexpr):
        """List the channels [first, end), at most SPAN, that any row keeps; return their number.

        channel (SPAN,) int32: the kept ones in their order, then -1. input (rows, SPAN) in x's
        dtype: what each row keeps of the listed channels, 0 for what it drops. x (rows, channels);
        threshold float32 (channels,), or () with STEP 0.
        """
        row = tl.arange(0, ROWS)                                                # (ROWS,)
        index = tl.arange(0, SPAN)                                              # (SPAN,)
        channel = first + index
        exists = channel < end
        inside = (row < rows)[:, None] & exists[None, :]                        # (ROWS, SPAN)
        x = tl.load(x_ptr + row[:, None] * channels + channel[None, :], mask=inside, other=0.0)
        threshold = tl.load(threshold_ptr + channel * STEP, mask=exists, other=0.0)
        keep = ((tl.abs(x.to(tl.float32)) <= threshold[None, :]) == 0) & inside     # NaN is kept
        needed = tl.max(keep.to(tl.int32), axis=0)                              # by any row
        before = tl.cumsum(needed) - needed
        count = tl.sum(needed)
        place = tl.where(needed > 0, before, count + index - before)    # kept first, then the rest
        tl.store(channel_ptr + place, tl.where(needed > 0, channel, -1))
        tl.store(input_ptr + row[:, None] * SPAN + place[None, :], tl.where(keep, x, 0.0),
                 mask=(row < rows)[:, None])
        tl.debug_barrier()               # the threads of the program read what others have listed
        return count

    @triton.jit
    def add_product(sums, x, weight):
        """Return sums + x @ weight, in float32: (16, BLOCK_OUT)."""
        if INTERPRETED:                  # its product takes the bits of a bfloat16 for an integer
            x = x.to(tl.float32)
            weight = weight.to(tl.float32)
        return tl.dot(x, weight, sums, input_precision="ieee")

    @triton.jit
    def add_kept(x_ptr, weight_ptr, threshold_ptr, channel_ptr, count, output, rows, channels,
                 outputs, STEP: tl.constexpr, BLOCK_OUT: tl.constexpr):
        """Return what the loop over the list sums up, row by row: (16, BLOCK_OUT).

        The loop multiplies what a row drops, and another keeps, by 0. That is NaN where the weight
        is infinite or NaN; here it is not multiplied. It is slow, and hardly ever needed.
        """
        padded = tl.arange(0, 16)[:, None]
        sums = tl.zeros((16, BLOCK_OUT), tl.float32)
        for index in range(0, count):
            channel = tl.load(channel_ptr + index)
            x = tl.load(x_ptr + padded * channels + channel, mask=padded < rows, other=0.0)
            x = x.to(tl.float32)                                                # (16, 1)
            keep = ((tl.abs(x) <= tl.load(threshold_ptr + channel * STEP)) == 0) & (padded < rows)
            weight = tl.load(weight_ptr + channel.to(tl.int64) * outputs + output,
                             mask=output < outputs, other=0.0)                  # (BLOCK_OUT,)
            sums += tl.where(keep, x * weight.to(tl.float32)[None, :], 0.0)
        return sums

    @triton.jit
    def is_number(x):
        """Return where x is neither infinite nor NaN."""
        return tl.abs(x) < float("inf")

    @triton.jit
    def is_last(ticket_ptr, programs):
        """Return whether this is the last of so many programs to come here, with all it stored."""
        tl.debug_barrier()               # all threads have stored; the atomic orders what follows
        last = tl.atomic_add(ticket_ptr, 1) == programs - 1
        if last:
            tl.store(ticket_ptr, 0)      # for the next launch
        return last

    @triton.jit
    def add_parts(partial_ptr, place, real, splits, size, ROWS: tl.constexpr, BLOCK: tl.constexpr):
        """Return the sum over s of partial[s * size + place], in a fixed order: (ROWS, BLOCK)."""
        PARTS: tl.constexpr = 32 // ROWS if ROWS > 2 else 16            # at a time, in registers
        total = tl.zeros((ROWS, BLOCK), tl.float32)
        for first in range(0, splits, PARTS):
            part = first + tl.arange(0, PARTS)[:, None, None]
            total += tl.sum(tl.load(partial_ptr + part * size + place[None, :, :],
                                    mask=(part < splits) & real[None, :, :], other=0.0,
                                    cache_modifier=".cg"), axis=0)      # other programs wrote it
        return total

    @triton.jit
    def sparse_product_kernel(x_ptr, weight_ptr, threshold_ptr, channel_ptr, input_ptr, partial_ptr,
                              ticket_ptr, y_ptr, rows, channels, outputs, STEP: tl.constexpr,
                              ROWS: tl.constexpr, SPAN: tl.constexpr, BLOCK_IN: tl.constexpr,
                              BLOCK_OUT: tl.constexpr, STAGES: tl.constexpr):
        """y[row, j] = sum over channels of kept x[row, i] * weight[i, j].

        grid (tiles, splits of SPAN channels). x (rows, channels), threshold: as in list_kept;
        weight (channels, outputs); y (rows, outputs). Room for each program: channel (SPAN,) int32
        and input (rows, SPAN); for each split: partial float32 (rows, outputs). ticket int32
        (tiles,), zeros before and after.
        """
        tile = tl.program_id(0)
        split = tl.program_id(1)
        splits = tl.num_programs(1)
        program = split * tl.num_programs(0) + tile
        channel_ptr += program * SPAN
        input_ptr += program * SPAN * rows
        count = list_kept(x_ptr, threshold_ptr, channel_ptr, input_ptr, split * SPAN, channels,
                          rows, channels, STEP, ROWS, SPAN)
        padded = tl.arange(0, 16)[:, None]                                      # rows, and zeros
        output = tile * BLOCK_OUT + tl.arange(0, BLOCK_OUT)                     # (BLOCK_OUT,)
        sums = tl.zeros((16, BLOCK_OUT), tl.float32)
        for start in tl.range(0, count, BLOCK_IN, num_stages=STAGES):
            index = start + tl.arange(0, BLOCK_IN)
            channel = tl.load(channel_ptr + index)                              # (BLOCK_IN,)
            x = tl.load(input_ptr + padded * SPAN + index[None, :], mask=padded < rows, other=0.0)
            weight = tl.load(weight_ptr + channel.to(tl.int64)[:, None] * outputs + output[None, :],
                             mask=(channel >= 0)[:, None] & (output < outputs)[None, :], other=0.0)
            sums = add_product(sums, x, weight)                                 # (16, BLOCK_OUT)
        if ROWS > 1:
            if tl.min((is_number(sums) | (padded >= rows)).to(tl.int32)) == 0:
                sums = add_kept(x_ptr, weight_ptr, threshold_ptr, channel_ptr, count, output, rows,
                                channels, outputs, STEP, BLOCK_OUT)
        tl.store(partial_ptr + (split * rows + padded) * outputs + output[None, :], sums,
                 mask=(padded < rows) & (output < outputs)[None, :])
        if is_last(ticket_ptr + tile, splits):
            row = tl.arange(0, ROWS)[:, None]
            place = row * outputs + output[None, :]                             # (ROWS, BLOCK_OUT)
            real = (row < rows) & (output < outputs)[None, :]
            y = add_parts(partial_ptr, place, real, splits, rows * outputs, ROWS, BLOCK_OUT)
            tl.store(y_ptr + place, y.to(y_ptr.dtype.element_ty), mask=real)


def is_interpreted():
    """Return whether Triton's kernels run in its interpreter, without a GPU."""
    return triton is not None and INTERPRETED.value


def check_triton(x):
    """Raise ValueError where Triton's kernels do not run for a tensor of x's device and dtype."""
    if triton is None or x.dtype == torch.float64:
        raise ValueError(f'backend "triton" needs Triton and float32, float16 or bfloat16, '
                         f'not {x.dtype}')
    if x.device.type != "cuda" and not is_interpreted():
        raise ValueError('backend "triton" needs a GPU, or TRITON_INTERPRET=1 set before triton is '
                         'imported')


@functools.cache
def multiprocessors(device):
    """Return how many multiprocessors a GPU has; 2 in the interpreter."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).multi_processor_count
    return 2


TILE = {2: {"BLOCK_IN": 32, "BLOCK_OUT": 128, "STAGES": 5},      # by the bytes of a weight
        4: {"BLOCK_IN": 16, "BLOCK_OUT": 128, "STAGES": 5}}


def span(tiles, channels, processors):
    """Return how many channels a program lists: more where the tiles alone make enough programs.

    processors: the multiprocessors of the GPU.
    """
    size = 256
    while size < 512 and tiles * triton.cdiv(channels, size) > 8 * processors:
        size *= 2
    return size


TICKETS = 1 << 16        # tiles of one launch, at most: 8 million outputs


def new_tickets(device):
    """Return zeros (TICKETS,) int32, by which programs learn which of them is the last.

    A launch leaves them zero for the next one. So launches share tickets if they never run at once:
    those in one stream, and those in graphs that are replayed one after the other.
    """
    return torch.zeros(TICKETS, dtype=torch.int32, device=device)


@functools.cache
def stream_tickets(device, stream):
    """Return the tickets of the launches in a stream, which is the current one."""
    return new_tickets(device)


def stream_of(device):
    """Return the number of the current stream; None while a CUDA graph is captured in it."""
    if device.type != "cuda":
        return 0
    if torch.cuda.is_current_stream_capturing():
        return None
    return torch.cuda.current_stream(device).cuda_stream


own_tickets = contextvars.ContextVar("own_tickets", default=None)


@contextlib.contextmanager
def using_tickets(zeros):
    """Give the launches inside a `with` the tickets `zeros`, of new_tickets: those of a graph."""
    token = own_tickets.set(zeros)
    try:
        yield
    finally:
        own_tickets.reset(token)


def tickets(number, device):
    """Return `number` tickets for a launch on a device; ValueError for more than there are.

    Captured in a graph that brings none of its own, they are zeros that the graph makes itself.
    """
    if number > TICKETS:
        raise ValueError(f"{number} tiles of outputs in one launch, at most {TICKETS}")
    zeros = own_tickets.get()
    if zeros is None:
        stream = stream_of(device)
        zeros = new_tickets(device) if stream is None else stream_tickets(device, stream)
    return zeros[:number]


def room(x, tiles, splits, size, width):
    """Return what the programs of a launch write besides y: channel, input, partial and ticket.

    tiles, splits: the grid; size: of a program's list; width: outputs of all tiles.
    """
    rows = x.shape[0]
    return (torch.empty(splits * tiles, size, device=x.device, dtype=torch.int32),
            torch.empty(splits * tiles, rows, size, device=x.device, dtype=x.dtype),
            torch.empty(splits, rows, width, device=x.device, dtype=torch.float32),
            tickets(tiles, x.device))


def triton_gemv(x, weight_t, threshold):
    """Compute sparse_gemv by the Triton kernel, in one launch."""
    check_triton(x)
    rows, channels = x.shape
    outputs = weight_t.shape[1]
    if not rows * channels * outputs:
        return x.new_zeros(rows, outputs)                  # there would be no program
    sizes = TILE[x.itemsize]
    tiles = triton.cdiv(outputs, sizes["BLOCK_OUT"])
    size = span(tiles, channels, multiprocessors(x.device))
    splits = triton.cdiv(channels, size)
    y = torch.empty(rows, outputs, device=x.device, dtype=x.dtype)
    with torch.cuda.device_of(x):        # Triton launches on the current device
        sparse_product_kernel[(tiles, splits)](
            x, weight_t, threshold, *room(x, tiles, splits, size, outputs), y, rows, channels,
            outputs, STEP=threshold.ndim, ROWS=triton.next_power_of_2(rows), SPAN=size, num_warps=4,
            **sizes)
    return y


# A backend is a function(x (B, in), weight_t (in, out), threshold () or (in,)) -> y (B, out).
BACKENDS = {"triton": triton_gemv, "c": c_gemv, "torch": torch_gemv}
C_CALLS = {"c": c_call}              # for those that are one C call: the function, its arguments


# --------------------------------------------------------------------------------------------------
# How near to the limit it is: the bytes of kept rows over the bandwidth of the memory.

def median_time(call, device, seconds=0.5):
    """Return the median time of `call(i)`, i counting up, of as many as `seconds` hold."""
    times = []
    if device.type == "cuda":
        def once(i):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda._sleep(1_000_000)     # half a millisecond in which the host gets ahead
            begin.record()
            call(i)
            end.record()
            end.synchronize()
            return begin.elapsed_time(end) / 1e3
    else:
        def once(i):
            begin = time.perf_counter()
            call(i)
            return time.perf_counter() - begin
    once(0)
    once(1)
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times) < 11:
        times.append(once(len(times)))
    return statistics.median(times)


def memory_bandwidth(device, size=1 << 30):
    """Return the bytes a second that are read from memory (on a GPU: read and written)."""
    a = torch.randint(255, (size,), dtype=torch.uint8, device=device)
    if device.type == "cuda":
        b = torch.empty_like(a)
        return 2 * a.numel() / median_time(lambda i: b.copy_(a), device)
    return a.numel() / median_time(lambda i: a.view(torch.float32).amax(), device)


def dense_ways(x, weights_t):
    """Return {name: call(i)}: the library's ways to compute x @ weights_t[i]."""
    n = len(weights_t)
    weights = [w.t().contiguous() for w in weights_t]      # (out, in), as usual
    ways = {"F.linear": lambda i: F.linear(x, weights[i % n]),
            "x @ weight_t": lambda i: x @ weights_t[i % n]}
    if len(x) == 1:
        ways["torch.mv"] = lambda i: torch.mv(weights[i % n], x[0])
    return ways


def threshold_dropping(x, sparsity):
    """Return the magnitude at or below which a share `sparsity` of the entries of x lies."""
    dropped = round(sparsity * x.numel())
    if not dropped:
        return KEEP_ALL.to(x.device)
    return x.float().abs().flatten().sort().values[dropped - 1]


def copies_of(inputs, outputs, dtype, device, total=512_000_000):
    """Return random weights (inputs, outputs), so many that no cache holds all `total` bytes."""
    first = torch.randn(inputs, outputs, device=device).to(dtype)
    return [first.roll(i, 0) for i in range(max(2, -(-total // first.nbytes)))]


def inputs_like(weights_t, rows):
    """Return eight inputs (rows, in), which keep other channels each; the rows of one the same."""
    channels, device, dtype = len(weights_t[0]), weights_t[0].device, weights_t[0].dtype
    return [(torch.randn(1, channels, device=device) * torch.randn(rows, 1, device=device).sign())
            .to(dtype) for _ in range(8)]


def time_shape(inputs, outputs, dtype, device, levels, rows):
    """Print, and return, the times of one shape: {"dense": seconds, each of levels: seconds}."""
    weights = copies_of(inputs, outputs, dtype, device)
    size = weights[0].nbytes
    xs = inputs_like(weights, rows)
    ways = {name: median_time(call, device) for name, call in dense_ways(xs[0], weights).items()}
    print(f"\n{inputs} x {outputs} {str(dtype).removeprefix('torch.')}, {size / 1e6:.0f} MB, "
          f"{rows} row{'s' * (rows > 1)}; dense: {listed(ways)}")
    return time_levels(xs, weights, ways, size, levels)


def listed(ways):
    """Return {name: seconds} as text."""
    return ", ".join(f"{name} {seconds * 1e3:.3f} ms" for name, seconds in ways.items())


def time_levels(xs, weights, ways, dense_size, levels, product=sparse_gemv):
    """Print, and return as time_shape does, the times of product(x, weight, threshold) at levels.

    ways: {name: seconds} of the dense ways beside it; dense_size: the bytes that they read.
    """
    n, size, device = len(weights), weights[0].nbytes, xs[0].device
    best = min(ways, key=ways.get)
    timed = {"dense": ways[best]}
    rate = dense_size / ways[best]
    print(f"{'sparsity':>10} {'ms':>9} {'GB/s':>8} {'share':>7} {'ratio':>8}")
    print(f"{'dense':>10} {ways[best] * 1e3:9.3f} {rate / 1e9:8.1f} {1:7.0%} {1:7.2f}x   {best}")
    for sparsity in levels:
        thresholds = [threshold_dropping(x, sparsity) for x in xs]
        read = kept(xs[0], thresholds[0]).any(0).float().mean().item() * size
        seconds = median_time(
            lambda i: product(xs[i % 8], weights[i % n], thresholds[i % 8]), device)
        timed[sparsity] = seconds
        print(f"{sparsity:10.0%} {seconds * 1e3:9.3f} {read / seconds / 1e9:8.1f} "
              f"{read / seconds / rate:7.0%} {ways[best] / seconds:7.2f}x   {best_backend(xs[0])}",
              flush=True)
    return timed


def make_parser(more_kinds=()):
    """Return the Parser of `python kernel.py`; python -m beyond.timing adds options, and dtypes."""
    parser = Parser(description="Times dense against sparse matrix-vector products, here.")
    parser.add_argument("--shapes", default="llama-2-7b", metavar="PRESET", choices=PRESETS,
                        help=f"whose linears: {', '.join(PRESETS)} (default: llama-2-7b)")
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"],
                        choices=["float32", "bfloat16", "float16", *more_kinds],
                        help="(default: float32 bfloat16)")
    parser.add_argument("--sparsity", nargs="+", type=share, default=[0, 0.25, 0.4, 0.5, 0.65, 0.9],
                        help="shares of the channels to drop (default: 0 0.25 0.4 0.5 0.65 0.9)")
    parser.add_argument("--rows", nargs="+", type=int, default=[1],
                        help="tokens at a time, 1 to 8, which drop the same channels (default: 1)")
    parser.add_device()
    return parser


def begin(arguments):
    """Check the arguments, and print what is measured, where; return (device, bytes a second)."""
    for rows in arguments.rows:
        require(1 <= rows <= MAX_ROWS, f"--rows {rows} is outside 1 to {MAX_ROWS}")
    device = find_device(arguments.device)
    machine = f"CPU, {torch.get_num_threads()} threads"
    if device.type == "cuda":
        machine = torch.cuda.get_device_name(device)
    print(f"{machine}, torch {torch.__version__}. Random weights, more than a cache holds.")
    print("GB/s: bytes of kept weights over time; share: of the best dense way's GB/s.")
    bandwidth = memory_bandwidth(device)
    print(f"memory bandwidth: {bandwidth / 1e9:.1f} GB/s")
    return device, bandwidth


def preset_shapes(preset):
    """Return the different (inputs, outputs) of a preset's linears."""
    return sorted({shape[::-1] for shape in block_linears(PRESETS[preset]).values()})


def main():
    arguments = make_parser().parse_args()
    device, _ = begin(arguments)
    for dtype in arguments.dtype:
        for inputs, outputs in preset_shapes(arguments.shapes):
            for rows in arguments.rows:
                time_shape(inputs, outputs, getattr(torch, dtype), device, arguments.sparsity, rows)


if __name__ == "__main__":
    command_line(main)
