"""How skipped columns become time: the sparse matrix-vector product (gemv).

    y = W x = Σ_i x_i · (column i of W)          with |x_i| ≤ threshold, column i is not read

A token takes as long as reading the weights takes; arithmetic is free. So that a skipped column is
not read, the weight is stored transposed, as `weight_t` (in, out): there a column of W is one
contiguous row (README, From skipped columns to time, draws it). y is the sum of the rows whose
input is large, each times its input. Two things are left to arrange.

Which loads to issue. The kept channels are listed first. Then every load is one of a row that
counts, and the next ones can be asked for long before they are needed.

Who adds up what. On a CPU each thread owns a range of outputs and walks down all kept rows; its
sums stay in the first cache. A GPU has ten thousand threads and a 4096 x 4096 layer only 32 tiles
of 128 outputs, so the rows are divided too ("split-K"): program (tile, split) adds the rows of its
split for its tile and writes a partial sum to a place of its own. The program of a tile that
finishes last adds the parts in a fixed order: the same input gives the same bits.

Several tokens. Decoding one text has one row of x. With 2 to 8 (a batch, or guesses to verify) a
weight row is read once if any token keeps its channel; those that drop it multiply it by 0, which
is NaN where a weight is infinite.

Three backends compute the same: "triton" (GPU), "c" (CPU, where a C compiler is found) and "torch"
(anywhere, and alone in float64). Thresholds are compared, and sums are taken, in float32 at least;
Triton first rounds x to the weight's dtype.

    python kernel.py                                 dense against sparse, Llama-2-7B's shapes
    python kernel.py --shapes llama-3-8b --dtype float16 --sparsity 0 0.5
"""
import contextlib
import ctypes
import functools
import hashlib
import itertools
import os
import platform
import shlex
import shutil
import statistics
import subprocess
import tempfile
import time

from model import (PRESETS, Parser, block_linears, can_multiply, command_line, find_device, matmul,
                   note, share)

import torch
import torch.nn.functional as F

try:
    import triton
    import triton.language as tl
except ImportError:                  # there is no Triton for macOS, which has no CUDA either
    triton = None

MAX_ROWS = 8             # with more rows arithmetic is the bound, not memory
THREADS = torch.get_num_threads()        # for C, read once: generate.plain_step sets PyTorch's to 1
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

    x: (..., in), 1 to 8 rows in all, of the weight's dtype, or float32 where that has 16 bits
    weight_t: (in, out), contiguous, floating point: the transposed weight of a linear
    threshold: a number, a 0-d tensor, or a tensor (in,), one a channel; below 0 keeps all
    backend: a name in BACKENDS, or None for the fastest there is for the weight
    Returns (..., out) in x's dtype. Raises ValueError for shapes and dtypes that do not fit.
    """
    same = x.dtype == weight_t.dtype or x.dtype == torch.float32 and weight_t.itemsize == 2
    if not (same and x.is_floating_point() and 1 <= x.shape[:-1].numel() <= MAX_ROWS
            and weight_t.ndim == 2 and weight_t.shape[:1] == x.shape[-1:]
            and weight_t.is_contiguous() and weight_t.device == x.device):
        raise ValueError(f"x is {x.dtype} {tuple(x.shape)} on {x.device}, weight_t "
                         f"{weight_t.dtype} {tuple(weight_t.shape)} on {weight_t.device}; expected "
                         f"floating point, x (..., in) of 1 to {MAX_ROWS} rows, weight_t (in, out) "
                         f"contiguous, of x's dtype, or of 16 bits where x is float32")
    name = backend or best_backend(weight_t)
    if name not in BACKENDS:
        raise ValueError(f"backend is {', '.join(BACKENDS)} or None, not {backend!r}")
    return multiply(name, x, weight_t, threshold)


def multiply(backend, x, weight, threshold):
    """Return a product of a backend unchecked: its x (..., in), weight and threshold must fit."""
    return BACKENDS[backend](x.contiguous(), weight, as_threshold(threshold, x))


def as_threshold(threshold, x):
    """Return a threshold as a tensor () or (in,), of x's device and of the comparison's dtype."""
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    if not isinstance(threshold, torch.Tensor):
        # not torch.tensor: a CUDA graph cannot replay a copy from the host
        threshold = torch.full((), threshold, device=x.device, dtype=dtype)
    elif threshold.dtype != dtype or threshold.device != x.device:
        threshold = threshold.to(x.device, dtype)
    threshold = threshold.contiguous()
    if threshold.ndim and threshold.shape != x.shape[-1:]:
        raise ValueError(f"threshold is {tuple(threshold.shape)}, expected a number or "
                         f"({x.shape[-1]},)")
    return threshold


def best_backend(weight_t):
    """Return the name of the fastest backend for weights of a tensor's device and dtype."""
    if fits_c(weight_t):
        return "c"
    return "triton" if weight_t.is_cuda and fits_triton(weight_t) else "torch"


