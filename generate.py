"""Decoding: how a model that scores the next token writes a text.

    prefill   the prompt runs through the model at once, dense; the KV cache now holds its positions
    decode    choose a token from the last logits ─► run that one token through the model ─┐
                    ▲                                                                      │
                    └───────────────────────── its logits ◄────────────────────────────────┘

Each turn reads all weights that are not skipped, for one token: sparsity speeds up this loop.

Speculative decoding gains less, but its text is exactly the dense model's. A pass over a few tokens
reads each weight once, as a pass over one token does, and takes hardly longer. So a cheap draft
guesses the next tokens, and the model checks all guesses at once:

    draft     guess what follows "the"             x1 x2 x3     by the model at high sparsity, or by
                                                                a smaller one
    verify    run "the x1 x2 x3" at once    ─►     x1 x2 y z    what the model writes after each
    accept    as far as both agree, and one more   x1 x2 y      three tokens for one pass

Sources: Leviathan et al., arXiv 2211.17192; Chen et al., arXiv 2302.01318.

    python generate.py                                         the demo: dense, then sparse
    python generate.py --model FOLDER --prompt TEXT --sparsity 0.5
    python generate.py --draft sparse --compare                speculation beside plain decoding
    python generate.py --model random:llama-3.2-1b             the speed of a real size
"""
import contextlib
import functools
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, fields

import kernel
from calibrate import load_calibration
from model import (DEMO, KVCache, Llama, Parser, check_tokens, command_line,
                   linear_names, load_model, natural, require, share)
from sparsify import SparseLinear, bytes_a_token, skipped_share, sparse_mode, sparsify

import torch


# --------------------------------------------------------------------------------------------------
# Choosing a token

@dataclass(frozen=True)
class Sampling:
    """How a token is chosen from logits. Every field is an argument of `generate` and an option."""
    temperature: float = 0.0         # divides the logits; 0: greedy, the likeliest token
    top_k: int | None = None         # so many of the likeliest tokens stay; None: all
    top_p: float | None = None       # of these the fewest that hold this share; None: all

    @property
    def greedy(self):
        """Whether the temperature is 0, or too small for float32 to divide by."""
        return self.temperature < torch.finfo(torch.float32).tiny

    def __post_init__(self):
        require(0 <= self.temperature < float("inf"),
                f"temperature is {self.temperature}, expected 0 (greedy) or more")
        require(self.top_k is None or self.top_k >= 1,
                f"top_k is {self.top_k}, expected at least 1")
        require(self.top_p is None or 0 < self.top_p <= 1,
                f"top_p is {self.top_p}, expected above 0 and at most 1")

    def probabilities(self, logits):
        """Return the distribution that logits (..., vocab) are sampled from, (..., vocab)."""
        p = ((logits - logits.max(-1, keepdim=True).values) / self.temperature).softmax(-1)
        if self.top_k is not None and self.top_k < p.shape[-1]:
            likeliest = p.topk(self.top_k)
            p = torch.zeros_like(p).scatter(-1, likeliest.indices, likeliest.values)
        if self.top_p is not None and self.top_p < 1:
            wanted = self.top_p * p.sum(-1, keepdim=True, dtype=torch.float64)
            ordered, order = p.topk(min(1024, p.shape[-1]))    # nearly always enough, and quick
            if (ordered.sum(-1, keepdim=True, dtype=torch.float64) < wanted).any():
                ordered, order = p.sort(-1, descending=True)
            before = ordered.cumsum(-1, dtype=torch.float64) - ordered
            p = torch.zeros_like(p).scatter(-1, order, ordered * (before < wanted))
        return p / p.sum(-1, keepdim=True)

    def choose(self, logits, generator):
        """Return (tokens (N, 1), p (N, vocab) or None if greedy) for logits (N, vocab)."""
        if self.greedy:
            return logits.argmax(-1, keepdim=True), None
        p = self.probabilities(logits)
        return draw(p, generator), p


