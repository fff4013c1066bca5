"""Decoding: how a model that scores the next token writes a text.

    prefill   the prompt runs through the model at once, dense; the KV cache now holds its positions
    decode    choose a token from the last logits ─► run that one token through the model ─┐
                    ▲                                                                      │
                    └───────────────────────── its logits ◄────────────────────────────────┘

Each turn reads all weights that are not skipped, for one token: sparsity speeds up this loop.

Greedy decoding (temperature 0) takes the likeliest token. Sampling divides the logits by the
temperature, keeps the top_k likeliest tokens, and of those the fewest that hold a share top_p of
the probability, and draws from what is left.

With speculative decoding the speed-up is smaller, but the output is exactly the dense model's. A
pass over a few tokens reads each weight once, as a pass over one token does, and takes hardly
longer. So let something cheap guess the next tokens, and let the model check them all at once:

    draft     guess what follows "the"             x1 x2 x3     the model at high sparsity, or a
                                                                smaller one
    verify    run "the x1 x2 x3" at once    ─►     x1 x2 y z    what the model writes after each
    accept    as far as both agree, and one more   x1 x2 y      three tokens for one pass

Greedy: a guess stays if it is the likeliest token. Sampled: a guess x drawn from the draft's q
stays with probability min(1, p(x) / q(x)), else a token is drawn from what p has above q; then it
is distributed as p. (Leviathan et al., arXiv 2211.17192; Chen et al., arXiv 2302.01318.)

    python generate.py                                         the demo: dense, then sparse
    python generate.py --model FOLDER --prompt TEXT --sparsity 0.5
    python generate.py --draft sparse --compare                speculation beside plain decoding
    python generate.py --model random:llama-3.2-1b             the speed of a real size
"""
import contextlib
import functools
import math
import time
from dataclasses import dataclass, fields

import torch

import kernel
from calibrate import load_calibration
from model import (DEMO, InputError, KVCache, Llama, Parser, check_tokens, command_line,
                   linear_names, load_model, natural, require, share)
from sparsify import realised_sparsity, reset_counts, sparse_mode, sparsify


# --------------------------------------------------------------------------------------------------
# Choosing a token

@dataclass(frozen=True)
class Sampling:
    """How a token is chosen from logits. Every field is an argument of `generate` and an option."""
    temperature: float = 0.0         # 0 is greedy
    top_k: int | None = None         # None: all
    top_p: float | None = None       # None: all

    @property
    def greedy(self):
        """Whether the likeliest token is taken: also where float32 cannot divide by so little."""
        return self.temperature < torch.finfo(torch.float32).tiny

    def check(self):
        """Raise InputError for settings that define no distribution."""
        require(0 <= self.temperature < float("inf"),
                f"temperature is {self.temperature}, expected 0 (greedy) or more")
        require(self.top_k is None or self.top_k >= 1,
                f"top_k is {self.top_k}, expected at least 1")
        require(self.top_p is None or 0 < self.top_p <= 1,
                f"top_p is {self.top_p}, expected above 0 and at most 1")

    def probabilities(self, logits):
        """Return the distribution that is drawn from, (..., vocab), of logits (..., vocab)."""
        logits = (logits - logits.max(-1, keepdim=True).values) / self.temperature
        if self.top_k is not None and self.top_k < logits.shape[-1]:
            best = logits.topk(self.top_k)
            nothing = torch.full_like(logits, float("-inf"))
            logits = nothing.scatter(-1, best.indices, best.values)
        p = logits.softmax(-1)
        if self.top_p is not None:
            ordered, order = p.topk(min(1024, p.shape[-1]))    # nearly always enough, and quick
            if (ordered.sum(-1) < self.top_p).any():
                ordered, order = p.sort(-1, descending=True)
            enough = ordered.cumsum(-1) - ordered >= self.top_p    # of what the likelier ones hold
            enough[..., 0] = False
            p = torch.zeros_like(p).scatter(-1, order, ordered.masked_fill(enough, 0.0))
            p = p / p.sum(-1, keepdim=True)
        return p

    def choose(self, logits, generator):
        """Return a token after each of logits (N, vocab), as (N, 1), and what it was drawn from.

        That is the distributions (N, vocab), or None if greedy.
        """
        if self.greedy:
            return logits.argmax(-1, keepdim=True), None
        p = self.probabilities(logits)
        return draw(p, generator), p


def draw(p, generator):
    """Return a token from each of the distributions p (N, vocab), as (N, 1).

    It is where a uniform number falls among the running sums. torch.multinomial draws a number for
    every token instead: 2.6 ms for 128,256 of them on a CPU, this takes 0.15 ms.
    """
    sums = p.cumsum(-1, dtype=torch.float64)
    uniform = torch.rand(len(p), 1, generator=generator, device=p.device, dtype=torch.float64)
    return torch.searchsorted(sums, sums[:, -1:] * uniform, right=True).clamp(max=p.shape[-1] - 1)


