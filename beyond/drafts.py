"""Drafts: guesses without a model, guesses that branch, and as many a pass as are fastest here.

generate.py lets a model guess a few tokens in a row and the verifier check them in one pass. Here
are three more ideas, and none of them changes the text.

Token Recycling (arXiv 2408.08696) guesses without a model. Every verify pass computes logits for
all its tokens, and most of them are thrown away. Keep of each the eight likeliest tokens, in a
table: what the model last thought would follow "the", "x1" or any other token. A guess is a row of
look-ups, which takes no time.

Trees. The likeliest guess is often wrong, and the second is right. So let guesses branch: one pass
verifies all paths, since attention shows each token only what was written and its own ancestors.

          ┌─ x1 ─┬─ x2 ─── x3        tokens of the pass:   the  x1  y1  x2  y2  x3
    the ──┤      └─ y2               node:                  0    1   2   3   4   5
          └─ y1                      x3 sees:               ■    ■   ·   ■   ·   ■

    accept    the path that the model itself takes, and one token more. The keys and values of the
              path lie apart in the cache, and are moved together.

Adaptive lengths. More guesses bring more tokens a pass, but take longer to make and to verify. How
much longer depends on the machine, and how many are right depends on the text. So `Statistics`
counts what is accepted, takes the time of every round, and finds the size of draft with the most
expected tokens a second. The size is the number of guesses; the root, node 0, is no guess.

The seam: `generate.Speculation`, of which make_cache, make_draft, read_prompt and round are
replaced. A step is still a function of tokens alone: it asks the cache where they stand and what
they see, so CUDA graphs and recorded steps verify trees and know nothing of them.

    python -m beyond --draft recycle --compare                Token Recycling beside plain decoding
    python -m beyond --draft sparse --draft-tokens 3          a fixed number of guesses a pass
"""
import functools
import heapq
import time
from collections.abc import Callable
from typing import NamedTuple

import torch

import generate
from generate import checked, from_guess
from model import KVCache, Llama, require
from sparsify import sparse_mode


# --------------------------------------------------------------------------------------------------
# Trees

class Tree:
    """The shape of a draft: node i + 1 is a guess at what follows node parents[i].

    parents: parents come before their children; the root is node 0
    ranks: which of its parent's candidates a node is, 0 the likeliest; (guesses,), as parents
    children: of each node, the root too
    depths: (nodes,) int64, how far from the root; sees: (nodes, nodes) bool, itself and ancestors
    levels: for each depth from 1 on a tensor (3, n) int64: its nodes, their parents and ranks
    """

    def __init__(self, parents, ranks, device):
        nodes = len(parents) + 1
        self.parents = parents
        self.ranks = ranks
        self.children = [[] for _ in range(nodes)]
        depths = [0]
        sees = torch.eye(nodes, dtype=torch.bool)
        levels = []
        for node, (parent, rank) in enumerate(zip(parents, ranks), start=1):
            self.children[parent].append(node)
            depth = depths[parent] + 1
            depths.append(depth)
            sees[node] |= sees[parent]
            if depth > len(levels):
                levels.append([])
            levels[depth - 1].append((node, parent, rank))
        self.depths = torch.tensor(depths, device=device)
        self.sees = sees.to(device)
        self.levels = [torch.tensor(level, device=device).T for level in levels]


@functools.cache
def chain(size, device):
    """Return the Tree of `size` guesses, one after another."""
    return Tree(list(range(size)), [0] * size, device)


# How often the next token was the candidate of each rank, on held-out text with the demo model.
CANDIDATE_ODDS = (0.38, 0.09, 0.055, 0.035, 0.028, 0.019, 0.014, 0.013)


