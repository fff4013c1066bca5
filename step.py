"""A step of decoding, recorded once and replayed.

A step runs a token, or a few, through the model: the same operations on the same memory, again and again. The products with
the weights take the time; but between them lie hundreds of small operations, and what starts each of them, Python and
PyTorch, takes longer than what it does. A GPU waits there for its host. On a CPU the weights that stream through the caches
evict the code of everything else, which is then fetched anew: at Llama-3.2-1B's shapes that was a fifth of a step.

So a step is recorded, and replayed without Python or PyTorch between its operations:

    on a GPU    a CUDA graph: what the model launches is taken down, and launched again as one
    on a CPU    a Tape: a list of C functions and the addresses they work on, called one after the other

    embedding ─► x ─► norm ─► q k v ─► rotate, store ─► attend ─► o ─► norm ─► gate up ─► swiglu ─► down ─► ... ─► norm ─► head
                      └──────────────────────────── a block, 9 calls ─────────────────────────────────┘

The products are kernel.py's. The others are written here, in C: they say once more what model.py says in PyTorch, but keep
float32 between the products whatever the model's dtype. Whoever changes the model changes it there; a tape that does not
compute the same is found out when it is first used, and the model itself runs instead.

    python step.py --model random:llama-3.2-1b         how long a step takes, recorded and not
"""
import contextlib
import ctypes
import functools
import threading
import warnings
import weakref

import torch
from torch import nn

import kernel
from cc import compiled
from model import check_fit, check_tokens, in_window, rope_tables
from sparsify import SparseLinear, is_sparse, sparse_mode