def checked(logits, position):
    """Return logits (..., T, vocab) of T tokens, the first of which stands at `position`.

    Raises InputError if they are no numbers: no token can be chosen then.
    """
    if not math.isfinite(logits.max().item()):             # NaN, too, is the largest
        wrong = ~logits.flatten(0, -2).max(-1).values.isfinite()
        raise InputError(f"the logits at position {position + wrong.nonzero()[0].item()} of the "
                         f"text are NaN or infinite: numbers in the model are too large for its "
                         f"dtype; try --dtype bfloat16 or float32")
    return logits


def random_source(model, seed):
    """Return a torch.Generator on the model's device; seed None: another one each time."""
    require(seed is None or 0 <= seed < 2**63, f"seed is {seed}, expected 0 to 2^63 - 1")
    generator = torch.Generator(model.device)
    # Such a seed as can be given again: to other processes, too.
    return generator.manual_seed(generator.seed() % 2**63 if seed is None else seed)


# --------------------------------------------------------------------------------------------------
# Steps. A step is a function of tokens (1, T) that returns their logits (1, T, vocab), valid until
# the next step, and appends them to the cache.

def plain_step(model, cache, tokens=1):
    """Return a step that runs the model. tokens: how many most steps will have."""
    return lambda tokens: model(tokens, cache)


class StaticCache(KVCache):
    """A view of another cache for steps of T tokens that always use the same memory.

    What changes from step to step lies in tensors that `follow` overwrites: where the tokens stand,
    which slots of the cache they go to, and what of the whole cache they see.
    """

    def __init__(self, cache, T):
        self.keys, self.values, self.length = cache.keys, cache.values, cache.length
        device, room = cache.keys.device, cache.keys.shape[3]
        self.positions = torch.zeros(T, dtype=torch.int64, device=device)
        self.slots = torch.zeros(T, dtype=torch.int64, device=device)
        self.mask = torch.zeros(T, room, dtype=torch.bool, device=device)
        self.all_slots = torch.arange(room, device=device)
        self.numbers = None
        if kernel.best_backend(cache.keys) == "triton":
            self.numbers = cache.keys.new_zeros(()), cache.keys.new_full((), float("-inf"))

    def follow(self, cache, T, window):
        """Make the next step one of T tokens that follow what `cache` holds."""
        positions, mask = cache.look(T, window)
        end = cache.used + T
        self.positions.copy_(positions)
        self.slots.copy_(self.all_slots[cache.used:end])
        torch.le(self.all_slots, self.slots[:, None], out=self.mask)
        if mask is not None:
            self.mask[:, :end] = mask

    def look(self, T, window):
        if self.numbers is None:
            return self.positions, self.mask
        # On a GPU attention adds numbers. Here they are made once, and not in every layer.
        return self.positions, torch.where(self.mask, *self.numbers)

    def append(self, layer, k, v):
        keys, values = self.keys[layer], self.values[layer]
        keys.index_copy_(2, self.slots, k)
        values.index_copy_(2, self.slots, v)
        return keys, values

    def advance(self, T):
        pass                             # the other cache counts


class GraphStep:
    """A step on a GPU: what the model launches, captured as a CUDA graph and launched again as one.

    Without it the GPU waits for Python between hundreds of small kernels, and sparsity saves
    nothing. A graph is captured for each number of tokens, dense and sparse. Thresholds are read
    where they lie, so that changed ones count. Kept inputs are counted in every 16th step, by a
    graph of its own.
    """

    def __init__(self, model, cache, tokens=1):
        self.model = model
        self.cache = cache
        self.graphs = {}
        self.pool = torch.cuda.graph_pool_handle()         # memory that the graphs share
        self.tickets = kernel.new_tickets(model.device)    # and that is not for other launches
        self.steps = 0
        if cache.used + tokens <= cache.length:
            example = torch.zeros(1, tokens, dtype=torch.int64, device=model.device)
            self.graph(example, sample=True)
            self.graph(example, sample=False)

    @torch.no_grad()
    def __call__(self, tokens):
        graph, place, static, logits = self.graph(tokens, sample=self.steps % 16 == 0)
        place.copy_(tokens)
        static.follow(self.cache, tokens.shape[1], self.model.config.sliding_window)
        with torch.cuda.device_of(tokens):
            graph.replay()
        self.cache.advance(tokens.shape[1])
        self.steps += 1
        return logits

    def graph(self, tokens, sample):
        """Return (graph, its tokens, its cache, its logits) for so many tokens, in this mode.

        sample: whether what is kept is counted, if the model counts at all.
        """
        state = getattr(self.model, "sparse_state", None)
        counting = state is not None and state.counting
        sample = counting and sample
        key = tokens.shape[1], sample, state and state.mode, id(state)
        if key not in self.graphs:
            if counting:
                state.counting = sample
            with torch.cuda.device_of(tokens), kernel.using_tickets(self.tickets):
                self.graphs[key] = self.capture(tokens)
            if counting:
                state.counting = True
        return self.graphs[key]

    @torch.no_grad()
    def capture(self, tokens):
        place = tokens.clone()
        static = StaticCache(self.cache, tokens.shape[1])
        static.follow(self.cache, tokens.shape[1], self.model.config.sliding_window)
        aside = torch.cuda.Stream()      # libraries set themselves up before the capture, not in it
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside), uncounted(self.model):
            self.model(place, static)
            self.model(place, static)
        torch.cuda.current_stream().wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        # thread_local: another thread may talk to another GPU meanwhile
        with torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local"):
            logits = self.model(place, static)
        return graph, place, static, logits


