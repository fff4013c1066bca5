"""What is dropped: small inputs, by a threshold on their magnitude.

TEAL (arXiv 2408.14690, section 4) replaces every linear of a block, y = W x, by

    y = W s(x)        s(x)_i = x_i if |x_i| > t, else 0

with one threshold t for each linear, found offline so that a wanted share of the entries of x falls
below it. The activations of a Llama are centred on zero with a sharp peak there, so that many
entries are small; and dropping channel i changes y by |x_i| times the norm of column i of W, which
is little where |x_i| is little.

    entries of x:   0.9  -0.1   0.02  -1.3   0.3  -0.05   0.7   0.1
    |x| > 0.25:      ■     ·     ·      ■     ■      ·     ■     ·       4 of 8 columns are read

`sparsify(model, thresholds)` puts a `SparseLinear` in the place of each named linear of a Llama.
While one token is decoded, its small inputs are dropped and their columns never read (kernel.py).
Calls with more tokens, such as the prompt, run dense: they are bound by arithmetic, not by memory.
`sparse_mode` overrides that, since quality is measured on whole sequences.

    python sparsify.py [--model FOLDER] [--text FILE]      quality against sparsity, as a table
"""
import contextlib
import functools
from collections import Counter
from dataclasses import dataclass

import kernel
from model import (Parser, check_tokens, command_line, default_context, load_model,
                   progress, read_tokens, require, share, windows_of)

import torch
import torch.nn.functional as F
from torch import nn


@dataclass
class SparseState:
    """What the sparse linears of a model share."""
    mode: str                    # "decode", "all" or "off": see sparse_mode
    dense_prefix: int            # the first positions of a call, which mode "all" leaves dense
    tokens: int                  # how many the running call has
    thresholds: torch.Tensor     # (inputs of all sparse linears,), so that one copy changes all

    def is_sparse(self):
        """Return whether the running call is sparse, by the mode and its number of tokens."""
        return self.mode == "all" or self.mode == "decode" and self.tokens == 1