def draw(p, generator):
    """Return a token from each of the distributions p (N, vocab), as (N, 1).

    A uniform number falls among the running sums: 0.15 ms for 128,256 tokens on a CPU.
    torch.multinomial, which draws a number for every token, takes 2.6 ms.
    """
    sums = p.cumsum(-1, dtype=torch.float64)
    uniform = torch.rand(len(p), 1, generator=generator, device=p.device, dtype=torch.float64)
    return torch.searchsorted(sums, sums[:, -1:] * uniform, right=True).clamp(max=p.shape[-1] - 1)


def checked(logits, position):
    """Return logits (T, vocab) of positions from `position` on; InputError for NaN or infinity."""
    for i, finite in enumerate(logits.max(-1).values.isfinite().tolist(), position):
        require(finite, f"the logits at position {i} of the text are NaN or infinite: numbers in "
                        f"the model are too large for its dtype; try --dtype bfloat16 or float32")
    return logits


def random_source(model, seed):
    """Return a torch.Generator on the model's device; seed None: another one each time."""
    require(seed is None or 0 <= seed < 2**63, f"seed is {seed}, expected 0 to 2^63 - 1")
    generator = torch.Generator(model.device)
    # A drawn seed is one that can be given again.
    return generator.manual_seed(generator.seed() % 2**63 if seed is None else seed)


# --------------------------------------------------------------------------------------------------
# Steps. A step is a function of tokens (1, T) that returns their logits (1, T, vocab), valid until
# the next step, and appends them to the cache.

SMALL_CACHE = 1 << 19    # numbers of a layer's keys; attention to fewer ends before a thread wakes


def plain_step(model, cache, most=1):
    """Return a step that runs the model. most: of tokens in a step, for which GraphStep prepares.

    On a CPU threads that share a core with other work wait long for each other, so PyTorch's small
    operations run on one. The kernel in C chooses for itself.
    """
    ours = kernel.best_backend(cache.keys) == "c" and isinstance(model.lm_head, SparseLinear)

    def step(tokens):
        threads = torch.get_num_threads()
        if ours and cache.keys[0, :, :, :cache.used].numel() < SMALL_CACHE:
            torch.set_num_threads(1)
        try:
            return model(tokens, cache)
        finally:
            torch.set_num_threads(threads)

    return step


class StaticCache(KVCache):
    """What a captured or recorded step of T tokens sees of a cache: the same memory every time.

    `follow` overwrites what changes from step to step: the slots of the cache that the tokens go
    to, which are their positions (T,), and the mask of what they see in the cache (T, room).
    """

    def __init__(self, cache, T):
        self.keys, self.values, self.length = cache.keys, cache.values, cache.length
        device, room = cache.keys.device, cache.keys.shape[3]
        self.all_slots = torch.arange(room, device=device)
        self.slots = self.all_slots[:T].clone()
        self.mask = torch.zeros(T, room, dtype=torch.bool, device=device)
        self.numbers = None              # on a GPU those of a mask: 0, -infinity
        if kernel.best_backend(cache.keys) == "triton":
            self.numbers = cache.keys.new_zeros(()), cache.keys.new_full((), float("-inf"))

    def follow(self, cache, T, window):
        """Make the next step one of T tokens that follow what `cache` holds."""
        slots, mask = cache.look(T, window)
        self.slots.copy_(slots)
        torch.le(self.all_slots, self.slots[:, None], out=self.mask)
        if mask is not None:             # not all before a token: a window cuts
            self.mask[:, :cache.used + T] = mask

    def look(self, T, window):
        if self.numbers is None:
            return self.slots, self.mask
        # On a GPU attention adds the mask as numbers: made here, once for all layers.
        return self.slots, torch.where(self.mask, *self.numbers)

    def append(self, layer, k, v):
        keys, values = self.keys[layer], self.values[layer]
        keys.index_copy_(2, self.slots, k.to(keys.dtype))
        values.index_copy_(2, self.slots, v.to(values.dtype))
        return keys, values

    def advance(self, T):
        pass                             # the other cache counts