@contextlib.contextmanager
def uncounted(model):
    """Make what a sparse model keeps inside count for nothing."""
    state = getattr(model, "sparse_state", None)
    counts = None if state is None else state.counts.clone()
    yield
    if state is not None:
        state.counts.copy_(counts)


def fast_step(model, cache, tokens=1):
    """Return the fastest step of this file: a graph on a GPU, else the model itself."""
    if kernel.best_backend(cache.keys) == "triton":
        return GraphStep(model, cache, tokens)
    return plain_step(model, cache, tokens)


# --------------------------------------------------------------------------------------------------
# One token after another

def generate(model, prompt_ids, max_new_tokens, temperature=0.0, top_k=None, top_p=None, seed=None,
             eos_ids=(), make_step=fast_step, **more):
    """Return an iterator of the token ids that follow `prompt_ids`, each computed when asked for.

    It ends after max_new_tokens, where the model's context is full, or before a token of eos_ids.
    temperature, top_k, top_p, and other fields of `Sampling` in `more`. seed: an int makes sampling
    repeatable. make_step(model, cache, tokens) returns a step. Raises InputError, at once, for what
    cannot be used.
    """
    sampling = Sampling(temperature, top_k, top_p, **more)
    sampling.check()
    prompt = check_prompt(model, prompt_ids, max_new_tokens)
    return _generate(model, prompt, max_new_tokens, sampling, random_source(model, seed),
                     frozenset(eos_ids), make_step)


@torch.no_grad()
def _generate(model, prompt, max_new_tokens, sampling, generator, eos_ids, make_step):
    length = min(prompt.shape[1] + max_new_tokens, model.config.max_position_embeddings)
    cache = model.make_cache(1, length)
    logits = model(prompt, cache, last_only=True)[:, -1]                        # (1, vocab)
    step = make_step(model, cache)
    for left in reversed(range(length - prompt.shape[1])):
        tokens, _ = sampling.choose(logits, generator)                          # (1, 1)
        # The one wait for a device. NaN, too, is the largest; a float32 holds any token.
        token, largest = torch.stack((tokens[0, 0], logits.max())).tolist()
        token = int(token)
        if not math.isfinite(largest):
            checked(logits, cache.used - 1)
        if token in eos_ids:
            return
        yield token
        if left:
            logits = step(tokens)[:, -1]


def check_prompt(model, prompt_ids, max_new_tokens):
    """Return the prompt as a tensor (1, T) on the model's device; InputError if it does not fit."""
    require(max_new_tokens >= 1, f"max_new_tokens is {max_new_tokens}, expected at least 1")
    prompt = torch.as_tensor(list(prompt_ids), dtype=torch.int64)
    require(len(prompt), "the prompt is empty: it needs at least one token")
    require(len(prompt) < model.config.max_position_embeddings,
            f"the prompt has {len(prompt)} tokens, the model's context holds "
            f"{model.config.max_position_embeddings} with at least one new one")
    check_tokens(prompt, model.config)
    return prompt[None].to(model.device)


# --------------------------------------------------------------------------------------------------
# Speculation

DRAFT_TOKENS = 3         # guesses a pass; python -m beyond finds the best number while it decodes


class ModelDraft:
    """Guesses token by token with a model: the verifier itself at high sparsity, or a smaller one.

    The verifier itself works in the verifier's cache: the keys and values it writes lie after the
    verified ones, and the verify pass writes the exact ones over them. A smaller model has a cache
    of its own, and first catches up with what was written.
    """

    def __init__(self, model, cache, sampling, generator, make_step, mode=contextlib.nullcontext):
        """mode: makes the context in which the model guesses."""
        self.model, self.cache, self.sampling, self.generator = model, cache, sampling, generator
        self.make_step, self.mode, self.step = make_step, mode, None

    def guess(self, ids, n):
        """Return up to n guesses at what follows `ids`, and the distributions q (n, vocab) they are
        drawn from, None if greedy. They are fewer where the cache ends."""
        self.cache.used = min(self.cache.used, len(ids) - 1)
        tokens = torch.tensor([ids[self.cache.used:]], device=self.model.device)
        guesses, q = [], []
        for _ in range(min(n, self.cache.length - len(ids) + 1)):
            with self.mode():
                if tokens.shape[1] > 2:
                    logits = self.model(tokens, self.cache, last_only=True)
                else:
                    self.step = self.step or self.make_step(self.model, self.cache)
                    logits = self.step(tokens)
            tokens, p = self.sampling.choose(logits[:, -1], self.generator)     # (1, 1), (1, vocab)
            guesses.append(tokens.item())
            q.append(p)
        return guesses, torch.cat(q) if q and q[0] is not None else None


