"""Speculative decoding: the gain of sparsity, and nothing lost.

A pass over a few tokens reads each weight once, as a pass over one token does, and takes hardly longer. So let something cheap
guess the next tokens, and the model check them all at once:

    draft     guesses                     the x1 x2 x3       by the model at high sparsity, by a small model, from a table
    verify    one pass of the model over  the x1 x2 x3  ─►   what it writes itself behind each of them:  x1 x2 y z
    accept    the guesses it agrees with, and its own token where it does not:  x1 x2 y                  three for one pass

Greedy: a guess stays if it is the likeliest token. Sampled: a guess x drawn from the draft's q stays with probability
min(1, p(x) / q(x)), else a token is drawn from what p has above q; then it is distributed as p. Either way the model has the
last word, and the text is its own. (Leviathan et al., arXiv 2211.17192; Chen et al., arXiv 2302.01318.)

The guesses of a round form a tree: its root, node 0, is the last token that was written, and each
path down from it is a guess at what follows. Guesses x1 x2 x3 are a tree without branches. One pass verifies all nodes:
each sees what was written, and its own ancestors. The size of a draft is its number of guesses, the root not counted.
"""
import contextlib
import functools
import heapq
import time

import torch

from cli import InputError
from decode import check_prompt, check_sampling, choose, draw, probabilities, random_source
from model import Llama
from sparsify import sparse_mode
from step import Steps


class Tree:
    """The shape of a draft. Node i + 1 is a guess at what follows node parents[i], its candidate of rank ranks[i], 0 the likeliest.

    Parents come before their children. depths (nodes,), sees (nodes, nodes) bool: as Steps takes them.
    """

    def __init__(self, parents, ranks, device):
        self.parents, self.ranks, self.children = parents, ranks, [[] for _ in range(len(parents) + 1)]
        depths, sees = [0], torch.eye(len(parents) + 1, dtype=torch.bool)
        for node, parent in enumerate(parents, start=1):
            self.children[parent].append(node)
            depths.append(depths[parent] + 1)
            sees[node] |= sees[parent]
        self.depths, self.sees, self.levels = torch.tensor(depths, device=device), sees.to(device), []
        for depth in range(1, max(depths) + 1):            # of each level: its nodes, their parents and ranks
            level = [(node, parents[node - 1], ranks[node - 1]) for node, at in enumerate(depths) if at == depth]
            self.levels.append(torch.tensor(level, device=device).T)


@functools.cache
def chain(size, device):
    """`size` guesses, one behind the other."""
    return Tree(list(range(size)), [0] * size, device)


# How often the next token was the candidate of each rank, on the held-out text with the demo model.
CANDIDATE_ODDS = (0.38, 0.09, 0.055, 0.035, 0.028, 0.019, 0.014, 0.013)


@functools.cache
def draft_tree(size, device):
    """The `size` likeliest guesses, if candidates come true by CANDIDATE_ODDS. Its first nodes are the smaller trees."""
    parents, ranks, front = [], [], [(-odds, 0, rank) for rank, odds in enumerate(CANDIDATE_ODDS)]    # a heap, likeliest first
    while len(parents) < size:
        likelihood, parent, rank = heapq.heappop(front)
        parents.append(parent)
        ranks.append(rank)
        for next_rank, odds in enumerate(CANDIDATE_ODDS):  # the new node's children
            heapq.heappush(front, (likelihood * odds, len(parents), next_rank))
    return Tree(parents, ranks, device)


class ModelDraft:
    """Guesses token by token with a model: the verifier itself at high sparsity, or a smaller one.

    The verifier itself works in the verifier's cache: the keys and values it writes lie ahead of the verified ones, and the
    verify pass writes the exact ones over them. A smaller model has a cache of its own, and catches up with what was written.
    """
    SIZES = range(8)         # that are chosen from; a verify pass over more than 8 tokens is no longer cheap on a CPU
    ODDS = (0.7,)            # that a guess is right, before any was judged
    shape = staticmethod(chain)

    def __init__(self, model, cache, shared=False, mode=contextlib.nullcontext):
        """mode: makes the context in which the model guesses."""
        self.model, self.cache, self.shared, self.mode, self.step = model, cache, shared, mode, Steps(model, cache)

    def read(self, prompt, verifier):
        """Runs the prompt (1, T) through the verifier, and through the draft model where it is another. Its last logits."""
        if not self.shared:
            self.model(prompt[:, :self.cache.length], self.cache, last_only=True)
        return verifier(prompt, last_only=True)[:, -1]

    def guess(self, ids, size, sampling, generator):
        """`size` guesses at what follows `ids`, fewer where the cache ends: (tokens, their distributions q or None)."""
        held = self.cache.used = min(self.cache.used, len(ids) - 1)
        tokens, guesses, q = torch.tensor([ids[held:]], device=self.model.device), [], []
        with self.mode():
            for _ in range(min(size, self.cache.length - len(ids) + 1)):
                # Some rounds without a draft leave more to catch up with than a graph is worth.
                logits = self.step(tokens) if tokens.shape[1] <= 2 else self.model(tokens, self.cache, last_only=True)
                tokens, p = choose(logits[:, -1], sampling, generator)                      # (1, 1), (1, vocab)
                guesses.append(tokens)
                q.append(p)
        return torch.cat(guesses).flatten().tolist() if guesses else [], torch.cat(q) if q and q[0] is not None else None

    def learn(self, tokens, logits):
        """A model knows what it knows."""