class GraphStep:
    """A step on a GPU: all that the model launches, captured as one CUDA graph and replayed.

    Without it the GPU waits for Python between hundreds of small kernels, and sparsity saves
    nothing. Each number of tokens and mode has its graph; those up to `most` are captured at once.
    A graph reads thresholds where they lie, so that changed ones count.
    """

    def __init__(self, model, cache, most=1):
        self.model, self.cache = model, cache
        self.graphs = {}
        self.pool = torch.cuda.graph_pool_handle()         # memory that the graphs share
        used = cache.used
        for T in range(1, min(most, cache.length - used) + 1):
            self(torch.zeros(1, T, dtype=torch.int64, device=model.device))
            cache.used = used

    @torch.no_grad()
    def __call__(self, tokens):
        T, window = tokens.shape[1], self.model.config.sliding_window
        state = getattr(self.model, "sparse_state", None)
        key = T, state and (state.mode, state.dense_prefix), id(state)    # sparsify makes a new one
        with torch.cuda.device_of(tokens):
            if key not in self.graphs:
                captured = self.capture(tokens, StaticCache(self.cache, T), window)
                self.graphs[key] = *captured, state        # which lives as long as its id is a key
            graph, input_tokens, static, logits, _ = self.graphs[key]
            input_tokens.copy_(tokens)
            static.follow(self.cache, T, window)
            graph.replay()
        self.cache.advance(T)
        return logits

    def capture(self, tokens, static, window):
        """Return (graph, input_tokens, static, logits) of a run of the model."""
        input_tokens = tokens.clone()
        static.follow(self.cache, tokens.shape[1], window)
        self.model(input_tokens, static)     # libraries set themselves up here, not in the capture
        graph = torch.cuda.CUDAGraph()
        # thread_local: another thread may talk to another GPU meanwhile
        with torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local"):
            logits = self.model(input_tokens, static)
        return graph, input_tokens, static, logits


def fast_step(model, cache, most=1):
    """Return the fastest step of this file: a GraphStep with Triton, else a plain one."""
    on_gpu = kernel.best_backend(cache.keys) == "triton"
    return (GraphStep if on_gpu else plain_step)(model, cache, most)


# --------------------------------------------------------------------------------------------------
# One token after another

def generate(model, prompt_ids, max_new_tokens, temperature=0.0, top_k=None, top_p=None, seed=None,
             eos_ids=(), make_step=fast_step, **more):
    """Return an iterator of the token ids that follow `prompt_ids`, each computed when asked for.

    It ends after max_new_tokens, where the model's context is full, or before a token of eos_ids.
    temperature, top_k, top_p: fields of `Sampling`; more: those that you add. seed: an int makes
    sampling repeatable. make_step(model, cache, most) returns a step. Raises InputError at once.
    """
    sampling = Sampling(temperature, top_k, top_p, **more)
    prompt, length = check_prompt(model, prompt_ids, max_new_tokens)
    generator = random_source(model, seed)
    cache = model.make_cache(1, length)
    step = make_step(model, cache)

    @torch.no_grad()
    def text():
        logits = model(prompt, cache, last_only=True)[:, -1]                    # (1, vocab)
        for left in reversed(range(length - prompt.shape[1])):
            tokens, _ = sampling.choose(logits, generator)                      # (1, 1)
            # The only wait for a device. The largest is NaN if any is; a float32 holds any token.
            token, largest = torch.stack((tokens[0, 0], logits.max())).tolist()
            if not math.isfinite(largest):
                checked(logits, cache.used - 1)
            if token in eos_ids:
                return
            yield int(token)
            if left:
                logits = step(tokens)[:, -1]
    return text()


def check_prompt(model, prompt_ids, max_new_tokens):
    """Return the prompt (1, T) on the model's device, and how long the text may become with it."""
    context = model.config.max_position_embeddings
    require(max_new_tokens >= 1, f"max_new_tokens is {max_new_tokens}, expected at least 1")
    prompt = torch.as_tensor(list(prompt_ids), dtype=torch.int64)
    require(len(prompt), "the prompt is empty: it needs at least one token")
    require(len(prompt) < context, f"the prompt has {len(prompt)} tokens, the model's context "
                                   f"holds {context}, one of them new")
    check_tokens(prompt, model.config)
    return prompt[None].to(model.device), min(len(prompt) + max_new_tokens, context)