@functools.cache
def draft_tree(size, device):
    """Return the Tree of the `size` likeliest guesses, if candidates come true by CANDIDATE_ODDS.

    Its first nodes are the smaller trees.
    """
    parents, ranks = [], []
    front = [(-odds, 0, rank) for rank, odds in enumerate(CANDIDATE_ODDS)]
    while len(parents) < size:
        likelihood, parent, rank = heapq.heappop(front)    # the likeliest: they stand below 0
        parents.append(parent)
        ranks.append(rank)
        for child_rank, odds in enumerate(CANDIDATE_ODDS):
            heapq.heappush(front, (likelihood * odds, len(parents), child_rank))
    return Tree(parents, ranks, device)


class Shapes(NamedTuple):
    """The shapes that a kind of draft has, by its size."""
    tree: Callable       # tree(size, device) -> the Tree of so many guesses
    sizes: tuple         # that are chosen from, rising
    odds: tuple          # how often a guess of each rank is right, believed before any was judged


# A verify pass over more than 8 tokens is no longer cheap on a CPU (kernel.MAX_ROWS).
CHAINS = Shapes(chain, tuple(range(8)), (0.7,))
TREES = Shapes(draft_tree, (0, 1, 3, 7, 15, 31, 79), CANDIDATE_ODDS)
MOST = max(TREES.sizes)


class TreeCache(KVCache):
    """A KVCache whose next tokens may be a tree: `grow(tree)` says so, for the next pass."""

    def __init__(self, cache):
        """cache: an empty KVCache, whose memory becomes that of this one."""
        self.keys, self.values = cache.keys, cache.values
        self.length, self.used = cache.length, cache.used
        self.tree = None

    def grow(self, tree):
        """Make the next tokens the nodes of a tree, its root first."""
        self.tree = tree

    def look(self, T, window):
        positions, mask = super().look(T, window)
        if self.tree is None or T == 1:
            return positions, mask
        positions = self.used + self.tree.depths                                # (T,)
        written = self.tree.sees.new_ones(T, self.used)
        mask = torch.cat((written, self.tree.sees), 1)                          # (T, used + T)
        if window:
            past = torch.arange(self.used, device=positions.device)
            mask &= torch.cat((past, positions)) > positions[:, None] - window
        return positions, mask

    def advance(self, T):
        super().advance(T)
        self.tree = None

    def keep(self, start, path):
        """Keep, of the tokens stored from `start` on, those of `path`, a rising list of nodes."""
        end = start + len(path)
        if path != list(range(len(path))):
            nodes = start + torch.tensor(path, device=self.keys.device)
            for states in (self.keys, self.values):        # (layers, B, G, length, D)
                states[:, :, :, start:end] = states[:, :, :, nodes]
        self.used = end


def walk(logits, tree, tokens, q, sampling, generator):
    """Return what the model itself writes, and after which nodes: two lists, the root's first.

    It is generate.verdict for a tree: from the root on, the model writes a token after a node, and
    where one of the node's children is that token, goes on from there. logits: (nodes, vocab);
    tokens: of all nodes, a list; q: (nodes - 1, vocab), the distributions that the guesses of a
    chain were drawn from, None if they were not drawn.
    """
    written, path = [], []
    node = 0
    while node is not None:
        path.append(node)
        children = tree.children[node]
        if q is not None and not sampling.greedy and children:
            guess = children[0]
            p = sampling.probabilities(logits[node])
            token = from_guess(p, q[guess - 1], tokens[guess], generator)
        else:
            token = sampling.choose(logits[node:node + 1], generator)[0].item()
        written.append(token)
        node = next((child for child in children if tokens[child] == token), None)
    return written, path


# --------------------------------------------------------------------------------------------------
# A draft without a model. A draft object may have, besides `guess`,
#     shapes                    the Shapes of its guesses; without it they are CHAINS
#     learn(tokens, logits)     which is told all that the verifier computes, the prompt's first

