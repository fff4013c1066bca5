"""Decoding: how a model that scores the next token writes a text.

    prefill   the prompt runs through the model at once, dense; the KV cache now holds its positions
    decode    choose a token from the last logits ─► run that one token through the model, sparse ─► its logits ─┐
                    ▲                                                                                            │
                    └────────────────────────────────────────────────────────────────────────────────────────────┘

Each turn reads all weights that are not skipped, for one token: this loop is what activation sparsity speeds up.

Greedy decoding (temperature 0) takes the likeliest token. Sampling divides the logits by the temperature, keeps the
top_k likeliest tokens and of those the fewest that hold a share top_p of the probability, and draws from what is left.

Speculative decoding makes the gain of sparsity lossless. A pass over a few tokens reads each weight once, as a pass over
one token does, and takes hardly longer. So let something cheap guess the next tokens, and the model check them all at once:

    draft     guesses                     the x1 x2 x3       by the model at high sparsity, by a small model, from a table
    verify    one pass of the model over  the x1 x2 x3  ─►   what it writes itself behind each of them:  x1 x2 y z
    accept    the guesses it agrees with, and its own token where it does not:  x1 x2 y                  three for one pass

Greedy: a guess stays if it is the likeliest token. Sampled: a guess x drawn from the draft's q stays with probability
min(1, p(x) / q(x)), else a token is drawn from what p has above q; then it is distributed as p. Either way the model has the
last word, and the text is its own. (Leviathan et al., arXiv 2211.17192; Chen et al., arXiv 2302.01318.)

    python generate.py                                         the demo: a small model writes Python, dense and sparse
    python generate.py --model FOLDER --prompt TEXT --sparsity 0.5
    python generate.py --draft sparse --compare                the demo, speculating, beside plain decoding
"""
import contextlib
import functools
import heapq
import statistics
import sys
import time

import torch

import parallel
from calibrate import load_calibration
from kernel import best_backend
from model import DEMO, InputError, Llama, Parser, check_tokens, command_line, in_window, linear_names, load_model, natural, progress_line
from sparsify import realised_sparsity, reset_counts, sparse_mode, sparsify
from tokenizer import StreamDecoder, chat_template

PROMPT = 'class Stack:\n    """A last-in, first-out stack of items."""\n\n    def __init__(self'


def probabilities(logits, temperature, top_k=None, top_p=None):
    """The distribution that is sampled from: logits (..., vocab) -> (..., vocab), temperature above 0."""
    logits = (logits - logits.max(-1, keepdim=True).values) / temperature    # the largest is 0 at any temperature
    if top_k is not None and top_k < logits.shape[-1]:
        best = logits.topk(top_k)
        logits = torch.full_like(logits, float("-inf")).scatter(-1, best.indices, best.values)
    p = logits.softmax(-1)
    if top_p is not None:
        ordered, order = p.topk(min(1024, p.shape[-1]))    # nearly always enough, and ten times faster than to sort all
        if (ordered.sum(-1) < top_p).any():
            ordered, order = p.sort(-1, descending=True)
        enough = ordered.cumsum(-1) - ordered >= top_p     # what the likelier tokens hold together
        enough[..., 0] = False
        p = torch.zeros_like(p).scatter(-1, order, ordered.masked_fill(enough, 0.0))
        p = p / p.sum(-1, keepdim=True)
    return p


def check_sampling(temperature, top_k, top_p, seed=None):
    """Raises InputError for settings that define no distribution."""
    if seed is not None and not 0 <= seed < 2**63:
        raise InputError(f"seed is {seed}, expected 0 to 2^63 - 1")
    if not 0 <= temperature < float("inf"):
        raise InputError(f"temperature is {temperature}, expected 0 (greedy) or more")
    if top_k is not None and top_k < 1:
        raise InputError(f"top_k is {top_k}, expected at least 1")
    if top_p is not None and not 0 < top_p <= 1:
        raise InputError(f"top_p is {top_p}, expected above 0 and at most 1")


