"""Reading less of the cache: attention that looks back at the few positions that score highest.

Each step of decoding reads the keys and values of all earlier positions, which grow with the text.
A few positions hold nearly all of a token's softmax. Which these are differs from token to token,
and only the scores q kᵀ tell, for which all keys must be read. TidalDecode (arXiv 2410.05076) reads
all keys in a few layers only, because a position that scores high in one layer scores high in the
next ones, too. *Position-persistent* sparse attention:

    positions   0 1 2 3 4 5 6 7 8 9 ...                 now
    layer  2    ■ ■ ■ ■ ■ ■ ■ ■ ■ ■ ■ ■ ■ ■ ■ ■ ■ ■ ■ ■ ■ ■    reads all, and chooses: the K with
           3    ■ ■ · · ■ · · · · ■ ■ · · · · · ■ · · ■ ■ ■    the largest scores ─► 0 1 4 9 10 ...
           4    ■ ■ · · ■ · · · · ■ ■ · · · · · ■ · · ■ ■ ■    these alone
          ...
           7    ■ ■ ■ ■ ■ ■ ■ ■ ■ ■ ■ ■ ■ ■ ■ ■ ■ ■ ■ ■ ■ ■    reads all, and chooses anew
                └┬┘                                 └─┬─┘
                 the first positions and the last ones, always: attention sinks (arXiv 2309.17453)

All heads share the chosen positions, whose scores are sums over the query heads. Which layers read
all decides how much is lost: lab/longtext.py measures it, and writes them to attend.json in a
model's folder. There are three ways to choose, three scores:

    tidal     q kᵀ, in the layers that read all; the layers between take over the choice
    window    the position itself: the first and the last ones (StreamingLLM, arXiv 2309.17453)
    pages     each layer for itself, by pages of 16 positions: no key of a page has a larger product
              with q than Σ max(q_i high_i, q_i low_i), where high_i and low_i are the largest and
              the smallest key_i of the page (Quest, arXiv 2406.10774). Each step computes high and
              low anew, from all keys: that shows what Quest's choice is worth, not how fast it is

Only a step of one token reads less; prompts read everything.

The seam: attention is one function of q, k, v and mask. `read_less(model, plan)` gives each layer a
function that hands the model's own attention the chosen keys and values alone. A recorded step
chooses and gathers in C, by record.NOTES.

    python -m beyond --attend 512 --model FOLDER --prompt "$(cat LONG.txt)"
    python -m beyond.lab.longtext layers --model FOLDER --text FILE   which layers are to read all
"""
import functools
import math
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import torch
from torch.overrides import wrap_torch_function

import kernel
from beyond import record
from model import natural, note, read_json, require

SINKS = 4                # first positions, which are always read
RECENT = 64              # last positions, which are always read
PAGE = 16                # positions of a page


# --------------------------------------------------------------------------------------------------
# Choosing positions by their scores. q (B, G, R, D), the R = H / G query heads of each key-value
# head; k (B, G, S, D); last: the last position that is shown, (); scores (B, G or 1, R or 1, S).
# record.py knows `choose` and `take` as one operation each.

def page_bounds(q, k, last):
    """Return for each position an upper bound of q kᵀ in its page."""
    S = k.shape[2]
    position = torch.arange(S + -S % PAGE, device=k.device)    # the last key fills the last page
    pages = k.index_select(2, position.minimum(last)).unflatten(2, (-1, PAGE))
    low, high = pages.amin(3), pages.amax(3)                                 # (B, G, pages, D)
    bounds = q.clamp(min=0) @ high.transpose(-1, -2) + q.clamp(max=0) @ low.transpose(-1, -2)
    return bounds.repeat_interleave(PAGE, -1)[..., :S]


SCORES = {
    "tidal": lambda q, k, last: q @ k.transpose(-1, -2),
    "window": lambda q, k, last: torch.arange(k.shape[2], device=k.device).expand(len(k), 1, 1, -1),
    "pages": page_bounds,
}