@dataclass
class Statistics:
    """What a speculative run did. tokens: written by verify passes."""
    tokens: int = 0
    passes: int = 0
    draft_seconds: float = 0.0
    verify_seconds: float = 0.0
    reached: list = None     # how often a guess at each place was judged, those before it accepted
    accepted: list = None    # how often it was accepted

    @property
    def tokens_a_pass(self):
        return self.tokens / max(1, self.passes)

    @property
    def acceptance(self):
        """The share of guesses accepted at each place, of those that were judged."""
        return [a / r for a, r in zip(self.accepted or (), self.reached or ())]

    def lines(self):
        """Return what there is to say, beside the numbers above."""
        places = " ".join(f"{share:.0%}" for share in self.acceptance)
        return [f"guesses accepted, by place: {places}"] if self.passes else []

    def record(self, guesses, accepted):
        """Count a pass that judged so many guesses, and accepted so many of them."""
        self.passes += 1
        self.reached = self.reached or []
        self.accepted = self.accepted or []
        for place in range(min(guesses, accepted + 1)):
            if place == len(self.reached):
                self.reached.append(0)
                self.accepted.append(0)
            self.reached[place] += 1
            self.accepted[place] += place < accepted


def from_guess(p, q, guess, generator):
    """Return a token distributed as p (vocab,), given a guess drawn from q (vocab,).

    With probability min(1, p/q) it is the guess; else it is drawn from where p is above q. A token
    so comes out with probability min(p, q) + (what was refused in all) * (p - q)₊ / Σ (p - q)₊ =
    min(p, q) + (p - q)₊ = p.
    """
    uniform = torch.rand((), generator=generator, device=p.device)
    if uniform * q[guess] < p[guess]:
        return guess
    rest = (p - q).clamp(min=0)
    return draw((rest if rest.sum() > 0 else p)[None], generator).item()


def verdict(logits, guesses, q, sampling, generator):
    """Return what the model itself writes, given its logits (n + 1, vocab) at n guesses: a list.

    Greedy: each token is the likeliest. Sampled: each is drawn from the model's distribution p, by
    way of the guess if that was drawn too, from q (n, vocab). While a guess is that token, the next
    one is judged: all tokens but the last were guessed.
    """
    written = []
    for i in range(len(guesses) + 1):
        if q is not None and not sampling.greedy and i < len(guesses):
            token = from_guess(sampling.probabilities(logits[i]), q[i], guesses[i], generator)
        else:
            token = sampling.choose(logits[i:i + 1], generator)[0].item()
        written.append(token)
        if i == len(guesses) or token != guesses[i]:
            return written


def generate_speculative(model, prompt_ids, max_new_tokens, draft="sparse", draft_thresholds=None,
                         draft_tokens=None, temperature=0.0, top_k=None, top_p=None, seed=None,
                         eos_ids=(), sparse_verifier=False, make_step=fast_step, kind=None, **more):
    """Return the text of `generate` in fewer passes: an iterator of token ids, with .statistics.

    The text is the dense model's, whatever is sparse: that of `generate` in sparse_mode "off". With
    sparse_verifier it is that of `generate` in the mode now in force; in mode "all" it always is.
    Greedy text is the same token for token, up to rounding (sums over several tokens are taken in
    another order than over one); sampled text has the same distribution.

    draft: "sparse": the model itself (sparsified) with draft_thresholds, as sparse_mode takes them;
               None: those in force
           a Llama with the same vocabulary, on the same device
           an object with guess(ids, n) -> (up to n tokens, q (n, vocab) that they were drawn from,
               or None if they were not drawn)
    draft_tokens: how many tokens to guess a pass; None: a few. kind: the class of the iterator;
    None: Speculation. Everything else as for `generate`.
    """
    sampling = Sampling(temperature, top_k, top_p, **more)
    sampling.check()
    prompt = check_prompt(model, prompt_ids, max_new_tokens)
    require(draft_tokens is None or draft_tokens >= 1,
            f"draft_tokens is {draft_tokens}, expected at least 1")
    return (kind or Speculation)(
        model, prompt, max_new_tokens, draft, draft_thresholds, draft_tokens, sampling,
        random_source(model, seed), frozenset(eos_ids), sparse_verifier, make_step)