def check_prompt(model, prompt_ids, max_new_tokens):
    """The prompt as a tensor (1, T) on the model's device; InputError if it is empty or does not fit the model."""
    if max_new_tokens < 1:
        raise InputError(f"max_new_tokens is {max_new_tokens}, expected at least 1")
    prompt = torch.as_tensor(list(prompt_ids), dtype=torch.int64)
    if not len(prompt):
        raise InputError("the prompt is empty: it needs at least one token")
    if len(prompt) >= model.config.max_position_embeddings:
        raise InputError(f"the prompt has {len(prompt)} tokens, the model's context holds "
                         f"{model.config.max_position_embeddings} with at least one new one")
    check_tokens(prompt, model.config)
    return prompt[None].to(model.device)


def generate(model, prompt_ids, max_new_tokens, temperature=0.0, top_k=None, top_p=None, seed=None, eos_ids=()):
    """An iterator of the token ids that follow `prompt_ids`, each computed when it is asked for.

    It ends after max_new_tokens, where the model's context is full, or before a token of eos_ids.
    temperature 0 is greedy. seed: an int makes sampling repeatable; None draws anew each time.
    Raises InputError, at once, for a prompt or settings that cannot be used.
    """
    check_sampling(temperature, top_k, top_p, seed)
    prompt = check_prompt(model, prompt_ids, max_new_tokens)
    return _decode(model, prompt, max_new_tokens, temperature, top_k, top_p, seed, frozenset(eos_ids))


@torch.no_grad()
def _decode(model, prompt, max_new_tokens, temperature, top_k, top_p, seed, eos_ids):
    sampling, generator = (temperature, top_k, top_p), random_source(model, seed)
    length = min(prompt.shape[1] + max_new_tokens, model.config.max_position_embeddings)
    cache = model.make_cache(1, length)
    logits, step = model(prompt, cache, last_only=True)[:, -1], Steps(model, cache)         # (1, vocab)
    for left in reversed(range(length - prompt.shape[1])):
        tokens, _ = choose(logits, sampling, generator)                                     # (1, 1)
        token = tokens.item()
        if token in eos_ids:
            return
        yield token
        if left:
            logits = step(tokens)[:, -1]


def choose(logits, sampling, generator):
    """The next token after each of logits (N, vocab), as (N, 1), and the distributions (N, vocab) it is drawn from, None if greedy."""
    if sampling[0] == 0:
        return logits.argmax(-1, keepdim=True), None
    p = probabilities(logits, *sampling)
    return torch.multinomial(p, 1, generator=generator), p


def random_source(model, seed):
    generator = torch.Generator(model.device)
    return generator.manual_seed(parallel.from_first(lambda: generator.seed() if seed is None else seed))


class Steps:
    """`model(tokens, cache)` for a few tokens at a time, on a GPU replayed from CUDA graphs.

    A step of decoding is hundreds of small kernels, which the host cannot launch as fast as the GPU runs them. A graph
    launches them at once, but always the same kernels on the same memory. So the tokens, where they stand and
    what they see are tensors that are overwritten before each replay, and attention looks at the whole cache
    through a mask. One graph for each number of tokens, captured when it is first needed, in the sparse_mode
    that is then in force; thresholds are read where they lie, so that changed ones count.
    """

    def __init__(self, model, cache):
        self.model, self.cache, self.graphs = model, cache, {}

    def __call__(self, tokens, depths=None, sees=None):
        """tokens (1, T) int64 -> logits (1, T, vocab), valid until the next call; the cache is T positions longer.

        For a tree of tokens: depths (T,) says how far behind the used positions each stands, sees (T, T) bool
        which of the others each sees.
        """
        model, cache, T = self.model, self.cache, tokens.shape[1]
        if model.device.type != "cuda":
            if depths is None:
                return model(tokens, cache)
            window, positions = model.config.sliding_window, cache.used + depths
            past, sees = in_window(torch.arange(cache.used), positions, window), sees & in_window(positions, positions, window)
            return model(tokens, cache, positions, torch.cat((past, sees), 1))
        order = torch.arange(T, device=model.device)
        slots = cache.used + order
        positions = slots if depths is None else cache.used + depths
        all_slots = torch.arange(cache.length, device=model.device)
        mask = (all_slots < cache.used) & in_window(all_slots, positions, model.config.sliding_window)      # (T, length)
        sees = order <= order[:, None] if sees is None else sees
        mask[:, cache.used:cache.used + T] = sees & in_window(positions, positions, model.config.sliding_window)
        inputs = tokens, positions, mask, slots
        if T not in self.graphs:
            self.graphs[T] = self.capture([tensor.clone() for tensor in inputs])
        graph, places, logits = self.graphs[T]
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


