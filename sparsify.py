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
Calls with more than one token, such as the prompt, run dense: they are bound by arithmetic, which
skipping memory does not help. `sparse_mode` overrides that, since quality is measured on whole
sequences.

    python sparsify.py [--model FOLDER] [--text FILE]      quality against sparsity, as a table
"""
import contextlib
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

import kernel
from model import (Parser, asked_context, check_tokens, command_line, default_context, load_model,
                   natural, progress, read_tokens, require, share, windows_of)


@dataclass
class SparseState:
    """What the sparse linears of a model share."""
    mode: str                    # "decode", "all" or "off": see sparse_mode
    dense_prefix: int            # positions that stay dense at the start of what a call is given
    tokens: int                  # of the call that is running
    thresholds: torch.Tensor     # (inputs of all sparse linears,), so that one copy changes all
    counts: torch.Tensor         # (sparse linears, 2) int64: inputs kept, inputs seen
    counting: bool = True

    def is_sparse(self):
        """Return whether the call that is running is sparse: its tokens decide, for all linears."""
        return self.mode == "all" or self.mode == "decode" and self.tokens == 1


class SparseLinear(nn.Module):
    """A linear that reads only the weights of its large inputs.

    weight_t: (in, out), the transposed weight, the only copy there is. threshold (in,), kept () and
    seen () are views of the model's state; without a state the linear is dense.
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
        y = self.sparse(x) if self.state is not None and self.state.is_sparse() else self.dense(x)
        return y if self.bias is None else y + self.bias

    def sparse(self, x):
        """Return the product of what is kept of x."""
        state = self.state
        prefix = state.dense_prefix if state.mode == "all" else 0
        rows = x.shape[0] * x.shape[1]
        few = rows <= kernel.MAX_ROWS and not prefix
        if few:
            if state.counting:
                self.count(x)
            return self.product(x.view(rows, -1)).view(*x.shape[:-1], -1)
        # Many tokens: the same function as a dense product with zeros in it.
        keep = self.count(x, prefix)
        keep[:, :prefix] = True
        return self.dense(x * keep)

    def count(self, x, prefix=0):
        """Return what is kept of x (B, T, in), bool, and count it from position `prefix` on."""
        keep = kernel.kept(x, self.threshold)
        counted = keep[:, prefix:] if prefix else keep
        self.kept.add_(counted.sum())
        self.seen.add_(counted.numel())
        return keep

    def product(self, x):
        """Return the sparse product of x (B, in), B at most MAX_ROWS: (B, out)."""
        return kernel.sparse_gemv(x, self.weight_t, self.threshold)

    def dense(self, x):
        """Return the product of all of x."""
        return kernel.dense(x, self.weight_t)


class TransposedEmbedding(nn.Module):
    """An embedding that is stored as the weight of a SparseLinear, which may be its tied head.

    weight_t: (hidden, vocab), or what has a tensor's `index_select` and `t`.
    """

    def __init__(self, weight_t):
        super().__init__()
        self.weight_t = weight_t

    @property
    def weight(self):
        return self.weight_t.t()

    def forward(self, tokens):
        columns = self.weight_t.index_select(1, tokens.flatten())               # (hidden, B * T)
        return columns.t().reshape(*tokens.shape, -1)


def sparsify(model, thresholds, make=SparseLinear):
    """Make the named linears of a Llama sparse, in place, and return the model.

    thresholds: {name of a linear, as "model.layers.0.mlp.down_proj": number, tensor () or (in,), or
    None}. None keeps a linear dense but stores it transposed: on a CPU our kernel is the fastest
    dense product, too. A linear not named stays as it is: dense, or with the threshold it had.
    make: what makes a sparse linear of (weight_t, bias). Weights are transposed one by one, so that
    no second copy of the model is needed. Raises InputError, and changes nothing, for a name or a
    shape that does not fit.
    """
    check_thresholds(model, thresholds, (nn.Linear, SparseLinear))
    for name in thresholds:
        dense = model.get_submodule(name)
        if not isinstance(dense, SparseLinear):
            parent, _, leaf = name.rpartition(".")
            weight_t = dense.weight.detach().t().contiguous()
            setattr(model.get_submodule(parent), leaf, make(weight_t, dense.bias))
            if name == "lm_head" and model.config.tie_word_embeddings:
                model.model.embed_tokens = TransposedEmbedding(model.lm_head.weight_t)
            del dense, weight_t          # before the next one's turn
    dtype = torch.promote_types(model.dtype, torch.float32)
    sparse = []
    for name, linear in model.named_modules():
        if not isinstance(linear, SparseLinear):
            continue
        if name in thresholds:
            linear.threshold = thresholds[name]
        if linear.threshold is None:
            linear.state = None
            continue
        value = torch.as_tensor(linear.threshold, dtype=dtype, device=model.device)
        linear.threshold = value.expand(linear.in_features)
        sparse.append(linear)
    if not sparse:
        return model
    state = SparseState("decode", 0, 0, torch.cat([linear.threshold for linear in sparse]),
                        torch.zeros(len(sparse), 2, dtype=torch.int64, device=model.device))
    parts = state.thresholds.split([linear.in_features for linear in sparse])
    for linear, threshold, counts in zip(sparse, parts, state.counts):
        linear.state = state
        linear.threshold = threshold
        linear.kept, linear.seen = counts
    if not hasattr(model, "sparse_state"):
        model.register_forward_pre_hook(note_tokens, with_kwargs=True)
    model.sparse_state = state
    return model