class RecycleDraft:
    """Token Recycling: guesses from the logits that verify passes computed anyway.

    candidates: (vocab, 8) int64, the tokens that were likeliest, the last time, to follow each.
    """
    shapes = TREES

    def __init__(self, model):
        vocab = model.config.vocab_size
        width = min(len(CANDIDATE_ODDS), vocab)
        self.candidates = torch.zeros(vocab, width, dtype=torch.int64, device=model.device)

    def guess(self, ids, n):
        """Return the n guesses of draft_tree(n) after the last of `ids`; and None, for no q."""
        device = self.candidates.device
        tokens = torch.empty(n + 1, dtype=torch.int64, device=device)
        tokens[0] = ids[-1]
        for nodes, parents, ranks in draft_tree(n, device).levels:
            tokens[nodes] = self.candidates[tokens[parents], ranks % self.candidates.shape[1]]
        return tokens[1:].tolist(), None

    def learn(self, tokens, logits):
        """Note what the model says follows each of tokens (N,), by its logits (N, vocab).

        Of equal tokens the last one counts.
        """
        order = torch.arange(len(tokens), device=tokens.device)
        last = tokens.new_zeros(len(self.candidates)).scatter_reduce_(0, tokens, order, "amax")
        likeliest = logits.topk(self.candidates.shape[1]).indices               # (N, 8)
        self.candidates[tokens] = likeliest[last[tokens]]


# --------------------------------------------------------------------------------------------------
# How many guesses?

class Statistics(generate.Statistics):
    """What a speculative run did, and from it which size of draft is best.

    judged[r], right[r]: how often a guess of rank r was judged, its parent accepted, and how often
    it was right; times: {size: seconds of each of its rounds}; last: {size: its last round}.
    """

    def __init__(self, shapes):
        super().__init__()
        self.shapes = shapes
        self.judged = [4.0] * len(shapes.odds)             # a belief counts as much as four guesses
        self.right = [4 * odds for odds in shapes.odds]
        self.times = {}
        self.last = {}

    def lines(self):
        rounds = ", ".join(f"{size}: {len(self.times[size])}" for size in sorted(self.times))
        return super().lines() + [f"rounds by guesses a pass: {rounds}"] * bool(rounds)

    def record(self, tree, path, draft_seconds, verify_seconds):
        """Count a round: the draft's tree, its accepted nodes (the root first), and its times."""
        accepted = len(path) - 1
        refused = bool(tree.children[path[-1]])            # one place more was judged
        super().record(accepted + refused, accepted)
        self.draft_seconds += draft_seconds
        self.verify_seconds += verify_seconds
        for node, (parent, rank) in enumerate(zip(tree.parents, tree.ranks), start=1):
            self.judged[rank] += parent in path
            self.right[rank] += node in path
        size = len(tree.parents)
        self.times.setdefault(size, []).append(draft_seconds + verify_seconds)
        self.last[size] = self.passes

    def expected(self, size):
        """Return how many tokens a round with a draft of `size` is expected to write.

        A node is accepted if its parent is and it is right, as often as its rank has been.
        """
        tree = self.shapes.tree(size, torch.device("cpu"))
        likelihood = [1.0]
        for parent, rank in zip(tree.parents, tree.ranks):
            likelihood.append(likelihood[parent] * self.right[rank] / self.judged[rank])
        return sum(likelihood)

    def best_size(self):
        """Return the size of draft with the most expected tokens a second.

        Sizes are tried upwards, the next one as long as it would pay if it cost what the one below
        it does. A size costs the least of its last times, since what disturbs a computer only makes
        it slower. Every 16th round goes to a neighbour of the best, whose time may have changed.
        """
        rates = {}                                         # {size: tokens a second}
        seconds = None
        for size in self.shapes.sizes:
            measured = self.times.get(size, [])[1:]        # the first sets things up, as a graph
            if measured:
                seconds = min(measured[-5:])
            if seconds is None:
                return size
            rates[size] = self.expected(size) / seconds
            if not measured:
                break
        best = max(rates, key=rates.get)
        tried = list(rates)
        i = tried.index(best)
        neighbours = tried[max(0, i - 1):i] + tried[i + 1:i + 2]
        if self.passes % 16 == 15 and neighbours:
            return min(neighbours, key=lambda size: self.last.get(size, 0))
        return best