# ---------------------------------------------------------------------------------------------------------
# Speculative decoding. The guesses of a round form a tree: its root, node 0, is the last token that was written, and each
# path down from it is a guess at what follows. Guesses x1 x2 x3 are a tree without branches. One pass verifies all nodes:
# each sees what was written, and its own ancestors. The size of a draft is its number of guesses, the root not counted.

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
                token = torch.multinomial(p, 1, generator=generator).item()
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
    return torch.multinomial(rest if rest.sum() > 0 else p, 1, generator=generator).item()


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


# ---------------------------------------------------------------------------------------------------------
# Text as it comes, and the command line

def stream(tokens, decoder, show):
    """Takes tokens from an iterator to its end, shows their text as it comes, and measures. Ctrl-C ends it early.

    Returns (ids, seconds to the first token, seconds for the rest, whether it was interrupted).
    """
    ids, began, first, interrupted = [], time.perf_counter(), None, False
    try:
        for token in tokens:
            first = first or time.perf_counter()
            ids.append(token)
            show(decoder.add(token) if decoder else f" {token}")
    except KeyboardInterrupt:
        interrupted = True
    ended = time.perf_counter()
    show((decoder.end() if decoder else "") + "\n[interrupted]" * interrupted)
    first = first or ended
    return ids, first - began, ended - first, interrupted


def rate(ids, seconds):
    """Tokens a second of decoding, without the first token, which is the prompt's; 0 where there was no other."""
    return (len(ids) - 1) / seconds if len(ids) > 1 else 0.0


def same_tokens(tokenizer, other, name):
    """Raises InputError if the tokenizer of the draft model `name` is not that of the model (both None: random models)."""
    if (tokenizer is None) != (other is None):
        raise InputError(f"--draft {name}: one of the two models has a tokenizer, the other has random weights and none")
    if tokenizer is not None:
        ours, theirs = tokenizer.pieces(), other.pieces()
        if ours != theirs:
            at = next((i for i, (a, b) in enumerate(zip(ours, theirs)) if a != b), min(len(ours), len(theirs)))
            raise InputError(f"--draft {name}: its tokenizer is not the model's, they differ from token {at} on")


def demo_tokens_a_pass(draft, sparsity, sizes, prompts=8, new_tokens=96):
    """{size: tokens a pass} of drafts on the demo model and held-out text, sampling at temperature 1, top-p 0.9."""
    from sparsify import read_tokens
    model, tokenizer = load_model(DEMO)
    sparsify(model, load_calibration(model, DEMO).thresholds(sparsity))
    texts = read_tokens(tokenizer, None, "held-out")[0][:prompts * 1000].view(prompts, 1000)[:, :64].tolist()
    found = {}
    for size in sizes:
        progress_line(f"tokens a pass on the demo model: {size} guesses")
        written = passes = 0
        for seed, prompt in enumerate(texts):
            run = generate_speculative(model, prompt, new_tokens, draft, draft_tokens=size, temperature=1.0, top_p=0.9, seed=seed)
            for _ in run:
                pass
            written, passes = written + run.statistics.tokens, passes + run.statistics.passes
        found[size] = written / passes
    return found


