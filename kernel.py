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
"torch" (anywhere). Weights are float32, bfloat16 or float16. Thresholds are compared, and sums are
taken, in float32; a float64 input stays float64 and takes "torch".

    python kernel.py                                 dense against sparse, Llama-2-7B's shapes
    python kernel.py --shapes llama-3-8b --dtype float16 --sparsity 0 0.5
"""
import contextlib
import ctypes
import functools
import hashlib
import os
import platform
import shlex
import shutil
import statistics
import subprocess
import tempfile
import time
from pathlib import Path

from model import PRESETS, Parser, block_linears, command_line, find_device, note, product, share

import torch
import torch.nn.functional as F

try:
    import triton
    import triton.language as tl
except ImportError:                  # there is no Triton for macOS, which has no CUDA either
    triton = None

MAX_ROWS = 8             # more rows than this are bound by arithmetic, and no longer a few vectors
THREADS = torch.get_num_threads()        # the most that a product in C runs on
KEEP_ALL = torch.tensor(-1.0)            # a threshold: no magnitude is below it


def kept(x, threshold):
    """Return which entries of x (..., in) are kept, bool: those with |x| > threshold, and NaN.

    threshold: a tensor () or (in,), compared in its own dtype, float32 at least. NaN is kept, so
    that it shows. This is the rule of TEAL, section 4; the kernels below repeat it in their own
    languages.
    """
    return (x.to(threshold.dtype).abs() <= threshold).logical_not_()


def sparse_gemv(x, weight_t, threshold, backend=None):
    """Return x with its small channels dropped, times the weight: where(|x| > t, x, 0) @ weight_t.

    x: (B, in), B from 1 to 8, of the weight's dtype, or float32 where the weight has 16 bits
    weight_t: (in, out), contiguous, floating point: the transposed weight of a linear
    threshold: a number, a 0-d tensor, or a tensor (in,), one a channel; below 0 keeps all
    backend: a name in BACKENDS, or None for the fastest there is for the weight
    Returns (B, out) in x's dtype. Raises ValueError for shapes and dtypes that do not fit.
    """
    if x.ndim != 2 or not 1 <= x.shape[0] <= MAX_ROWS or not x.is_floating_point():
        raise ValueError(f"x is {x.dtype} {tuple(x.shape)}, expected floating point (1 to "
                         f"{MAX_ROWS}, in)")
    fits = x.dtype == weight_t.dtype or x.dtype == torch.float32 and weight_t.itemsize == 2
    if weight_t.ndim != 2 or weight_t.shape[0] != x.shape[1] or weight_t.device != x.device or (
            not fits):
        raise ValueError(f"weight_t is {weight_t.dtype} {tuple(weight_t.shape)} on "
                         f"{weight_t.device}, expected {x.dtype} ({x.shape[1]}, out) on "
                         f"{x.device}, as x is, or 16 bits where x is float32")
    if not weight_t.is_contiguous():
        raise ValueError("weight_t is not contiguous: its rows must be the input channels, one "
                         "after another")
    name = backend or best_backend(weight_t)
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


def best_backend(weight_t):
    """Return the name of the fastest backend for weights of a tensor's device and dtype."""
    if weight_t.dtype == torch.float64:
        return "torch"
    if weight_t.device.type == "cuda" and triton is not None:
        return "triton"
    return "c" if fits_c(weight_t) else "torch"


def dense(x, weight_t):
    """Return x (..., in) @ weight_t (in, out) in x's dtype, by what is fastest; drop nothing.

    On a CPU the library's products are made for many rows. One to eight go through the C kernel,
    which reads the weight at the speed of memory.
    """
    rows = x.numel() // x.shape[-1]
    if rows > MAX_ROWS or x.requires_grad or not fits_c(weight_t):
        return product(x, weight_t)
    y = sparse_gemv(x.reshape(rows, -1), weight_t, KEEP_ALL, "c")
    return y.view(*x.shape[:-1], -1)


# --------------------------------------------------------------------------------------------------
# PyTorch: gather the rows that count, a block at a time, and multiply them.

