"""A step of decoding, recorded once and replayed.

A step runs a token, or a few, through the model, over and over the same operations on the same memory. The weights' products
are what takes the time; but between them lie hundreds of small operations, and what starts each of them, Python and
PyTorch, costs more than what it does. On a GPU the host cannot launch them as fast as they run. On a CPU the weights
that stream through the caches push the code of all else out: at Llama-3.2-1B's shapes a fifth of a step was lost there.

So a step is recorded, and then replayed without Python or PyTorch between its operations:

    on a GPU    a CUDA graph: what the model launches is taken down, and launched again as one
    on a CPU    a Tape: a list of C functions and the addresses they work on, called one after the other

    embedding ─► x ─► norm ─► q k v ─► attend ─► o ─► norm ─► gate up ─► swiglu ─► down ─► norm ─► ... ─► head ─► logits
                      └─────────────────── a block, 8 calls ────────────────────────────┘

The products are kernel.py's; the other four functions, written here in C, say once more what model.py says in PyTorch, but
keep float32 between the products whatever the model's dtype. Who changes the model changes it in both; a tape that does not
compute what the model does is found out when it is first used, and goes unused.
"""
import ctypes
import functools
import warnings
import weakref
from dataclasses import replace

import torch
from torch import nn

import kernel
from cc import compiled
from model import Llama, check_fit, check_tokens, in_window, rope_tables
from sparsify import SparseLinear, is_sparse, sparse_mode

