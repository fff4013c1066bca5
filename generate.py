"""Decoding: how a model that scores the next token writes a text.

    prefill   the prompt runs through the model at once, dense; the KV cache now holds its positions
    decode    choose a token from the last logits ─► run that one token through the model, sparse ─► its logits ─┐
                    ▲                                                                                            │
                    └────────────────────────────────────────────────────────────────────────────────────────────┘

Each turn reads all weights that are not skipped, for one token: this loop is what activation sparsity speeds up.

Greedy decoding (temperature 0) takes the likeliest token. Sampling divides the logits by the temperature, keeps the
top_k likeliest tokens and of those the fewest that hold a share top_p of the probability, and draws from what is left.

    python generate.py                                         the demo: a small model writes Python, dense and sparse
    python generate.py --model FOLDER --prompt TEXT --sparsity 0.5
"""
import time

import torch

from calibrate import load_calibration
from kernel import best_backend
from model import DEMO, InputError, Parser, check_tokens, command_line, linear_names, load_model, natural
from sparsify import realised_sparsity, reset_counts, sparse_mode, sparsify

PROMPT = 'class Stack:\n    """A last-in, first-out stack of items."""\n\n    def __init__(self'


def probabilities(logits, temperature, top_k=None, top_p=None):
    """The distribution that is sampled from: logits (..., vocab) -> (..., vocab), temperature above 0."""
    logits = (logits - logits.max(-1, keepdim=True).values) / temperature    # the largest is 0 at any temperature
    if top_k is not None and top_k < logits.shape[-1]:
        best = logits.topk(top_k)
        logits = torch.full_like(logits, float("-inf")).scatter(-1, best.indices, best.values)
    p = logits.softmax(-1)
    if top_p is not None:
        ordered, order = p.sort(-1, descending=True)
        enough = ordered.cumsum(-1) - ordered >= top_p     # what the likelier tokens hold together
        enough[..., 0] = False
        p = p.scatter(-1, order, ordered.masked_fill(enough, 0.0))
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
    generator = random_source(model, seed)
    length = min(prompt.shape[1] + max_new_tokens, model.config.max_position_embeddings)
    cache = model.make_cache(1, length)
    logits, step = model(prompt, cache, last_only=True)[:, -1], Steps(model, cache)         # (1, vocab)
    for left in reversed(range(length - prompt.shape[1])):
        if temperature == 0:
            tokens = logits.argmax(-1, keepdim=True)                                        # (1, 1)
        else:
            tokens = torch.multinomial(probabilities(logits, temperature, top_k, top_p), 1, generator=generator)
        token = tokens.item()
        if token in eos_ids:
            return
        yield token
        if left:
            logits = step(tokens)[:, -1]


def random_source(model, seed):
    generator = torch.Generator(model.device)
    generator.seed() if seed is None else generator.manual_seed(seed)
    return generator


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
            past = torch.ones(T, cache.used, dtype=torch.bool, device=tokens.device)
            return model(tokens, cache, cache.used + depths, torch.cat((past, sees), 1))
        order = torch.arange(T, device=model.device)
        slots = cache.used + order
        mask = torch.zeros(T, cache.length, dtype=torch.bool, device=model.device)
        mask[:, :cache.used] = True
        mask[:, cache.used:cache.used + T] = sees if sees is not None else order <= order[:, None]
        inputs = tokens, slots if depths is None else cache.used + depths, mask, slots
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


class StreamDecoder:
    """Turns tokens into text as they come, whole characters only.

    A character may be spread over several tokens, and what a token spells may depend on those before it. So the
    text of the last few tokens is decoded anew with each token, and given out as far as it is new and sure. Between calls
    the first `given` characters of decode(pending) have been given out.
    """
    CONTEXT = 8              # tokens kept before the new ones
    PATIENCE = 32            # tokens to wait for a character to become whole

    def __init__(self, tokenizer, prompt_ids=()):
        self.tokenizer = tokenizer
        self.pending = list(prompt_ids)[-self.CONTEXT:]
        self.given = len(tokenizer.decode(self.pending))

    def add(self, token):
        """The text that `token` completes; "" while a character is unfinished."""
        self.pending.append(token)
        text = self.tokenizer.decode(self.pending)
        if text.endswith("\ufffd") and len(self.pending) < self.PATIENCE:   # bytes that are no character yet
            return ""
        new, self.given = text[self.given:], len(text)
        if len(self.pending) >= 2 * self.CONTEXT:
            self.pending = self.pending[-self.CONTEXT:]
            self.given = len(self.tokenizer.decode(self.pending))
        return new

    def end(self):
        """What is left when no token follows: bytes that never became a character show as U+FFFD."""
        new, self.given = self.tokenizer.decode(self.pending)[self.given:], 0
        self.pending = []
        return new


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