class Speculation:
    """The iterator that generate_speculative returns."""

    ROOM = 0             # positions of the cache after the text, for drafts that go beyond its end

    def __init__(self, model, prompt, max_new_tokens, draft, draft_thresholds, draft_tokens,
                 sampling, generator, eos_ids, sparse_verifier, make_step):
        state = getattr(model, "sparse_state", None)
        mode = state.mode if state else "off"
        require(mode != "all" or not state.dense_prefix,
                "a dense prefix is not for decoding, where every step would begin anew")
        if mode == "decode" and not sparse_verifier:
            mode = "off"
        verify_mode = "off" if mode == "off" else "all"      # a verify pass has several tokens
        thresholds = state.thresholds.clone() if state else None
        self.reading = lambda: sparse_mode(model, mode, thresholds)
        self.verifying = lambda: sparse_mode(model, verify_mode, thresholds)
        self.against = "the dense model" if mode == "off" else "the sparse model"
        self.model, self.prompt, self.draft_tokens = model, prompt, draft_tokens
        self.sampling, self.generator, self.eos_ids = sampling, generator, eos_ids
        self.make_step = make_step
        self.length = min(prompt.shape[1] + max_new_tokens, model.config.max_position_embeddings)
        self.cache = self.make_cache()
        self.draft = self.make_draft(draft, draft_thresholds)
        self.statistics = Statistics()
        self.text = self.run()

    def make_cache(self):
        """Return the verifier's cache."""
        return self.model.make_cache(1, self.length + self.ROOM)

    def make_draft(self, draft, draft_thresholds):
        """Return the draft object that an argument `draft` means; InputError if it means none."""
        model = self.model
        if draft == "sparse":
            state = getattr(model, "sparse_state", None)
            require(state, 'draft "sparse" needs a model made sparse: sparsify(model, thresholds)')
            with sparse_mode(model, "all", draft_thresholds or {}):
                thresholds = state.thresholds.clone()
            return ModelDraft(model, self.cache, self.sampling, self.generator, self.make_step,
                              lambda: sparse_mode(model, "all", thresholds))
        if isinstance(draft, Llama):
            ours, theirs = model.config.vocab_size, draft.config.vocab_size
            require(ours == theirs, f"the draft model has {theirs} tokens, the model {ours}")
            require(draft.device == model.device,
                    f"the draft model is on {draft.device}, the model on {model.device}")
            cache = draft.make_cache(1, min(self.length, draft.config.max_position_embeddings))
            return ModelDraft(draft, cache, self.sampling, self.generator, self.make_step)
        require(hasattr(draft, "guess"),
                f'draft is "sparse", a Llama, or an object with guess(ids, n), not {draft!r}')
        return draft

    def __iter__(self):
        return self

    def __next__(self):
        return next(self.text)

    @torch.no_grad()
    def run(self):
        ids = self.prompt[0].tolist()
        with self.reading():
            logits = checked(self.read_prompt(), len(ids) - 1)                  # (1, vocab)
        written = [self.sampling.choose(logits, self.generator)[0].item()]
        with self.verifying():
            self.verify = self.make_step(self.model, self.cache,
                                         (self.draft_tokens or DRAFT_TOKENS) + 1)
        while True:
            for token in written:
                if token in self.eos_ids:
                    return
                ids.append(token)
                self.statistics.tokens += self.statistics.passes > 0
                yield token
                if len(ids) == self.length:
                    return
            written = self.round(ids)

    def read_prompt(self):
        """Run the prompt through the verifier, and return its last logits (1, vocab)."""
        return self.model(self.prompt, self.cache, last_only=True)[:, -1]

    def round(self, ids):
        """Draft, verify, accept: return the tokens that follow `ids`, at least one."""
        began = time.perf_counter()
        start = len(ids) - 1                               # all but the last are in the cache
        # The last token that is wanted comes from the verifier.
        n = min(self.draft_tokens or DRAFT_TOKENS, self.length - len(ids) - 1)
        guesses, q = self.draft.guess(ids, n)
        drafted = time.perf_counter()
        self.cache.used = start
        with self.verifying():
            logits = self.verify(torch.tensor([[ids[-1], *guesses]], device=self.model.device))[0]
        written = verdict(logits, guesses, q, self.sampling, self.generator)
        checked(logits[:len(written)], start)              # what follows a wrong guess is no matter
        self.cache.used = start + len(written)
        self.statistics.record(len(guesses), len(written) - 1)
        self.statistics.draft_seconds += drafted - began
        self.statistics.verify_seconds += time.perf_counter() - drafted
        return written


# --------------------------------------------------------------------------------------------------
# Text as it comes