C_SOURCE = r"""
#include <math.h>
#include <stdint.h>
#include <string.h>

static inline float number(uint32_t bits) { float value; memcpy(&value, &bits, 4); return value; }
static inline uint32_t bits_of(float value) { uint32_t bits; memcpy(&bits, &value, 4); return bits; }

// e^x in operations that make vectors: 2^n · e^f with |f| ≤ ln(2) / 2, and e^f by its series; 0 below -87.
static inline float exponential(float x) {
    float small = x < -87.0f ? -87.0f : x > 88.0f ? 88.0f : x, n = rintf(1.44269504f * small);
    float f = small - 0.693145752f * n - 1.42860677e-6f * n;
    float power = 1 + f * (1 + f * (1 / 2.0f + f * (1 / 6.0f + f * (1 / 24.0f + f * (1 / 120.0f + f * (1 / 720.0f))))));
    power *= number((uint32_t)((int32_t)n + 127) << 23);
    return x < -87.0f ? 0 : power;
}

// x += y, unless y is null; normed = x / sqrt(mean(x²) + eps) * weight. x, y, normed: (rows, size)
void norm(float *restrict x, const float *restrict y, const float *restrict weight, float eps, long rows, long size,
          float *restrict normed) {
    for (long t = 0; t < rows; t++, x += size, normed += size) {
        for (long i = 0; y && i < size; i++) x[i] += y[t * size + i];
        float sum = 0;
        #pragma omp simd reduction(+:sum)
        for (long i = 0; i < size; i++) sum += x[i] * x[i];
        float factor = 1 / sqrtf(sum / size + eps);
        for (long i = 0; i < size; i++) normed[i] = weight[i] * (x[i] * factor);
    }
}

// y (rows, size) += bias (size)
void add_bias(float *restrict y, const float *restrict bias, long rows, long size) {
    for (long t = 0; t < rows; t++)
        for (long i = 0; i < size; i++) y[t * size + i] += bias[i];
}

// both (rows, 2, size): gate and up; gated (rows, size) = silu(gate) * up
void swiglu(const float *restrict both, long rows, long size, float *restrict gated) {
    for (long t = 0; t < rows; t++, both += 2 * size, gated += size)
        for (long i = 0; i < size; i++) gated[i] = both[i] / (1 + exponential(-both[i])) * both[size + i];
}

// What the cache holds: a float in 16 bits and back, rounded to nearest, ties to even.
#define AS_IT_IS(value)  (value)
#define BF16_READ(u)     number((uint32_t)(u) << 16)
#define F16_READ(u)      (((u) & 0x7c00) == 0x7c00 ? number(((u) & 0x8000u) << 16 | 0x7f800000u | ((u) & 0x3ffu) << 13) :      \
                          0x1p112f * number(((u) & 0x8000u) << 16 | ((u) & 0x7fffu) << 13))
static inline uint16_t bf16(float value) {
    uint32_t bits = bits_of(value);
    return value != value ? 0x7fc0 : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}
static inline uint16_t f16(float value) {
    uint32_t bits = bits_of(0x1p-112f * value), sign = bits >> 16 & 0x8000;
    if (!(fabsf(value) < 65520.0f)) return sign | (value == value ? 0x7c00 : 0x7e00);
    return sign | ((bits & 0x7fffffff) + 0xfff + (bits >> 13 & 1)) >> 13;
}

// Σ a[i] b[i], in 16 sums side by side, put together pair by pair: a single sum would wait for each addition.
static inline float dot(const float *a, const float *b, long size) {
    float sums[16] = {0};
    long i = 0;
    for (; i + 16 <= size; i += 16)
        for (int k = 0; k < 16; k++) sums[k] += a[i + k] * b[i + k];
    for (int k = 0; i < size; i++, k++) sums[k] += a[i] * b[i];
    for (int k = 0; k < 8; k++) sums[k] += sums[k + 8];
    for (int k = 0; k < 4; k++) sums[k] += sums[k + 4];
    return sums[0] + sums[2] + (sums[1] + sums[3]);
}

/* Attention of `tokens` new tokens, heads H, key-value heads G, channels D a head. Rotates their q and k, stores k and v in the
   cache behind the *used positions, and looks back, tile by tile of positions: what was summed so far shrinks when a
   larger score turns up (FlashAttention, arXiv 2205.14135). All queries of a key-value head share a tile.
   qkv (tokens, H + G + G, D); cos, sin (length, D): RoPE by position; positions (tokens): where each stands, first (tokens): the
   first position it sees, sees (tokens, tokens): which of the new ones; keys, values (G, length, D): the layer's cache;
   y (tokens, H, D) */
#define TILE 32
#define DEFINE(NAME, TYPE, READ, WRITE)                                                                           \
static void NAME##_tile(const TYPE *from, long n, long D, float *restrict tile) {                                 \
    for (long i = 0; i < n * D; i++) tile[i] = READ(from[i]);                                                     \
    for (long i = n * D; i < TILE * D; i++) tile[i] = 0;                                                          \
}                                                                                                                 \
                                                                                                                  \
void NAME(float *restrict qkv, const float *cos, const float *sin, const int64_t *used, const int64_t *positions, \
          const int64_t *first, const uint8_t *sees, TYPE *restrict keys, TYPE *restrict values,                  \
          float *restrict y, long tokens, long H, long G, long D, long length, int threads) {                     \
    long end = *used + tokens, width = (H + 2 * G) * D, shared = H / G, begin = first[0];                         \
    float scale = 1 / sqrtf(D);                                                                                   \
    for (long t = 0; t < tokens; t++) {                                                                           \
        float *at = qkv + t * width;                                                                              \
        const float *c = cos + positions[t] * D, *s = sin + positions[t] * D;                                     \
        for (long h = 0; h < H + G; h++)                                                                          \
            for (long i = 0; i < D / 2; i++) {                                                                    \
                float a = at[h * D + i], b = at[h * D + i + D / 2];                                               \
                at[h * D + i] = a * c[i] + b * s[i];                                                              \
                at[h * D + i + D / 2] = b * c[i + D / 2] + a * s[i + D / 2];                                      \
            }                                                                                                     \
        for (long g = 0; g < G; g++)                                                                              \
            for (long i = 0, to = (g * length + *used + t) * D; i < D; i++) {                                     \
                keys[to + i] = WRITE(at[(H + g) * D + i]);                                                        \
                values[to + i] = WRITE(at[(H + G + g) * D + i]);                                                  \
            }                                                                                                     \
        begin = first[t] < begin ? first[t] : begin;                                                              \
    }                                                                                                             \
    memset(y, 0, tokens * H * D * sizeof(float));                                                                 \
    threads = tokens * H * end * D > 1 << 16 ? threads : 1;        /* waking another one takes as long as that */ \
    PRAGMA(omp parallel for num_threads(threads) schedule(static))                                                \
    for (long g = 0; g < G; g++) {                                                                                \
        float tile[TILE * D], score[tokens * shared][TILE], most[tokens * shared], total[tokens * shared];        \
        for (long r = 0; r < tokens * shared; r++) { most[r] = -1e30f; total[r] = 0; }                            \
        for (long start = begin; start < end; start += TILE) {                                                    \
            long n = end - start < TILE ? end - start : TILE;                                                     \
            NAME##_tile(keys + (g * length + start) * D, n, D, tile);                                             \
            for (long r = 0; r < tokens * shared; r++) {                                                          \
                long t = r / shared, h = g * shared + r % shared;                                                 \
                const float *q = qkv + t * width + h * D;                                                         \
                float *to = y + (t * H + h) * D, before = most[r], sum = 0;                                       \
                for (long p = 0; p < TILE; p++) score[r][p] = scale * dot(q, tile + p * D, D);                    \
                for (long p = 0, at = start; p < TILE && (start < first[t] || start + n > *used); p++, at++)      \
                    if (p >= n || at < first[t] || (at >= *used && !sees[t * tokens + at - *used])) score[r][p] = -INFINITY; \
                for (long p = 0; p < TILE; p++) most[r] = score[r][p] > most[r] ? score[r][p] : most[r];          \
                for (long p = 0; p < TILE; p++) score[r][p] = exponential(score[r][p] - most[r]);                 \
                for (long p = 0; p < TILE; p++) sum += score[r][p];                                               \
                float shrunk = exponential(before - most[r]);                                                     \
                total[r] = shrunk * total[r] + sum;                                                               \
                if (shrunk != 1) for (long i = 0; i < D; i++) to[i] *= shrunk;                                    \
            }                                                                                                     \
            NAME##_tile(values + (g * length + start) * D, n, D, tile);                                           \
            for (long r = 0; r < tokens * shared; r++) {                                                          \
                float *restrict to = y + (r / shared * H + g * shared + r % shared) * D;                          \
                for (long p = 0; p < TILE; p += 4) {                                                              \
                    const float *v = tile + p * D, *w = score[r] + p;                                             \
                    for (long i = 0; i < D; i++) to[i] += w[0] * v[i] + w[1] * v[i + D] + w[2] * v[i + 2 * D] + w[3] * v[i + 3 * D]; \
                }                                                                                                 \
            }                                                                                                     \
        }                                                                                                         \
        for (long r = 0; r < tokens * shared; r++)                                                                \
            for (long i = 0; i < D; i++) y[(r / shared * H + g * shared + r % shared) * D + i] /= total[r];       \
    }                                                                                                             \
}
#define PRAGMA(text) _Pragma(#text)

DEFINE(attend_f32, float, AS_IT_IS, AS_IT_IS)
DEFINE(attend_bf16, uint16_t, BF16_READ, bf16)
DEFINE(attend_f16, uint16_t, F16_READ, f16)
"""
ATTEND = {torch.float32: "attend_f32", torch.bfloat16: "attend_bf16", torch.float16: "attend_f16"}


