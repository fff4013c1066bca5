"""A step of decoding without Python in it: recorded once, replayed ever after.

A step runs a token, or a few, through the model: the same operations on the same memory, again and
again. The products with the weights take the time; but between them lie hundreds of small
operations, and what starts each of them, Python and PyTorch, takes longer than what it does. On a
GPU a CUDA graph removes that (`generate.GraphStep`). On a CPU this file does: at Llama-3.2-1B's
shapes it is a fifth of a step, since weights that stream through the caches evict all other code.

    model.forward ──► each operation of PyTorch passes by ──┬──► it is done, once
       (once)         a `TorchFunctionMode` looking on      └──► and noted: a C function, and the
                                                                 addresses that it reads and writes
    each step     ──► copy the tokens and where they stand ──► the notes, one after the other, in C

It is the forward of model.py itself that is recorded, or that of a subclass in place of a linear or
a block: whoever changes them sees the change here. An operation for which there is no C function
below is noted all the same, and PyTorch replays it, a few microseconds slower. Views cost nothing;
what depends on no input of the step is not repeated. A forward that looks at values while it runs
(`if x.max() > 3`) cannot be recorded; then one line says so, and the model runs itself.

The seam: `generate(..., make_step=record.make_step)`. The cache of the step is
`generate.StaticCache`, the one that CUDA graphs use. A chapter that has operations of its own says
in NOTES how they are noted.
"""
import contextlib
import ctypes
import functools
import itertools
import struct
from collections import Counter
from unittest import mock

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

import kernel
from generate import StaticCache, fast_step
from sparsify import note_tokens

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
#include <float.h>

// e^x in operations that make vectors: 2^n e^f with |f| <= ln(2) / 2, and e^f by its series.
static inline float exponential(float x) {
    float inside = x > -87.0f ? x < 88.0f ? x : 88.0f : -87.0f, n = rintf(1.44269504f * inside);
    float f = inside - 0.693145752f * n - 1.42860677e-6f * n;    // n ln(2), in two parts, exactly
    float power = 1 + f * (1 + f * (1 / 2.0f + f * (1 / 6.0f + f * (1 / 24.0f + f * (1 / 120.0f
                    + f * (1 / 720.0f))))));
    power *= number((uint32_t)((int32_t)n + 127) << 23);
    return x != x ? x : x < -87.0f ? 0 : x > 88.0f ? INFINITY : power;
}

// Numbers are computed with in float32. In memory they have one of four types; those of a mask are
// bytes, 0 and 1.
enum { FLOAT32, BFLOAT16, FLOAT16, BOOL };

static void load(const void *from, long type, long at, long n, float *restrict to) {
    const uint16_t *half = (const uint16_t *)from + at;
    if (type == FLOAT32) memcpy(to, (const float *)from + at, n * sizeof(float));
    else if (type == BFLOAT16) for (long i = 0; i < n; i++) to[i] = of_bfloat16(half[i]);
    else if (type == FLOAT16) for (long i = 0; i < n; i++) to[i] = of_float16(half[i]);
    else for (long i = 0; i < n; i++) to[i] = ((const uint8_t *)from)[at + i];
}
static void store(void *to, long type, long at, long n, const float *restrict from) {
    uint16_t *half = (uint16_t *)to + at;
    if (type == FLOAT32) memcpy((float *)to + at, from, n * sizeof(float));
    else if (type == BFLOAT16) for (long i = 0; i < n; i++) half[i] = bfloat16_of(from[i]);
    else if (type == FLOAT16) for (long i = 0; i < n; i++) half[i] = float16_of(from[i]);
    else for (long i = 0; i < n; i++) ((uint8_t *)to)[at + i] = from[i] != 0;
}

// What every function here is given: addresses, sizes, and floats by their bits.
typedef int64_t args;
#define POINTER(i) ((void *)a[i])
static inline float float_of(args a) { return number((uint32_t)a); }

/* Calls the kernel of a product: its address, then its arguments. Returns not 0 if it failed. */
int product(const args *a) {
    return ((int (*)(args, args, args, args, args, args, args, args, args, args, args, args))a[0])(
        a[1], a[2], a[3], a[4], a[5], a[6], a[7], a[8], a[9], a[10], a[11], a[12]);
}

/* y = x / sqrt(mean(x^2) + eps) * weight, over rows of float32.
   x, y, weight, rows, size, eps */