class StreamDecoder:
    """Turns tokens into text as they come, whole characters only.

    A character may be spread over several tokens, and what a token spells may depend on those
    before it. So the text of the last few tokens is decoded anew with each token, and given out as
    far as it is new and sure. Between calls the first `given` characters of decode(pending) were
    given out.
    """
    CONTEXT = 8              # tokens kept before the new ones
    PATIENCE = 32            # tokens to wait for a character to become whole

    def __init__(self, tokenizer, prompt_ids=()):
        self.tokenizer = tokenizer
        ids = list(prompt_ids)
        self.keep(ids, tokenizer.decode(ids))

    def keep(self, ids, text):
        """Keep the last of `ids`, which spell `text`, from where a character begins."""
        self.waited = 0
        last = len(ids) - self.CONTEXT
        for first in range(last, last - 4, -1):            # a character has at most four bytes
            end = self.tokenizer.decode(ids[max(first, 0):])
            if text.endswith(end):       # not so where a character was cut in two
                break
        self.pending = ids[max(first, 0):]
        self.given = len(end)

    def add(self, token):
        """Return the text that `token` completes; "" while a character is unfinished."""
        self.pending.append(token)
        text = self.tokenizer.decode(self.pending)
        if text.endswith("\ufffd") and self.waited < self.PATIENCE:
            self.waited += 1
            return ""
        new = text[self.given:]
        self.given = len(text)
        self.waited = 0
        if len(self.pending) >= 2 * self.CONTEXT:
            self.keep(self.pending, text)
        return new

    def end(self):
        """Return what is left when no token follows: bytes that are no character show as U+FFFD."""
        new = self.tokenizer.decode(self.pending)[self.given:]
        self.pending = []
        self.given = 0
        return new


def stream(tokens, decoder, show):
    """Take tokens from an iterator to its end, show their text as it comes, and measure.

    Returns (ids, seconds to the first token, seconds for the rest, whether Ctrl-C ended it early).
    """
    ids, first, interrupted = [], None, False
    began = time.perf_counter()
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


# --------------------------------------------------------------------------------------------------
# The command line

PROMPT = 'class Stack:\n    """A last-in, first-out stack of items."""\n\n    def __init__(self'


DRAFT_HELP = ("speculate: sparse (guesses by the model itself, sparser), demo, or the folder of a "
              "smaller model (default: no speculation)")


def make_parser(draft_help=DRAFT_HELP, draft_tokens_default=str(DRAFT_TOKENS)):
    """Return the Parser of `python generate.py`; python -m beyond adds options to it."""
    parser = Parser(description="Writes text with a Llama. Without arguments: the demo model, "
                                "dense and then sparse.")
    parser.add_model()
    parser.add_argument("--prompt", help="text to continue (default: the beginning of a class)")
    parser.add_argument("--sparsity", type=share, metavar="S",
                        help="share of the blocks' weights to skip, 0 to below 1 (default: 0.5 "
                             "after a dense run to compare; 0 with --draft)")
    parser.add_argument("--head-sparsity", type=share, metavar="S",
                        help="share of the head's weights to skip (default: 0, as in the paper)")
    parser.add_argument("--draft", metavar="KIND", help=draft_help)
    parser.add_argument("--draft-sparsity", type=share, metavar="S",
                        help="of --draft sparse (default: 0.75)")
    parser.add_argument("--draft-tokens", type=natural, metavar="N",
                        help=f"guesses a pass (default: {draft_tokens_default})")
    parser.add_argument("--compare", action="store_true",
                        help="with --draft: decode plainly too (default: no)")
    parser.add_argument("--max-new-tokens", type=natural, default=128, metavar="N",
                        help="(default: 128)")
    parser.add_argument("--temperature", type=float,
                        help="0 is greedy (default: 0; 1 in the demo, where so small a model would "
                             "soon repeat itself)")
    parser.add_argument("--top-k", type=int,
                        help="sample from the k likeliest tokens (default: all)")
    parser.add_argument("--top-p", type=float,
                        help="sample from the likeliest tokens that hold this share (default: all; "
                             "0.9 in the demo)")
    parser.add_argument("--seed", type=int, help="makes sampling repeatable (default: 0 when runs "
                                                 "are compared, else none)")
    parser.add_argument("--calibration", metavar="FILE",
                        help="(default: calibration.safetensors in the checkpoint folder)")
    parser.add_argument("--allocation",
                        help="how the sparsity is shared out (default: the best that the "
                             "calibration holds)")
    return parser


def settle(arguments):
    """Check the arguments of `make_parser`, and put values where none were given."""
    demo = arguments.model == str(DEMO) and arguments.prompt is None and not arguments.draft
    if arguments.temperature is None:
        arguments.temperature = 1.0 if demo else 0.0
        if demo and arguments.top_p is None:
            arguments.top_p = 0.9
    require(arguments.draft_sparsity is None or arguments.draft == "sparse",
            "--draft-sparsity is for --draft sparse")
    require(arguments.draft or not (arguments.compare or arguments.draft_tokens),
            "--compare and --draft-tokens are for --draft")
    if arguments.draft_sparsity is None:
        arguments.draft_sparsity = 0.75
    if not arguments.draft:
        arguments.compare = arguments.sparsity is None
    if arguments.sparsity is None:
        arguments.sparsity = 0.0 if arguments.draft else 0.5
    if arguments.compare and arguments.seed is None:
        arguments.seed = 0
    require(arguments.seed is None or 0 <= arguments.seed < 2**63,
            f"seed is {arguments.seed}, expected 0 to 2^63 - 1")
    sampling_of(arguments).check()
    return arguments