def stream(tokens, decode, ids):
    """Yield the text that each of `tokens` completes, "" inside a character; at the end the rest.

    decode: of a tokenizer. ids: the prompt's; each token is appended to them. A character may be
    spread over several tokens, and what a token stands for (a blank or none) may depend on those
    before it. So pending tokens are decoded after the last ones that were shown.
    """
    start, shown = max(0, len(ids) - 8), len(ids)          # ids[start:shown]: decoded before others
    while decode(ids[start:]).startswith("\ufffd"):        # cut inside a character
        start += 1
    for token in tokens:
        ids.append(token)
        text = decode(ids[start:])[len(decode(ids[start:shown])):]
        whole = not text.endswith("\ufffd")                # no unfinished character
        yield text if whole else ""
        if whole:
            start = shown if text else start               # ids[start:shown] has some text
            shown = len(ids)
    if shown < len(ids):
        yield text


# --------------------------------------------------------------------------------------------------
# Speculation

DRAFT_TOKENS = 3         # guesses a pass; python -m beyond finds the best number while it decodes


class ModelDraft:
    """Guesses token by token with a model: the verifier itself at high sparsity, or a smaller one.

    As its own draft the verifier guesses in its own cache, after the verified positions; the verify
    pass overwrites these keys and values. A smaller model has a cache of its own, and first catches
    up with the text. thresholds: for the guesses of a sparsified model, as for `sparse_mode`.
    """

    def __init__(self, model, cache, sampling, generator, make_step, thresholds=None):
        self.model, self.cache, self.sampling, self.generator = model, cache, sampling, generator
        with sparse_mode(model, "all", thresholds):
            self.step = make_step(model, cache, 2)
            if hasattr(model, "sparse_state"):             # as one tensor, which is quickly set
                thresholds = model.sparse_state.thresholds.clone()
        self.mode = functools.partial(sparse_mode, model, "all", thresholds)

    def guess(self, ids, n):
        """Return at most n guesses at what follows `ids`, and q (n, vocab), None if greedy."""
        self.cache.used = min(self.cache.used, len(ids) - 1)
        tokens = torch.tensor([ids[self.cache.used:]], device=self.model.device)
        guesses, q = [], []
        for _ in range(min(n, self.cache.length - len(ids) + 1)):
            with self.mode():
                far = tokens.shape[1] > 2        # a smaller model, at first: the whole prompt
                logits = self.model(tokens, self.cache, True) if far else self.step(tokens)
            tokens, p = self.sampling.choose(logits[:, -1], self.generator)     # (1, 1), (1, vocab)
            guesses.append(tokens.item())
            q.append(p)
        return guesses, torch.cat(q) if q and not self.sampling.greedy else None


@dataclass
class Statistics:
    """What a speculative run did."""
    tokens: int = 0                      # written by verify passes
    passes: int = 0                      # of the verifier, without the prompt's
    draft_seconds: float = 0.0
    verify_seconds: float = 0.0

    def __str__(self):
        return (f"{self.tokens / max(1, self.passes):.2f} tokens a pass in {self.passes} passes, "
                f"drafts {self.draft_seconds:.2f} s, verify passes {self.verify_seconds:.2f} s")

    def record(self, guesses, accepted, draft_seconds, verify_seconds):
        """Count a pass. beyond/drafts.py counts guesses, and how many were accepted, too."""
        self.passes += 1
        self.draft_seconds += draft_seconds
        self.verify_seconds += verify_seconds


def from_guess(p, q, guess, generator):
    """Return a token distributed as p (vocab,), given a guess drawn from q (vocab,).

    It is the guess with probability min(1, p/q), else a token drawn from (p - q)₊. The first gives
    a token the probability min(p, q) in all, the second (p - q)₊; their sum is p.
    """
    uniform = torch.rand((), generator=generator, device=p.device)
    if uniform * q[guess] < p[guess]:
        return guess
    rest = (p - q).clamp(min=0)
    return draw((rest if rest.sum() > 0 else p)[None], generator).item()