@functools.cache
def c_library():
    """C_SOURCE compiled, its functions declared, or None where no C compiler builds it."""
    library = compiled(C_SOURCE)
    if library is not None:
        pointer, long, integer, number = ctypes.c_void_p, ctypes.c_long, ctypes.c_int, ctypes.c_float
        library.norm.argtypes = [pointer, pointer, pointer, number, long, long, pointer]
        library.add_bias.argtypes = [pointer, pointer, long, long]
        library.swiglu.argtypes = [pointer, long, long, pointer]
        for name in ATTEND.values():
            getattr(library, name).argtypes = [*[pointer] * 10, *[long] * 5, integer]
        for name in ("norm", "add_bias", "swiglu", *ATTEND.values()):
            getattr(library, name).restype = None
    return library


class Tape:
    """A step of up to MAX_ROWS tokens on a CPU: C functions with their arguments, in the order in which they are called.

    What changes from step to step, which tokens, how many of them and where they stand, lies in memory that is written before
    each replay; thresholds are read where they lie, so that changed ones count. sparse: whether small inputs are dropped.
    """

    def __init__(self, model, cache, sparse):
        self.model, self.cache, self.sparse, self.calls, self.held = model, cache, sparse, [], []
        self.rows, self.used = ctypes.c_long(), (ctypes.c_int64 * 1)()
        self.positions, self.first = (ctypes.c_int64 * kernel.MAX_ROWS)(), (ctypes.c_int64 * kernel.MAX_ROWS)()
        self.sees = (ctypes.c_uint8 * kernel.MAX_ROWS ** 2)()
        self.keep_all, self.counts = torch.tensor(-1.0), torch.zeros(3, 2, dtype=torch.int64)       # for dense products
        library, config, blocks, threads = c_library(), model.config, model.model.layers, torch.get_num_threads()
        attend = getattr(library, ATTEND[cache.keys.dtype])
        H, G, D, hidden = config.num_attention_heads, config.num_key_value_heads, config.head_dim, config.hidden_size
        self.x, normed, y, qkv, heads, both, gated = (torch.zeros(kernel.MAX_ROWS, width) for width in (
            hidden, hidden, hidden, (H + G + G) * D, H * D, 2 * config.intermediate_size, config.intermediate_size))
        cos, sin = rope_tables(torch.arange(cache.length), config, torch.float32)           # (length, D)
        for layer, block in enumerate(blocks):
            attention, mlp = block.self_attn, block.mlp
            self.norm(y if layer else None, block.input_layernorm, normed)
            self.product(normed, [attention.q_proj, attention.k_proj, attention.v_proj], qkv)
            self.call(attend, qkv, cos, sin, self.used, self.positions, self.first, self.sees, cache.keys[layer], cache.values[layer],
                      heads, self.rows, H, G, D, cache.length, threads)
            self.product(heads, [attention.o_proj], y)
            self.norm(y, block.post_attention_layernorm, normed)
            self.product(normed, [mlp.gate_proj, mlp.up_proj], both)
            self.call(library.swiglu, both, self.rows, config.intermediate_size, gated)
            self.product(gated, [mlp.down_proj], y)
        self.norm(y, model.model.norm, normed)
        self.normed, self.logits = normed, None
        if isinstance(model.lm_head, SparseLinear):
            self.logits = torch.zeros(kernel.MAX_ROWS, config.vocab_size)
            self.product(normed, [model.lm_head], self.logits)

    def call(self, function, *arguments):
        self.held.append(arguments)                        # their memory must not go before the tape does
        self.calls.append((function, [a.data_ptr() if isinstance(a, torch.Tensor) else a for a in arguments]))

    def norm(self, y, module, normed):
        """x += y, and normed = norm(x)"""
        self.call(c_library().norm, self.x, y, module.weight.float(), module.eps, self.rows, self.x.shape[1], normed)

    def product(self, x, linears, y):
        """y = the linears of one input x, side by side."""
        weights = [linear.weight_t for linear in linears]
        dropping = self.sparse and linears[0].state is not None
        thresholds = [linear.threshold if dropping else self.keep_all for linear in linears]
        counts = linears[0].counts if dropping else self.counts                             # those of a group lie side by side
        self.held.append((weights, thresholds, counts))
        self.calls.append(kernel.c_call(x, self.rows, weights, thresholds, counts, y))
        if linears[0].bias is not None:
            self.call(c_library().add_bias, y, torch.cat([linear.bias for linear in linears]).float(), self.rows, y.shape[1])

    def __call__(self, tokens, depths=None, sees=None):
        """As Steps."""
        model, cache, T = self.model, self.cache, tokens.shape[1]
        check_fit(tokens, cache)                           # C would write on behind the end
        check_tokens(tokens, model.config)
        positions = [cache.used + depth for depth in (range(T) if depths is None else depths.tolist())]
        first = [max(0, position + 1 - (model.config.sliding_window or position + 1)) for position in positions]
        sees = [[j <= i for j in range(T)] for i in range(T)] if sees is None else sees.tolist()
        self.rows.value, self.used[0], self.positions[:T], self.first[:T] = T, cache.used, positions, first
        self.sees[:T * T] = [sees[i][j] and positions[j] >= first[i] for i in range(T) for j in range(T)]
        self.x[:T] = model.model.embed_tokens(tokens)[0]
        for function, arguments in self.calls:
            if function(*arguments):
                raise MemoryError("no memory for the list of kept channels")
        cache.used += T
        if self.logits is None:
            return model.lm_head(self.normed[None, :T].to(cache.keys.dtype)).float()
        return self.logits[None, :T]