def torch_gemv(x, weight_t, threshold):
    """Compute sparse_gemv in PyTorch, with sums of the threshold's dtype."""
    keep = kept(x, threshold)
    channels = keep.any(0).nonzero()[:, 0]                                      # (kept by any row,)
    inputs = torch.where(keep, x, 0).to(threshold.dtype)[:, channels]
    y = inputs.new_zeros(len(x), weight_t.shape[1])
    for some, part in zip(channels.split(512), inputs.split(512, 1)):
        y += part @ weight_t[some].to(y.dtype)
    return y.to(x.dtype)


# --------------------------------------------------------------------------------------------------
# C: first the kept channels are listed, then each thread walks down the listed rows over its range
# of outputs, eight rows at a time. The sums of a few outputs of all tokens stay in registers while
# eight weights are added to each; a weight is widened to float32 once for all tokens. Meanwhile the
# next eight rows are on their way: a processor foresees how a row goes on, but not which row comes
# next. x, y and the sums are float32, whatever the weights are.

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
#ifdef __AVX2__
#include <immintrin.h>
#endif

#if defined __AVX512F__
#define LANES 16                     // floats in a register
#elif defined __AVX2__
#define LANES 8
#else
#define LANES 4
#endif
#define VECTOR(type, alignment) \
    type __attribute__((vector_size(LANES * sizeof(type)), aligned(alignment), may_alias))
typedef VECTOR(float, LANES * 4) floats;
typedef VECTOR(uint32_t, LANES * 4) words;
typedef VECTOR(float, 4) floats_anywhere;                  // in memory
typedef VECTOR(uint16_t, 2) halves_anywhere;

// A weight as a float, and LANES of them at once.
#if defined FLOAT32
typedef float type;
#define to_float(weight) (weight)
static inline floats load(const type *at) { return *(const floats_anywhere *)at; }

#elif defined BFLOAT16               // the upper half of a float
typedef uint16_t type;
#define to_float of_bfloat16
static inline floats load(const type *at) {
#if defined __AVX512F__              // gcc 12 cuts the last line in two
    return (floats)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((void *)at)), 16);
#elif defined __AVX2__
    return (floats)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((void *)at)), 16);
#else
    return (floats)(__builtin_convertvector(*(const halves_anywhere *)at, words) << 16);
#endif
}

#elif defined FLOAT16
typedef uint16_t type;
#define to_float of_float16
static inline floats load(const type *at) {
#if defined __AVX512F__
    return (floats)_mm512_cvtph_ps(_mm256_loadu_si256((void *)at));
#elif defined __AVX2__ && defined __F16C__
    return (floats)_mm256_cvtph_ps(_mm_loadu_si128((void *)at));
#else                                // as of_float16; steps of 2^-24 are floats that small, too
    words bits = __builtin_convertvector(*(const halves_anywhere *)at, words);
    floats size = (floats)((bits & 0x7fff) << 13) * 0x1p112f;
    words no_number = (words)((bits & 0x7c00) == 0x7c00) & 0x7f800000;
    return (floats)((words)size | no_number | (bits & 0x8000) << 16);
#endif
}
#endif

#define BATCH 8                      // rows added in one pass over the sums
#define TOGETHER 4                   // tokens whose sums, two registers each, are there at once
#define ROOM 8192                    // sums that a thread works on: 32 KB, as the first cache has
#define WORTH (2 << 20)              // bytes of weights that are worth a thread
#define UNROLL _Pragma("GCC unroll 4")

/* Adds a batch of rows to the sums of some tokens: y[t][j] += input[r][t] * row[r][j].

   TOKENS: a constant where this is inlined. next: the rows that follow. A row of input has `tokens`
   numbers, y has `out` a token, of which `columns` are summed here. */