def dense(x, weight_t):
    """Return x (..., in) @ weight_t (in, out) in x's dtype, by what is fastest; drop nothing.

    On a CPU the library's products are made for many rows. The C kernel reads the weight at the
    speed of memory: it takes up to eight rows, or 48 where the processor cannot multiply the dtype.
    """
    rows = x.shape[:-1].numel()
    few = rows <= MAX_ROWS or rows <= 6 * MAX_ROWS and not can_multiply(weight_t.dtype)
    fits = x.shape[-1] == len(weight_t) and weight_t.is_contiguous() and fits_c(weight_t)
    if few and fits and not x.requires_grad:
        return BACKENDS["c"](x.contiguous(), weight_t, KEEP_ALL)
    return matmul(x, weight_t)           # which refuses shapes that do not fit


# --------------------------------------------------------------------------------------------------
# PyTorch: gather the rows that count, a block at a time, and multiply them.

def torch_gemv(x, weight_t, threshold):
    """Compute sparse_gemv in PyTorch, with sums of the threshold's dtype."""
    keep = kept(x, threshold)
    kept_x = torch.where(keep, x, 0).to(threshold.dtype)
    channels = keep[None].flatten(0, -2).any(0).nonzero()[:, 0]                 # (kept by any row,)
    y = kept_x.new_zeros(*x.shape[:-1], weight_t.shape[1])
    for some in channels.split(512):
        y += kept_x[..., some] @ weight_t[some].to(y.dtype)
    return y.to(x.dtype)


# --------------------------------------------------------------------------------------------------
# C: each thread walks down the list over its range of outputs, eight rows at a time. Meanwhile the
# next rows are on their way: a processor foresees how a row goes on, but not which row comes next.
# The sums of 2 * LANES outputs of up to four tokens stay in registers while the eight are added; a
# weight is widened to float32 once for these tokens. x, y and the sums are always float32.