C_SOURCE = r"""
#include <float.h>
#include <math.h>
#include <stdint.h>
#include <string.h>

static inline float number(uint32_t bits) { float value; memcpy(&value, &bits, 4); return value; }
static inline uint32_t bits_of(float value) { uint32_t bits; memcpy(&bits, &value, 4); return bits; }

// e^x in operations that make vectors: 2^n · e^f with |f| ≤ ln(2) / 2, and e^f by its series. Below -87 it is 0, above 88 infinite.
static inline float exponential(float x) {
    float inside = x > -87.0f ? x < 88.0f ? x : 88.0f : -87.0f, n = rintf(1.44269504f * inside);
    float f = inside - 0.693145752f * n - 1.42860677e-6f * n;        // n ln(2), in two parts that lose nothing
    float power = 1 + f * (1 + f * (1 / 2.0f + f * (1 / 6.0f + f * (1 / 24.0f + f * (1 / 120.0f + f * (1 / 720.0f))))));
    power *= number((uint32_t)((int32_t)n + 127) << 23);
    return x != x ? x : x < -87.0f ? 0 : x > 88.0f ? INFINITY : power;
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

// The cache has the model's dtype. A float becomes one of 16 bits by rounding to nearest, ties to even.
enum { FLOAT32, BFLOAT16, FLOAT16 };

static uint16_t bfloat16_of(float value) {
    uint32_t bits = bits_of(value);
    return value != value ? 0x7fc0 : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

static uint16_t float16_of(float value) {
    uint32_t sign = bits_of(value) >> 16 & 0x8000, bits = bits_of(0x1p-112f * fabsf(value));    // its exponent as float16 has it
    if (!(fabsf(value) < 65520.0f)) return sign | (value == value ? 0x7c00 : 0x7e00);           // infinity, NaN
    if (fabsf(value) < 0x1p-14f) return sign | (bits_of(fabsf(value) + 0.5f) - bits_of(0.5f));  // counts steps of 2^-24
    return sign | (bits + 0xfff + (bits >> 13 & 1)) >> 13;
}

static inline float of_float16(uint32_t half) {
    uint32_t sign = (half & 0x8000) << 16, rest = (half & 0x7fff) << 13;
    return (half & 0x7c00) == 0x7c00 ? number(sign | 0x7f800000 | rest) : 0x1p112f * number(sign | rest);
}

// to[at], to[at + 1], ... = from, `count` floats
static void store(void *to, int dtype, long at, const float *restrict from, long count) {
    if (dtype == FLOAT32) memcpy((float *)to + at, from, count * sizeof(float));
    else for (long i = 0; i < count; i++) ((uint16_t *)to)[at + i] = dtype == BFLOAT16 ? bfloat16_of(from[i]) : float16_of(from[i]);
}

// `count` floats from[at], from[at + 1], ..., and zeros up to `room`
static void load(const void *from, int dtype, long at, long count, float *restrict to, long room) {
    const uint16_t *half = (const uint16_t *)from + at;
    if (dtype == FLOAT32) memcpy(to, (const float *)from + at, count * sizeof(float));
    else if (dtype == BFLOAT16) for (long i = 0; i < count; i++) to[i] = number((uint32_t)half[i] << 16);
    else for (long i = 0; i < count; i++) to[i] = of_float16(half[i]);
    for (long i = count; i < room; i++) to[i] = 0;
}

/* Rotates q and k of the new tokens by their positions (RoPE), and stores k and v in the cache, behind the *used slots.
   H heads, G key-value heads, D channels a head; qkv (tokens, H + G + G, D); cos, sin (length, D), by position;
   keys, values (G, length, D): the layer's cache, of `dtype` */
void rotate_and_store(float *restrict qkv, const float *cos, const float *sin, const int64_t *positions, const int64_t *used,
                      void *keys, void *values, int dtype, long tokens, long H, long G, long D, long length) {
    for (long t = 0; t < tokens; t++, qkv += (H + 2 * G) * D) {
        const float *c = cos + positions[t] * D, *s = sin + positions[t] * D;
        for (float *head = qkv; head < qkv + (H + G) * D; head += D)
            for (long i = 0, j = D / 2; j < D; i++, j++) {
                float a = head[i], b = head[j];
                head[i] = a * c[i] + b * s[i];
                head[j] = b * c[j] + a * s[j];
            }
        for (long g = 0; g < G; g++) {
            long slot = (g * length + *used + t) * D;
            store(keys, dtype, slot, qkv + (H + g) * D, D);
            store(values, dtype, slot, qkv + (H + G + g) * D, D);
        }
    }
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

/* y (tokens, H, D) = softmax(q kᵀ / √D) v for the new tokens, over the *used slots of the cache and their own behind them.
   first (tokens): the first slot that each sees; sees (tokens, tokens): which of the new ones it sees; the rest as above.

   The slots are taken in tiles, each shared by all queries of a key-value head. A query keeps the largest of its scores so
   far; e^(score - largest) and their sum are of that largest one, and shrink when a larger turns up (FlashAttention,
   arXiv 2205.14135). What is not seen scores -infinity, and `largest` starts above that, so that their difference is no NaN. */
#define TILE 32
void attend(const float *qkv, const void *keys, const void *values, int dtype, const int64_t *used, const int64_t *first,
            const uint8_t *sees, float *restrict y, long tokens, long H, long G, long D, long length, int threads) {
    long end = *used + tokens, queries = tokens * (H / G), earliest = first[0];
    float scale = 1 / sqrtf(D);
    for (long t = 0; t < tokens; t++) earliest = first[t] < earliest ? first[t] : earliest;
    memset(y, 0, tokens * H * D * sizeof(float));
    threads = tokens * H * end * D > 1 << 16 ? threads : 1;          // to wake another one takes as long as that
    #pragma omp parallel for num_threads(threads) schedule(static)
    for (long g = 0; g < G; g++) {
        float tile[TILE * D], score[queries][TILE], largest[queries], total[queries], *to[queries];
        const float *q[queries];
        for (long r = 0; r < queries; r++) {                         // the queries of one token, then those of the next
            long t = r / (H / G), h = g * (H / G) + r % (H / G);
            q[r] = qkv + (t * (H + 2 * G) + h) * D;
            to[r] = y + (t * H + h) * D;
            largest[r] = -FLT_MAX;
            total[r] = 0;
        }
        for (long start = earliest; start < end; start += TILE) {
            long count = end - start < TILE ? end - start : TILE;
            load(keys, dtype, (g * length + start) * D, count * D, tile, TILE * D);
            for (long r = 0; r < queries; r++) {
                long t = r / (H / G);
                float before = largest[r];
                for (long p = 0; p < TILE; p++) score[r][p] = scale * dot(q[r], tile + p * D, D);
                if (start < first[t] || start + TILE > *used)        // not all of this tile is seen
                    for (long p = 0; p < TILE; p++) {
                        long slot = start + p;
                        if (slot < first[t] || slot >= end || (slot >= *used && !sees[t * tokens + slot - *used])) score[r][p] = -INFINITY;
                    }
                for (long p = 0; p < TILE; p++) largest[r] = score[r][p] > largest[r] ? score[r][p] : largest[r];
                for (long p = 0; p < TILE; p++) score[r][p] = exponential(score[r][p] - largest[r]);
                float shrunk = exponential(before - largest[r]);
                total[r] *= shrunk;
                for (long p = 0; p < TILE; p++) total[r] += score[r][p];
                for (long i = 0; shrunk != 1 && i < D; i++) to[r][i] *= shrunk;
            }
            load(values, dtype, (g * length + start) * D, count * D, tile, TILE * D);
            for (long r = 0; r < queries; r++) {
                float *restrict sum = to[r];
                for (long p = 0; p < TILE; p += 4) {                 // four at a time, so that it is loaded and stored less
                    const float *v = tile + p * D, *w = score[r] + p;
                    for (long i = 0; i < D; i++) sum[i] += w[0] * v[i] + w[1] * v[i + D] + w[2] * v[i + 2 * D] + w[3] * v[i + 3 * D];
                }
            }
        }
        for (long r = 0; r < queries; r++)
            for (long i = 0; i < D; i++) to[r][i] /= total[r];
    }
}
"""
C_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