def draft_costs(model, draft, sparsity):
    """Prints what drafts cost on a random model, and what they would bring with the acceptance of the demo model.

    The model is sparse, with the draft's thresholds. Random weights accept at random, so each is measured where it can be.
    """
    sampling, generator = (1.0, None, 0.9), random_source(model, 0)
    kind = ModelDraft if draft == "sparse" else RecycleDraft
    sizes = [size for size in kind.SIZES if size]
    brought = demo_tokens_a_pass(draft, sparsity, sizes)
    prompt, cache = torch.arange(1, 65, device=model.device)[None], model.make_cache(1, 256)

    def milliseconds(call, repeats=9):
        """The median; each call begins behind the prompt."""
        times = []
        for _ in range(repeats + 2):                       # the first two set things up
            cache.used = prompt.shape[1]
            began = time.perf_counter()
            call()
            times.append(1e3 * (time.perf_counter() - began))
        return statistics.median(times[2:])

    with torch.no_grad(), sparse_mode(model, "off"):
        model(prompt, cache, last_only=True)
        verify, step, recycle = Steps(model, cache), Steps(model, cache), RecycleDraft(model)
        plain = milliseconds(lambda: choose(verify(prompt[:, :1])[:, -1], sampling, generator)[0].item())
        print(f"a plain step {plain:.1f} ms, {1e3 / plain:.1f} tokens/s")
        if draft == "sparse":
            with sparse_mode(model, "all"):
                one = milliseconds(lambda: choose(step(prompt[:, :1])[:, -1], sampling, generator)[0].item())
            print(f"a draft step at {sparsity:.0%} {one:.1f} ms")
        print(f"{'guesses':>8} {'draft ms':>9} {'verify ms':>10} {'tokens a pass':>14} {'tokens/s':>9} {'ratio':>7}")
        for size in sizes:
            tree, tokens = kind.shape(size, model.device), prompt[:, :1].expand(1, size + 1)
            guess = size * one if draft == "sparse" else milliseconds(lambda: recycle.guess([1], size, sampling, generator))

            def verified():
                logits = verify(tokens, tree.depths, tree.sees)[0]
                verdict(logits, tree, tokens[0].tolist(), None, sampling, generator)
                if draft == "recycle":
                    recycle.learn(tokens[0], logits)
            pass_ = milliseconds(verified)
            print(f"{size:8} {guess:9.1f} {pass_:10.1f} {brought[size]:14.2f} {1e3 * brought[size] / (guess + pass_):9.1f} "
                  f"{brought[size] * plain / (guess + pass_):6.2f}x", flush=True)
    print("times: this model's, with random weights; tokens a pass: the demo model's; both sampled at temperature 1, top-p 0.9")