C_SOURCE = r"""
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

// What this processor loads at once: LANES weights of 16 bits, widened to 32. No compiler makes
// these instructions from plain C yet: gcc 12 needs two for WIDEN, and converts float16 one by one.
#if defined __AVX512F__
#include <immintrin.h>
#define LANES 16
#define WIDEN(at) (words)_mm512_cvtepu16_epi32(_mm256_loadu_si256((void *)(at)))
#define OF_FLOAT16(at) (floats)_mm512_cvtph_ps(_mm256_loadu_si256((void *)(at)))
#elif defined __AVX2__ && defined __F16C__
#include <immintrin.h>
#define LANES 8
#define WIDEN(at) (words)_mm256_cvtepu16_epi32(_mm_loadu_si128((void *)(at)))
#define OF_FLOAT16(at) (floats)_mm256_cvtph_ps(_mm_loadu_si128((void *)(at)))
#else
#define LANES 4
#define WIDEN(at) __builtin_convertvector(*(const halves *)(at), words)
#endif
typedef float floats __attribute__((vector_size(LANES * 4), aligned(4), may_alias));
typedef uint32_t words __attribute__((vector_size(LANES * 4)));
typedef uint16_t halves __attribute__((vector_size(LANES * 2), aligned(2), may_alias));

#if defined FLOAT32
typedef float type;
#else
typedef uint16_t type;
#endif

/* Returns LANES weights as floats. */
static inline floats load(const type *at) {
#if defined FLOAT32
    return *(const floats *)at;
#elif defined BFLOAT16               // the upper half of a float
    return (floats)(WIDEN(at) << 16);
#elif defined OF_FLOAT16
    return OF_FLOAT16(at);
#else                                // float16 as a float has an exponent 112 too small
    words bits = WIDEN(at), special = (words)((bits & 0x7c00) == 0x7c00) & 0x7f800000;
    floats magnitude = (floats)((bits & 0x7fff) << 13) * 0x1p112f;
    return (floats)((words)magnitude | special | (bits & 0x8000) << 16);
#endif
}

#define ROWS_A_PASS 8                // rows of weights added in one pass over the sums
#define TOKENS_A_PASS 4              // tokens whose sums, two registers each, a pass holds
#define SUMS_IN_CACHE 8192           // sums that a thread works on: 32 KB, as the first cache has
#define BYTES_A_THREAD (2 << 20)     // of weights that are worth one more thread
#define UNROLL _Pragma("GCC unroll 4")

/* Adds up to ROWS_A_PASS rows: y[t][j] += input[r][t] * row[r][j], j from first to end. `tokens` is
   a constant where this is inlined, so that the sums are registers. A row of input has `stride`
   numbers, one of y `out`. In `row` the rows of the next pass follow. */
static inline __attribute__((always_inline)) void add_rows(
        const int tokens, int rows, const type **row, const float *input, long stride, float *y,
        long out, long first, long end) {
    long j = first;
    for (; j + 2 * LANES <= end; j += 2 * LANES) {
        floats sums[TOKENS_A_PASS][2] = {0};
        for (int r = 0; r < rows; r++) {
            floats weights[2] = { load(row[r] + j), load(row[r] + j + LANES) };
            for (int line = 0; line < 2 * LANES; line += 64 / sizeof(type))   // of 64 bytes
                __builtin_prefetch(row[r + ROWS_A_PASS] + j + line, 0, 2);
            UNROLL for (int t = 0; t < tokens; t++)
                UNROLL for (int half = 0; half < 2; half++)
                    sums[t][half] += input[r * stride + t] * weights[half];
        }
        UNROLL for (int t = 0; t < tokens; t++)
            UNROLL for (int half = 0; half < 2; half++)
                *(floats *)(y + t * out + j + half * LANES) += sums[t][half];
    }
    for (int r = 0; r < rows && j < end; r++) {    // the rest, copied: loads would run past the end
        type last[2 * LANES] = {0};
        memcpy(last, row[r] + j, (end - j) * sizeof(type));
        floats weights[2] = { load(last), load(last + LANES) };
        for (int t = 0; t < tokens; t++)
            for (long k = j; k < end; k++)
                y[t * out + k] += input[r * stride + t] * ((float *)weights)[k - j];
    }
}

/* y (tokens, out) = x (tokens, in), its small channels dropped, times weight (in, out).
   threshold: one (step 0) or (in) (step 1); threads: the most to use. Returns 0, or 1 where memory
   ran out. */
int sparse_product(const float *x, const type *weight, const float *threshold, long step, float *y,
                   long tokens, long in, long out, long threads) {
    const type **row = malloc((in + ROWS_A_PASS) * (sizeof *row + tokens * sizeof(float)));
    float *input = (float *)(row + in + ROWS_A_PASS);        // (n, tokens)
    long n = 0;
    if (!row) return 1;
    for (long i = 0; i < in; i++) {  // rows that any token keeps, with 0 for tokens that drop it
        int needed = 0;
        for (long t = 0; t < tokens; t++) {
            int keep = !(fabsf(x[t * in + i]) <= threshold[i * step]);          // NaN is kept
            input[n * tokens + t] = keep ? x[t * in + i] : 0.0f;
            needed |= keep;
        }
        row[n] = weight + i * out;
        n += needed;
    }
    for (int r = 0; r < ROWS_A_PASS; r++) row[n + r] = weight;       // prefetched, but not added
    memset(y, 0, tokens * out * sizeof(float));
    long useful = 1 + n * out * (long)sizeof(type) / BYTES_A_THREAD;
    if (threads > useful) threads = useful;
    // Equal parts of the outputs, as many for each thread: the sums of one fit the cache
    long parts = threads * (1 + (tokens * out - 1) / (threads * SUMS_IN_CACHE));
    long columns = (out + parts * 64 - 1) / (parts * 64) * 64;
    // dynamic: a part is taken by whoever comes first, so that a late thread holds up less
    #pragma omp parallel for schedule(dynamic) num_threads(threads) if (threads > 1)
    for (long first = 0; first < out; first += columns) {
        long end = first + columns < out ? first + columns : out;
        for (long k = 0; k < n; k += ROWS_A_PASS) {
            int rows = n - k < ROWS_A_PASS ? n - k : ROWS_A_PASS;
            long t = 0;
#define ADD(COUNT) for (; t + COUNT <= tokens; t += COUNT) \
                       add_rows(COUNT, rows, row + k, input + k * tokens + t, tokens, y + t * out, \
                                out, first, end)
            ADD(4); ADD(3); ADD(2); ADD(1);
        }
    }
    free(row);
    return 0;
}
"""
C_TYPES = {torch.float32: "FLOAT32", torch.bfloat16: "BFLOAT16", torch.float16: "FLOAT16"}