class RecycleDraft:
    """Token Recycling (arXiv 2408.08696): guesses without a model, from logits that verify passes computed and left behind.

    candidates (vocab, 8): the tokens that were likeliest, the last time, to follow each token. A tree is grown from them.
    """
    SIZES = (0, 1, 3, 7, 15, 31, 79)
    ODDS = CANDIDATE_ODDS
    shape = staticmethod(draft_tree)

    def __init__(self, model):
        width = min(len(CANDIDATE_ODDS), model.config.vocab_size)
        self.candidates = torch.zeros(model.config.vocab_size, width, dtype=torch.int64, device=model.device)

    def read(self, prompt, verifier):
        """Runs the prompt (1, T) through the verifier, in parts since all logits count here, and learns. The last logits."""
        for part in prompt.split(256, 1):
            logits = verifier(part)[0]                                                      # (T, vocab)
            self.learn(part[0], logits)
        return logits[-1:]

    def guess(self, ids, size, sampling, generator):
        """The tokens of draft_tree(size) behind the last of `ids`, level by level. They were not drawn: no q."""
        tokens = torch.empty(size + 1, dtype=torch.int64, device=self.candidates.device)
        tokens[0] = ids[-1]
        for nodes, parents, ranks in draft_tree(size, self.candidates.device).levels:
            tokens[nodes] = self.candidates[tokens[parents], ranks % self.candidates.shape[1]]
        return tokens[1:].tolist(), None

    def learn(self, tokens, logits):
        """tokens (N,), logits (N, vocab): what the model has just said follows each of them. The last of equal tokens counts."""
        order = torch.arange(len(tokens), device=tokens.device)
        last = tokens.new_zeros(len(self.candidates)).scatter_reduce_(0, tokens, order, "amax")
        self.candidates[tokens] = logits.topk(self.candidates.shape[1]).indices[last[tokens]]


class Statistics:
    """What a speculative run did, and from it what size of draft is best.

    tokens: written by verify passes; passes; draft_seconds, verify_seconds
    reached[i], accepted[i]: how often a guess at place i + 1 was judged, those before it accepted; how often accepted
    judged[r], right[r]: how often a guess of rank r was judged, its parent accepted; how often accepted
    """

    def __init__(self, draft):
        self.tokens = self.passes = 0
        self.draft_seconds = self.verify_seconds = 0.0
        self.reached, self.accepted = [], []
        self.sizes, self.shape = list(draft.SIZES), draft.shape
        self.judged = [4.0] * len(draft.ODDS)              # what is held to be true at first counts as four guesses
        self.right = [4 * odds for odds in draft.ODDS]
        self.times, self.last = {}, {}                     # by size: seconds of its rounds, number of its last round

    @property
    def tokens_a_pass(self):
        return self.tokens / max(1, self.passes)

    @property
    def acceptance(self):
        """The share of guesses accepted at each place, of those that were judged."""
        return [accepted / reached for accepted, reached in zip(self.accepted, self.reached)]

    def record(self, tree, path, draft_seconds, verify_seconds):
        """One round: the draft's tree, its accepted nodes (the root first) and the times it took."""
        self.passes += 1
        self.draft_seconds += draft_seconds
        self.verify_seconds += verify_seconds
        for place, node in enumerate(path):
            if tree.children[node]:
                if place == len(self.reached):
                    self.reached.append(0)
                    self.accepted.append(0)
                self.reached[place] += 1
                self.accepted[place] += place + 1 < len(path)
        for node, (parent, rank) in enumerate(zip(tree.parents, tree.ranks), start=1):
            self.judged[rank] += parent in path
            self.right[rank] += node in path
        size = len(tree.parents)
        self.times.setdefault(size, []).append(draft_seconds + verify_seconds)
        self.last[size] = self.passes

    def expected(self, size):
        """The tokens that a round with a draft of `size` is expected to write: each node is accepted if its parent is and
        it is right, as often as guesses of its rank have been."""
        tree, likelihood = self.shape(size, torch.device("cpu")), [1.0]
        for parent, rank in zip(tree.parents, tree.ranks):
            likelihood.append(likelihood[parent] * self.right[rank] / self.judged[rank])
        return sum(likelihood)

    def best_size(self):
        """The draft size with the most expected tokens a second.

        Sizes are tried upwards, the next one as long as it would pay if it cost what the one below it does. A size costs the
        least of its last times, since what disturbs a computer only makes it slower; and every 16th round goes to a
        neighbour of the best, so that what changes, or was disturbed, is found out.
        """
        rates, seconds = {}, None
        for size in self.sizes:
            measured = self.times.get(size, [])[1:]        # the first sets things up: a graph, the kernel's threads
            seconds = min(measured[-5:]) if measured else seconds
            if seconds is None:
                return size
            rates[size] = self.expected(size) / seconds
            if not measured:
                break
        best, tried = max(rates, key=rates.get), list(rates)
        if self.passes % 16 == 15:
            at = tried.index(best)
            return min(tried[max(0, at - 1):at] + tried[at + 1:at + 2] or [best], key=lambda size: self.last.get(size, 0))
        return best