@functools.cache
def small_functions():
    """C_SOURCE compiled, its functions declared, or None where no C compiler builds it."""
    library = compiled(C_SOURCE)
    if library is not None:
        pointer, long, integer, real = ctypes.c_void_p, ctypes.c_long, ctypes.c_int, ctypes.c_float
        library.norm.argtypes = [pointer, pointer, pointer, real, long, long, pointer]
        library.add_bias.argtypes = [pointer, pointer, long, long]
        library.swiglu.argtypes = [pointer, long, long, pointer]
        library.rotate_and_store.argtypes = [*[pointer] * 7, integer, *[long] * 5]
        library.attend.argtypes = [*[pointer] * 3, integer, *[pointer] * 4, *[long] * 5, integer]
        for function in (library.norm, library.add_bias, library.swiglu, library.rotate_and_store, library.attend):
            function.restype = None
    return library


class Tape:
    """A step of 1 to MAX_ROWS tokens on a CPU: C functions with their arguments, in the order in which they are called.

    What changes from step to step, which tokens, how many and where they stand, lies in memory that is written before each
    replay, and thresholds are read where they lie. The rest is as it was when the tape was made: 16-bit norms and biases are
    copied, the number of threads stands in the calls. sparse: whether small inputs are dropped.
    tables: rope_tables of all positions of the cache, float32.
    """

    @torch.no_grad()
    def __init__(self, model, cache, sparse, tables):
        self.model, self.cache, self.sparse, self.calls, self.held = model, cache, sparse, [], []
        self.rows, self.used = ctypes.c_long(), (ctypes.c_int64 * 1)()
        self.positions, self.first = (ctypes.c_int64 * kernel.MAX_ROWS)(), (ctypes.c_int64 * kernel.MAX_ROWS)()
        self.sees = (ctypes.c_uint8 * kernel.MAX_ROWS ** 2)()
        c, config, threads, dtype = small_functions(), model.config, torch.get_num_threads(), C_DTYPES[cache.keys.dtype]
        H, G, D, hidden = config.num_attention_heads, config.num_key_value_heads, config.head_dim, config.hidden_size
        self.x, self.normed, y, qkv, heads, both, gated = (torch.zeros(kernel.MAX_ROWS, width) for width in (
            hidden, hidden, hidden, (H + G + G) * D, H * D, 2 * config.intermediate_size, config.intermediate_size))
        for layer, block in enumerate(model.model.layers):
            attention, mlp, keys, values = block.self_attn, block.mlp, cache.keys[layer], cache.values[layer]
            self.norm(y if layer else None, block.input_layernorm)
            self.product(self.normed, [attention.q_proj, attention.k_proj, attention.v_proj], attention, qkv)
            self.call(c.rotate_and_store, qkv, *tables, self.positions, self.used, keys, values, dtype, self.rows, H, G, D, cache.length)
            self.call(c.attend, qkv, keys, values, dtype, self.used, self.first, self.sees, heads, self.rows, H, G, D, cache.length, threads)
            self.product(heads, [attention.o_proj], attention.o_proj, y)
            self.norm(y, block.post_attention_layernorm)
            self.product(self.normed, [mlp.gate_proj, mlp.up_proj], mlp, both)
            self.call(c.swiglu, both, self.rows, config.intermediate_size, gated)
            self.product(gated, [mlp.down_proj], mlp.down_proj, y)
        self.norm(y, model.model.norm)
        self.logits = None                                 # where the head is not transposed, PyTorch computes them
        if isinstance(model.lm_head, SparseLinear):
            self.logits = torch.zeros(kernel.MAX_ROWS, config.vocab_size)
            self.product(self.normed, [model.lm_head], model.lm_head, self.logits)

    def call(self, function, *arguments):
        """Takes down a call. Its tensors are held as they are now, so that their memory stays."""
        arguments = [a.detach() if isinstance(a, torch.Tensor) else a for a in arguments]
        self.held.append(arguments)
        self.calls.append((function, [a.data_ptr() if isinstance(a, torch.Tensor) else a for a in arguments]))

    def norm(self, y, module):
        """x += y, and normed = norm(x)"""
        self.call(small_functions().norm, self.x, y, module.weight.float(), module.eps, self.rows, self.x.shape[1], self.normed)

    def product(self, x, linears, counting, y):
        """y = the linears of one input x, side by side; counting: the module with the counts of all of them."""
        dropping = self.sparse and linears[0].state is not None
        thresholds = [linear.threshold if dropping else torch.tensor(-1.0) for linear in linears]
        counts = counting.counts if dropping else torch.zeros(len(linears), 2, dtype=torch.int64)
        function, arguments, held = kernel.c_call(x, self.rows, [linear.weight_t for linear in linears], thresholds, counts, y)
        self.held.append(held)
        self.calls.append((function, arguments))
        if linears[0].bias is not None:
            self.call(small_functions().add_bias, y, torch.cat([linear.bias for linear in linears]).float(), self.rows, y.shape[1])

    @torch.no_grad()
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
            if function(*arguments):                       # a product returns 1 for that, the others nothing
                raise MemoryError("no memory for the list of kept channels")
        cache.used += T
        if self.logits is None:
            return model.lm_head(self.normed[:T].to(cache.keys.dtype)[None]).float()
        return self.logits[None, :T]