# --------------------------------------------------------------------------------------------------
# Speculation

PART = 256               # tokens of a prompt that are read at once where all logits are wanted


def speculate(model, prompt_ids, max_new_tokens, draft="sparse", draft_thresholds=None,
              draft_tokens=None, *arguments, **named):
    """Return what generate.generate_speculative does, with more kinds of draft.

    draft: as there, or "recycle": no model, Token Recycling. A draft object may have `shapes` and
        `learn`, as RecycleDraft does.
    draft_tokens: how many tokens to guess a pass; None: what is fastest here, by what was accepted
        and by the clock. Only with a fixed number is sampled text repeatable from a seed.
    arguments, named: all the others, as there; kind None: TreeSpeculation.
    """
    require(draft_tokens is None or 1 <= draft_tokens <= MOST,
            f"draft_tokens is {draft_tokens}, expected 1 to {MOST}")
    return generate.generate_speculative(
        model, prompt_ids, max_new_tokens, draft, draft_thresholds, draft_tokens, *arguments,
        **{"kind": TreeSpeculation} | named)


class TreeSpeculation(generate.Speculation):
    """The iterator that `speculate` returns."""

    ROOM = MOST          # a tree may go beyond the end of the text

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.shapes = getattr(self.draft, "shapes", CHAINS)
        self.statistics = Statistics(self.shapes)

    def make_cache(self):
        return TreeCache(super().make_cache())

    def make_draft(self, draft, draft_thresholds):
        if draft == "recycle":
            return RecycleDraft(self.model)
        require(draft == "sparse" or isinstance(draft, Llama) or hasattr(draft, "guess"),
                f'draft is "sparse", "recycle", a Llama, or an object with guess(ids, n), not '
                f'{draft!r}')
        return super().make_draft(draft, draft_thresholds)

    def read_prompt(self):
        """Run the prompt through the verifier, and return its last logits (1, vocab).

        A draft that learns is given the logits of all positions. As they take much memory, the
        prompt is read in parts. Each part is read as one call with the whole prompt would be: in
        mode "decode" dense, even if it is a single token, unless that is the whole prompt.
        """
        if not hasattr(self.draft, "learn"):
            return super().read_prompt()
        state = getattr(self.model, "sparse_state", None)
        mode = "off"
        if state is not None:
            state.tokens = self.prompt.shape[1]            # what decides in mode "decode"
            mode = "all" if state.is_sparse() else "off"
        with sparse_mode(self.model, mode):
            for part in self.prompt.split(PART, 1):
                logits = self.model(part, self.cache)[0]                        # (T, vocab)
                self.draft.learn(part[0], logits)
        return logits[-1:]

    def round(self, ids):
        """Draft, verify, accept: return the tokens that follow `ids`, at least one."""
        began = time.perf_counter()
        start = len(ids) - 1                               # all but the last are in the cache
        size = self.draft_tokens or self.statistics.best_size()
        if self.shapes is CHAINS:                          # the last token is the verifier's own
            size = min(size, self.length - len(ids) - 1)
        guesses, q = self.draft.guess(ids, size)
        tree = self.shapes.tree(len(guesses), self.model.device)
        nodes = [ids[-1], *guesses]
        drafted = time.perf_counter()
        self.cache.used = start
        self.cache.grow(tree)
        tokens = torch.tensor([nodes], device=self.model.device)                # (1, nodes)
        with self.verifying():
            logits = self.verify(tokens)[0]                                     # (nodes, vocab)
        written, path = walk(logits, tree, nodes, q, self.sampling, self.generator)
        checked(logits[path], start)
        self.cache.keep(start, path)
        if hasattr(self.draft, "learn"):
            self.draft.learn(tokens[0], logits)
        self.statistics.record(tree, path, drafted - began, time.perf_counter() - drafted)
        return written