def sampling_of(arguments):
    """Return the Sampling that the command line asks for."""
    return Sampling(**{field.name: getattr(arguments, field.name) for field in fields(Sampling)})


class Writer:
    """What `python generate.py` does with a model. python -m beyond gives it other parts.

    make_step, speculate: as fast_step and generate_speculative; realised: as realised_sparsity.
    """

    OWN_DRAFTS = ("sparse",)         # those that are no folder

    def __init__(self, arguments, model, tokenizer, make_step=fast_step,
                 speculate=generate_speculative, realised=realised_sparsity):
        self.arguments, self.model, self.tokenizer = arguments, model, tokenizer
        self.make_step, self.speculate, self.realised = make_step, speculate, realised
        self.eos_ids = tokenizer.eos_ids if tokenizer else ()
        self.draft = arguments.draft
        if self.draft and self.draft not in self.OWN_DRAFTS:
            self.draft = self.load_draft(str(DEMO) if self.draft == "demo" else self.draft)

    def load_draft(self, name):
        """Return the draft model `name`, which needs the tokenizer of the model."""
        arguments = self.arguments
        draft, tokenizer = load_model(name, arguments.device, arguments.dtype)
        if (tokenizer is None) != (self.tokenizer is None):
            raise InputError(f"--draft {name}: one of the two models has a tokenizer, the other "
                             f"has random weights and none")
        if tokenizer is not None:
            pairs = zip(self.tokenizer.pieces(), tokenizer.pieces())
            other = next((i for i, (ours, theirs) in enumerate(pairs) if ours != theirs), None)
            sizes = {self.tokenizer.vocab_size, tokenizer.vocab_size}
            at = min(sizes) if other is None and len(sizes) > 1 else other
            require(at is None, f"--draft {name}: its tokenizer is not the model's, they differ "
                                f"from token {at} on")
        return sparsify(draft, dict.fromkeys([*linear_names(draft.config), "lm_head"]))

    @functools.cached_property
    def calibration(self):
        return load_calibration(self.model, self.arguments.model, self.arguments.calibration)

    def thresholds(self, sparsity):
        """Return the thresholds of a sparsity; at 0 they are None, which is dense by our kernel."""
        names = linear_names(self.model.config)
        if sparsity:
            thresholds = self.calibration.thresholds(sparsity, self.arguments.allocation)
        else:
            thresholds = dict.fromkeys(names)
        thresholds["lm_head"] = None
        if self.arguments.head_sparsity:
            thresholds["lm_head"] = self.calibration.head_threshold(self.arguments.head_sparsity)
        return thresholds

    def text(self, prompt, speculative=False):
        """Return an iterator of the tokens that follow a prompt."""
        arguments = self.arguments
        settings = vars(sampling_of(arguments)) | {"seed": arguments.seed, "eos_ids": self.eos_ids}
        if not speculative:
            return generate(self.model, prompt, arguments.max_new_tokens, make_step=self.make_step,
                            **settings)
        sparse = bool(arguments.sparsity or arguments.head_sparsity)
        thresholds = {}
        if self.draft == "sparse":
            for name, threshold in self.thresholds(arguments.draft_sparsity).items():
                if threshold is not None or name != "lm_head":
                    thresholds[name] = 0.0 if threshold is None else threshold
        return self.speculate(self.model, prompt, arguments.max_new_tokens, self.draft, thresholds,
                              arguments.draft_tokens, sparse_verifier=sparse,
                              make_step=self.make_step, **settings)

    def show(self, title, prompt, tokens):
        """Write the text of an iterator of tokens; return (ids, tokens a second)."""
        print(f"--- {title}")
        decoder = None
        if self.tokenizer is not None:
            decoder = StreamDecoder(self.tokenizer, prompt)
            print(self.tokenizer.decode(prompt), end="", flush=True)
        reset_counts(self.model)
        ids, first, rest, interrupted = stream(
            tokens, decoder, lambda text: print(text, end="", flush=True))
        # The first token is the prompt's.
        rate = (len(ids) - 1) / rest if len(ids) > 1 else 0.0
        unread = "" if self.draft or interrupted else self.unread()
        print(f"\n--- {title}: {len(ids)} tokens, {rate:.1f} tokens/s, prompt of {len(prompt)} in "
              f"{first * 1e3:.0f} ms{unread}", flush=True)
        if interrupted:
            raise KeyboardInterrupt
        return ids, rate

    def unread(self):
        """Return what the last text did not read, in words."""
        return f", {self.realised(self.model):.1%} of the blocks' weights skipped"

    @property
    def mode(self):
        """The sparse_mode in which the command line wants its text."""
        return "decode" if self.arguments.sparsity or self.arguments.head_sparsity else "off"

    @property
    def title(self):
        """What the text of that mode is called."""
        return "dense" if self.mode == "off" else f"{self.arguments.sparsity:.0%} sparse"

    def baseline(self):
        """Return the context in which a text is written to be compared with."""
        return sparse_mode(self.model, "off")

    def prepare(self):
        """Make the model as sparse as the command line wants it."""
        thresholds = self.thresholds(self.arguments.sparsity)
        if self.draft == "sparse" and not self.arguments.sparsity:
            thresholds |= dict.fromkeys(linear_names(self.model.config), 0.0)  # the draft has more
        sparsify(self.model, thresholds)

    def write(self, prompt):
        """Do what the command line asks for, with a prompt of token ids."""
        self.prepare()
        if self.draft:
            with sparse_mode(self.model, self.mode):
                self.write_speculatively(prompt)
        elif not self.arguments.compare:
            with sparse_mode(self.model, self.mode):
                self.show(self.title, prompt, self.text(prompt))
        else:
            with self.baseline():
                dense, dense_rate = self.show("dense", prompt, self.text(prompt))
            print()
            ids, rate = self.show(self.title, prompt, self.text(prompt))
            if dense_rate:
                print(f"\nsparse over dense: {rate / dense_rate:.2f}x; the first "
                      f"{first_difference(dense, ids)} of {len(dense)} tokens are the same")

    def write_speculatively(self, prompt):
        """Write a text by speculation, say what it took, and compare it with plain decoding."""
        arguments = self.arguments
        if arguments.compare:
            plain, plain_rate = self.show("plain", prompt, self.text(prompt))
            print()
        speculation = self.text(prompt, speculative=True)
        ids, rate = self.show(f"speculative, {arguments.draft}", prompt, speculation)
        did = speculation.statistics
        print(f"\nlossless against {speculation.against}"
              + f" at {arguments.sparsity:.0%}" * bool(arguments.sparsity)
              + f": {did.tokens_a_pass:.2f} tokens a pass in {did.passes} passes, drafts "
                f"{did.draft_seconds:.2f} s, verify passes {did.verify_seconds:.2f} s")
        for line in did.lines():
            print(line)
        if not arguments.compare:
            return
        if plain_rate:
            print(f"speculative over plain: {rate / plain_rate:.2f}x")
        same = first_difference(plain, ids)
        if same == len(plain) == len(ids):
            print(f"the same text, all {same} tokens")
        elif not sampling_of(arguments).greedy:
            print("sampled: another text of the same distribution")
        else:
            tokens = torch.tensor([prompt + plain[:same]], device=self.model.device)
            with torch.no_grad():
                logits = self.model(tokens, last_only=True)[0, -1]
            first, second = logits.topk(2).values.tolist()
            rounding = torch.finfo(self.model.dtype).eps * logits.abs().max()
            print(f"the texts part at token {same}, where the two best logits are "
                  f"{first - second:.2g} apart; logits there are rounded by up to {rounding:.2g}")