def verdict(logits, guesses, q, sampling, generator):
    """Return the list of tokens that the model itself writes, all but the last of them guessed.

    logits: (n + 1, vocab), of the model, before and after each of n guesses; q: (n, vocab), the
    distributions that the guesses were drawn from, or None. Greedy: each token is the likeliest.
    Sampled: each is drawn from the model's distribution, by way of the guess if that was drawn.
    """
    written = []
    for i, guess in enumerate([*guesses, None]):           # None: what follows the last guess
        if q is None or guess is None or sampling.greedy:
            written.append(sampling.choose(logits[i:i + 1], generator)[0].item())
        else:
            written.append(from_guess(sampling.probabilities(logits[i]), q[i], guess, generator))
        if written[-1] != guess:
            return written


class Speculation(Iterator):
    """The text of `generate` in fewer passes: an iterator of token ids, with .statistics.

    The text is that of `generate` in sparse_mode "off". Greedy text is the same token for token, up
    to rounding (a pass over several tokens sums in another order); sampled text has the same
    distribution.

    draft: "sparse": the model itself (sparsified) with draft_thresholds, as sparse_mode takes them;
               None: those in force
           a Llama with the same vocabulary, on the same device
           an object with guess(ids, n) -> (up to n tokens, q (n, vocab) that they were drawn from,
               or None if they were not drawn)
    draft_tokens: guesses a pass; None: DRAFT_TOKENS. Everything else as for `generate`.
    """

    verifier = "off", None               # the mode of a verify pass, and its thresholds
    against = "the dense model"          # whose text it is

    def __init__(self, model, prompt_ids, max_new_tokens, draft="sparse", draft_thresholds=None,
                 draft_tokens=None, temperature=0.0, top_k=None, top_p=None, seed=None, eos_ids=(),
                 make_step=fast_step, **more):
        self.sampling = Sampling(temperature, top_k, top_p, **more)
        self.prompt, length = check_prompt(model, prompt_ids, max_new_tokens)
        self.draft_tokens = DRAFT_TOKENS if draft_tokens is None else draft_tokens
        require(self.draft_tokens >= 1, f"draft_tokens is {draft_tokens}, expected at least 1")
        self.model, self.make_step, self.eos_ids = model, make_step, eos_ids
        self.generator = random_source(model, seed)
        self.cache = model.make_cache(1, length)
        self.draft = self.make_draft(draft, draft_thresholds)
        with sparse_mode(model, *self.verifier):
            self.step = make_step(model, self.cache, self.draft_tokens + 1)
        self.statistics = Statistics()
        self.text = self.run()

    def make_draft(self, draft, thresholds):
        """Return the object that guesses for an argument `draft`; InputError if there is none."""
        if hasattr(draft, "guess"):
            return draft
        model, cache = self.model, self.cache
        if isinstance(draft, Llama):
            ours, theirs = (f"{each.config.vocab_size} tokens, on {each.device}"
                            for each in (model, draft))
            require(ours == theirs, f"the draft model has {theirs}; the model has {ours}")
            cache = draft.make_cache(1, min(cache.length, draft.config.max_position_embeddings))
            model, thresholds = draft, None
        else:
            require(draft == "sparse", f'draft is "sparse", a Llama, or an object with '
                                       f'guess(ids, n), not {draft!r}')
            require(hasattr(model, "sparse_state"),
                    'draft "sparse" needs a model made sparse: sparsify(model, thresholds)')
        return ModelDraft(model, cache, self.sampling, self.generator, self.make_step, thresholds)

    def __next__(self):
        return next(self.text)

    @torch.no_grad()
    def run(self):
        """Draft, verify, accept, to the end of the text."""
        ids = self.prompt[0].tolist()
        with sparse_mode(self.model, *self.verifier):
            logits = checked(self.read_prompt(), len(ids) - 1)                  # (1, vocab)
        written = verdict(logits, [], None, self.sampling, self.generator)
        while True:
            for token in written:
                if token in self.eos_ids:
                    return
                ids.append(token)
                self.statistics.tokens += self.statistics.passes > 0     # the first: the prompt's
                yield token
                if len(ids) == self.cache.length:
                    return
            began = time.perf_counter()
            start = len(ids) - 1                           # all but the last are in the cache
            # The last token that is wanted comes from the verifier.
            guesses, q = self.draft.guess(ids, min(self.size(), self.cache.length - len(ids) - 1))
            drafted = time.perf_counter()
            self.cache.used = start
            logits = self.verify([ids[-1], *guesses])
            written = verdict(logits, guesses, q, self.sampling, self.generator)
            checked(logits[:len(written)], start)          # logits after a wrong guess are unused
            self.cache.used = start + len(written)
            self.statistics.record(len(guesses), len(written) - 1, drafted - began,
                                   time.perf_counter() - drafted)

    def size(self):
        """Return how many guesses the next pass is to have."""
        return self.draft_tokens

    def read_prompt(self):
        """Run the prompt through the verifier, and return its last logits (1, vocab)."""
        return self.model(self.prompt, self.cache, last_only=True)[:, -1]

    def verify(self, tokens):
        """Return the logits (T, vocab) after each of a list of T tokens."""
        with sparse_mode(self.model, *self.verifier):
            return self.step(torch.tensor([tokens], device=self.model.device))[0]