static inline __attribute__((always_inline)) void add_rows(
        const int TOKENS, int rows, const type *const *row, const type *const *next,
        const float *input, long tokens, float *y, long out, long columns) {
    long j = 0;
    for (; j + 2 * LANES <= columns; j += 2 * LANES) {
        floats sums[TOGETHER][2] = {0};
        for (int r = 0; r < rows; r++) {
            floats weights[2] = { load(row[r] + j), load(row[r] + j + LANES) };
            for (int line = 0; line < 2 * LANES; line += 64 / sizeof(type))
                __builtin_prefetch(next[r] + j + line, 0, 2);
            UNROLL for (int t = 0; t < TOKENS; t++)
                UNROLL for (int half = 0; half < 2; half++)
                    sums[t][half] += input[r * tokens + t] * weights[half];
        }
        UNROLL for (int t = 0; t < TOKENS; t++)
            UNROLL for (int half = 0; half < 2; half++)
                *(floats_anywhere *)(y + t * out + j + half * LANES) += sums[t][half];
    }
    for (int r = 0; r < rows; r++)
        for (int t = 0; t < TOKENS; t++)
            for (long k = j; k < columns; k++)
                y[t * out + k] += input[r * tokens + t] * to_float(row[r][k]);
}

struct product {
    long n, *channel;                // listed
    float *input;                    // (n, tokens)
    const type *weight;
    float *y;
    long tokens, out, share;         // share: outputs of a part
};

/* Computes the outputs of a part for all tokens, as many at a time as there is room for. */
static void outputs(struct product p, long part) {
    long most = ROOM / p.tokens / 64 * 64;
    long end = (part + 1) * p.share < p.out ? (part + 1) * p.share : p.out;
    for (long first = part * p.share; first < end; first += most) {
        long columns = end - first < most ? end - first : most;
        for (long t = 0; t < p.tokens; t++) memset(p.y + t * p.out + first, 0, columns * 4);
        for (long k = 0; k < p.n; k += BATCH) {
            const type *row[BATCH], *next[BATCH];
            int rows = p.n - k < BATCH ? p.n - k : BATCH;
            for (int r = 0; r < rows; r++) {
                long then = k + r + BATCH < p.n ? k + r + BATCH : k + r;
                row[r] = p.weight + p.channel[k + r] * p.out + first;
                next[r] = p.weight + p.channel[then] * p.out + first;
            }
            for (long t = 0; t < p.tokens; t += TOGETHER) {
                const float *x = p.input + k * p.tokens + t;
                float *y = p.y + t * p.out + first;
                switch (p.tokens - t) {
                case 1: add_rows(1, rows, row, next, x, p.tokens, y, p.out, columns); break;
                case 2: add_rows(2, rows, row, next, x, p.tokens, y, p.out, columns); break;
                case 3: add_rows(3, rows, row, next, x, p.tokens, y, p.out, columns); break;
                default: add_rows(4, rows, row, next, x, p.tokens, y, p.out, columns);
                }
            }
        }
    }
}

/* y (tokens, out) = x (tokens, in), its small channels dropped, times weight (in, out).
   threshold: one (step 0) or (in) (step 1); threads: the most to use. Returns 0, or 1 where memory
   ran out. */