# No -ffast-math: a library linked with it makes the whole process flush denormals. -march is for
# gcc and clang on x86, -mcpu for arm; Apple's compiler has no OpenMP: there C runs on one thread.
C_FLAGS = ["-fopenmp -march=native", "-fopenmp -mcpu=native", "-mcpu=native", ""]
say_once = functools.cache(note)


@functools.cache
def compiled(source):
    """Return C source compiled for this processor, a ctypes.CDLL, or None without a C compiler.

    The compiler is CC (a path, or a command with arguments), or else cc, gcc or clang. The library
    is kept in MINTEAL_CACHE, or else in ~/.cache/minteal. MINTEAL_CACHE=off does without C.
    """
    if os.environ.get("MINTEAL_CACHE") == "off":
        return None
    asked = os.environ.get("CC", "")
    asked = [asked] if shutil.which(asked) else shlex.split(asked)     # a path may have blanks
    for command in filter(None, (asked, ["cc"], ["gcc"], ["clang"])):
        if command is not asked and not shutil.which(command[0]):
            continue
        for flags in C_FLAGS:
            library = built([*command, "-O3", *flags.split()], source)
            if library is not None:
                return library
        if command is asked:
            say_once(f"kernel.py: CC={shlex.join(command)} does not make a C library here")
    return None


def built(command, source):
    """Return the library that a compiler's command makes of C source, kept for later, or None."""
    identity = f"{source}\n{command}\n{processor()}"       # machines may share a folder
    folder = os.environ.get("MINTEAL_CACHE") or os.path.expanduser("~/.cache/minteal")
    path = f"{folder}/{hashlib.sha256(identity.encode()).hexdigest()[:16]}.so"
    with contextlib.suppress(OSError):                     # not built yet, or damaged
        return ctypes.CDLL(path)
    try:
        os.makedirs(folder, exist_ok=True)
        scratch = tempfile.TemporaryDirectory(dir=folder)
    except OSError:
        say_once(f"kernel.py: {folder} cannot be written: every command compiles its C anew. Set "
                 f"MINTEAL_CACHE to a folder that can")
        scratch = tempfile.TemporaryDirectory()
    with scratch, contextlib.suppress(OSError):            # no such compiler, or it failed
        made = f"{scratch.name}/made.so"
        subprocess.run([*command, "-shared", "-fPIC", "-x", "c", "-", "-o", made, "-lm"],
                       input=source.encode(), capture_output=True)
        library = ctypes.CDLL(made)                        # stays when its file moves or goes
        with contextlib.suppress(OSError):
            os.replace(made, path)
        return library