int rms_norm(const args *a) {
    const float *weight = POINTER(2);
    long size = a[4];
    for (long t = 0; t < a[3]; t++) {
        const float *x = (const float *)a[0] + t * size;
        float *restrict y = (float *)a[1] + t * size, sum = 0;
        #pragma omp simd reduction(+:sum)
        for (long i = 0; i < size; i++) sum += x[i] * x[i];
        float factor = 1 / sqrtf(sum / size + float_of(a[5]));
        for (long i = 0; i < size; i++) y[i] = x[i] * factor * weight[i];
    }
    return 0;
}

/* y = f(x0, x1, x2), number by number. Four dimensions; each tensor has its strides.
   f, inputs, sizes (4), then for y and each input: address, type, strides (4); of an input the last
   stride is 0 or 1, of y it is 1 */
enum { COPY, ADD, MUL, ADDCMUL, SILU };
#define CHUNK 256
int elementwise(const args *a) {
    const args *sizes = a + 2, *y = a + 6;
    float x[3][CHUNK], z[CHUNK];
    for (long i = 0; i < sizes[0]; i++)
    for (long j = 0; j < sizes[1]; j++)
    for (long k = 0; k < sizes[2]; k++)
    for (long l = 0; l < sizes[3]; l += CHUNK) {
        long n = sizes[3] - l < CHUNK ? sizes[3] - l : CHUNK;
        for (int m = 0; m < a[1]; m++) {
            const args *of = y + 6 * (m + 1);
            long at = i * of[2] + j * of[3] + k * of[4] + l * of[5];
            load((void *)of[0], of[1], at, of[5] ? n : 1, x[m]);
            if (!of[5]) for (long p = 1; p < n; p++) x[m][p] = x[m][0];
        }
        for (long p = 0; a[0] == COPY && p < n; p++) z[p] = x[0][p];
        for (long p = 0; a[0] == ADD && p < n; p++) z[p] = x[0][p] + x[1][p];
        for (long p = 0; a[0] == MUL && p < n; p++) z[p] = x[0][p] * x[1][p];
        for (long p = 0; a[0] == ADDCMUL && p < n; p++) z[p] = x[0][p] + x[1][p] * x[2][p];
        for (long p = 0; a[0] == SILU && p < n; p++) z[p] = x[0][p] / (1 + exponential(-x[0][p]));
        store((void *)y[0], y[1], i * y[2] + j * y[3] + k * y[4] + l, n, z);
    }
    return 0;
}

/* keys[:, slots] = k. keys (G, length, D), k (G, T, D).
   keys, k, slots, bytes of a row, G, T, strides in bytes: keys (2), k (2) */
int index_copy(const args *a) {
    const int64_t *slots = POINTER(2);
    for (long g = 0; g < a[4]; g++)
        for (long t = 0; t < a[5]; t++)
            memcpy((char *)a[0] + g * a[6] + slots[t] * a[7],
                   (char *)a[1] + g * a[8] + t * a[9], a[3]);
    return 0;
}

// The sum of a[i] b[i], in 16 sums side by side: a single one would wait for each addition.
static inline float dot(const float *a, const float *b, long n) {
    float sums[16] = {0};
    long i = 0;
    for (; i + 16 <= n; i += 16)
        for (int k = 0; k < 16; k++) sums[k] += a[i + k] * b[i + k];
    for (int k = 0; i < n; i++, k++) sums[k] += a[i] * b[i];
    for (int k = 0; k < 8; k++) sums[k] += sums[k + 8];
    for (int k = 0; k < 4; k++) sums[k] += sums[k + 4];
    return sums[0] + sums[2] + (sums[1] + sums[3]);
}

/* y = softmax(scale q k^T) v over what the mask shows. q, y (G, R, D) float32; k, v (G, S, D), of
   the cache's type; mask (R, S).
   The positions, from the first that is seen to the last, are taken in tiles, each shared by all
   queries of a group. A query keeps the largest of its scores so far; e^(score - largest) and their
   sum are of that largest one, and shrink when a larger turns up (FlashAttention, arXiv
   2205.14135). What is not seen scores -infinity, and `largest` starts above that: their difference
   is no NaN.
   A group is cut in parts, as many as give each thread the same work, which are joined in the end.
   q, k, v, mask, y, type, G, R, S, D, scale, group strides of q, k, v, row strides of q, k, v,
   row stride of the mask, threads */