def can_be_taped(model, cache):
    """Whether a step of this model can be a Tape: on a CPU with a C compiler, all linears of the blocks SparseLinear, one text."""
    if not kernel.fits_c(cache.keys) or cache.keys.shape[1] > 1 or None in (kernel.c_library(), c_library()):
        return False
    linears = [linear for block in model.model.layers for linear in block.modules() if isinstance(linear, (nn.Linear, SparseLinear))]
    if not all(isinstance(linear, SparseLinear) and linear.state is linears[0].state for linear in linears):
        return False
    if any(module._forward_hooks or module._forward_pre_hooks for module in model.modules()):
        return False                                       # somebody looks on: parallel.py, or a reader
    return agrees(model)


compared = weakref.WeakKeyDictionary()                     # Llama -> whether its tape does what it does


@torch.no_grad()
def agrees(model):
    """Whether a tape computes what model.py does; tried once for each model, on its first block and head, dense."""
    if model not in compared:
        short = Llama.shapes(replace(model.config, num_hidden_layers=1))
        short.model.embed_tokens, short.model.norm, short.lm_head = model.model.embed_tokens, model.model.norm, model.lm_head
        short.model.layers[0] = model.model.layers[0]
        tokens = torch.arange(3)[None] % model.config.vocab_size
        with sparse_mode(model, "off"):
            expected = short(tokens, short.make_cache(1, 3))
        tape = Tape(short, short.make_cache(1, 3), sparse=False)
        found = torch.cat((tape(tokens[:, :1]).clone(), tape(tokens[:, 1:])), 1)
        allowed = max(8 * torch.finfo(tape.cache.keys.dtype).eps, 1e-4) * expected.nan_to_num().abs().max().item()
        compared[model] = torch.allclose(found, expected, rtol=0, atol=allowed, equal_nan=True)
        if not compared[model]:
            warnings.warn(f"step.py does not compute what model.py does: logits differ by {(found - expected).abs().max():.2g}, where "
                          f"rounding explains {allowed:.2g}. Decoding goes without it, slower.", stacklevel=2)
    return compared[model]