def note_tokens(model, inputs, named):
    """Tell the sparse linears how many tokens the call has, before it begins."""
    model.sparse_state.tokens = (inputs[0] if inputs else named["tokens"]).shape[1]


def check_thresholds(model, thresholds, kinds):
    """Raise InputError unless each name is a linear of `kinds` in the model, and its value fits."""
    modules = dict(model.named_modules())
    for name, threshold in thresholds.items():
        linear = modules.get(name)
        require(isinstance(linear, kinds), f"thresholds name {name}, which is not a "
                f"{'sparse ' * (kinds is SparseLinear)}linear of this model")
        if threshold is not None:
            value = torch.as_tensor(threshold)
            require(value.shape in ((), (linear.in_features,)),
                    f"threshold of {name}: shape {tuple(value.shape)}, expected () or "
                    f"({linear.in_features},)")
            require(bool(torch.isfinite(value).all()), f"threshold of {name} is not finite")


def set_thresholds(model, thresholds):
    """Set the thresholds of sparse linears by name; the tensors stay where they are."""
    check_thresholds(model, thresholds, SparseLinear)
    for name, threshold in thresholds.items():
        linear = model.get_submodule(name)
        require(linear.state is not None and threshold is not None,
                f"{name} is dense, or would become so: that is for sparsify")
        linear.threshold.copy_(torch.as_tensor(threshold))


@contextlib.contextmanager
def sparse_mode(model, where="decode", thresholds=None, dense_prefix=0):
    """Change, inside a `with`, when and how strongly a sparsified model is sparse.

    where: "decode": calls with one token are sparse, calls with more are dense
           "all": every call is sparse, except the first `dense_prefix` positions that it is given
           "off": every call is dense
    thresholds: {name of a sparse linear: number, tensor () or (in,)}, in force inside; others stay.
    Or all of them, a copy of model.sparse_state.thresholds, which is quick enough for every step.
    A model that was not sparsified is dense whatever the mode.
    """
    require(where in ("decode", "all", "off"), f'where is "decode", "all" or "off", not {where!r}')
    require(dense_prefix >= 0, f"dense_prefix is {dense_prefix}, expected at least 0")
    state = getattr(model, "sparse_state", None)
    if state is None:
        yield
        return
    before = state.mode, state.dense_prefix
    thresholds_before = None if thresholds is None else state.thresholds.clone()
    try:
        state.mode = where
        state.dense_prefix = dense_prefix
        if isinstance(thresholds, torch.Tensor):
            state.thresholds.copy_(thresholds)
        elif thresholds:
            set_thresholds(model, thresholds)
        yield
    finally:
        state.mode, state.dense_prefix = before
        if thresholds is not None:
            state.thresholds.copy_(thresholds_before)


# --------------------------------------------------------------------------------------------------
# Measures

def realised_sparsity(model):
    """Return the share of the blocks' weights that sparse calls did not read since `reset_counts`.

    Each linear counts with its size; a dense one is read whole. 0.0 if no call was sparse.
    """
    return share_skipped(model.model.layers)


def share_skipped(module):
    """Return what `realised_sparsity` does, of the linears in a module."""
    skipped = total = 0
    for linear in module.modules():
        if isinstance(linear, (nn.Linear, SparseLinear)):
            size = linear.in_features * linear.out_features
            total += size
            if isinstance(linear, SparseLinear) and linear.state is not None:
                seen = linear.seen.item()
                skipped += size * (1 - linear.kept.item() / seen) if seen else 0
    return skipped / total


def reset_counts(model):
    """Forget what was counted for `realised_sparsity`."""
    if hasattr(model, "sparse_state"):
        model.sparse_state.counts.zero_()