def read_arguments():
    """The command line, checked as far as it can be without a model."""
    parser = Parser(description="Writes text with a Llama. Without arguments: the demo model, dense and then sparse.")
    parser.add_argument("--model", default=str(DEMO), help="checkpoint folder, or random:PRESET (default: the demo model)")
    parser.add_argument("--prompt", help="text to continue (default: the beginning of a Python class)")
    parser.add_argument("--sparsity", type=float, metavar="S",
                        help="share of the blocks' weights to skip, 0 to below 1 (default: 0.5 after a dense run to compare; 0 with --draft)")
    parser.add_argument("--draft", metavar="KIND", help="speculate, and lose nothing: sparse (guesses by the model itself, sparser), "
                        "recycle (Token Recycling, no model), demo or the folder of a smaller model (default: no speculation); "
                        "with a random: model, a table of what guesses cost")
    parser.add_argument("--draft-sparsity", type=float, metavar="S", help="of --draft sparse (default: 0.75)")
    parser.add_argument("--draft-tokens", type=natural, metavar="N", help="guesses a pass (default: what is fastest, found while it "
                        "decodes; then a seed does not repeat a sampled text)")
    parser.add_argument("--compare", action="store_true", help="with --draft: decode plainly too (default: no)")
    parser.add_argument("--chat", action="store_true", help="talk: each line of input is a turn, in the checkpoint's own chat format "
                        "(default: no)")
    parser.add_argument("--system", metavar="TEXT", help="with --chat: what the model is told first (default: nothing)")
    parser.add_argument("--max-new-tokens", type=natural, default=128, metavar="N", help="(default: 128)")
    parser.add_argument("--temperature", type=float, help="0 is greedy (default: 0; 1 in the demo, where so small a model "
                        "would soon repeat itself)")
    parser.add_argument("--top-k", type=int, help="sample from the k likeliest tokens (default: all)")
    parser.add_argument("--top-p", type=float, help="sample from the likeliest tokens that hold this share (default: all; 0.9 in the demo)")
    parser.add_argument("--seed", type=int, help="makes sampling repeatable (default: 0 when runs are compared, else none)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu",
                        help="(default: cuda where there is one, else cpu)")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], help="(default: the checkpoint's own)")
    parser.add_argument("--quantize", choices=["int8", "int4"], help="round the blocks' weights first (default: as they are)")
    parser.add_argument("--calibration", metavar="FILE", help="(default: calibration.safetensors in the checkpoint folder)")
    parser.add_argument("--allocation", help="how the sparsity is shared out (default: the best that the calibration holds)")
    arguments = parser.parse_args()
    demo = arguments.model == str(DEMO) and arguments.prompt is None and not arguments.draft
    for name in ("prompt", "compare") if arguments.chat else ("system",):
        if getattr(arguments, name):
            raise InputError(f"--{name} is for {'a text, not for --chat' if arguments.chat else '--chat, which is not given'}")
    if arguments.temperature is None:
        arguments.temperature = 1.0 if demo else 0.0
        arguments.top_p = arguments.top_p or (0.9 if demo else None)
    beside_dense = arguments.sparsity is None and not arguments.chat        # the default without a draft
    if arguments.sparsity is None:
        arguments.sparsity = 0.0 if arguments.draft or arguments.chat else 0.5
    if arguments.draft != "sparse" and arguments.draft_sparsity is not None:
        raise InputError("--draft-sparsity is for --draft sparse")
    arguments.draft_sparsity = 0.75 if arguments.draft_sparsity is None else arguments.draft_sparsity
    for name in ("sparsity", "draft_sparsity"):
        if not 0 <= getattr(arguments, name) < 1:
            raise InputError(f"--{name.replace('_', '-')} is {getattr(arguments, name)}, expected at least 0 and below 1")
    for name in ("compare", "draft_tokens"):
        if getattr(arguments, name) and (not arguments.draft or arguments.model.startswith("random:")):
            raise InputError(f"--{name.replace('_', '-')} is for --draft with a checkpoint folder")
    check_sampling(arguments.temperature, arguments.top_k, arguments.top_p, arguments.seed)
    if not arguments.draft:
        arguments.compare = beside_dense
    if arguments.compare and arguments.seed is None:
        arguments.seed = 0
    return arguments


def main():
    arguments = read_arguments()
    with parallel.group(arguments.device) as arguments.device:         # one process, unless torchrun has started more
        show(arguments)