def first_difference(ids, others):
    """Return how many tokens two lists have in common at the start."""
    same = [a == b for a, b in zip(ids, others)]
    return same.index(False) if False in same else len(same)


def prompt_of(arguments, model, tokenizer):
    """Return the ids of the prompt, checked, and print what is going to write."""
    if tokenizer is None:
        require(arguments.prompt is None,
                f"--prompt: {arguments.model} has random weights and no tokenizer")
        prompt = list(range(1, 17))
        print(f"{arguments.model}: random weights, for speed alone; it writes token numbers")
    else:
        prompt = tokenizer.encode(PROMPT if arguments.prompt is None else arguments.prompt)
    check_prompt(model, prompt, arguments.max_new_tokens)
    threads = f", {torch.get_num_threads()} threads" if model.device.type == "cpu" else ""
    print(f"{arguments.model}, {str(model.dtype).removeprefix('torch.')}, {model.device.type}"
          f"{threads}, torch {torch.__version__}")
    return prompt


def main():
    arguments = settle(make_parser().parse_args())
    require(not (arguments.draft == "sparse" and arguments.model.startswith("random:")),
            "--draft sparse with random weights says nothing; python -m beyond shows its cost")
    model, tokenizer = load_model(arguments.model, arguments.device, arguments.dtype)
    prompt = prompt_of(arguments, model, tokenizer)
    Writer(arguments, model, tokenizer).write(prompt)
    print("\npython -m beyond is the fast one, with more options; the demo model fits a cache, "
          "--model random:llama-3.2-1b shows the speed of a real size.")


if __name__ == "__main__":
    command_line(main)