def can_be_taped(model, cache):
    """Whether a Tape knows how to take a step of this model.

    It does on a CPU with a C compiler, for 32- or 16-bit floats, one text, linears of the blocks that are all SparseLinear, of
    one kind, and nobody looking on through hooks (parallel.py does, and readers do).
    """
    if not kernel.fits_c(cache.keys) or cache.keys.shape[1] > 1 or None in (kernel.c_library(), small_functions()):
        return False
    linears = [linear for block in model.model.layers for linear in block.modules() if isinstance(linear, (nn.Linear, SparseLinear))]
    if not all(isinstance(linear, SparseLinear) and linear.state is linears[0].state for linear in linears):
        return False
    state = linears[0].state
    if state is not None and (state.thresholds.dtype != torch.float32 or not kernel.fits_c(state.thresholds)):
        return False
    kinds = {(w.bits, w.group) if isinstance(w, kernel.QuantizedWeight) else w.dtype for w in (linear.weight_t for linear in linears)}
    return len(kinds) == 1 and not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@contextlib.contextmanager
def uncounted(state):
    """Inside, what a model with this SparseState keeps and sees counts for nothing; None: a model that does not count."""
    counts = None if state is None else state.counts.clone()
    try:
        yield
    finally:
        if state is not None:
            state.counts.copy_(counts)