def show(arguments):
    """What the command line asks for."""
    if parallel.ranks() > 1 and arguments.draft and not arguments.draft_tokens:
        raise InputError("--draft with several processes needs --draft-tokens: each would find another number the fastest")
    template = chat_template(arguments.model) if arguments.chat else None
    model, tokenizer = load_model(arguments.model, arguments.device, arguments.dtype, arguments.quantize,
                                  parallel if parallel.ranks() > 1 else Llama)
    if tokenizer is None:
        if arguments.prompt is not None:
            raise InputError(f"--prompt: {arguments.model} has random weights and no tokenizer")
        prompt, eos_ids = torch.arange(1, 17).tolist(), ()
        print(f"{arguments.model}: random weights, for speed alone; what it writes are token numbers")
    else:
        prompt, eos_ids = tokenizer.encode(PROMPT if arguments.prompt is None else arguments.prompt), tokenizer.eos_ids
    check_prompt(model, prompt, arguments.max_new_tokens)
    dtype = str(model.model.embed_tokens.weight.dtype).removeprefix("torch.")
    threads = f", {torch.get_num_threads()} threads" if model.device.type == "cpu" else ""
    threads += f", {parallel.ranks()} processes" if parallel.ranks() > 1 else ""
    print(f"{arguments.model}, {dtype}, {model.device.type}{threads}, torch {torch.__version__}")

    ours = best_backend(model.model.embed_tokens.weight)

    def thresholds_for(sparsity):
        thresholds = dict.fromkeys(linear_names(model.config), 0.0)
        if sparsity:
            thresholds = load_calibration(model, arguments.model, arguments.calibration).thresholds(sparsity, arguments.allocation)
        if ours == "c":                                    # the head stays dense, but is read faster by our kernel
            thresholds["lm_head"] = 0.0
        return parallel.part_of_thresholds(thresholds)

    sampling = dict(temperature=arguments.temperature, top_k=arguments.top_k, top_p=arguments.top_p, seed=arguments.seed,
                    eos_ids=eos_ids)

    def run(title, tokens):
        """Shows what an iterator of tokens writes; (ids, tokens a second)."""
        print(f"--- {title}")
        if tokenizer is not None:
            print(tokenizer.decode(prompt), end="", flush=True)
        reset_counts(model)
        ids, first, rest, interrupted = stream(tokens, tokenizer and StreamDecoder(tokenizer, prompt),
                                               lambda text: print(text, end="", flush=True))
        parallel.count_together(model)
        skipped = f", {realised_sparsity(model):.1%} of the blocks' weights skipped" if not arguments.draft else ""
        print(f"\n--- {title}: {len(ids)} tokens, {rate(ids, rest):.1f} tokens/s, prompt of {len(prompt)} in {first * 1e3:.0f} ms{skipped}",
              flush=True)
        if interrupted:
            raise KeyboardInterrupt
        return ids, rate(ids, rest)

    def text_of(prompt):
        """The tokens that follow a prompt, as the command line wants them written."""
        if not arguments.draft:
            return generate(model, prompt, arguments.max_new_tokens, **sampling)
        return generate_speculative(model, prompt, arguments.max_new_tokens, draft, draft_thresholds, arguments.draft_tokens,
                                    **sampling, sparse_verifier=arguments.sparsity > 0)

    if arguments.draft:
        draft, draft_thresholds = prepare_draft(model, tokenizer, arguments, thresholds_for)
        if tokenizer is None and isinstance(draft, str):   # a random model: what it would write says nothing
            draft_costs(model, draft, arguments.draft_sparsity)
            return
        if not arguments.chat:
            speculate(model, prompt, arguments, lambda: generate(model, prompt, arguments.max_new_tokens, **sampling), text_of, run)
            return
    elif not arguments.compare:
        sparsify(model, thresholds_for(arguments.sparsity))
    if arguments.chat:
        with sparse_mode(model, "decode" if arguments.sparsity else "off"):
            chat(tokenizer, template, arguments.system, text_of)
        return
    if not arguments.compare:
        with sparse_mode(model, "decode" if arguments.sparsity else "off"):
            run(f"{arguments.sparsity:.0%} sparse" if arguments.sparsity else "dense",
                text_of(prompt))
        return
    # Dense is to be as fast as it can be: with our kernel, except where only the fallback runs.
    thresholds = thresholds_for(arguments.sparsity)
    if ours != "torch":
        sparsify(model, thresholds)
    with sparse_mode(model, "off"):
        dense_ids, dense_rate = run("dense", text_of(prompt))
    print()
    sparsify(model, thresholds)
    sparse_ids, sparse_rate = run(f"{arguments.sparsity:.0%} sparse", text_of(prompt))
    if not dense_rate:                                     # a text of a token or none has no rate
        return
    print(f"\nsparse over dense: {sparse_rate / dense_rate:.2f}x; the first {first_difference(dense_ids, sparse_ids)} of "
          f"{len(dense_ids)} tokens are the same")


def first_difference(ids, others):
    """How many tokens two lists have in common at the start."""
    return next((i for i, (a, b) in enumerate(zip(ids, others)) if a != b), min(len(ids), len(others)))