generate_speculative = Speculation       # beside `generate` it is called as a function


# --------------------------------------------------------------------------------------------------
# The command line

PROMPT = 'class Stack:\n    """A last-in, first-out stack of items."""\n\n    def __init__(self'


def make_parser():
    """Return the Parser of `python generate.py`; python -m beyond adds options to it."""
    parser = Parser(description="Writes text with a Llama. Without arguments: the demo model, "
                                "dense and sparse, and what that gains on this machine.")
    parser.add_model()
    add = parser.add_argument
    add("--prompt", help="text to continue (default: the beginning of a class)")
    add("--sparsity", type=share, metavar="S", help="share of the blocks' weights to skip, 0 to "
        "below 1 (default: 0.5 beside a dense run; 0 with --draft)")
    add("--draft", metavar="KIND", help="speculate: sparse (guesses by the model itself, sparser), "
        "demo, or the folder of a smaller model (default: no speculation)")
    add("--draft-sparsity", type=share, metavar="S", help="of --draft sparse (default: 0.75)")
    add("--draft-tokens", type=natural, metavar="N",
        help=f"guesses a pass (default: {DRAFT_TOKENS})")
    add("--compare", action="store_true", help="with --draft: decode plainly too (default: no)")
    add("--max-new-tokens", type=natural, default=128, metavar="N", help="(default: 128)")
    add("--temperature", type=float, help="0 is greedy (default: 0; 1 for the demo's own prompt "
        "without --draft, as so small a model would soon repeat itself)")
    add("--top-k", type=int, help="sample from the k likeliest tokens (default: all)")
    add("--top-p", type=float, help="sample from the likeliest tokens that hold this share "
        "(default: all; 0.9 where the temperature is 1 by default)")
    add("--seed", type=int, help="makes sampling repeatable (default: 0 when runs are compared, "
        "else none)")
    parser.add_calibration()
    add("--allocation", help="how the sparsity is shared out (default: the best that the "
        "calibration holds)")
    return parser