#define TILE 32
int attend(const args *a) {
    const uint8_t *mask = POINTER(3);
    long type = a[5], G = a[6], R = a[7], D = a[9], first = a[8], end = 0;
    float scale = float_of(a[10]);
    for (long r = 0; r < R; r++) {
        for (long s = 0; s < first; s++) if (mask[r * a[17] + s]) first = s;
        for (long s = a[8]; s > end; s--) if (mask[r * a[17] + s - 1]) end = s;
    }
    long threads = R * G * (end - first) * D > 1 << 19 ? a[18] : 1;    // one that wakes may be late
    long parts = 1, tiles = (end - first + TILE - 1) / TILE;
    while (G * parts % threads) parts++;
    float sums[G * parts][R][D], totals[G * parts][R], most[G * parts][R];
    memset(sums, 0, sizeof sums);
    memset(totals, 0, sizeof totals);
    #pragma omp parallel for num_threads(threads) schedule(static)
    for (long unit = 0; unit < G * parts; unit++) {
        long g = unit / parts, part = unit % parts;
        long last = first + tiles * (part + 1) / parts * TILE;
        if (last > end) last = end;
        const float *q = (const float *)a[0] + g * a[11];
        float tile[TILE * D], score[R][TILE], *total = totals[unit], *largest = most[unit];
        for (long r = 0; r < R; r++) largest[r] = -FLT_MAX;
        for (long start = first + tiles * part / parts * TILE; start < last; start += TILE) {
            long n = last - start < TILE ? last - start : TILE;
            for (long p = 0; p < n; p++)
                load(POINTER(1), type, g * a[12] + (start + p) * a[15], D, tile + p * D);
            for (long r = 0; r < R; r++) {
                const uint8_t *sees = mask + r * a[17] + start;
                float *sum = sums[unit][r], now = largest[r];
                for (long p = 0; p < TILE; p++)
                    score[r][p] = p < n && sees[p] ? scale * dot(q + r * a[14], tile + p * D, D)
                                                   : -INFINITY;
                for (long p = 0; p < TILE; p++) now = score[r][p] <= now ? now : score[r][p];
                for (long p = 0; p < TILE; p++) score[r][p] = exponential(score[r][p] - now);
                float shrunk = exponential(largest[r] - now);
                largest[r] = now;
                total[r] *= shrunk;
                for (long p = 0; p < TILE; p++) total[r] += score[r][p];
                for (long i = 0; shrunk != 1 && i < D; i++) sum[i] *= shrunk;
            }
            for (long p = 0; p < n; p++)
                load(POINTER(2), type, g * a[13] + (start + p) * a[16], D, tile + p * D);
            memset(tile + n * D, 0, (TILE - n) * D * sizeof(float));
            for (long r = 0; r < R; r++)
                for (long p = 0; p < TILE; p += 4) {             // four at a time: sums move less
                    const float *v = tile + p * D, *w = score[r] + p;
                    float *restrict sum = sums[unit][r];
                    for (long i = 0; i < D; i++)
                        sum[i] += w[0] * v[i] + w[1] * v[i + D] + w[2] * v[i + 2 * D]
                                  + w[3] * v[i + 3 * D];
                }
        }
    }
    for (long g = 0; g < G; g++)
        for (long r = 0; r < R; r++) {
            float *y = (float *)a[4] + (g * R + r) * D, largest = -FLT_MAX, total = 0;
            memset(y, 0, D * sizeof *y);
            for (long u = g * parts; u < (g + 1) * parts; u++)
                largest = most[u][r] <= largest ? largest : most[u][r];
            for (long u = g * parts; u < (g + 1) * parts; u++) {
                float shrunk = exponential(most[u][r] - largest);
                total += shrunk * totals[u][r];
                for (long i = 0; i < D; i++) y[i] += shrunk * sums[u][r][i];
            }
            for (long i = 0; i < D; i++) y[i] /= total;
        }
    return 0;
}

typedef struct { int (*function)(const args *); args a[30]; } call;