int sparse_product(const float *x, const type *weight, const float *threshold, long step, float *y,
                   long tokens, long in, long out, int threads) {
    struct product p = { .weight = weight, .y = y, .tokens = tokens, .out = out };
    p.channel = malloc((in + 1) * (sizeof(long) + tokens * sizeof(float)));
    if (!p.channel) return 1;
    p.input = (float *)(p.channel + in + 1);
    for (long i = 0; i < in; i++) {  // what any token keeps, with 0 for tokens that drop it
        int needed = 0;
        for (long t = 0; t < tokens; t++) {
            int keep = !(fabsf(x[t * in + i]) <= threshold[i * step]);          // NaN is kept
            p.input[p.n * tokens + t] = keep ? x[t * in + i] : 0.0f;
            needed |= keep;
        }
        p.channel[p.n] = i;
        p.n += needed;
    }
    long worth = 1 + (p.n * out * (long)sizeof(type) - 1) / WORTH;
    if (threads > worth) threads = worth;
    p.share = (out + threads * 64 - 1) / (threads * 64) * 64;
    // dynamic: a part is taken by whoever comes first, so that a late thread holds up less
    #pragma omp parallel for schedule(dynamic) num_threads(threads) if (threads > 1)
    for (long part = 0; part < threads; part++) outputs(p, part);
    free(p.channel);
    return 0;
}
"""
C_TYPES = {torch.float32: "FLOAT32", torch.bfloat16: "BFLOAT16", torch.float16: "FLOAT16"}

# No -ffast-math: a library linked with it makes the whole process flush denormals. -march is for
# gcc and clang on x86, -mcpu for arm; Apple's compiler has no OpenMP: there C runs on one thread.
C_FLAGS = ["-fopenmp -march=native", "-fopenmp -mcpu=native", "-mcpu=native", ""]


@functools.cache
def compiled(source):
    """Return C source compiled for this processor, a ctypes.CDLL, or None without a C compiler.

    The compiler is CC, or else cc, gcc or clang. What it makes is kept in MINTEAL_CACHE, or else in
    ~/.cache/minteal. MINTEAL_CACHE=off does without C.
    """
    folder = os.environ.get("MINTEAL_CACHE") or os.environ.get("HOME", "") + "/.cache/minteal"
    asked = os.environ.get("CC", "").strip()               # a path, which may have blanks in it,
    words = [asked] if shutil.which(asked) else shlex.split(asked)         # or with arguments
    for command in [words] * bool(asked) + [[name] for name in ("cc", "gcc", "clang")]:
        if folder == "off" or command != words and not shutil.which(command[0]):
            continue
        for flags in C_FLAGS:
            library = built([*command, "-O3", *flags.split()], source, Path(folder))
            if library is not None:
                return library
        say_once(f"kernel.py: {shlex.join(command)} does not make a C library here; set CC to a "
                 f"compiler that does")
    return None


def built(command, source, folder):
    """Return the library that a compiler's command makes of C source, kept in a folder, or None."""
    identity = f"{source}\n{command}\n{processor()}"       # machines may share a folder
    path = folder / f"{hashlib.sha256(identity.encode()).hexdigest()[:16]}.so"
    with contextlib.suppress(OSError):                     # there is none, or a damaged one
        return ctypes.CDLL(str(path))
    with tempfile.TemporaryDirectory() as workplace, contextlib.suppress(OSError):
        result = Path(workplace) / path.name
        options = ["-shared", "-fPIC", "-x", "c", "-", "-o", result, "-lm"]
        subprocess.run([*command, *options], input=source.encode(), capture_output=True)
        library = ctypes.CDLL(str(result))
        try:
            folder.mkdir(parents=True, exist_ok=True)
            copy = shutil.copy(result, path.with_suffix(f".{os.getpid()}"))
            os.replace(copy, path)                         # whole, or not at all
        except OSError:
            say_once(f"kernel.py: {folder} cannot be written: every command compiles its C anew. "
                     f"Set MINTEAL_CACHE to a folder that can")
        return library


say_once = functools.cache(note)


@functools.cache
def processor():
    """Return what -march=native looks at, near enough, as text."""
    lines = []
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    signs = ("model name", "flags", "Features", "CPU part")
    lines = sorted({line for line in lines if line.startswith(signs)})
    return " ".join([platform.machine(), platform.processor(), *lines])


def instructions():
    """Return the names of those of this processor's instructions that products gain from."""
    names = {"avx2": "AVX2", "avx512f": "AVX-512", "avx512_bf16": "bfloat16",
             "avx_vnni": "AVX-VNNI", "avx512_vnni": "VNNI", "asimd": "NEON"}
    flags = processor().split()
    return ", ".join(names[flag] for flag in names if flag in flags) or platform.machine()


@functools.cache
def c_function(dtype):
    """Return the C function for weights of a dtype, or None where no C compiler builds it."""
    library = compiled(f"#define {C_TYPES[dtype]}\n{C_SOURCE}")
    if library is None:
        return None
    pointer, long = [ctypes.c_void_p], [ctypes.c_long]
    library.sparse_product.argtypes = 3 * pointer + long + pointer + 3 * long + [ctypes.c_int]
    return library.sparse_product