@wrap_torch_function(lambda q, k, *_: (q, k))
def choose(q, k, mask, K, by):
    """Return the K positions that q reads, (B, K) int64, the same for all heads.

    q (B, H, 1, D), k (B, G, S, D); mask (1, S) as for model.attend; by: a name in SCORES. The first
    SINKS and the last RECENT positions are always chosen, at most half of K each. A position that
    the mask hides is listed only if all others are, and after them. Of equal scores the earlier
    position counts.
    """
    position = torch.arange(k.shape[2], device=k.device)
    shown = torch.ones_like(position, dtype=torch.bool)
    if mask is not None:                                       # bool, or 0 and -inf
        shown = mask[0] if mask.dtype == torch.bool else mask[0] == 0
    last = (position * shown).amax()
    q = q.reshape(k.shape[0], k.shape[1], -1, k.shape[3])                           # (B, G, R, D)
    scores = SCORES[by](q, k.to(q.dtype), last).float()                  # (B, G or 1, R or 1, S)
    first, recent = always_read(K)
    always = (position < first) | (position > last - recent)
    scores = scores.flatten(1, 2).sum(1).masked_fill(always, math.inf)                   # (B, S)
    scores = scores.masked_fill(~shown, -math.inf)
    return scores.sort(descending=True, stable=True).indices[:, :K].contiguous()