/* Does what was noted. Returns not 0 if a call failed. */
int replay(const call *calls, int n) {
    int failed = 0;
    for (int i = 0; i < n; i++) failed |= calls[i].function(calls[i].a);
    return failed;
}
"""
C_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.bool: 3}
ELEMENTWISE = {"copy": (0, 1), "add": (1, 2), "mul": (2, 2), "addcmul": (3, 3), "silu": (4, 1)}
                         # {name of an operation: (its number in C, how many inputs it has)}
NOTES = {}               # {name of a chapter's own operation: function(tape, y, *its arguments)}

# Operations whose result Python sees, or whose output's shape depends on values.
LOOKS = {"item", "tolist", "numpy", "__array__", "__bool__", "__int__", "__float__", "__index__",
         "__contains__", "equal", "allclose", "is_nonzero", "nonzero", "argwhere", "masked_select",
         "unique", "unique_consecutive", "bincount", "repeat_interleave", "arange", "linspace",
         "data_ptr"}


class Call(ctypes.Structure):
    _fields_ = [("function", ctypes.c_void_p), ("a", ctypes.c_int64 * 30)]      # elementwise's


def c_functions():
    """Return C_SOURCE compiled, or None without a C compiler."""
    return kernel.compiled(C_SOURCE)


def written_in_place(name, args, kwargs):
    """Return the tensor that an operation of PyTorch writes to, None if it makes a new one."""
    if "out" in kwargs:
        return kwargs["out"]
    changes = name.endswith("_") and not name.endswith("__") or name == "__setitem__"
    operator = name.startswith("__i") and name not in ("__invert__", "__index__", "__int__")
    return args[0] if changes or operator else None


class Tape(TorchFunctionMode):
    """Notes that do again what a forward did. Inside `with tape:` everything is noted.

    Conversions are noted like all else. But attention in C converts what it reads of the cache, in
    registers: in the end a conversion that nothing reads is dropped.
    """

    def __init__(self, inputs):
        """inputs: tensors that change from step to step."""
        super().__init__()
        self.notes = []              # (address of a C function, arguments), or a Python function
        self.alive = []              # every tensor of which an address is noted
        self.changing = {storage_of(tensor) for tensor in inputs}
        self.born = set()            # memory that the forward itself has asked for
        self.conversions = {}        # {id of a result: (what it was, versions, place in the notes)}
        self.reads = Counter()       # {id of a tensor: how many operations read it}

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = getattr(function, "__name__", "")
        tensors = tensors_in(args, kwargs)
        changing = [x for x in tensors if storage_of(x) in self.changing]
        if changing and (name in LOOKS or name == "where" and len(args) == 1):
            raise RuntimeError(f"it looks at values in `{name}`")
        if name == "__getitem__" and any(x.dtype == torch.bool for x in changing
                                         if x is not args[0]):
            raise RuntimeError("it picks by a mask, as many values as there happen to be")
        target = written_in_place(name, args, kwargs)
        own = target is not None and storage_of(target) in self.born
        if own and storage_of(target) not in self.changing:
            before = target.clone()      # a replay begins with what it held, not with what is left
            self.notes.append(lambda: target.copy_(before))
        result = function(*args, **kwargs)
        results = tensors_in(result)
        self.alive += results + tensors
        self.reads.update(map(id, tensors))
        if target is not None:
            self.note(lambda: function(*args, **kwargs), name, target, args, kwargs)
            self.changing.add(storage_of(target))
            return result
        memory = {storage_of(each) for each in results}
        if memory <= {storage_of(tensor) for tensor in tensors}:                # views, or nothing
            if results and any(x is not tensors[0] for x in changing):
                raise RuntimeError(f"which part it looks at depends on values, in `{name}`")
            return result
        self.born |= memory
        if name in ("to", "float"):
            self.conversions[id(result)] = (args[0], (result._version, args[0]._version),
                                            len(self.notes) if changing else None)
        if changing:
            def again():
                for old, new in zip(results, tensors_in(function(*args, **kwargs))):
                    old.copy_(new)
            self.note(again, name, results[0] if len(results) == 1 else None, args, kwargs)
            self.changing |= memory
        return result

    def note(self, again, name, y, args, kwargs):
        """Note an operation that sets y: in C if there is a function for it, else as `again`."""
        write = NOTES.get(name) or getattr(Tape, f"note_{name}", None)
        if name in ELEMENTWISE and kwargs in ({}, {"inplace": False}):
            write = functools.partial(Tape.elementwise, kind=name)
        noted = False
        if write is not None and y is not None:
            # Suppressed is what arguments and types raise that a function of ours does not know.
            with torch._C.DisableTorchFunction(), contextlib.suppress(
                    AttributeError, KeyError, TypeError):
                noted = write(self, y, *args, **kwargs)
        if not noted:
            self.notes.append(again)

    def call(self, function, *arguments):
        """Note a call of a C function. Tensors stand for their addresses, floats for their bits."""
        values = []
        for argument in arguments:
            if isinstance(argument, torch.Tensor):
                self.alive.append(argument)
                argument = argument.data_ptr()
            elif isinstance(argument, float):
                argument, = struct.unpack("<I", struct.pack("<f", argument))
            values.append(argument)
        self.notes.append((ctypes.cast(function, ctypes.c_void_p).value, tuple(values)))
        return True

    def before(self, x):
        """Return what a converted tensor x was before; x itself if one was written to since."""
        source, versions, _ = self.conversions.get(id(x), (x, None, None))
        return source if versions == (x._version, source._version) else x

    # The operations that have C functions. Each returns whether it takes these arguments.

    def elementwise(self, y, *inputs, kind, **_):
        number, count = ELEMENTWISE[kind]
        inputs = [x if isinstance(x, torch.Tensor) else torch.tensor(float(x)) for x in inputs]
        if len(inputs) != count or y.ndim > 4:
            return False
        shape = (1,) * (4 - y.ndim) + y.shape
        arguments = [number, count, *shape]
        for x in (y, *inputs):
            *strides, last = x.expand(shape).stride()
            last = int(x is y) if shape[-1] == 1 else last
            if last not in (0, 1):
                return False
            arguments += [x, C_TYPES[x.dtype], *strides, last]
        return self.call(c_functions().elementwise, *arguments)

    def note_to(self, y, x, *args, **kwargs):
        return self.elementwise(y, x, kind="copy")

    def note_reshape(self, y, x, *shape):
        return y.is_contiguous() and self.note_to(y.view(x.shape), x)

    note_float = note_to
    note_contiguous = note_clone = note_flatten = note_reshape

    def note_roll(self, y, x, shifts, dims):
        first = shifts % x.shape[dims]
        rest = x.shape[dims] - first
        return (self.note_to(y.narrow(dims, 0, first), x.narrow(dims, rest, first))
                and self.note_to(y.narrow(dims, first, rest), x.narrow(dims, 0, rest)))

    def note_rms_norm(self, y, x, normalized_shape, weight, eps):
        size = x.shape[-1]
        if (not x.dtype == y.dtype == weight.dtype == torch.float32
                or tuple(normalized_shape) != (size,)
                or not (x.is_contiguous() and weight.is_contiguous())):
            return False
        return self.call(c_functions().rms_norm, x, y, weight, x.numel() // size, size, float(eps))

    def note_index_copy_(self, y, keys, dim, slots, k):
        if dim != 2 or keys.ndim != 4 or len(k) != 1 or not keys.stride(-1) == k.stride(-1) == 1:
            return False
        keys, k = keys[0], k[0]                                      # (G, length, D), (G, T, D)
        size = keys.element_size()
        return self.call(c_functions().index_copy, keys, k, slots, size * k.shape[2], *k.shape[:2],
                         *[size * stride for x in (keys, k) for stride in x.stride()[:2]])

    def note_scaled_dot_product_attention(self, y, q, k, v, attn_mask, scale=None):
        tensors = q, self.before(k), self.before(v)
        if (attn_mask.dtype != torch.bool or attn_mask.ndim != 2 or not y.is_contiguous()
                or q.ndim != 4 or q.shape[:2] != (1, k.shape[1]) or q.shape[-1] != v.shape[-1]
                or not q.dtype == y.dtype == torch.float32 or tensors[1].dtype != tensors[2].dtype
                or any(x.stride(-1) != 1 for x in (*tensors, attn_mask))):
            return False
        G, R, D = q.shape[1:]
        self.call(c_functions().attend, *tensors, attn_mask, y, C_TYPES[tensors[1].dtype], G, R,
                  k.shape[2], D, float(D ** -0.5 if scale is None else scale),
                  *[x.stride(1) for x in tensors], *[x.stride(2) for x in tensors],
                  attn_mask.stride(0) if len(attn_mask) > 1 else 0, kernel.THREADS)
        self.reads.subtract(map(id, (k, v)))
        return True

    def product(self, c_call, x, weight_t, threshold):
        """Do and note a product in C: while it is recorded this stands in kernel.run_c's place."""
        if x.dtype != torch.float32:
            return self.product(c_call, x.float(), weight_t, threshold).to(x.dtype)
        with torch._C.DisableTorchFunction():
            y = x.new_empty(*x.shape[:-1], weight_t.shape[1])
            function, arguments = c_call(x, weight_t, threshold, y)
            if function(*arguments):
                raise MemoryError("no memory for the list of kept channels")
            self.alive += [x, threshold, y]
            self.reads.update(map(id, (x, threshold)))
            self.changing.add(storage_of(y))
            address = ctypes.cast(function, ctypes.c_void_p).value
            self.call(c_functions().product, address, *arguments)
        return y

    def finish(self, result):
        """Make the notes what `replay` wants: Python functions, and runs of C calls as arrays."""
        self.reads[id(result)] += 1
        dropped = {place for key, (*_, place) in self.conversions.items() if not self.reads[key]}
        notes = [note for place, note in enumerate(self.notes) if place not in dropped]
        self.notes = []
        for in_python, run in itertools.groupby(notes, callable):
            run = list(run)
            self.notes += run if in_python else [(Call * len(run))(*run)]

    @torch.no_grad()
    def replay(self):
        """Do again all that was noted."""
        for run in self.notes:
            if callable(run):
                run()
            elif c_functions().replay(run, len(run)):
                raise MemoryError("no memory for the list of kept channels")