@functools.cache
def processor():
    """Return this processor's model and features, on which -march=native depends."""
    keys = ("model name", "flags", "Features", "CPU part")
    with contextlib.suppress(OSError), open("/proc/cpuinfo") as lines:
        return sorted({line for line in lines if line.startswith(keys)})
    return platform.machine(), platform.processor()


@functools.cache
def c_function(dtype):
    """Return the C function for weights of a dtype, or None if there is none or no compiler."""
    library = compiled(f"#define {C_TYPES[dtype]}\n{C_SOURCE}") if dtype in C_TYPES else None
    if library is None:
        return None
    library.sparse_product.argtypes = 9 * [ctypes.c_int64]           # addresses and sizes
    return library.sparse_product


def fits_c(weight_t):
    """Return whether the C kernel takes weights of a tensor's device and dtype here."""
    return weight_t.is_cpu and c_function(weight_t.dtype) is not None


def c_call(x, weight_t, threshold, y):
    """Return the C function and the arguments that set y (..., out) to the sparse product.

    x (..., in), threshold and y are float32. Raises ValueError for weights that C does not take.
    """
    function = c_function(weight_t.dtype)
    if function is None or not weight_t.is_cpu:
        raise ValueError(f'backend "c" needs a C compiler and float32, float16 or bfloat16 on the '
                         f'CPU, not {weight_t.dtype} on {weight_t.device.type}')
    return function, (
        x.data_ptr(), weight_t.data_ptr(), threshold.data_ptr(), threshold.ndim, y.data_ptr(),
        x.shape[:-1].numel(), *weight_t.shape, THREADS)


def run_c(call, x, weight, threshold):
    """Return a sparse product in C: `call` is c_call, or one like it for another kind of weight."""
    wide = x.float()
    y = wide.new_empty(*x.shape[:-1], weight.shape[1])
    function, arguments = call(wide, weight, threshold, y)
    if function(*arguments):
        raise MemoryError("no memory for the list of kept channels")
    return y if wide is x else y.to(x.dtype)


def c_gemv(x, weight_t, threshold):
    """Compute sparse_gemv in C."""
    return run_c(c_call, x, weight_t, threshold)           # beyond/record.py takes run_c's place


# --------------------------------------------------------------------------------------------------
# Triton: the same sum, cut into tiles. A GPU is busy while enough bytes are on their way: on an
# H100 3.35 TB/s x 0.7 us, which is 17 KB for each of its 132 multiprocessors. So the walk down the
# list is a pipeline: while the tensor cores take one turn's rows, those of the next turns are being
# copied to shared memory, past the registers. Tensor cores take at least 16 rows of x. Those that
# are not there are zeros, and cost no time, as time is bytes: one row or eight take the same.

