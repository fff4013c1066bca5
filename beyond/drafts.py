"""Drafts: guesses without a model, as many a pass as are fastest here; verifiers that are sparse.

generate.py lets a model guess a few tokens in a row, and the dense model checks them in one pass.
Three more ideas; the first two do not change the text.

Token Recycling (arXiv 2408.08696) guesses without a model. A verify pass computes logits after all
its tokens, and most of them are thrown away. Keep the likeliest token after each in a table: what
the model last thought would follow "the", "x1" or any other token. A guess is a walk along the
table, which takes no time:

    table     the ─► x1     x1 ─► x2     x2 ─► the     ...
    guess     the ─► x1 ─► x2 ─► the ...

(The paper verifies a tree of guesses. Here a pass over many tokens costs too much: LOG.md.)

Adaptive lengths. More guesses bring more tokens a pass, but take longer to make and to verify. How
much longer depends on the machine, and how many are right depends on the text. So `Statistics`
counts what is accepted, takes the time of every round, and finds the number of guesses with the
most expected tokens a second.

Sparse verifiers. Where the verifier is sparse, speculation writes the text of the sparse model in
fewer passes: each token of a verify pass keeps what it keeps in plain decoding.

The seam: the methods and the mode `verifier` of `generate.Speculation`.

    python -m beyond --draft recycle --compare                Token Recycling beside plain decoding
    python -m beyond --draft sparse --sparsity 0.4            lossless against the 40 % sparse model
"""
import contextlib
from collections import Counter

import torch

import generate
from kernel import MAX_ROWS
from sparsify import sparse_mode

MOST = MAX_ROWS - 1      # guesses: a pass over more tokens is no longer bound by memory
BELIEF = 0.7             # how often a guess is right, believed before any was judged
PART = 256               # tokens of a prompt that are read at once where all logits are wanted


class RecycleDraft:
    """Token Recycling: guesses from the logits that verify passes computed anyway.

    following: {token: the token that was likeliest, the last time, to follow it}. Any draft object
    may have a `learn`, which is told all that the verifier computes, the prompt's first.
    """

    def __init__(self):
        self.following = {}

    def guess(self, ids, n):
        """Return n guesses after the last of `ids`; and None, for they are not drawn."""
        guesses = []
        token = ids[-1]
        for _ in range(n):
            token = self.following.get(token, 0)
            guesses.append(token)
        return guesses, None

    def learn(self, tokens, logits):
        """Note the likeliest token after each of tokens (N,), by its logits (N, vocab).

        Of equal tokens the last one counts.
        """
        self.following |= dict(zip(tokens.tolist(), logits.argmax(-1).tolist()))


class Statistics(generate.Statistics):
    """What a speculative run did, and from it which number of guesses is best.

    judged, right: {place: how often the guess there was judged, those before it accepted; and how
    often it was accepted}. times: {guesses: seconds of each round with so many}.
    """

    def __init__(self):
        super().__init__()
        self.judged = Counter()
        self.right = Counter()
        self.times = {}

    @property
    def acceptance(self):
        """The share of guesses accepted at each place, of those that were judged."""
        return [self.right[place] / self.judged[place] for place in sorted(self.judged)]

    def __str__(self):
        places = " ".join(f"{share:.0%}" for share in self.acceptance)
        rounds = ", ".join(f"{size}: {len(self.times[size])}" for size in sorted(self.times))
        return (f"{super().__str__()}\nguesses accepted, by place: {places}\n"
                f"rounds by guesses a pass: {rounds}")

    def record(self, guesses, accepted, draft_seconds, verify_seconds):
        """Count a round: how many tokens were guessed, how many accepted, and its times."""
        super().record(guesses, accepted, draft_seconds, verify_seconds)
        self.judged.update(range(min(guesses, accepted + 1)))
        self.right.update(range(accepted))
        self.times.setdefault(guesses, []).append(draft_seconds + verify_seconds)

    def expected(self, size):
        """Return how many tokens a round with so many guesses is expected to write.

        A guess counts if all before it are right. All are right equally often, as far as is known:
        a belief counts as much as four guesses.
        """
        rate = (self.right.total() + 4 * BELIEF) / (self.judged.total() + 4)
        return sum(rate ** i for i in range(size + 1))

    def best_size(self):
        """Return the number of guesses with the most expected tokens a second.

        Numbers are tried upwards, the next one as long as it would pay if it cost what the one
        below it does. A number costs the least of its last times, since what disturbs a computer
        only makes it slower. Every 16th round goes to a neighbour of the best, to each in turn, as
        its time may have changed.
        """
        rates = {}                                         # {guesses: tokens a second}
        seconds = None
        for size in range(MOST + 1):
            measured = self.times.get(size, [])[1:]        # the first sets things up, as a graph
            if measured:
                seconds = min(measured[-5:])
            if seconds is None:
                return size
            rates[size] = self.expected(size) / seconds
            if not measured:
                break
        best = max(rates, key=rates.get)
        neighbours = [size for size in (best - 1, best + 1) if size in rates]
        if self.passes % 16 == 15 and neighbours:
            return neighbours[self.passes // 16 % len(neighbours)]
        return best


class Speculation(generate.Speculation):
    """generate.Speculation with more kinds of draft and of verifier.

    draft: as there, or "recycle": no model, Token Recycling
    draft_tokens: how many tokens to guess a pass; None: what is fastest here, by what was accepted
        and by the clock. Only with a fixed number is sampled text repeatable from a seed.
    sparse_verifier: whether the text is that of `generate` in the mode now in force, rather than
        the dense model's.
    """

    def __init__(self, model, prompt_ids, max_new_tokens, draft="sparse", draft_thresholds=None,
                 draft_tokens=None, *arguments, sparse_verifier=False, **named):
        state = getattr(model, "sparse_state", None)
        self.mode = state.mode if sparse_verifier and state else "off"       # that of the text
        if self.mode != "off":
            self.verifier = "all", state.thresholds.clone()
            self.against = "the sparse model"
        self.adaptive = draft_tokens is None
        super().__init__(model, prompt_ids, max_new_tokens, draft, draft_thresholds, draft_tokens,
                         *arguments, **named)
        self.statistics = Statistics()

    def make_draft(self, draft, draft_thresholds):
        return super().make_draft(RecycleDraft() if draft == "recycle" else draft, draft_thresholds)

    def read_prompt(self):
        """Run the prompt through the verifier, and return its last logits (1, vocab).

        In mode "decode" a prompt of several tokens is dense, as in plain decoding. A draft that
        learns is given the logits of all positions; as they take much memory, in parts.
        """
        dense = self.mode == "decode" and self.prompt.shape[1] > 1
        with sparse_mode(self.model, "off") if dense else contextlib.nullcontext():
            if not hasattr(self.draft, "learn"):
                return super().read_prompt()
            for part in self.prompt.split(PART, 1):
                logits = self.model(part, self.cache)[0]                        # (T, vocab)
                self.draft.learn(part[0], logits)
        return logits[-1:]

    def verify(self, tokens):
        """Return the logits (T, vocab) after each of a list of T tokens, and let a draft learn."""
        logits = super().verify(tokens)
        if hasattr(self.draft, "learn"):
            self.draft.learn(torch.tensor(tokens), logits)
        return logits

    def size(self):
        return self.statistics.best_size() if self.adaptive else super().size()


speculate = Speculation                  # as generate.generate_speculative