def always_read(K):
    """Return how many of K positions are the first ones, and how many the last ones."""
    recent = min(RECENT, max(1, K // 2))
    return min(SINKS, K - recent), recent


@wrap_torch_function(lambda x, positions: (x, positions))
def take(x, positions):
    """Return x (B, G, S, D) at positions (B, K), (B, G, K, D)."""
    return x.gather(2, positions[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3]))


def attend_to(attention, q, k, v, mask, positions):
    """Return what an attention, as model.attend, makes of chosen positions (B, K) alone."""
    if mask is not None:                 # hidden positions are at the same places in each text
        mask = take(mask.view(1, 1, -1, 1), positions[:1]).view(1, -1)                     # (1, K)
    return attention(q, take(k, positions), take(v, positions), mask)


# --------------------------------------------------------------------------------------------------
# The same in C, for steps that record.py replays

C_SOURCE = record.C_SOURCE + r"""
#include <stdlib.h>

/* The K positions with the largest sums of q k^T over the query heads, rising; the first ones and
   the last ones in any case; hidden ones only if there are no others. Floats are compared as whole
   numbers in the same order, and the K-th largest is found bit by bit.
   q (G * R, D) float32, k (G, S, D) of a type, mask (S), positions (K) int64.
   q, k, mask, positions, type, G, R, S, D, K, first, recent, row stride of q, strides of k (2),
   threads */
int choose(const args *a) {
    const uint8_t *mask = POINTER(2);
    long G = a[5], R = a[6], S = a[7], D = a[8], K = a[9], first = 0, end = S;
    while (end && !mask[end - 1]) end--;
    while (first < end && !mask[first]) first++;
    float q[G][D];
    uint32_t *order = calloc(S, sizeof *order), smallest = 0;   // of hidden positions: 0
    if (!order) return 1;
    memset(q, 0, sizeof q);
    for (long h = 0; h < G * R; h++)         // a sum of products is the product of the sum
        for (long i = 0; i < D; i++) q[h / R][i] += ((const float *)a[0])[h * a[12] + i];
    long threads = G * (end - first) * D > 1 << 19 ? a[15] : 1;
    #pragma omp parallel for num_threads(threads) schedule(static)
    for (long start = first; start < end; start += TILE) {
        long n = end - start < TILE ? end - start : TILE;
        float tile[TILE * D], scores[TILE] = {0};
        for (long g = 0; g < G; g++) {
            for (long p = 0; p < n; p++)
                load(POINTER(1), a[4], g * a[13] + (start + p) * a[14], D, tile + p * D);
            for (long p = 0; p < n; p++) scores[p] += dot(q[g], tile + p * D, D);
        }
        for (long p = 0, s = start; p < n; p++, s++) {
            uint32_t bits = bits_of(scores[p]);                 // NaN is the largest
            bits = scores[p] != scores[p] ? 0xfffffffe : bits >> 31 ? ~bits : bits | 0x80000000;
            if (mask[s]) order[s] = s < a[10] || s >= end - a[11] ? 0xffffffff : bits;
        }
    }
    for (uint32_t bit = 0x80000000; bit; bit >>= 1) {
        long count = 0;
        for (long s = 0; s < S; s++) count += order[s] >= (smallest | bit);
        if (count >= K) smallest |= bit;
    }
    int64_t *to = (int64_t *)a[3];
    long equal = K;                          // the room for positions that score the smallest
    for (long s = 0; s < S; s++) equal -= order[s] > smallest;
    for (long s = 0; s < S; s++)
        if (order[s] > smallest || (order[s] == smallest && equal-- > 0)) *to++ = s;
    free(order);
    return 0;
}

/* y[g, j] = x[g, positions[j]], rows of some bytes. x (G, S, row), y (G, K, row).
   x, positions, y, bytes of a row, G, K, strides of x in bytes (2), threads */
int take(const args *a) {
    long threads = a[3] * a[4] * a[5] > 1 << 22 ? a[8] : 1;  // a thread that wakes may be late
    #pragma omp parallel for num_threads(threads) schedule(static)
    for (long i = 0; i < a[4] * a[5]; i++) {
        long at = ((const int64_t *)a[1])[i % a[5]];
        memcpy((char *)a[2] + i * a[3], (const char *)a[0] + i / a[5] * a[6] + at * a[7], a[3]);
    }
    return 0;
}
"""


c_functions = functools.cache(functools.partial(kernel.compiled, C_SOURCE))


def note_choose(tape, positions, q, k, mask, K, by):
    """Note `choose` on a record.Tape in C; return whether these arguments can be noted."""
    if (by != "tidal" or q.dtype != torch.float32 or k.dtype not in record.C_TYPES
            or not q.stride(-1) == k.stride(-1) == 1 or mask is None or mask.dtype != torch.bool):
        return False
    G, S, D = k.shape[1:]
    return tape.call(c_functions().choose, q, k, mask, positions, record.C_TYPES[k.dtype], G,
                     q.shape[1] // G, S, D, K, *always_read(K), q.stride(1), k.stride(1),
                     k.stride(2), torch.get_num_threads())


def note_take(tape, y, x, positions):
    """Note `take` as note_choose does."""
    size = x.element_size()
    return x.stride(-1) == 1 and tape.call(
        c_functions().take, x, positions, y, size * x.shape[3], *y.shape[1:3], size * x.stride(1),
        size * x.stride(2), torch.get_num_threads())


record.NOTES |= {"choose": note_choose, "take": note_take}


# --------------------------------------------------------------------------------------------------
# In the model

@dataclass(frozen=True)
class Plan:
    """Which layers read how much of the cache, and which choose."""
    positions: int                   # K, the positions that a layer reads
    layers: tuple                    # the layers that read all; by "tidal" they choose for others
    by: str = "tidal"                # a name in SCORES

    def check(self, config):
        """Raise InputError for a plan that does not fit a model."""
        layers, context = config.num_hidden_layers, config.max_position_embeddings
        require(1 <= self.positions <= context,
                f"--attend {self.positions}, expected 1 to {context}, the model's context")
        wrong = [layer for layer in self.layers if not 0 <= layer < layers]
        require(not wrong, f"--attend-layers {' '.join(map(str, wrong))}, expected numbers from 0 "
                           f"to {layers - 1}, the model's layers")

    def chooses(self, layer):
        """Return whether a layer scores the positions, for itself or for others."""
        if self.by == "tidal":           # where the next layer chooses, too, its choice counts
            return layer in self.layers and layer + 1 not in self.layers
        return self.by == "pages" and layer not in self.layers

    def share(self, config, first, end):
        """Return the share of the cache that steps behind `first` to `end` - 1 tokens read."""
        layers, whole = config.num_hidden_layers, len(self.layers)
        seen = [min(used + 1, config.sliding_window or used + 1) for used in range(first, end)]
        read = 0
        for visible in seen:
            fewer = min(self.positions, visible)
            if self.by == "pages" and fewer < visible:
                fewer += -(-visible // PAGE)     # two bounds a page, as long as a key and a value
            read += whole * visible + (layers - whole) * fewer
        return read / (layers * sum(seen)) if seen else 1.0


class Reading:
    """How the attentions of a model read the cache, in steps of one token: `model.reading`.

    active: whether they read less, now. A recorded step does as it did when it was recorded.
    """

    def __init__(self, plan):
        self.plan = plan
        self.active = True
        self.chosen = None               # (B, K), by the layer that last chose

    def switched(self, active):
        """Read less, or everything, inside a `with`."""
        return mock.patch.object(self, "active", active)

    def attend(self, layer, whole, q, k, v, mask):
        """Do what the attention `whole` does; for one token read less, if this layer is to."""
        plan = self.plan
        if not self.active or q.shape[2] > 1 or k.shape[2] <= plan.positions:
            return whole(q, k, v, mask)
        if layer == 0:
            self.chosen = None
        if plan.chooses(layer):
            self.chosen = choose(q, k, mask, plan.positions, plan.by)
        if layer in plan.layers:
            return whole(q, k, v, mask)
        if self.chosen is None:          # no layer has chosen yet
            self.chosen = choose(q, k, mask, plan.positions, "window")
        return attend_to(whole, q, k, v, mask, self.chosen)


def read_less(model, plan):
    """Let steps of one token read the cache as planned; return the Reading, `model.reading`.

    A second call gives the model another plan; a recorded step keeps its own. InputError for a plan
    that does not fit. If an attention depends on the order of its positions, everything is read as
    before, and one line on standard error says why.
    """
    plan.check(model.config)
    attentions = [block.self_attn for block in model.model.layers]
    own = [getattr(attention.attend, "whole", attention.attend) for attention in attentions]
    ordered = [layer for layer, whole in enumerate(own) if not orderless(whole, model)]
    if ordered:
        note(f"attend.py steps aside, all of the cache is read: the attention of layer "
             f"{ordered[0]} depends on the order of the positions")
        plan = Plan(model.config.max_position_embeddings, tuple(range(len(own))))
    reading = model.reading = Reading(plan)
    for layer, (attention, whole) in enumerate(zip(attentions, own)):
        attention.attend = functools.partial(reading.attend, layer, whole)
        attention.attend.whole = whole
    return reading


def orderless(attention, model):
    """Return whether an attention gives the same for keys and values in another order."""
    own = model.model.layers[0].self_attn
    q = torch.arange(1.0 * own.q_proj.out_features, device=model.device).sin()
    k = torch.arange(8.0 * own.k_proj.out_features, device=model.device).sin()
    q, k = q.view(1, -1, 1, own.head_dim), k.view(1, -1, 8, own.head_dim)
    other = k.flip(2)
    return torch.allclose(attention(q, k, k, None), attention(q, other, other, None), atol=1e-5)


# --------------------------------------------------------------------------------------------------
# Options

LAYERS_FILE = "attend.json"              # in a checkpoint folder: which layers are to read all


def add_options(parser):
    """Add --attend and the options beside it, of which `plan_of` makes a Plan."""
    parser.add_argument("--attend", type=natural, metavar="K",
                        help="positions of the cache that a step reads in most layers (default: "
                             "all)")
    parser.add_argument("--attend-by", choices=SCORES,
                        help="how they are chosen (default: tidal)")
    parser.add_argument("--attend-layers", type=int, nargs="+", metavar="N",
                        help=f"the layers that read all (default: those in {LAYERS_FILE} in the "
                             f"checkpoint folder, else every third)")


def check_options(arguments):
    """Raise InputError for options of how to read less without --attend."""
    for name in ("by", "layers"):
        require(arguments.attend or not getattr(arguments, f"attend_{name}"),
                f"--attend-{name} is for --attend, which is not given")


def plan_of(arguments, config):
    """Return the Plan that the options ask for."""
    layers = arguments.attend_layers or layers_of(arguments.model, config)
    return Plan(arguments.attend, tuple(sorted(set(layers))), arguments.attend_by or "tidal")


def layers_of(folder, config):
    """Return the layers that are to read all: those in a folder's LAYERS_FILE, or every third."""
    path, count = Path(folder) / LAYERS_FILE, config.num_hidden_layers
    thirds = [*range(min(2, count - 1), count, 3)]
    layers = read_json(path, {"layers": thirds}).get("layers")
    require(isinstance(layers, list) and all(layer in range(count) for layer in layers),
            f"{path}: layers is {layers}, expected a list of numbers from 0 to {count - 1}")
    return tuple(layers)
