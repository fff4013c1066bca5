"""Reading less of the cache: attention that looks back at few positions, those that score highest.

Sparsity saves weights. But each step reads a second stream from memory, the keys and values of all
that was written before, and that one grows with the text. What a token attends to is mostly little:
a few positions hold nearly all of the softmax, and leaving out the others changes next to nothing.
Which ones they are differs from token to token, and only the scores q kᵀ tell, for which all keys
must be read. TidalDecode (arXiv 2410.05076) reads them in a few layers alone, for what scores high
in one layer does so in the next ones, too. *Position-persistent* sparse attention:

    positions   0 1 2 3 4 5 6 7 8 9 ...                 now
    layer  2    ■ ■ ■ ■ ■ ■ ■ ■ ■ ■ ■ ■ ■ ■ ■ ■ ■ ■ ■ ■ ■ ■    reads all, and chooses: the K with
           3    ■ ■ · · ■ · · · · ■ ■ · · · · · ■ · · ■ ■ ■    the largest scores ─► 0 1 4 9 10 ...
           4    ■ ■ · · ■ · · · · ■ ■ · · · · · ■ · · ■ ■ ■    these alone
          ...
           7    ■ ■ ■ ■ ■ ■ ■ ■ ■ ■ ■ ■ ■ ■ ■ ■ ■ ■ ■ ■ ■ ■    reads all, and chooses anew
           8    ■ ■ · ■ · · · · · · ■ ■ · · ■ · · · · ■ ■ ■    these alone
                └┬┘                                 └─┬─┘
                 the first positions and the last ones, always: attention sinks (arXiv 2309.17453)

All heads share the positions, those with the largest score summed over the query heads; or each
key-value head has its own. The cache holds the keys of a head one after the other, so that a chosen
position is a run of memory, and what lies between two of them is not touched. Which layers are to
read all differs from model to model, and decides how much is lost: longtext.py measures it, and
writes them to attend.json in the checkpoint folder.

Two other ways to choose stand beside it, to compare with. They differ in the score alone:

    tidal     q kᵀ, in the layers that read all; the others take over what was chosen
    window    the position: the first and the last ones (StreamingLLM, arXiv 2309.17453)
    pages     each layer for itself, by pages of 16 positions: no key of a page has a larger product
              with q than Σ max(q_i high_i, q_i low_i), where high_i and low_i are the largest and
              the smallest key_i in the page (Quest, arXiv 2406.10774). Here the bounds are computed
              anew in each step, which reads all keys: it shows what Quest's choice is worth, not
              how fast it is

Only a step with one token reads less. The prompt and verify passes read everything, so that
speculation is lossless with a draft that reads less of both streams.

The seam: attention is one function of q, k, v and mask. `read_less(model, plan)` puts another one
in each layer. On a CPU a recorded step runs it in C, by functions that this file gives record.py;
elsewhere it is PyTorch with a fixed K, which a CUDA graph can hold.

    python -m beyond --attend 512 --model FOLDER --prompt "$(cat LONG.txt)"
    python -m beyond.longtext layers --model FOLDER --text FILE   which layers are to read all
    python -m beyond.longtext perplexity                          what it costs; see there
"""
import ast
import contextlib
import functools
import math
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.overrides import handle_torch_function, has_torch_function

import kernel
from beyond import drafts, record
from beyond.fused import code_of, without_name
from model import natural, note, read_json, require

SINKS = 4                # first positions, which are always read
RECENT = 64              # last positions, which are always read
PAGE = 16                # positions of a page


# --------------------------------------------------------------------------------------------------
# Choosing: a score of each position, (B, G, S) float32, or (B, 1, S) for all heads alike; and the K
# positions with the largest. Both are operations of their own for whoever looks on, as record.py.

def products(q, k, mask, over, shared):
    """Return the scores q kᵀ of all positions, over the query heads that share them.

    q (B, H, 1, D), k (B, G, S, D); mask (1, S) as for model.attend. over: "sum" or "max". shared:
    whether the heads of all groups share positions. What the mask hides may have any score.
    """
    if has_torch_function((q, k)):
        return handle_torch_function(products, (q, k), q, k, mask, over, shared)
    B, _, S, _ = k.shape
    scores = grouped(q, k) @ k.transpose(-1, -2)                                  # (B, G, H/G, S)
    return over_heads(scores.float(), over, shared)