def fits_c(weight_t):
    """Return whether the C kernel takes weights of a tensor's device and dtype here."""
    return (weight_t.device.type == "cpu" and weight_t.dtype in C_TYPES
            and c_function(weight_t.dtype) is not None)


def c_call(x, weight_t, threshold, y):
    """Return the C function and the arguments that set y (B, out) to the sparse product.

    x, threshold and y are float32.
    """
    return c_function(weight_t.dtype), (
        x.data_ptr(), weight_t.data_ptr(), threshold.data_ptr(), threshold.ndim, y.data_ptr(),
        *x.shape, weight_t.shape[1], THREADS)


def c_gemv(x, weight_t, threshold):
    """Compute sparse_gemv in C."""
    if not fits_c(weight_t):
        raise ValueError(f'backend "c" needs a C compiler and float32, float16 or bfloat16 on the '
                         f'CPU, not {weight_t.dtype} on {weight_t.device.type}')
    wide = x.float()
    y = wide.new_empty(len(x), weight_t.shape[1])
    function, arguments = c_call(wide, weight_t, threshold, y)
    if function(*arguments):
        raise MemoryError("no memory for the list of kept channels")
    return y.to(x.dtype)


# --------------------------------------------------------------------------------------------------
# Triton: the same sum, cut into tiles. What a GPU needs to be busy is bytes on their way: an H100
# 3.35 TB/s x 0.7 us, 17 KB for each of its 132 multiprocessors, all the time. So a program
#     1. lists the channels of its split that any row keeps, and their inputs, in memory of its own
#     2. walks down the list. The loop is a pipeline: while the matrix units take one turn's rows,
#        those of the next turns are being copied to shared memory, without a register
#     3. writes its part; the last program of a tile adds the parts
# The matrix units want 16 rows of x. Those that are not there are zeros, and cost no time, since
# time is bytes: one row or eight take the same.

TILE = {2: {"BLOCK_IN": 32, "BLOCK_OUT": 128, "STAGES": 5},      # by the bytes of a weight
        4: {"BLOCK_IN": 16, "BLOCK_OUT": 128, "STAGES": 5}}
TICKETS = 1 << 16        # tiles of one launch, at most: 8 million outputs