def verdict(logits, tree, tokens, q, sampling, generator):
    """What the model writes itself, given its logits (nodes, vocab): (tokens, the nodes they were written behind, root first).

    tokens: of all nodes; q (nodes - 1, vocab): the distributions that the guesses were drawn from, None if they were not drawn.
    Greedy: each token is the likeliest. Sampled: each is drawn from the model's own distribution p, by way of the guess where
    that was drawn too (`from_guess`). Where a guess is that token the walk goes on behind it, else it ends: all tokens but
    the last were guessed.
    """
    likeliest = logits.argmax(-1).tolist() if sampling[0] == 0 else None
    written, path, node = [], [], 0
    while node is not None:
        path.append(node)
        children = tree.children[node]
        if likeliest:
            token = likeliest[node]
        else:
            p = probabilities(logits[node], *sampling)
            if q is not None and children:
                token = from_guess(p, q[children[0] - 1], tokens[children[0]], generator)
            else:
                token = draw(p[None], generator).item()
        written.append(token)
        node = next((child for child in children if tokens[child] == token), None)
    return written, path


def from_guess(p, q, guess, generator):
    """A token distributed as p (vocab,), given a guess that was drawn from q (vocab,): the guess as often as can be.

    With probability min(1, p/q) it stays; else a token is drawn from where p is above q. A token x so comes out with probability
    min(p, q) + (what was refused in all) * (p - q)₊ / Σ (p - q)₊ = min(p, q) + (p - q)₊ = p.
    """
    if stays(p[guess], q[guess], torch.rand((), generator=generator, device=p.device)):
        return guess
    rest = (p - q).clamp(min=0)
    return draw((rest if rest.sum() > 0 else p)[None], generator).item()


def stays(p, q, uniform):
    """Whether a guess is accepted, with probability min(1, p/q); uniform: drawn from [0, 1)."""
    return bool(uniform * q < p)


def generate_speculative(model, prompt_ids, max_new_tokens, draft="sparse", draft_thresholds=None, draft_tokens=None,
                         temperature=0.0, top_k=None, top_p=None, seed=None, eos_ids=(), sparse_verifier=False):
    """The text of `generate` in fewer passes: an iterator of token ids, with .statistics (a Statistics) and .against (which model's).

    The text is the dense model's, whatever is sparse: that of `generate` in sparse_mode "off". With sparse_verifier it is that
    of `generate` in the mode in force now, and in mode "all" it always is. Greedy text is the same token for token, up to
    rounding (sums over several tokens are taken in another order than over one); sampled text has the same distribution.

    draft: "sparse": the model itself (sparsified) with draft_thresholds, as sparse_mode takes them; None: those in force
           "recycle": no model, Token Recycling
           a Llama with the same vocabulary, on the same device
    draft_tokens: how many tokens to guess a pass; None: what is fastest here, by what was accepted and by the clock.
    Only with a fixed number is sampled text repeatable from a seed. Everything else as for `generate`.
    """
    check_sampling(temperature, top_k, top_p, seed)
    prompt = check_prompt(model, prompt_ids, max_new_tokens)
    if draft_tokens is not None and not 1 <= draft_tokens <= max(RecycleDraft.SIZES):
        raise InputError(f"draft_tokens is {draft_tokens}, expected 1 to {max(RecycleDraft.SIZES)}")
    state = getattr(model, "sparse_state", None)
    if state is not None and state.where == "all" and state.dense_prefix:
        raise InputError("a dense prefix is not for decoding, where every step would begin anew")
    if draft == "sparse" and state is None:
        raise InputError('draft "sparse" needs a model made sparse: sparsify(model, thresholds)')
    if isinstance(draft, Llama):
        if draft.config.vocab_size != model.config.vocab_size:
            raise InputError(f"the draft model has {draft.config.vocab_size} tokens, the model {model.config.vocab_size}")
        if draft.device != model.device:
            raise InputError(f"the draft model is on {draft.device}, the model on {model.device}")
    elif draft not in ("sparse", "recycle"):
        raise InputError(f'draft is "sparse", "recycle" or a Llama, not {draft!r}')
    return Speculation(model, prompt, max_new_tokens, draft, draft_thresholds, draft_tokens, (temperature, top_k, top_p),
                       random_source(model, seed), frozenset(eos_ids), sparse_verifier)