def settle(arguments):
    """Check the arguments of `make_parser`, and put values where none were given."""
    draft = arguments.draft
    require(draft == "sparse" or arguments.draft_sparsity is None,
            "--draft-sparsity is for --draft sparse")
    require(draft or not (arguments.compare or arguments.draft_tokens),
            "--compare and --draft-tokens are for --draft")
    require(arguments.draft_sparsity != 0, "--draft-sparsity is 0: there is nothing to skip")
    random = arguments.model.startswith("random:")
    require(not random or not draft or draft.startswith("random:"),
            f"--draft {draft} with random weights says nothing; python -m beyond.lab.costs shows "
            f"what it costs")
    arguments.compare = arguments.compare or (arguments.sparsity is None and not draft)
    demo = (arguments.model == str(DEMO)
            and not draft and arguments.prompt is None and arguments.temperature is None)
    for name, value in {"sparsity": 0.0 if draft else 0.5, "draft_sparsity": 0.75,
                        "temperature": float(demo), "top_p": 0.9 if demo else None,
                        "seed": 0 if arguments.compare else None}.items():
        if getattr(arguments, name) is None:
            setattr(arguments, name, value)
    arguments.sampling = Sampling(**{each.name: getattr(arguments, each.name)
                                     for each in fields(Sampling)})
    return arguments


def load_draft(arguments, tokenizer, load=load_model):
    """Return what --draft names: None, "sparse", or a model, which needs the model's tokenizer."""
    name = str(DEMO) if arguments.draft == "demo" else arguments.draft
    if name in (None, "sparse"):
        return name
    draft, own = load(name, arguments.device, arguments.dtype)
    ours, theirs = (each and each.pieces() for each in (tokenizer, own))
    require(ours == theirs, f"--draft {name}: its tokenizer is not the model's")
    return sparsify(draft, dict.fromkeys([*linear_names(draft.config), "lm_head"]))


class Writer:
    """What `python generate.py` does with a model: a class, as python -m beyond overrides parts."""

    skipped_share = staticmethod(skipped_share)
    speculate = generate_speculative

    def __init__(self, arguments, model, tokenizer, draft=None, make_step=fast_step):
        self.arguments, self.model, self.tokenizer, self.draft = arguments, model, tokenizer, draft
        self.settings = vars(arguments.sampling) | {
            "seed": arguments.seed, "eos_ids": tokenizer.eos_ids if tokenizer else (),
            "make_step": make_step}

    def prepare(self):
        """Make the model as sparse as the command line says; the paper leaves the head dense."""
        arguments = self.arguments
        thresholds = dict.fromkeys([*linear_names(self.model.config), "lm_head"])       # dense
        # A draft "sparse" is sparse with these; while it verifies it is dense.
        sparsity = arguments.sparsity or arguments.draft_sparsity * (self.draft == "sparse")
        if sparsity:
            calibration = load_calibration(self.model, arguments.model, arguments.calibration)
            thresholds |= calibration.thresholds(sparsity, arguments.allocation)
        sparsify(self.model, thresholds)

    def baseline(self):
        """Return the context in which a text is written to be compared with."""
        return sparse_mode(self.model, "off")

    def text(self, prompt, plain=False, tokens=None):
        """Return an iterator of the tokens that follow a prompt. plain: without a draft."""
        tokens = tokens or self.arguments.max_new_tokens
        if plain or not self.draft:
            return generate(self.model, prompt, tokens, **self.settings)
        return self.speculate(self.model, prompt, tokens, self.draft,
                              draft_tokens=self.arguments.draft_tokens, **self.settings)

    def show(self, title, prompt, tokens):
        """Write the text of an iterator of tokens; return (ids, tokens a second)."""
        decode = (self.tokenizer.decode if self.tokenizer
                  else lambda ids: "".join(f" {token}" for token in ids))
        print(f"--- {title}\n{decode(prompt)}", end="", flush=True)
        ids, times = list(prompt), []
        began = time.perf_counter()
        try:
            for text in stream(tokens, decode, ids):
                times.append(time.perf_counter())
                print(text, end="", flush=True)
        finally:                         # after Ctrl-C, too
            ids = ids[len(prompt):]
            times = times[:len(ids)]     # without that of a rest
            first = times[0] - began if times else 0.0
            print(f"\n--- {title}: {len(ids)} tokens, {rate(times):.1f} tokens/s, prompt of "
                  f"{len(prompt)} in {first * 1e3:.0f} ms", flush=True)
        return ids, rate(times)

    def write(self):
        """Do what the command line asks for."""
        arguments, draft = self.arguments, self.arguments.draft
        names = ("plain", "speculative") if draft else ("dense", "sparse")
        prompt = self.prompt()
        self.prepare()
        if arguments.compare:
            with self.baseline():
                plain, plain_rate = self.show(names[0], prompt, self.text(prompt, plain=True))
            print()
        text = self.text(prompt)
        title = f"{arguments.sparsity:.0%} sparse" if arguments.sparsity else "dense"
        ids, _ = self.show(f"speculative, {draft}" if draft else title, prompt, text)
        if draft:
            print(f"\nlossless against {text.against}: {text.statistics}")
        elif arguments.sparsity:
            self.say_skipped(prompt, ids)
        if arguments.compare:            # by about a second of each
            self.compare(names, prompt, min(len(ids), max(16, int(plain_rate))))
            if draft:
                print(f"the same text for {first_difference(plain, ids)} of {len(ids)} tokens"
                      + ", which rounding or sampling parts" * (plain != ids))

    def prompt(self):
        """Return the ids of the prompt, and print which model will write."""
        name, text = self.arguments.model, self.arguments.prompt
        if self.tokenizer is None:
            require(text is None, f"--prompt: {name} has random weights and no tokenizer")
            print(f"{name}: random weights, for speed alone; it writes token numbers")
            prompt = list(range(1, 17))
        else:
            prompt = self.tokenizer.encode(PROMPT if text is None else text)
        check_prompt(self.model, prompt, self.arguments.max_new_tokens)
        print(circumstances(name, self.model))
        return prompt

    def say_skipped(self, prompt, ids):
        """Say what a token of a sparse text read."""
        skipped = self.skipped_share(self.model, prompt + ids, len(prompt))
        read, whole = (bytes_a_token(self.model, each) / 1e6 for each in (skipped, 0))
        print(f"{skipped:.1%} of the blocks' weights skipped: {read:,.1f} MB read a token, of "
              f"{whole:,.1f}")

    def compare(self, names, prompt, tokens):
        """Time two ways to write in turn, in three rounds of so many tokens."""
        best = dict.fromkeys(names, 0.0)
        for name in 3 * names:
            plain = name == names[0]
            with self.baseline() if plain else contextlib.nullcontext():
                times = [time.perf_counter() for _ in self.text(prompt, plain, tokens)]
            best[name] = max(best[name], rate(times))
        (plain, slow), (other, fast) = best.items()
        print(f"in turn, the best of three: {plain} {slow:.1f} tokens/s, {other} {fast:.1f}\n"
              f"{other} over {plain}: {fast / max(slow, 1e-9):.2f}x")