class Steps:
    """`model(tokens, cache)` for a few tokens at a time, recorded and replayed where that can be.

    Recordings: on a CPU one dense and one sparse Tape, on a GPU a CUDA graph for each number of tokens. Each is made when it is
    first needed, in the sparse_mode that is then in force; thresholds are read where they lie, so that changed ones count.
    """

    def __init__(self, model, cache):
        self.model, self.cache, self.recorded, self.tapes = model, cache, {}, can_be_taped(model, cache)

    def __call__(self, tokens, depths=None, sees=None):
        """tokens (1, T) int64 -> logits (1, T, vocab), valid until the next call; the cache is T positions longer.

        For a tree of tokens: depths (T,) says how far behind the used positions each stands, sees (T, T) bool
        which of the others each sees.
        """
        model, cache = self.model, self.cache
        if model.device.type == "cuda":
            return self.replay_graph(tokens, depths, sees)
        tape = self.tape(tokens)
        if tape is not None:
            return tape(tokens, depths, sees)
        if depths is None:
            return model(tokens, cache)
        window, positions = model.config.sliding_window, cache.used + depths
        past, sees = in_window(torch.arange(cache.used), positions, window), sees & in_window(positions, positions, window)
        return model(tokens, cache, positions, torch.cat((past, sees), 1))

    def tape(self, tokens):
        """The tape for such tokens, None where there can be none."""
        state = getattr(self.model, "sparse_state", None)
        if not self.tapes or tokens.shape[1] > kernel.MAX_ROWS or state is not None and state.where == "all" and state.dense_prefix:
            return None
        sparse = is_sparse(state, tokens)
        if sparse not in self.recorded:
            self.recorded[sparse] = Tape(self.model, self.cache, sparse)
        return self.recorded[sparse]

    def replay_graph(self, tokens, depths, sees):
        """A step on a GPU. A graph launches always the same kernels on the same memory. So the tokens, where they stand and what
        they see are tensors that are overwritten before each replay, and attention looks at the whole cache through a mask."""
        model, cache, T = self.model, self.cache, tokens.shape[1]
        order = torch.arange(T, device=model.device)
        slots = cache.used + order
        positions = slots if depths is None else cache.used + depths
        all_slots = torch.arange(cache.length, device=model.device)
        mask = (all_slots < cache.used) & in_window(all_slots, positions, model.config.sliding_window)      # (T, length)
        sees = order <= order[:, None] if sees is None else sees
        mask[:, cache.used:cache.used + T] = sees & in_window(positions, positions, model.config.sliding_window)
        inputs = tokens, positions, mask, slots
        if T not in self.recorded:
            self.recorded[T] = self.capture([tensor.clone() for tensor in inputs])
        graph, places, logits = self.recorded[T]
        for place, tensor in zip(places, inputs):
            place.copy_(tensor)
        graph.replay()
        cache.used += T
        return logits

    def capture(self, places):
        """(graph, its inputs, its logits). The trial runs write where the first replay will, and count for nothing."""
        def run():
            tokens, positions, mask, slots = places
            return self.model(tokens, self.cache, positions, mask, slots)

        state = getattr(self.model, "sparse_state", None)
        counts = None if state is None else state.counts.clone()
        aside = torch.cuda.Stream()                        # libraries set themselves up before the capture, not in it
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            run(), run()
        torch.cuda.current_stream().wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            logits = run()
        if state is not None:
            state.counts.copy_(counts)
        return graph, places, logits