if triton is not None:
    INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)

    @triton.jit
    def load_split(x_ptr, rows, channels, per_split, ROWS: tl.constexpr, SPAN: tl.constexpr):
        """Return a split's channels (SPAN,), a mask of what x has there (ROWS, SPAN), and x."""
        first = tl.program_id(1) * per_split
        row = tl.arange(0, ROWS)[:, None]
        channel = first + tl.arange(0, SPAN)
        inside = (row < rows) & (channel < tl.minimum(first + per_split, channels))[None, :]
        x = tl.load(x_ptr + row * channels + channel[None, :], mask=inside, other=0.0)
        return channel, inside, x

    @triton.jit
    def list_kept(channel, inside, x, threshold_ptr, channel_ptr, input_ptr, channels,
                  STEP: tl.constexpr, ROWS: tl.constexpr, SPAN: tl.constexpr):
        """List which channels of a program's split any row of x keeps, as load_split gives them.

        Written, for this program alone: channel int32 (SPAN,), the kept ones in their order, then
        -1; input (ROWS, SPAN), what each row keeps of them, 0 for what it drops. Returns where the
        two are, and the number of kept channels. threshold: (channels,), or () with STEP 0.
        """
        program = tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
        channel_ptr += program * SPAN
        input_ptr += program * SPAN * ROWS
        row = tl.arange(0, ROWS)[:, None]
        index = tl.arange(0, SPAN)
        threshold = tl.load(threshold_ptr + channel * STEP, mask=channel < channels, other=0.0)
        keep = ((tl.abs(x.to(tl.float32)) <= threshold[None, :]) == 0) & inside     # NaN is kept
        needed = tl.max(keep.to(tl.int32), axis=0)                              # by any row
        before = tl.cumsum(needed) - needed
        count = tl.sum(needed)
        place = tl.where(needed > 0, before, count + index - before)    # kept: 0 to count - 1
        tl.store(channel_ptr + place, tl.where(needed > 0, channel, -1))
        kept_x = tl.where(keep, x, 0.0).to(input_ptr.dtype.element_ty)
        tl.store(input_ptr + row * SPAN + place[None, :], kept_x)
        tl.debug_barrier()               # each thread will read what others have listed
        return channel_ptr, input_ptr, count

    @triton.jit
    def add_rows(weight_ptr, channel_ptr, input_ptr, count, output, outputs, ROWS: tl.constexpr,
                 SPAN: tl.constexpr, BLOCK_OUT: tl.constexpr):
        """Return the sum of input times weight over `count` listed channels: (16, BLOCK_OUT).

        output (BLOCK_OUT,): the outputs of the tile; weight (channels, outputs). Sums are float32.
        """
        # The rows of a turn: 32 of 16 bits, 16 of 32
        BLOCK_IN: tl.constexpr = 512 // weight_ptr.dtype.element_ty.primitive_bitwidth
        row = tl.arange(0, 16)[:, None]                                         # tl.dot needs 16
        sums = tl.zeros((16, BLOCK_OUT), tl.float32)
        for start in tl.range(0, count, BLOCK_IN, num_stages=5):
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
        """Return whether the other programs of this tile have all stored their parts."""
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
                              ticket_ptr, y_ptr, rows, channels, outputs, per_split,
                              STEP: tl.constexpr, ROWS: tl.constexpr, SPAN: tl.constexpr,
                              BLOCK_OUT: tl.constexpr):
        """y[row, j] = sum over channels of kept x[row, i] * weight[i, j].

        grid (tiles, splits of per_split channels). x (rows, channels); y (rows, outputs); partial
        float32 (splits, rows, outputs); ticket int32 (tiles,), zeros; others: see list_kept.
        ROWS and SPAN: rows and per_split, rounded up to a power of 2.
        """
        tile = tl.program_id(0)
        split = tl.program_id(1)
        splits = tl.num_programs(1)
        channel, inside, x = load_split(x_ptr, rows, channels, per_split, ROWS, SPAN)
        channel_ptr, input_ptr, count = list_kept(channel, inside, x, threshold_ptr, channel_ptr,
                                                  input_ptr, channels, STEP, ROWS, SPAN)
        output = tile * BLOCK_OUT + tl.arange(0, BLOCK_OUT)                     # (BLOCK_OUT,)
        sums = add_rows(weight_ptr, channel_ptr, input_ptr, count, output, outputs, ROWS, SPAN,
                        BLOCK_OUT)
        padded = tl.arange(0, 16)[:, None]
        tl.store(partial_ptr + (split * rows + padded) * outputs + output[None, :], sums,
                 mask=(padded < rows) & (output < outputs)[None, :])
        if is_last(ticket_ptr + tile, splits):
            row = tl.arange(0, ROWS)[:, None]
            place = row * outputs + output[None, :]                             # (ROWS, BLOCK_OUT)
            real = (row < rows) & (output < outputs)[None, :]
            y = add_parts(partial_ptr, place, real, splits, rows * outputs, ROWS, BLOCK_OUT)
            tl.store(y_ptr + place, y.to(y_ptr.dtype.element_ty), mask=real)