TOLERANCE = 0.1          # of the logits, as a share of their norm: rounding to 16 bits explains 3 %
compared = weakref.WeakKeyDictionary()                     # Llama -> {whether its steps were sparse: whether its tape did what it does}
comparing = threading.Lock()


@torch.no_grad()
def agrees(tape, tokens):
    """Whether a tape computes what its model does: tried with the first step of a model, dense and sparse, which is taken twice.

    Sparse ones with thresholds that keep all: rounding would move inputs across real ones, and that has effects of any size.
    What is changed after that first step is not found out.
    """
    model, cache, used, state = tape.model, tape.cache, tape.cache.used, getattr(tape.model, "sparse_state", None)
    with comparing:
        found = compared.setdefault(model, {})
        if tape.sparse not in found:
            keep_all = ("off", None) if state is None else (state.where, torch.full_like(state.thresholds, -1))
            with uncounted(state), sparse_mode(model, *keep_all):
                ours = tape(tokens)
                cache.used = used
                theirs = model(tokens, cache)
                cache.used = used
            error = ((ours - theirs).norm() / theirs.norm()).item()
            found[tape.sparse] = not error > TOLERANCE     # NaN is not: there is nothing to compare where the model says NaN
            if error > TOLERANCE:
                warnings.warn(f"step.py does not compute what the model does, its logits are {error:.0%} off: a change to one belongs in "
                              "both. Until then the model itself runs, which is slower.", stacklevel=2)
        return found[tape.sparse]