@torch.no_grad()
def perplexity(model, tokens, context=None, dense_prefix=0):
    """Return exp of the mean cross-entropy a token, over windows with nothing before them.

    tokens: (N,) int64. context: tokens a window; None: the model's own, at most 2048. A sparsified
    model is sparse here, in every position from `dense_prefix` on of each window, except inside
    sparse_mode(model, "off"). Afterwards `realised_sparsity` is that of this text.
    """
    check_tokens(tokens, model.config)
    windows = windows_of(tokens, context or default_context(model)).to(model.device)
    state = getattr(model, "sparse_state", None)
    mode = "off" if state is not None and state.mode == "off" else "all"
    reset_counts(model)
    total = 0.0
    with sparse_mode(model, mode, dense_prefix=dense_prefix):
        for part in windows.split(4):
            logits = model(part[:, :-1]).flatten(0, 1)
            total += F.cross_entropy(logits, part[:, 1:].flatten(), reduction="sum").item()
    return math.exp(total / windows[:, 1:].numel())


@torch.no_grad()
def quality(model, windows, settings):
    """Return, for each of several thresholds, how far the sparse model is from the dense one.

    windows: (W, T + 1) int64; settings: a list of thresholds as `sparse_mode` takes them, all of
    the same linears, which are sparse afterwards. Returns (settings + 1, 4) float64, the dense
    model first: perplexity; KL from the dense model's distributions, in nats a token; agreement,
    how often the likeliest token is the same; realised sparsity.
    """
    require(all(each.keys() == settings[0].keys() for each in settings),
            "settings of different linears: one not named would keep the threshold it had")
    if settings:
        sparsify(model, settings[0])
    sums = torch.zeros(len(settings) + 1, 4, dtype=torch.float64)
    parts = windows.to(model.device).split(4)
    for part in progress(parts, f"{len(settings)} settings"):
        tokens, targets = part[:, :-1], part[:, 1:].flatten()
        for i, thresholds in enumerate([None, *settings]):
            reset_counts(model)
            with sparse_mode(model, "all" if i else "off", thresholds):
                log_p = model(tokens).flatten(0, 1).log_softmax(-1)             # (w * T, vocab)
            if i == 0:
                dense = log_p
            sums[i] += torch.tensor([
                F.nll_loss(log_p, targets, reduction="sum").item(),
                F.kl_div(log_p, dense, reduction="sum", log_target=True).item(),
                (log_p.argmax(-1) == dense.argmax(-1)).sum().item(),
                realised_sparsity(model) * len(targets),
            ], dtype=torch.float64)
    means = sums / windows[:, 1:].numel()
    means[:, 0] = means[:, 0].exp()
    return means


def main(load_calibration):
    parser = Parser(description="Prints quality against sparsity, for every allocation that the "
                                "calibration holds.")
    parser.add_model()
    parser.add_argument("--text", metavar="FILE",
                        help="UTF-8 text (default: the standard library's held-out part)")
    parser.add_argument("--tokens", type=natural, default=20_000,
                        help="of it at most (default: 20000)")
    parser.add_argument("--context", type=natural,
                        help="tokens a window (default: the model's own, at most 2048)")
    parser.add_argument("--calibration", metavar="FILE",
                        help="(default: calibration.safetensors in the checkpoint folder)")
    parser.add_argument("--sparsity", nargs="+", type=share, default=[0.25, 0.4, 0.5, 0.65],
                        help="(default: 0.25 0.4 0.5 0.65)")
    arguments = parser.parse_args()
    require(not arguments.model.startswith("random:"),
            f"{arguments.model} has random weights: it has no quality to measure")
    model, tokenizer = load_model(arguments.model, arguments.device, arguments.dtype)
    context = asked_context(model, arguments.context)
    calibration = load_calibration(model, arguments.model, arguments.calibration)
    tokens, source = read_tokens(tokenizer, arguments.text, "held-out")
    windows = windows_of(tokens[:arguments.tokens], context)
    settings = [(name, s) for name in reversed(calibration.allocations) for s in arguments.sparsity]
    measures = quality(model, windows, [calibration.thresholds(s, name) for name, s in settings])
    print(f"{arguments.model} on {windows[:, 1:].numel():,} tokens: {source}")
    print(f"{'allocation':>15} {'sparsity':>9} {'realised':>9} {'perplexity':>11} {'KL':>8} "
          f"{'agreement':>10}")
    for (allocation, sparsity), (perplexity, kl, same, realised) in zip(
            [("dense", 0), *settings], measures.tolist()):
        print(f"{allocation:>15} {sparsity:9.0%} {realised:9.1%} {perplexity:11.3f} {kl:8.4f} "
              f"{same:10.1%}")


if __name__ == "__main__":
    import calibrate                     # where thresholds come from; it imports nothing from here
    command_line(lambda: main(calibrate.load_calibration))
