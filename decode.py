"""Decoding: how a model that scores the next token writes a text.

    prefill   the prompt runs through the model at once, dense; the KV cache now holds its positions
    decode    choose a token from the last logits ─► run that one token through the model, sparse ─► its logits ─┐
                    ▲                                                                                            │
                    └────────────────────────────────────────────────────────────────────────────────────────────┘

Each turn reads all weights that are not skipped, for one token: this loop is what activation sparsity speeds up.

Greedy decoding (temperature 0) takes the likeliest token. Sampling divides the logits by the temperature, keeps the
top_k likeliest tokens and of those the fewest that hold a share top_p of the probability, and draws from what is left.
"""
import torch

import parallel
from cli import InputError
from model import check_tokens
from step import Steps


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
    if length > prompt.shape[1] + 1:
        step.prepare(prompt[:, -1:])                       # now, so that its time is the prompt's
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
    return draw(p, generator), p


def draw(p, generator):
    """A token from each of the distributions p (N, vocab), as (N, 1): where a uniform number falls among the running sums.

    torch.multinomial draws a number for every token instead, which takes 2.6 ms for 128,256 of them on a CPU, this 0.15 ms.
    """
    sums = p.cumsum(-1, dtype=torch.float64)
    at = sums[:, -1:] * torch.rand(len(p), 1, generator=generator, device=p.device, dtype=torch.float64)
    return torch.searchsorted(sums, at, right=True).clamp(max=p.shape[-1] - 1)


def random_source(model, seed):
    generator = torch.Generator(model.device)
    return generator.manual_seed(parallel.from_first(lambda: generator.seed() if seed is None else seed))