class Speculation:
    """The iterator that generate_speculative returns."""

    def __init__(self, model, prompt, max_new_tokens, draft, draft_thresholds, draft_tokens, sampling, generator, eos_ids, sparse):
        state = getattr(model, "sparse_state", None)
        where, thresholds = ("off", None) if state is None else (state.where, state.thresholds.clone())
        if where == "decode" and not sparse:
            where = "off"
        self.against = "the dense model" if where == "off" else "the sparse model"
        self.reading = lambda: sparse_mode(model, where, thresholds)       # for the prompt: as `generate` would read it
        self.verifying = lambda: sparse_mode(model, "off" if where == "off" else "all", thresholds)
        self.model, self.prompt, self.draft_tokens, self.sampling = model, prompt, draft_tokens, sampling
        self.generator, self.eos_ids = generator, eos_ids
        self.length = min(prompt.shape[1] + max_new_tokens, model.config.max_position_embeddings)
        self.cache = model.make_cache(1, self.length + max(RecycleDraft.SIZES))             # room for a draft at the end
        if draft == "sparse":
            with sparse_mode(model, "all", draft_thresholds):
                guessing = state.thresholds.clone()
            self.draft = ModelDraft(model, self.cache, True, lambda: sparse_mode(model, "all", guessing))
        elif draft == "recycle":
            self.draft = RecycleDraft(model)
        else:
            self.draft = ModelDraft(draft, draft.make_cache(1, min(self.length, draft.config.max_position_embeddings)))
        self.statistics = Statistics(self.draft)
        self.text = self.run()

    def __iter__(self):
        return self

    def __next__(self):
        return next(self.text)

    @torch.no_grad()
    def run(self):
        ids, verify = self.prompt[0].tolist(), Steps(self.model, self.cache)
        with self.reading():
            logits = self.draft.read(self.prompt, lambda tokens, **options: self.model(tokens, self.cache, **options))
        written = [choose(logits, self.sampling, self.generator)[0].item()]
        while True:
            for token in written:
                if token in self.eos_ids:
                    return
                ids.append(token)
                self.statistics.tokens += self.statistics.passes > 0
                yield token
                if len(ids) == self.length:
                    return
            written = self.round(ids, verify)

    def round(self, ids, verify):
        """Draft, verify, accept: the tokens that follow `ids`, at least one."""
        began, start, device = time.perf_counter(), len(ids) - 1, self.prompt.device        # all but the last are in the cache
        size = self.statistics.best_size() if self.draft_tokens is None else self.draft_tokens
        if isinstance(self.draft, ModelDraft):
            size = min(size, self.length - len(ids) - 1)   # the last token that is wanted comes from the verifier
        guesses, q = self.draft.guess(ids, size, self.sampling, self.generator)
        tree, tokens = self.draft.shape(len(guesses), device), torch.tensor([ids[-1], *guesses], device=device)
        drafted, self.cache.used = time.perf_counter(), start
        with self.verifying():
            logits = (verify(tokens[None], tree.depths, tree.sees) if guesses else verify(tokens[None]))[0]    # (nodes, vocab)
        written, path = verdict(logits, tree, [ids[-1], *guesses], q, self.sampling, self.generator)
        self.cache.keep(start, path)
        self.draft.learn(tokens, logits)
        self.statistics.record(tree, path, drafted - began, time.perf_counter() - drafted)
        return written