class SparseLinear(nn.Module):
    """A linear that reads only the weights of its large inputs.

    weight_t: (in, out), the transposed weight, its only copy. threshold: (in,), a view of the
    thresholds in the model's state; without a state the linear is dense.
    """

    def __init__(self, weight_t, bias=None):
        super().__init__()
        self.weight_t = nn.Parameter(weight_t, requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        self.in_features, self.out_features = weight_t.shape
        self.state = None
        self.threshold = None

    @property
    def weight(self):
        """(out, in), as a dense linear has it."""
        return self.weight_t.t()

    def forward(self, x):
        """x (B, T, in) -> (B, T, out)"""
        state = self.state
        if state is None or not state.is_sparse():
            y = self.dense(x)
        elif x.numel() <= kernel.MAX_ROWS * self.in_features and not state.dense_prefix:
            y = self.product(x)
        else:                            # the same result, from a dense product of x with zeros
            keep = self.keep(x)
            keep[:, :state.dense_prefix] = True
            y = self.dense(x * keep)
        return y if self.bias is None else y + self.bias

    def keep(self, x):
        """Return which entries of x (..., in) are kept, bool."""
        return kernel.kept(x, self.threshold)

    def product(self, x):
        """Return the product of the large entries of x (..., in), which has few rows."""
        # Not by sparse_gemv, whose checks take a tenth of its time in the demo.
        backend = kernel.best_backend(self.weight_t)
        return kernel.multiply(backend, x, self.weight_t, self.threshold)

    def dense(self, x):
        """Return the product of all entries of x (..., in)."""
        return kernel.dense(x, self.weight_t)


class TransposedEmbedding(nn.Module):
    """An embedding that shares the weight_t (hidden, vocab) of its tied head, stored transposed."""

    def __init__(self, weight_t):
        super().__init__()
        self.weight_t = weight_t

    @property
    def weight(self):
        return self.weight_t.t()

    def forward(self, tokens):
        columns = self.weight_t.index_select(1, tokens.flatten())               # (hidden, B * T)
        return columns.t().contiguous().view(*tokens.shape, -1)


def sparsify(model, thresholds, make=SparseLinear):
    """Make the named linears of a Llama sparse, in place, and return the model.

    thresholds: {name, as "model.layers.0.mlp.down_proj": number, tensor () or (in,), or None}
        None: dense, but stored transposed, for our kernel: on a CPU the fastest dense product, too
        A linear not named stays as it is: dense, or with the threshold it had.
    make(weight_t, bias): returns a sparse linear. One that is sparse already keeps its class.
    Raises InputError, and changes nothing, for a name or a shape that does not fit.
    """
    check_thresholds(model, thresholds)
    for name in thresholds:
        dense = model.get_submodule(name)
        if not isinstance(dense, SparseLinear):
            weight_t = dense.weight.detach().t().contiguous()
            model.set_submodule(name, make(weight_t, dense.bias))
            if name == "lm_head" and model.config.tie_word_embeddings:      # one memory for both
                model.model.embed_tokens = TransposedEmbedding(model.lm_head.weight_t)
            del dense, weight_t          # before the next one's turn: no second copy of the model
    dtype = torch.promote_types(model.dtype, torch.float32)                 # of the thresholds
    values = {}
    for name, linear in model.named_modules():
        if isinstance(linear, SparseLinear):
            value = thresholds.get(name, linear.threshold)
            linear.state = linear.threshold = None
            if value is not None:
                value = torch.as_tensor(value, dtype=dtype, device=model.device)
                values[linear] = value.expand(linear.in_features)
    if not values:
        return model
    if not hasattr(model, "sparse_state"):
        model.register_forward_pre_hook(note_tokens, with_kwargs=True)
    model.sparse_state = SparseState("decode", 0, 0, torch.cat(list(values.values())))
    parts = model.sparse_state.thresholds.split([linear.in_features for linear in values])
    for linear, threshold in zip(values, parts):
        linear.threshold = threshold
        linear.state = model.sparse_state
    return model


def note_tokens(model, inputs, named):
    """Tell the sparse linears how many tokens the call has, before it begins."""
    model.sparse_state.tokens = (inputs[0] if inputs else named["tokens"]).shape[1]


def check_thresholds(model, thresholds):
    """Raise InputError unless each name is a linear of the model, and its value fits."""
    modules = dict(model.named_modules())
    for name, threshold in thresholds.items():
        linear = modules.get(name)
        require(isinstance(linear, (nn.Linear, SparseLinear)),
                f"thresholds name {name}, which is not a linear of this model")
        value = torch.as_tensor(0.0 if threshold is None else threshold)
        require(value.shape in ((), (linear.in_features,)) and bool(value.isfinite().all()),
                f"threshold of {name}: shape {tuple(value.shape)}, expected finite numbers, () or "
                f"({linear.in_features},)")


@contextlib.contextmanager
def sparse_mode(model, where="decode", thresholds=None, dense_prefix=0):
    """Change, inside a `with`, when and how strongly a sparsified model is sparse.

    where: "decode": calls with one token are sparse, calls with more are dense
           "all": every call is sparse, except the first `dense_prefix` positions that it is given
           "off": every call is dense
    thresholds: {name of a sparse linear: number, tensor () or (in,)}, in force inside; or a tensor
    like model.sparse_state.thresholds, all at once: quick enough for every step.
    A model that was not sparsified is dense in every mode.
    """
    require(where in ("decode", "all", "off"), f'where is "decode", "all" or "off", not {where!r}')
    require(dense_prefix >= 0, f"dense_prefix is {dense_prefix}, expected at least 0")
    state = getattr(model, "sparse_state", None)
    if state is None:
        yield
        return
    before = state.mode, state.dense_prefix
    thresholds_before = state.thresholds if thresholds is None else state.thresholds.clone()
    try:
        state.mode = where
        state.dense_prefix = dense_prefix if where == "all" else 0
        if isinstance(thresholds, torch.Tensor):
            state.thresholds.copy_(thresholds)
        elif thresholds:
            check_thresholds(model, thresholds)
            for name, threshold in thresholds.items():
                linear = model.get_submodule(name)
                require(getattr(linear, "state", None) and threshold is not None,
                        f"{name} is dense, or would become so: that is for sparsify")
                linear.threshold[:] = threshold
        yield
    finally:
        state.mode, state.dense_prefix = before
        if thresholds is not None:
            state.thresholds.copy_(thresholds_before)


# --------------------------------------------------------------------------------------------------
# Measures

@contextlib.contextmanager
def counted(model):
    """Count, inside a `with`, what sparse calls drop, for realised_sparsity to tell afterwards."""
    size = {linear: linear.in_features * linear.out_features
            for linear in model.model.layers.modules()
            if isinstance(linear, (nn.Linear, SparseLinear))}
    dropped = Counter()                  # inputs, by linear
    seen = Counter()

    def count(linear, inputs):
        state = getattr(linear, "state", None)
        if state and state.is_sparse():
            keep = linear.keep(inputs[0])[:, state.dense_prefix:]
            dropped[linear] += keep.numel() - int(keep.sum())
            seen[linear] += keep.numel()

    with contextlib.ExitStack() as hooks:
        for linear in size:
            hooks.enter_context(linear.register_forward_pre_hook(count))
        yield
    unread = sum(dropped[linear] / max(seen[linear], 1) * size[linear] for linear in size)
    model.realised = unread / sum(size.values())


def realised_sparsity(model):
    """Return the share of the blocks' weights that sparse calls inside `counted` did not read.

    Each linear counts with its size, a dense one as read whole. 0.0 if no call was sparse.
    """
    return getattr(model, "realised", 0.0)


@torch.no_grad()
def skipped_share(model, ids, prompt):
    """Return the realised sparsity of decoding `ids` after a prompt, the first `prompt` of them.

    One pass over the finished text finds it, so that nothing is counted while a text is written.
    """
    tokens = torch.tensor([ids[:-1]], device=model.device)         # the last was not run
    with counted(model), sparse_mode(model, "all", dense_prefix=prompt):
        model(tokens, last_only=True)
    return realised_sparsity(model)


def bytes_a_token(model, skipped):
    """Return the bytes of weights that a step reads where a share of the blocks' is skipped."""
    blocks, head = (sum(tensor.nbytes for tensor in (*part.parameters(), *part.buffers()))
                    for part in (model.model.layers, model.lm_head))
    return head + (1 - skipped) * blocks


@torch.no_grad()
def quality(model, windows, ways, scored=None):
    """Return how far a model is from the dense one, made sparse in several ways.

    windows: (W, T + 1) int64, of which the last `scored` targets count; None: all. ways: functions
    that return a context in which the model runs, as sparse_mode does; in the first it is dense.
    Returns (ways, 4) float64: perplexity; KL from the dense model's distributions, in nats a token;
    how often the likeliest token is the same; realised sparsity.
    """
    scored = scored or windows.shape[1] - 1
    sums = torch.zeros(len(ways), 4, dtype=torch.float64)
    together = max(1, 2560 // windows.shape[1])            # windows: logits take much memory
    for part in progress(windows.to(model.device).split(together), "measuring quality"):
        targets = part[:, -scored:].flatten()                                   # (N,)
        for i, way in enumerate(ways):
            with way(), counted(model):
                log_p = model(part[:, :-1])[:, -scored:].flatten(0, 1).log_softmax(-1)  # (N, vocab)
            if i == 0:
                dense = log_p
            sums[i] += torch.tensor([
                F.nll_loss(log_p, targets, reduction="sum"),
                F.kl_div(log_p, dense, reduction="sum", log_target=True),
                (log_p.argmax(-1) == dense.argmax(-1)).sum(),
                realised_sparsity(model) * len(targets)], dtype=torch.float64)
    means = sums / (len(windows) * scored)
    means[:, 0] = means[:, 0].exp()
    return means


def perplexity(model, tokens, context=None, dense_prefix=0):
    """Return exp of the mean cross-entropy a token, over windows that each begin anew.

    tokens: (N,) int64. context: tokens a window; None: the model's own, at most 2048. A sparsified
    model is sparse from position `dense_prefix` of each window on, but dense inside
    sparse_mode(model, "off"). Afterwards realised_sparsity is that of this text.
    """
    check_tokens(tokens, model.config)
    windows = windows_of(tokens, context or default_context(model))
    off = hasattr(model, "sparse_state") and model.sparse_state.mode == "off"
    way = functools.partial(sparse_mode, model, "off" if off else "all", None, dense_prefix)
    row = quality(model, windows, [way])[0].tolist()
    model.realised = row[3]              # of all windows, not of the last ones
    return row[0]


def main():
    parser = Parser(description="Prints quality against sparsity, for every allocation that the "
                                "calibration holds.")
    parser.add_model()
    parser.add_text("held-out", 20_000)
    parser.add_calibration()
    parser.add_argument("--sparsity", nargs="+", type=share, default=[0.25, 0.4, 0.5, 0.65],
                        help="(default: 0.25 0.4 0.5 0.65)")
    arguments = parser.parse_args()
    require(not arguments.model.startswith("random:"),
            f"{arguments.model} has random weights: it has no quality to measure")
    model, tokenizer = load_model(arguments.model, arguments.device, arguments.dtype)
    calibration = load_calibration(model, arguments.model, arguments.calibration)
    tokens, source = read_tokens(tokenizer, arguments.text, "held-out")
    windows = windows_of(tokens[:arguments.tokens], default_context(model, arguments.context))
    settings = [(name, s) for name in reversed(calibration.allocations) for s in arguments.sparsity]
    thresholds = [calibration.thresholds(s, name) for name, s in settings]
    sparsify(model, thresholds[0])
    ways = [functools.partial(sparse_mode, model, "all", each) for each in thresholds]
    rows = quality(model, windows, [functools.partial(sparse_mode, model, "off"), *ways])
    print(f"{arguments.model} on {windows[:, 1:].numel():,} tokens: {source}")
    print("     allocation  sparsity  realised  perplexity       KL  agreement")
    for (name, sparsity), row in zip([("dense", 0), *settings], rows.tolist()):
        ppl, kl, same, realised = row
        print(f"{name:>15} {sparsity:9.0%} {realised:9.1%} {ppl:11.3f} {kl:8.4f} {same:10.1%}")


if __name__ == "__main__":
    from calibrate import load_calibration       # the next file, and it imports nothing of this one
    command_line(main)