def fits_triton(x):
    """Return whether Triton's kernels run for tensors of x's device and dtype here."""
    return triton is not None and x.itemsize < 8 and (x.is_cuda or INTERPRETED.value)


@functools.cache
def tickets(device):
    """Return zeros int32, one a tile, by which a program learns that it is the last of its tile.

    A launch leaves zeros for the next one: launches on a device follow each other, in one stream.
    """
    return torch.zeros(1 << 16, dtype=torch.int32, device=device)


def launch(function, grid, *arguments, num_warps=4, **constants):
    """Launch a Triton kernel on the device of its first argument."""
    with torch.cuda.device_of(arguments[0]):               # Triton launches on the current device
        function[grid](*arguments, num_warps=num_warps, **constants)


def launch_product(function, x, inputs, y, outputs, dtype, block=128, per_split=None, **constants):
    """Launch sparse_product_kernel, or another that divides its work among programs as it does.

    x (..., in), contiguous; inputs: what else is read; y: what is written; outputs: how many each
    linear has; dtype: of the listed inputs; block: outputs of a tile; per_split: channels that a
    program lists (default: 512 where 256 would make too many programs).
    """
    if not fits_triton(x):
        raise ValueError(f'backend "triton" needs Triton, 16 or 32 bits, not {x.dtype}, and a GPU, '
                         f'or TRITON_INTERPRET=1 set before triton is imported')
    channels = x.shape[-1]
    rows = x.shape[:-1].numel()
    padded = triton.next_power_of_2(rows)
    tiles = sum(triton.cdiv(out, block) for out in outputs)
    if per_split is None:
        processors = 2                   # for the interpreter
        if x.is_cuda:
            processors = torch.cuda.get_device_properties(x.device).multi_processor_count
        per_split = 512 if tiles * triton.cdiv(channels, 256) > 8 * processors else 256
    span = max(16, triton.next_power_of_2(per_split))
    splits = triton.cdiv(channels, per_split)
    new = functools.partial(torch.empty, device=x.device)
    channel = new(splits * tiles, span, dtype=torch.int32)           # a list for each program
    listed = new(splits * tiles, padded, span, dtype=dtype)
    partial = new(splits, rows, sum(outputs), dtype=torch.float32)
    launch(function, (tiles, splits), x, *inputs, channel, listed, partial, tickets(x.device), y,
           rows, channels, sum(outputs), per_split, ROWS=padded, SPAN=span, BLOCK_OUT=block,
           **constants)


def triton_gemv(x, weight_t, threshold):
    """Compute sparse_gemv by the Triton kernel, in one launch."""
    outputs = weight_t.shape[1]
    if not weight_t.numel():
        return x.new_zeros(*x.shape[:-1], outputs)         # there would be no program
    y = x.new_empty(*x.shape[:-1], outputs)
    launch_product(sparse_product_kernel, x, (weight_t, threshold), y, (outputs,), weight_t.dtype,
                   STEP=threshold.ndim)
    return y


# A backend is a function(x (..., in), weight_t (in, out), threshold () or (in,)) -> y (..., out).
BACKENDS = {"triton": triton_gemv, "c": c_gemv, "torch": torch_gemv}


# --------------------------------------------------------------------------------------------------
# How fast it is, here.