def grouped(q, k):
    """Return q (B, H, 1, D) as (B, G, H / G, D): the query heads of each key-value head of k."""
    return q.reshape(k.shape[0], k.shape[1], -1, k.shape[3])


def over_heads(scores, over, shared):
    """Return scores (B, G, H / G, S) as one a group, (B, G, S), or one for all, (B, 1, S)."""
    if shared:
        scores = scores.flatten(1, 2)[:, None]                                    # (B, 1, H, S)
    return scores.amax(2) if over == "max" else scores.sum(2)


def recency(q, k, mask, over, shared):
    """Return the positions themselves as scores: the last ones score highest."""
    return torch.arange(k.shape[2], device=k.device, dtype=torch.float32).expand(len(k), 1, -1)


def page_bounds(q, k, mask, over, shared):
    """Return for each position what q kᵀ is at most in its page; arguments as for `products`."""
    S = k.shape[2]
    position = torch.arange(S + -S % PAGE, device=k.device)    # the last key fills the last page
    k = k.index_select(2, torch.minimum(position, last_shown(mask, position[:S])))
    pages = k.unflatten(2, (-1, PAGE))                                       # (B, G, pages, 16, D)
    low, high = pages.amin(3), pages.amax(3)                                 # (B, G, pages, D)
    q = grouped(q, k)
    bounds = q.clamp(min=0) @ high.transpose(-1, -2) + q.clamp(max=0) @ low.transpose(-1, -2)
    bounds = over_heads(bounds.float(), over, shared)                        # (B, G or 1, pages)
    return bounds[..., None].expand(*bounds.shape, PAGE).flatten(2)[..., :S]


SCORES = {"tidal": products, "window": recency, "pages": page_bounds}


def pick(scores, mask, K):
    """Return the K positions that are read, (B, G or 1, K) int64, of scores (B, G or 1, S).

    The first SINKS and the last RECENT are among them, or half of K if that is less; none that the
    mask (1, S) hides, while others are left; of equal scores the earlier ones.
    """
    if has_torch_function((scores,)):
        return handle_torch_function(pick, (scores,), scores, mask, K)
    position = torch.arange(scores.shape[-1], device=scores.device)
    last = last_shown(mask, position)
    first, recent = always_read(K)
    always = (position < first) | (position > last - recent)
    scores = scores.masked_fill(always, math.inf)
    if mask is not None:
        scores = scores.masked_fill(~shown(mask), -math.inf)
    return scores.sort(descending=True, stable=True).indices[..., :K].contiguous()


def last_shown(mask, position):
    """Return the last of all positions (S,) that the mask (1, S) shows, a tensor ()."""
    return position[-1] if mask is None else (position * shown(mask)).amax()


def shown(mask):
    """Return which positions a mask (1, S) shows, (S,) bool: it is bool, or numbers, 0 and -inf."""
    return mask[0] if mask.dtype == torch.bool else mask[0] == 0