if triton is not None:
    INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)

    @triton.jit
    def list_kept(x, threshold, inside, first, channel_ptr, input_ptr, ROWS: tl.constexpr,
                  SPAN: tl.constexpr):
        """List the channels that any row of x (ROWS, SPAN) keeps; return their number.

        threshold (SPAN,); inside (ROWS, SPAN): which entries of x there are; first: the number of
        the first channel. Written: channel (SPAN,) int32, the kept ones in their order, then -1;
        input (ROWS, SPAN), what each row keeps of the listed channels, 0 for what it drops.
        """
        index = tl.arange(0, SPAN)
        keep = ((tl.abs(x.to(tl.float32)) <= threshold[None, :]) == 0) & inside     # NaN is kept
        needed = tl.max(keep.to(tl.int32), axis=0)                              # by any row
        before = tl.cumsum(needed) - needed
        count = tl.sum(needed)
        place = tl.where(needed > 0, before, count + index - before)    # kept first, then the rest
        tl.store(channel_ptr + place, tl.where(needed > 0, first + index, -1))
        kept_x = tl.where(keep, x, 0.0).to(input_ptr.dtype.element_ty)
        tl.store(input_ptr + tl.arange(0, ROWS)[:, None] * SPAN + place[None, :], kept_x)
        tl.debug_barrier()               # the threads of the program read what others have listed
        return count

    @triton.jit
    def add_rows(weight_ptr, channel_ptr, input_ptr, count, output, outputs, ROWS: tl.constexpr,
                 SPAN: tl.constexpr, BLOCK_IN: tl.constexpr, BLOCK_OUT: tl.constexpr,
                 STAGES: tl.constexpr):
        """Return the sum of input times weight over `count` listed channels: (16, BLOCK_OUT).

        output (BLOCK_OUT,): the outputs of the tile; weight (channels, outputs). Sums are float32.
        What one row drops and another keeps is multiplied by 0: NaN where a weight is infinite.
        """
        row = tl.arange(0, 16)[:, None]                                         # rows, and zeros
        sums = tl.zeros((16, BLOCK_OUT), tl.float32)
        for start in tl.range(0, count, BLOCK_IN, num_stages=STAGES):
            index = start + tl.arange(0, BLOCK_IN)
            channel = tl.load(channel_ptr + index)                              # (BLOCK_IN,)
            x = tl.load(input_ptr + row * SPAN + index[None, :], mask=row < ROWS, other=0.0)
            weight = tl.load(weight_ptr + channel.to(tl.int64)[:, None] * outputs + output[None, :],
                             mask=(channel >= 0)[:, None] & (output < outputs)[None, :], other=0.0)
            if INTERPRETED:              # its product takes the bits of a bfloat16 for an integer
                x = x.to(tl.float32)
                weight = weight.to(tl.float32)
            sums = tl.dot(x, weight, sums, input_precision="ieee")
        return sums

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
        PARTS: tl.constexpr = max(4, 2048 // (ROWS * BLOCK))            # at a time, in registers
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

        grid (tiles, splits of SPAN channels). x (rows, channels); threshold float32 (channels,), or
        () with STEP 0; y (rows, outputs). ROWS: rows, or the next power of 2. Room for each
        program: channel and input, as in list_kept; for each split: partial float32 (rows,
        outputs). ticket int32 (tiles,), zeros before and after.
        """
        tile = tl.program_id(0)
        split = tl.program_id(1)
        program = split * tl.num_programs(0) + tile
        channel_ptr += program * SPAN
        input_ptr += program * SPAN * ROWS
        row = tl.arange(0, ROWS)[:, None]
        channel = split * SPAN + tl.arange(0, SPAN)                             # (SPAN,)
        inside = (row < rows) & (channel < channels)[None, :]                   # (ROWS, SPAN)
        x = tl.load(x_ptr + row * channels + channel[None, :], mask=inside, other=0.0)
        threshold = tl.load(threshold_ptr + channel * STEP, mask=channel < channels, other=0.0)
        count = list_kept(x, threshold, inside, split * SPAN, channel_ptr, input_ptr, ROWS, SPAN)
        output = tile * BLOCK_OUT + tl.arange(0, BLOCK_OUT)                     # (BLOCK_OUT,)
        sums = add_rows(weight_ptr, channel_ptr, input_ptr, count, output, outputs, ROWS, SPAN,
                        BLOCK_IN, BLOCK_OUT, STAGES)
        padded = tl.arange(0, 16)[:, None]
        tl.store(partial_ptr + (split * rows + padded) * outputs + output[None, :], sums,
                 mask=(padded < rows) & (output < outputs)[None, :])
        if is_last(ticket_ptr + tile, tl.num_programs(1)):
            place = row * outputs + output[None, :]                             # (ROWS, BLOCK_OUT)
            real = (row < rows) & (output < outputs)[None, :]
            y = add_parts(partial_ptr, place, real, tl.num_programs(1), rows * outputs, ROWS,
                          BLOCK_OUT)
            tl.store(y_ptr + place, y.to(y_ptr.dtype.element_ty), mask=real)


def is_interpreted():
    """Return whether Triton's kernels run in its interpreter, without a GPU."""
    return triton is not None and INTERPRETED.value


def check_triton(x):
    """Raise ValueError where Triton's kernels do not run for a tensor of x's device and dtype."""
    runs = triton is not None and (x.device.type == "cuda" or is_interpreted())
    if not runs or x.dtype == torch.float64:
        raise ValueError(f'backend "triton" needs Triton, 16 or 32 bits, not {x.dtype}, and a GPU, '
                         f'or TRITON_INTERPRET=1 set before triton is imported')


@functools.cache
def multiprocessors(device):
    """Return how many multiprocessors a GPU has; 2 in the interpreter."""
    if device.type != "cuda":
        return 2
    return torch.cuda.get_device_properties(device).multi_processor_count


def span(tiles, channels, device):
    """Return how many channels a program lists: 512 where 256 would make too many programs."""
    return 512 if tiles * triton.cdiv(channels, 256) > 8 * multiprocessors(device) else 256


@functools.cache
def stream_tickets(device, stream):
    return torch.zeros(TICKETS, dtype=torch.int32, device=device)


def tickets(number, device):
    """Return `number` zeros int32, by which programs learn which of them is the last of a tile.

    A launch leaves zeros for the next one. So the launches in a stream share them, and all CUDA
    graphs of a device, of which one is replayed at a time. ValueError for more than there are.
    """
    if number > TICKETS:
        raise ValueError(f"{number} tiles of outputs in one launch, at most {TICKETS}")
    stream = None
    if device.type == "cuda" and not torch.cuda.is_current_stream_capturing():
        stream = torch.cuda.current_stream(device).cuda_stream
        stream_tickets(device, None)     # those of graphs, made before one is captured
    return stream_tickets(device, stream)[:number]


def room(x, dtype, tiles, splits, size, width):
    """Return what the programs of a launch write besides y: channel, input, partial and ticket.

    dtype: of the listed inputs; tiles, splits: the grid; size: channels of a list; width: outputs
    of all tiles.
    """
    programs = splits * tiles
    rows = len(x)
    return (torch.empty(programs * size, device=x.device, dtype=torch.int32),
            torch.empty(programs * size * triton.next_power_of_2(rows), device=x.device,
                        dtype=dtype),
            torch.empty(splits * rows * width, device=x.device, dtype=torch.float32),
            tickets(tiles, x.device))


def triton_gemv(x, weight_t, threshold):
    """Compute sparse_gemv by the Triton kernel, in one launch."""
    check_triton(x)
    rows, channels = x.shape
    outputs = weight_t.shape[1]
    if not rows * channels * outputs:
        return x.new_zeros(rows, outputs)                  # there would be no program
    sizes = TILE[weight_t.itemsize]
    tiles = triton.cdiv(outputs, sizes["BLOCK_OUT"])
    size = span(tiles, channels, x.device)
    splits = triton.cdiv(channels, size)
    y = torch.empty(rows, outputs, device=x.device, dtype=x.dtype)
    with torch.cuda.device_of(x):        # Triton launches on the current device
        sparse_product_kernel[(tiles, splits)](
            x, weight_t, threshold, *room(x, weight_t.dtype, tiles, splits, size, outputs), y,
            rows, channels, outputs, STEP=threshold.ndim, ROWS=triton.next_power_of_2(rows),
            SPAN=size, num_warps=4, **sizes)
    return y


# A backend is a function(x (B, in), weight_t (in, out), threshold () or (in,)) -> y (B, out).
BACKENDS = {"triton": triton_gemv, "c": c_gemv, "torch": torch_gemv}
C_CALLS = {"c": c_call}              # for those that are one C call: the function, its arguments


# --------------------------------------------------------------------------------------------------
# How fast it is, here.

def median_time(call, device, seconds=0.5):
    """Return the median time of `call(i)`, i counting up, of as many as `seconds` hold."""
    on_gpu = device.type == "cuda"
    if on_gpu:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    times = []
    call(0)                              # which may compile
    last = time.perf_counter() + seconds
    while time.perf_counter() < last or len(times) < 5:
        if on_gpu:
            torch.cuda._sleep(1_000_000)     # half a millisecond in which the host gets ahead
            begin.record()
        started = time.perf_counter()
        call(1 + len(times))
        times.append(time.perf_counter() - started)
        if on_gpu:
            end.record()
            end.synchronize()
            times[-1] = begin.elapsed_time(end) / 1e3
    return statistics.median(times)


def threshold_dropping(x, sparsity):
    """Return the magnitude at or below which a share `sparsity` of the entries of x lies."""
    dropped = round(sparsity * x.numel())
    if not dropped:
        return KEEP_ALL.to(x.device)
    return x.float().abs().flatten().sort().values[dropped - 1]


def copies_of(inputs, outputs, dtype, device, total=512_000_000):
    """Return random weights (inputs, outputs), at least two, of `total` bytes: more than a cache.

    Their rows are 256 random ones, again and again: what the numbers are costs no time.
    """
    block = torch.randn(256, outputs, device=device).to(dtype)
    row = torch.arange(inputs, device=device)
    copies = max(2, -(-total // (inputs * outputs * dtype.itemsize)))
    return [block[(row + i) % 256] for i in range(copies)]


def time_shape(inputs, outputs, dtype, device, levels, seconds=0.5, total=512_000_000,
               library=("F.linear", "torch.mv", "x @ weight_t")):
    """Print, and return, the times of one product: {each of `library`, "ours, 50%"...: seconds}.

    levels: the shares of the inputs that our kernel drops; seconds: for each time; total: bytes of
    weights; library: PyTorch's ways. Ratios are to the fastest of these.
    """
    weights = copies_of(inputs, outputs, dtype, device, total)
    n = len(weights)
    size = weights[0].nbytes
    usual = [weight.view(outputs, inputs) for weight in weights]       # other numbers, same bytes
    xs = torch.randn(8, 1, inputs, device=device)
    x = xs[0].to(dtype)
    if device.type == "cuda":
        xs = xs.to(dtype)                # as a model's are there; on a CPU they are float32
    ways = {"F.linear": lambda i: F.linear(x, usual[i % n]),
            "torch.mv": lambda i: torch.mv(usual[i % n], x[0]),
            "x @ weight_t": lambda i: x @ weights[i % n]}
    times = {name: median_time(ways[name], device, seconds) for name in library}
    best = min(times.values())

    def show(name, read):
        print(f"{name:>12} {times[name] * 1e3:9.3f} {read * size / times[name] / 1e9:7.1f} "
              f"{best / times[name]:6.2f}x", flush=True)

    print(f"\n{inputs} x {outputs} {str(dtype).removeprefix('torch.')}, {size / 1e6:.0f} MB\n"
          f"{'':>12} {'ms':>9} {'GB/s':>7} {'ratio':>7}")
    for name in library:
        show(name, 1)
    for level in levels:
        thresholds = [threshold_dropping(x, level) for x in xs]
        name = f"ours, {level:.0%}"
        times[name] = median_time(
            lambda i: sparse_gemv(xs[i % 8], weights[i % n], thresholds[i % 8]), device, seconds)
        show(name, 1 - round(level * inputs) / inputs)
    return times


def main():
    parser = Parser(description="Times dense against sparse matrix-vector products, here.")
    parser.add_argument("--shapes", default="llama-2-7b", metavar="PRESET", choices=PRESETS,
                        help=f"whose linears: {', '.join(PRESETS)} (default: llama-2-7b)")
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16", "float16"],
                        help="(default: bfloat16)")
    parser.add_argument("--sparsity", nargs="+", type=share, default=[0, 0.25, 0.4, 0.5, 0.65, 0.9],
                        help="shares of the channels to drop (default: 0 0.25 0.4 0.5 0.65 0.9)")
    parser.add_device()
    arguments = parser.parse_args()
    device = find_device(arguments.device)
    dtype = getattr(torch, arguments.dtype)
    machine = f"CPU with {instructions()}, {THREADS} threads"
    if device.type == "cuda":
        machine = torch.cuda.get_device_name(device)
    print(f"{machine}, torch {torch.__version__}. Random weights, more than a cache holds.\n"
          f"ours: {best_backend(torch.empty(0, dtype=dtype, device=device))}. GB/s: bytes of kept "
          f"weights over time. ratio: to the fastest of PyTorch's ways")
    shapes = {shape[::-1] for shape in block_linears(PRESETS[arguments.shapes]).values()}
    for inputs, outputs in sorted(shapes):
        time_shape(inputs, outputs, dtype, device, arguments.sparsity)


if __name__ == "__main__":
    command_line(main)