def median_time(call, device, seconds=0.5):
    """Return the median time of `call(i)`, i counting up, of as many as `seconds` hold."""
    if device.type == "cuda":
        turn = itertools.count()
        return triton.testing.do_bench(lambda: call(next(turn)), rep=round(1e3 * seconds),
                                       return_mode="median") / 1e3
    call(0)                              # which may compile
    ends = [time.perf_counter()]
    while len(ends) < 6 or ends[-1] < ends[0] + seconds:
        call(len(ends))
        ends.append(time.perf_counter())
    return statistics.median(end - began for began, end in itertools.pairwise(ends))


def threshold_dropping(x, sparsity):
    """Return the magnitude at or below which a share `sparsity` of the entries of x lies."""
    dropped = round(sparsity * x.numel())
    return x.float().abs().flatten().kthvalue(dropped).values if dropped else KEEP_ALL.to(x.device)


def copies_of(inputs, outputs, dtype, device, total=512_000_000):
    """Return random weights (inputs, outputs), at least two, of `total` bytes: more than a cache.

    Their rows are 256 random ones, again and again: what the numbers are costs no time.
    """
    block = torch.randn(256, outputs, device=device).to(dtype)
    row = torch.arange(inputs, device=device)
    copies = max(2, -(-total // (inputs * outputs * dtype.itemsize)))
    return [block[(row + i) % 256] for i in range(copies)]


def show_time(name, seconds, size, best):
    """Print a row: milliseconds, GB/s of the `size` bytes that were read, the speed over `best`."""
    print(f"{name:>12} {seconds * 1e3:9.3f} {size / seconds / 1e9:7.1f} {best / seconds:6.2f}x",
          flush=True)


def time_levels(product, weights, xs, levels, best, seconds=0.5):
    """Print, and return, the times of our product at each level: {"ours, 50%": seconds}.

    product(x, weight, threshold), of xs (8, 1, in) and weights in turn; levels: shares of the
    inputs that are dropped; best: seconds that ratios are to; seconds: for each time.
    """
    inputs = xs.shape[-1]
    times = {}
    for level in levels:
        thresholds = [threshold_dropping(x, level) for x in xs]
        name = f"ours, {level:.0%}"
        times[name] = median_time(
            lambda i: product(xs[i % 8], weights[i % len(weights)], thresholds[i % 8]), xs.device,
            seconds)
        kept_bytes = weights[0].nbytes * (1 - round(level * inputs) / inputs)
        show_time(name, times[name], kept_bytes, best)
    return times


def time_shape(inputs, outputs, dtype, device, levels, seconds=0.5, total=512_000_000):
    """Print, and return, the times of a product: {one of PyTorch's ways, or "ours, 50%": seconds}.

    levels: the shares of the inputs that our kernel drops; seconds: for each time; total: bytes of
    weights. Ratios are to the fastest of PyTorch's ways.
    """
    weights = copies_of(inputs, outputs, dtype, device, total)
    n = len(weights)
    as_pytorch = [weight.view(outputs, inputs) for weight in weights]  # other numbers, same bytes
    xs = torch.randn(8, 1, inputs, device=device)
    x = xs[0].to(dtype)
    if device.type == "cuda":
        xs = xs.to(dtype)                # as a model's are there; on a CPU they are float32
    ways = {"F.linear": lambda i: F.linear(x, as_pytorch[i % n]),
            "torch.mv": lambda i: torch.mv(as_pytorch[i % n], x[0]),
            "x @ weight_t": lambda i: x @ weights[i % n]}
    times = {name: median_time(way, device, seconds) for name, way in ways.items()}
    best = min(times.values())
    size = weights[0].nbytes
    print(f"\n{inputs} x {outputs} {str(dtype).removeprefix('torch.')}, {size / 1e6:.0f} MB\n"
          f"{'':>12} {'ms':>9} {'GB/s':>7} {'ratio':>7}")
    for name, time_of in times.items():
        show_time(name, time_of, size, best)
    return times | time_levels(sparse_gemv, weights, xs, levels, best, seconds)


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
    machine = f"CPU with {torch.backends.cpu.get_cpu_capability()}, {THREADS} threads"
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