def storage_of(tensor):
    """Return the address of the memory that a tensor is, or is a view of."""
    return tensor.untyped_storage().data_ptr()


def tensors_in(*values):
    """Return the tensors in nested tuples, lists and dictionaries."""
    return [x for x in tree_leaves(values) if isinstance(x, torch.Tensor)]


class RecordedStep:
    """A step on a CPU, recorded for each number of tokens, dense and sparse, and replayed.

    Thresholds and weights are read where they lie: what is changed in place counts. A step of more
    tokens than the kernels take, or one that cannot be recorded, is the model's own.
    """

    def __init__(self, model, cache, tokens=1):
        self.model = model
        self.cache = cache
        self.tapes = {}
        self.reason = None               # why steps of this model cannot be recorded
        for module in model.modules():
            hooks = [*module._forward_pre_hooks.values(), *module._forward_hooks.values()]
            if any(hook is not note_tokens for hook in hooks):
                self.step_aside("others look on through hooks, which a tape would not call")
        for T in sorted({1, tokens}):
            if cache.used + T <= cache.length:
                self.tape(torch.zeros(1, T, dtype=torch.int64))

    def step_aside(self, reason):
        """Let the model run itself from now on, and say once why."""
        self.reason = str(reason).partition("\n")[0] or type(reason).__name__
        kernel.say_once(f"record.py steps aside, the model runs itself: {self.reason}")

    @torch.no_grad()
    def __call__(self, tokens):
        """tokens (1, T) int64 -> logits (1, T, vocab), valid until the next call."""
        T = tokens.shape[1]
        tape = self.tape(tokens)
        if tape is None:
            return self.model(tokens, self.cache)
        tape.place.copy_(tokens)
        tape.static.follow(self.cache, T, self.model.config.sliding_window)
        try:
            tape.replay()
        except (IndexError, RuntimeError) as error:        # as of shapes that depend on values
            logits = self.model(tokens, self.cache)        # refuses a token that is none
            self.step_aside(error)
            return logits
        self.cache.advance(T)
        return tape.logits

    def tape(self, tokens):
        """Return the tape for so many tokens in the mode in force; None if there can be none."""
        state = getattr(self.model, "sparse_state", None)
        if (self.reason or tokens.shape[1] > kernel.MAX_ROWS
                or state is not None and state.dense_prefix):
            return None
        if any(tape.state is not state for tape in self.tapes.values()):
            self.tapes = {}              # the model was made sparse anew
        key = tokens.shape[1], state and state.mode
        if key not in self.tapes:
            try:
                self.tapes[key] = self.record(tokens, state)
            except Exception as error:   # an operation of the model that a tape cannot take
                self.step_aside(error)
        return self.tapes.get(key)

    @torch.no_grad()
    def record(self, tokens, state):
        """Return the Tape of one run of the model, which writes where the step will."""
        place = tokens.clone()
        static = StaticCache(self.cache, tokens.shape[1])
        static.follow(self.cache, tokens.shape[1], self.model.config.sliding_window)
        tape = Tape(tensors_in(place, vars(static), getattr(state, "thresholds", None),
                               *self.model.parameters(), *self.model.buffers()))
        with mock.patch.object(kernel, "run_c", tape.product), tape:
            logits = self.model(place, static)
        tape.finish(logits)
        tape.place, tape.static, tape.logits, tape.state = place, static, logits, state
        return tape


def make_step(model, cache, tokens=1):
    """Return the fastest step there is: a CUDA graph on a GPU, a tape on a CPU."""
    recorded = kernel.fits_c(cache.keys) and cache.keys.shape[1] == 1           # of one text
    return (RecordedStep if recorded else fast_step)(model, cache, tokens)