def always_read(K):
    """Return how many of K positions are the first ones, and how many the last ones."""
    recent = min(RECENT, max(1, K // 2))
    return min(SINKS, K - recent), recent


def attend_to(q, k, v, mask, positions):
    """Return softmax(q kᵀ / √D) v over chosen positions alone, (B, H, 1, D).

    q (B, H, 1, D), k and v (B, G, S, D), mask (1, S) as for model.attend, positions (B, G or 1, K)
    int64.
    """
    if has_torch_function((q, k, v)):
        return handle_torch_function(attend_to, (q, k, v), q, k, v, mask, positions)
    B, G, _, D = k.shape
    rows = positions[..., None].expand(B, G, -1, D)
    seen = None if mask is None else mask[0][positions][:, :, None]          # (B, G or 1, 1, K)
    y = F.scaled_dot_product_attention(grouped(q, k), k.gather(2, rows), v.gather(2, rows), seen)
    return y.reshape(q.shape)


# --------------------------------------------------------------------------------------------------
# The same in C, for steps that record.py replays. Its `attend` reads listed positions, too.

C_SOURCE = record.C_SOURCE + r"""
#include <stdlib.h>

/* score = q k^T, summed over the R queries of a group or the largest of them; over all groups if
   the scores are shared. q (G, R, D), k (G, S, D), score (G or 1, S) float32.
   q, k, mask, score, type, G, R, S, D, largest, shared, group strides of q, k, row strides of q, k,
   threads */
int products(const args *a) {
    const uint8_t *mask = POINTER(2);
    float *scores = POINTER(3);
    long type = a[4], G = a[5], R = a[6], S = a[7], D = a[8], largest = a[9], first = 0, end = S;
    while (end && !mask[end - 1]) end--;
    while (first < end && !mask[first]) first++;
    long queries = largest ? R : 1;          // a sum of products is the product of the sum
    float q[G][queries][D];
    memset(q, 0, sizeof q);
    for (long g = 0; g < G; g++)
        for (long r = 0; r < R; r++) {
            float one[D];
            load(POINTER(0), type, g * a[11] + r * a[13], D, one);
            for (long i = 0; i < D; i++) q[g][largest ? r : 0][i] += one[i];
        }
    long threads = G * (end - first) * D > 1 << 16 ? a[15] : 1;
    #pragma omp parallel for num_threads(threads) schedule(static)
    for (long start = first; start < end; start += TILE) {
        long n = end - start < TILE ? end - start : TILE;
        for (long g = 0; g < G; g++) {
            float *score = scores + (a[10] ? 0 : g * S) + start, tile[TILE * D];
            for (long p = 0; p < n; p++)
                load(POINTER(1), type, g * a[12] + (start + p) * a[14], D, tile + p * D);
            for (long p = 0; p < n; p++)
                for (long r = 0; r < queries; r++) {
                    float one = dot(q[g][r], tile + p * D, D), *to = score + p;
                    if (!r && (!g || !a[10])) *to = one;
                    else if (!largest) *to += one;
                    else *to = one <= *to ? *to : one;           // NaN, too, is the largest
                }
        }
    }
    return 0;
}

/* The K positions with the largest scores that the mask shows, rising; the first ones and the last
   ones in any case. Floats are compared as whole numbers in the same order, whose K-th largest is
   found bit by bit. score (rows, S) float32, positions (rows, K) int64.
   score, mask, positions, rows, S, K, first, recent */
int pick(const args *a) {
    const uint8_t *mask = POINTER(1);
    long S = a[4], K = a[5], last = S - 1;
    uint32_t *order = malloc(S * sizeof *order);
    if (!order) return 1;
    while (last && !mask[last]) last--;
    for (long row = 0; row < a[3]; row++) {
        const float *score = (const float *)a[0] + row * S;
        uint32_t smallest = 0;
        for (long s = 0; s < S; s++) {
            uint32_t bits = bits_of(score[s]);
            bits = score[s] != score[s] ? 0xfffffffe : bits >> 31 ? ~bits : bits | 0x80000000;
            order[s] = !mask[s] ? 0 : s < a[6] || s > last - a[7] ? 0xffffffff : bits;
        }
        for (uint32_t bit = 0x80000000; bit; bit >>= 1) {
            long count = 0;
            for (long s = 0; s < S; s++) count += order[s] >= (smallest | bit);
            if (count >= K) smallest |= bit;
        }
        int64_t *to = (int64_t *)a[2] + row * K;
        long equal = K;                                          // as many of them have room
        for (long s = 0; s < S; s++) equal -= order[s] > smallest;
        for (long s = 0; s < S; s++)
            if (order[s] > smallest || (order[s] == smallest && equal-- > 0)) *to++ = s;
    }
    free(order);
    return 0;
}
"""


@functools.cache
def c_functions():
    """Return C_SOURCE compiled, or None where no C compiler builds it."""
    return kernel.compiled(C_SOURCE)


def fits_c(mask, *tensors):
    """Return whether the C functions take these tensors (1, heads, rows, D), and a mask (1, S)."""
    types = {x.dtype for x in tensors}
    return (len(types) <= 1 and types <= record.C_TYPES.keys() and mask is not None
            and mask.dtype == torch.bool and mask.is_contiguous() and c_functions() is not None
            and all(len(x) == 1 and x.stride(-1) == 1 for x in tensors))


def note_products(tape, scores, q, k, mask, over, shared):
    """Note `products` on a record.Tape in C; return whether these arguments can be noted."""
    if not fits_c(mask, q, k):
        return False
    q = grouped(q, k)
    _, G, S, D = k.shape
    return tape.call(c_functions().products, q, k, mask, scores, record.C_TYPES[k.dtype], G,
                     q.shape[2], S, D, int(over == "max"), int(shared),
                     *[x.stride(1) for x in (q, k)], *[x.stride(2) for x in (q, k)],
                     torch.get_num_threads())


def note_pick(tape, positions, scores, mask, K):
    """Note `pick` as note_products does."""
    if not fits_c(mask) or len(scores) > 1 or not scores.is_contiguous() \
            or not positions.is_contiguous():
        return False
    return tape.call(c_functions().pick, scores, mask, positions, *scores.shape[1:], K,
                     *always_read(K))


def note_attend_to(tape, y, q, k, v, mask, positions):
    """Note `attend_to` as note_products does."""
    if not fits_c(mask, q, k, v) or not y.is_contiguous():
        return False
    return tape.attend(y, grouped(q, k), k, v, mask, positions)


record.NOTES |= {"products": note_products, "pick": note_pick, "attend_to": note_attend_to}


# --------------------------------------------------------------------------------------------------
# In the model

@dataclass(frozen=True)
class Plan:
    """Who reads how much of the cache, and who chooses. `check` says what is wrong with one."""
    positions: int                   # K, that a layer reads
    layers: tuple                    # those that read all; by "tidal" they choose for the next ones
    by: str = "tidal"                # a name in SCORES
    over: str = "sum"                # or "max", over the query heads that share positions
    shared: bool = True              # whether all key-value heads share positions

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
        if self.by == "tidal":           # its choice counts unless the next layer makes another
            return layer in self.layers and layer + 1 not in self.layers
        return self.by == "pages" and layer not in self.layers

    def read(self, visible, layers):
        """Return how many positions a step reads in `layers` layers, each of which sees so many."""
        fewer = min(self.positions, visible)
        if self.by == "pages" and fewer < visible:
            fewer += -(-visible // PAGE)     # two bounds a page, as long as a key and a value
        whole = len(set(self.layers))
        return whole * visible + (layers - whole) * fewer


class Reading:
    """How the attentions of a model read the cache, and how much they have read: `model.reading`.

    active: whether steps of one token read less, now. A recorded step does as it did when made.
    """

    def __init__(self, model, plan):
        self.plan = plan
        self.active = True
        self.chosen = None               # (B, G or 1, K), by the layer that last chose
        self.layers = len(model.model.layers)
        self.window = model.config.sliding_window
        self.reset()

    def reset(self):
        """Forget what was counted."""
        self.read = self.there = 0       # positions in all layers, over all steps that read less

    @property
    def share(self):
        """The share of the cache that was read by steps that read less; 1.0 if there was none."""
        return self.read / self.there if self.there else 1.0

    def count(self, visible):
        """Count a step whose token sees so many positions."""
        if self.active:
            visible = min(visible, self.window or visible)
            self.read += self.plan.read(visible, self.layers)
            self.there += visible * self.layers

    @contextlib.contextmanager
    def switched(self, active):
        """Read less, or everything, inside a `with`."""
        before = self.active
        self.active = active
        try:
            yield
        finally:
            self.active = before

    def attend(self, layer, whole, q, k, v, mask):
        """Do what the attention `whole` does, or read less for one token, as a layer is to."""
        plan = self.plan
        if not self.active or q.shape[2] > 1 or k.shape[2] <= plan.positions:
            return whole(q, k, v, mask)
        if layer == 0:
            self.chosen = None
        if plan.chooses(layer):
            scores = SCORES[plan.by](q, k, mask, plan.over, plan.shared)
            self.chosen = pick(scores, mask, plan.positions)
        if layer in plan.layers:
            return whole(q, k, v, mask)
        if self.chosen is None:          # nobody has chosen yet
            scores = recency(q, k, mask, plan.over, plan.shared)
            self.chosen = pick(scores, mask, plan.positions)
        return attend_to(q, k, v, mask, self.chosen)


# What `attend_to` was written for. Where it is not the model's attention, nothing is put in its
# place.
REPLACED = """
def attend(q, k, v, mask):
    B, H, T, D = q.shape
    G = k.shape[1]
    if mask is None and T > 1:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=H != G)
    mask = None if mask is None else mask.expand(H // G, -1, -1).flatten(0, 1)
    y = F.scaled_dot_product_attention(q.reshape(B, G, -1, D), k, v, attn_mask=mask)
    return y.reshape(B, H, T, D)
"""


def read_less(model, plan):
    """Let steps of one token read the cache as planned; return the Reading, `model.reading`.

    A second call gives the model another plan; a recorded step keeps that with which it was made.
    InputError for a plan that does not fit. Where the attention is not that of REPLACED, one line
    on standard error says so, and everything is read as before.
    """
    plan.check(model.config)
    attentions = [block.self_attn for block in model.model.layers]
    own = [attention.attend.args[1] if is_ours(attention.attend) else attention.attend
           for attention in attentions]
    expected = without_name(ast.parse(REPLACED).body[0])
    changed = next((i for i, whole in enumerate(own) if code_of(whole) != expected), None)
    reading = model.reading = Reading(model, plan)
    if changed is not None:
        note(f"attend.py steps aside, all of the cache is read: the attention of layer {changed} "
             f"is not what it was written for")
        reading.plan = Plan(model.config.max_position_embeddings, tuple(range(len(own))), plan.by)
        return reading
    for layer, (attention, whole) in enumerate(zip(attentions, own)):
        attention.attend = functools.partial(reading.attend, layer, whole)
    return reading


def is_ours(attend):
    """Return whether read_less has put this attention in its place."""
    return (isinstance(attend, functools.partial)
            and isinstance(getattr(attend.func, "__self__", None), Reading))


def make_step(model, cache, tokens=1, make_step=record.make_step):
    """Return a step, as another make_step does, which counts in model.reading what it reads."""
    step = make_step(model, cache, tokens)

    def counted(tokens):
        if tokens.shape[1] == 1:
            model.reading.count(cache.used + 1)
        return step(tokens)
    return counted


class Speculation(drafts.TreeSpeculation):
    """Speculation whose draft "sparse" reads less of the cache; the verifier reads everything."""

    def make_draft(self, draft, draft_thresholds):
        guessing = super().make_draft(draft, draft_thresholds)
        if draft != "sparse":
            return guessing
        sparse = guessing.mode

        @contextlib.contextmanager
        def mode():
            with sparse(), self.model.reading.switched(True):
                yield
        guessing.mode = mode
        return guessing


# --------------------------------------------------------------------------------------------------
# Options

LAYERS_FILE = "attend.json"              # in a checkpoint folder: which layers are to read all


def add_options(parser):
    """Add --attend and what belongs to it, of which `plan_of` makes a Plan."""
    parser.add_argument("--attend", type=natural, metavar="K",
                        help="positions of the cache that a step reads in most layers (default: "
                             "all)")
    parser.add_argument("--attend-by", choices=SCORES,
                        help="how they are chosen (default: tidal)")
    add_choices(parser)


def add_choices(parser):
    """Add the options that say who chooses, and how."""
    parser.add_argument("--attend-layers", type=int, nargs="+", metavar="N",
                        help=f"the layers that read all (default: those in {LAYERS_FILE} in the "
                             f"checkpoint folder, else every third)")
    parser.add_argument("--attend-over", choices=["sum", "max"],
                        help="the score of a position over query heads (default: sum)")
    parser.add_argument("--attend-heads", choices=["shared", "own"],
                        help="all heads read the same positions, or each key-value head its own "
                             "(default: shared; of several processes each has its own)")


def check_options(arguments):
    """Raise InputError for options of how to read less without --attend."""
    for name in ("by", "layers", "over", "heads"):
        require(arguments.attend or not getattr(arguments, f"attend_{name}"),
                f"--attend-{name} is for --attend, which is not given")


def plan_of(arguments, config, positions=None, by=None):
    """Return the Plan that the options ask for; positions and by: in the place of theirs."""
    layers = arguments.attend_layers
    if layers is None:
        layers = layers_beside(arguments.model, config)
    return Plan(positions or arguments.attend, tuple(sorted(set(layers))),
                by or arguments.attend_by or "tidal", arguments.attend_over or "sum",
                arguments.attend_heads != "own")


def layers_beside(name, config):
    """Return the layers that read all by default, for a checkpoint folder or random:PRESET."""
    path = Path(name) / LAYERS_FILE
    layers = config.num_hidden_layers
    if not path.exists():
        return list(range(min(2, layers - 1), layers, 3))
    found = read_json(path).get("layers")
    require(isinstance(found, list)
            and all(type(layer) is int and 0 <= layer < layers for layer in found),
            f"{path}: layers is {found}, expected a list of numbers from 0 to {layers - 1}")
    return found