def main():
    parser = Parser(description="Writes text with a Llama. Without arguments: the demo model, dense and then sparse.")
    parser.add_argument("--model", default=str(DEMO), help="checkpoint folder, or random:PRESET (default: the demo model)")
    parser.add_argument("--prompt", help="text to continue (default: the beginning of a Python class)")
    parser.add_argument("--sparsity", type=float, metavar="S",
                        help="share of the blocks' weights to skip, 0 to below 1 (default: 0.5 after a dense run to compare)")
    parser.add_argument("--max-new-tokens", type=natural, default=128, metavar="N", help="(default: 128)")
    parser.add_argument("--temperature", type=float, help="0 is greedy (default: 0; 1 in the demo, where so small a model "
                        "would soon repeat itself)")
    parser.add_argument("--top-k", type=int, help="sample from the k likeliest tokens (default: all)")
    parser.add_argument("--top-p", type=float, help="sample from the likeliest tokens that hold this share (default: all; 0.9 in the demo)")
    parser.add_argument("--seed", type=int, help="makes sampling repeatable (default: 0 when runs are compared, else none)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu",
                        help="(default: cuda where there is one, else cpu)")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], help="(default: the checkpoint's own)")
    parser.add_argument("--calibration", metavar="FILE", help="(default: calibration.safetensors in the checkpoint folder)")
    parser.add_argument("--allocation", help="how the sparsity is shared out (default: the best that the calibration holds)")
    arguments = parser.parse_args()
    compare, demo = arguments.sparsity is None, arguments.model == str(DEMO) and arguments.prompt is None
    if arguments.temperature is None:
        arguments.temperature = 1.0 if demo else 0.0
        arguments.top_p = arguments.top_p or (0.9 if demo else None)
    sparsity = 0.5 if compare else arguments.sparsity
    if not 0 <= sparsity < 1:
        raise InputError(f"--sparsity is {sparsity}, expected at least 0 and below 1")
    check_sampling(arguments.temperature, arguments.top_k, arguments.top_p, arguments.seed)

    model, tokenizer = load_model(arguments.model, arguments.device, arguments.dtype)
    if tokenizer is None:
        if arguments.prompt is not None:
            raise InputError(f"--prompt: {arguments.model} has random weights and no tokenizer")
        prompt, eos_ids = torch.arange(1, 17).tolist(), ()
        print(f"{arguments.model}: random weights, for speed alone; what it writes are token numbers")
    else:
        prompt, eos_ids = tokenizer.encode(PROMPT if arguments.prompt is None else arguments.prompt), tokenizer.eos_ids
    check_prompt(model, prompt, arguments.max_new_tokens)

    def run(title):
        print(f"--- {title}")
        if tokenizer is not None:
            print(tokenizer.decode(prompt), end="", flush=True)
        tokens = generate(model, prompt, arguments.max_new_tokens, arguments.temperature, arguments.top_k, arguments.top_p,
                          0 if compare and arguments.seed is None else arguments.seed, eos_ids)
        reset_counts(model)
        ids, first, rest, interrupted = stream(tokens, tokenizer and StreamDecoder(tokenizer, prompt),
                                 lambda text: print(text, end="", flush=True))
        print(f"\n--- {title}: {len(ids)} tokens, {rate(ids, rest):.1f} tokens/s, prompt of {len(prompt)} in {first * 1e3:.0f} ms, "
              f"{realised_sparsity(model):.1%} of the blocks' weights skipped", flush=True)
        if interrupted:
            raise KeyboardInterrupt
        return ids, rate(ids, rest)

    dtype = str(model.model.embed_tokens.weight.dtype).removeprefix("torch.")
    threads = f", {torch.get_num_threads()} threads" if model.device.type == "cpu" else ""
    print(f"{arguments.model}, {dtype}, {model.device.type}{threads}, torch {torch.__version__}")
    thresholds = dict.fromkeys(linear_names(model.config), 0.0)
    if sparsity:
        thresholds = load_calibration(model, arguments.model, arguments.calibration).thresholds(sparsity, arguments.allocation)
    ours = best_backend(model.model.embed_tokens.weight)
    if ours == "c":                                        # the head stays dense, but is read faster by our kernel
        thresholds["lm_head"] = 0.0
    if not compare:
        sparsify(model, thresholds)
        with sparse_mode(model, "decode" if sparsity else "off"):
            run(f"{sparsity:.0%} sparse" if sparsity else "dense")
        return
    # Dense is to be as fast as it can be: with our kernel, except where only the fallback runs.
    if ours != "torch":
        sparsify(model, thresholds)
    with sparse_mode(model, "off"):
        dense_ids, dense_rate = run("dense")
    print()
    sparsify(model, thresholds)
    sparse_ids, sparse_rate = run(f"{sparsity:.0%} sparse")
    if not dense_rate:                                     # a text of a token or none has no rate
        return
    same = next((i for i, (a, b) in enumerate(zip(dense_ids, sparse_ids)) if a != b), min(len(dense_ids), len(sparse_ids)))
    print(f"\nsparse over dense: {sparse_rate / dense_rate:.2f}x; the first {same} of {len(dense_ids)} tokens are the same")


if __name__ == "__main__":
    command_line(main)