class Steps:
    """`model(tokens, cache)` for a few tokens at a time, recorded and replayed where that can be.

    Recordings, dense and sparse: on a CPU a Tape each, on a GPU a CUDA graph each for each number of tokens. They are made when they
    are first needed; thresholds are read where they lie, so that changed ones count.
    """

    def __init__(self, model, cache):
        self.model, self.cache = model, cache
        self.forget()

    def forget(self):
        """Begins anew, as when the model has been made sparse anew."""
        self.state = getattr(self.model, "sparse_state", None)
        self.recorded, self.tables = {}, None              # by whether it is sparse; on a GPU by the number of tokens, and that
        self.can_be_taped = can_be_taped(self.model, self.cache)
        self.pool = torch.cuda.graph_pool_handle() if self.cache.keys.is_cuda else None      # memory that the graphs share

    def __call__(self, tokens, depths=None, sees=None):
        """tokens (1, T) int64 -> logits (1, T, vocab), valid until the next call; the cache is T positions longer.

        For a tree of tokens: depths (T,) says how far behind the used positions each stands, sees (T, T) bool
        which of the others each sees.
        """
        model, cache = self.model, self.cache
        if getattr(model, "sparse_state", None) is not self.state:
            self.forget()
        if self.can_be_graphed(tokens):
            return self.replay_graph(tokens, depths, sees)
        tape = self.tape(tokens)
        if tape is not None:
            return tape(tokens, depths, sees)
        if depths is None:
            return model(tokens, cache)
        window, positions = model.config.sliding_window, cache.used + depths
        past, sees = in_window(torch.arange(cache.used, device=model.device), positions, window), sees & in_window(positions, positions, window)
        return model(tokens, cache, positions, torch.cat((past, sees), 1))

    def prepare(self, tokens):
        """Records now what such tokens, one behind the other, will need."""
        if self.can_be_graphed(tokens):
            with torch.cuda.device_of(tokens):
                self.graph(self.inputs_of(tokens, None, None), is_sparse(self.state, tokens))
        else:
            self.tape(tokens)

    def tape(self, tokens):
        """The tape for such tokens, None where there can be none."""
        state = self.state
        if not self.can_be_taped or not 1 <= tokens.shape[1] <= kernel.MAX_ROWS or self.has_prefix():
            return None
        sparse = is_sparse(state, tokens)
        if sparse not in self.recorded:
            self.tables = self.tables or rope_tables(torch.arange(self.cache.length), self.model.config, torch.float32)
            tape = Tape(self.model, self.cache, sparse, self.tables)
            self.recorded[sparse] = tape if agrees(tape, tokens) else None
        return self.recorded[sparse]

    def has_prefix(self):
        """Whether a step would begin with positions that stay dense, which depends on what is in it."""
        return self.state is not None and self.state.where == "all" and self.state.dense_prefix > 0

    def can_be_graphed(self, tokens):
        """Whether a CUDA graph can take such a step: on a GPU, by kernels that do not wait for the host."""
        return tokens.is_cuda and not self.has_prefix() and (not is_sparse(self.state, tokens) or kernel.best_backend(self.cache.keys) == "triton")

    def replay_graph(self, tokens, depths, sees):
        """A step on a GPU. A graph launches always the same kernels on the same memory. So the tokens, where they stand and what
        they see are tensors that are overwritten before each replay, and attention looks at the whole cache through a mask."""
        check_fit(tokens, self.cache)
        with torch.cuda.device_of(tokens):
            inputs = self.inputs_of(tokens, depths, sees)
            graph, places, logits = self.graph(inputs, is_sparse(self.state, tokens))
            for place, tensor in zip(places, inputs):
                place.copy_(tensor)
            graph.replay()
        self.cache.used += tokens.shape[1]
        return logits

    def inputs_of(self, tokens, depths, sees):
        """(tokens, where they stand (T,), what of the whole cache they see (T, length), the slots they go to (T,))"""
        cache, T, window, device = self.cache, tokens.shape[1], self.model.config.sliding_window, tokens.device
        order, all_slots = torch.arange(T, device=device), torch.arange(cache.length, device=device)
        slots = cache.used + order
        positions = slots if depths is None else cache.used + depths
        mask = (all_slots < cache.used) & in_window(all_slots, positions, window)
        sees = order <= order[:, None] if sees is None else sees
        mask[:, cache.used:cache.used + T] = sees & in_window(positions, positions, window)
        return tokens, positions, mask, slots

    def graph(self, inputs, sparse):
        """(graph, its inputs, its logits) for so many tokens."""
        key = inputs[0].shape[1], sparse
        if key not in self.recorded:
            self.recorded[key] = self.capture([tensor.clone() for tensor in inputs])
        return self.recorded[key]

    def capture(self, places):
        """(graph, its inputs, its logits). The trial runs write where the first replay will, and count for nothing."""
        def run():
            tokens, positions, mask, slots = places
            return self.model(tokens, self.cache, positions, mask, slots)

        with uncounted(self.state):
            aside = torch.cuda.Stream()                    # libraries set themselves up before the capture, not in it
            aside.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(aside):
                run(), run()
            torch.cuda.current_stream().wait_stream(aside)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local"):        # other threads may talk to other GPUs
                logits = run()
        return graph, places, logits


if __name__ == "__main__":
    from cli import command_line
    from timing import show_steps
    command_line(show_steps)