def circumstances(name, model):
    """Return what the times of a model, loaded by a name, depend on, as text."""
    device = model.device.type
    threads = f", {torch.get_num_threads()} threads" if device == "cpu" else ""
    return (f"{name}, {str(model.dtype).removeprefix('torch.')}, {device}{threads}, "
            f"torch {torch.__version__}")


def rate(times):
    """Return the tokens a second after the first, by the times when each came."""
    return (len(times) - 1) / (times[-1] - times[0]) if len(times) > 1 else 0.0


def first_difference(ids, others):
    """Return how many tokens two lists have in common at the start."""
    same = [a == b for a, b in zip(ids, others)]
    return same.index(False) if False in same else len(same)


def main():
    arguments = settle(make_parser().parse_args())
    require(not (arguments.draft and arguments.sparsity),
            "--sparsity with --draft, a sparse verifier, is for python -m beyond")
    model, tokenizer = load_model(arguments.model, arguments.device, arguments.dtype)
    Writer(arguments, model, tokenizer, load_draft(arguments, tokenizer)).write()
    if arguments.model == str(DEMO) and arguments.compare and not arguments.draft:
        print("\nThe demo fits a cache. Weights of a real size do not:")
        kernel.time_shape(4096, 11008, model.dtype, model.device, [0, 0.5], 0.3, total=0)
        print("\ntry next: python generate.py --model random:llama-3.2-1b, a whole model of a real "
              "size; python sparsify.py, what sparsity costs")


if __name__ == "__main__":
    command_line(main)