def read_line():
    """A line of input, None at its end."""
    try:
        return input("\n> " if sys.stdin.isatty() else "")
    except EOFError:
        return None


def chat(tokenizer, template, system, text_of):
    """Turns of a conversation, one for each line of input, until it ends. text_of(prompt ids): an iterator of token ids."""
    messages = [{"role": "system", "content": system}] if system else []
    while True:
        line = parallel.from_first(read_line)
        if line is None:
            return
        if not line.strip():
            continue
        messages.append({"role": "user", "content": line})
        prompt = tokenizer.encode(template(messages), bos=False, special=True)
        ids, *_ = stream(text_of(prompt), StreamDecoder(tokenizer, prompt), lambda text: print(text, end="", flush=True))
        print(flush=True)
        messages.append({"role": "assistant", "content": tokenizer.decode(ids)})


def prepare_draft(model, tokenizer, arguments, thresholds_for):
    """(draft, draft_thresholds) for generate_speculative; the model, and a draft model, made as fast as they can be."""
    draft, sparsity, draft_thresholds = arguments.draft, arguments.sparsity, None
    if draft == "sparse":
        draft_thresholds = thresholds_for(arguments.draft_sparsity)
    elif draft != "recycle":
        folder = str(DEMO) if draft == "demo" else draft
        draft, other = load_model(folder, arguments.device, arguments.dtype)
        same_tokens(tokenizer, other, folder)
        parallel.follow_first(draft)
    if tokenizer is None and isinstance(draft, str):       # for draft_costs
        sparsify(model, draft_thresholds or thresholds_for(0))
        return draft, draft_thresholds
    for each in (model, draft) if isinstance(draft, Llama) else (model,):
        if best_backend(each.model.embed_tokens.weight) != "torch" or each is model and (sparsity or draft == "sparse"):
            names = [*linear_names(each.config), *["lm_head"] * (each.device.type == "cpu")]
            sparsify(each, dict.fromkeys(names, 0.0) if each is not model else thresholds_for(sparsity))
    return draft, draft_thresholds


def speculate(model, prompt, arguments, plain_text, text_of, run):
    """Writes the text speculatively, says what it took, and with --compare sets plain decoding beside it."""
    sparsity = arguments.sparsity
    with sparse_mode(model, "decode" if sparsity else "off"):
        speculation = text_of(prompt)
        if arguments.compare:
            plain, plain_rate = run("plain", plain_text())
            print()
        ids, speed = run(f"speculative, {arguments.draft}", speculation)
        did = speculation.statistics
        print(f"\nlossless against {speculation.against}" + (f" at {sparsity:.0%}" if sparsity else "")
              + f": {did.tokens_a_pass:.2f} tokens a pass in {did.passes} passes, drafts {did.draft_seconds:.2f} s, "
              f"verify passes {did.verify_seconds:.2f} s")
        if did.passes:
            print("guesses accepted, by place: " + " ".join(f"{share:.0%}" for share in did.acceptance))
            print("rounds by guesses a pass: " + ", ".join(f"{size}: {len(did.times[size])}" for size in sorted(did.times)))
        if not arguments.compare:
            return
        print(f"speculative over plain: {speed / plain_rate:.2f}x" if plain_rate else "too few tokens to compare the speed")
        same = first_difference(plain, ids)
        if same == len(plain) == len(ids):
            print(f"the same text, all {same} tokens")
        elif arguments.temperature:
            print("sampled: another text of the same distribution")
        else:
            with torch.no_grad():
                logits = model(torch.tensor([prompt + plain[:same]], device=model.device), last_only=True)[0, -1]
            first, second = logits.topk(2).values.tolist()
            rounding = torch.finfo(model.model.embed_tokens.weight.dtype).eps * logits.abs().max()
            print(f"the texts part at token {same}, where the two best logits are {first - second:.2g} apart; logits there are "
                  f"rounded by up to {rounding:.2g}")


if __name__ == "__main__":
    command_line(main)
