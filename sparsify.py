"""What is dropped: small inputs, by a threshold on their magnitude.

TEAL (arXiv 2408.14690, section 4) replaces every linear of a block, y = W x, by

    y = W s(x)        s(x)_i = x_i if |x_i| > t, else 0

with one threshold t for each input, found offline so that a wanted share of the entries falls below it. The
activations of a Llama are centred on zero with a sharp peak there, so that many entries are small, and dropping
channel i changes y by |x_i| times the norm of column i of W: little, where |x_i| is little.

    entries of x:   0.9  -0.1   0.02  -1.3   0.3  -0.05   0.7   0.1
    |x| > 0.25:      ■     ·     ·      ■     ■      ·     ■     ·       4 of 8 columns of W are read

`sparsify(model, thresholds)` puts a `SparseLinear` in the place of each named linear of a Llama. While one token is
decoded, its small inputs are dropped and their columns never read (kernel.py). Whatever has more tokens than one,
the prompt for instance, is dense: it is bound by arithmetic, which skipping memory does not help.
`sparse_mode` overrides that, since quality is measured on whole sequences.

    python sparsify.py [--model FOLDER] [--text FILE]      quality against sparsity, as a table (judge.py)
"""
import contextlib
import math
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

import kernel
from cli import InputError, command_line
from model import MLP, Attention, check_tokens


# ---------------------------------------------------------------------------------------------------------
# The sparse linears of a model share one state: when they are sparse, their thresholds, and what they counted.

@dataclass
class SparseState:
    where: str               # "decode", "all" or "off": see sparse_mode
    dense_prefix: int        # positions at the start of a sequence that stay dense in mode "all"
    thresholds: torch.Tensor     # (inputs of all sparse linears,) one behind another, so that one copy swaps all
    counts: torch.Tensor         # (sparse linears, 2) int64: entries kept, entries seen


class SparseLinear(nn.Module):
    """A linear that reads only the weights of its large inputs.

    weight_t: (in, out), the transposed weight, the only copy there is; a tensor or a QuantizedWeight.
    `share` gives it its part of the model's state; before, it is dense.
    """

    def __init__(self, weight_t, bias=None):
        super().__init__()
        self.weight_t = nn.Parameter(weight_t, requires_grad=False) if isinstance(weight_t, torch.Tensor) else weight_t
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        self.in_features, self.out_features = weight_t.shape
        self.state = None

    @property
    def weight(self):
        """(out, in), as a dense linear has it; of a quantized one, what it is multiplied with, in float32."""
        return (self.weight_t if isinstance(self.weight_t, torch.Tensor) else self.weight_t.dequantized(torch.float32)).t()

    def share(self, state, threshold, counts):
        """state: the model's; threshold (in,) and counts (2,): views of this linear's part of it."""
        self.state, self.threshold, self.counts = state, threshold, counts

    def forward(self, x):
        """x (B, T, in) -> (B, T, out)"""
        y = self.product(x)
        return y if self.bias is None else y + self.bias

    def product(self, x):
        if not is_sparse(self.state, x):
            return kernel.dense(x, self.weight_t)
        if fits_kernel(self.state, x):
            y = kernel.sparse_gemv(x.flatten(0, 1), self.weight_t, self.threshold, counts=self.counts)
            return y.view(*x.shape[:-1], -1)
        # Many tokens: the same function as a dense product with zeros in it.
        keep = ~(x.to(self.threshold.dtype).abs() <= self.threshold)                        # (B, T, in); NaN is kept
        prefix = self.state.dense_prefix if self.state.where == "all" else 0
        keep[:, :prefix] = True
        counted = keep[:, prefix:]
        self.counts[0] += counted.sum()
        self.counts[1] += counted.numel()
        return kernel.dense(x * keep, self.weight_t)


def is_sparse(state, x):
    """Whether small entries of x (B, T, in) are dropped: a step of decoding has T = 1."""
    return state is not None and (state.where == "all" or state.where == "decode" and x.shape[1] == 1)


def fits_kernel(state, x):
    """Whether x (B, T, in) is few enough rows for the sparse kernel, none of them exempt."""
    return x.shape[0] * x.shape[1] <= kernel.MAX_ROWS and not (state.dense_prefix and state.where == "all")


class TransposedEmbedding(nn.Module):
    """The embedding of a model whose head, tied to it, is a SparseLinear: the head's weight_t (hidden, vocab) serves both."""

    def __init__(self, weight_t):
        super().__init__()
        self.weight_t = weight_t

    @property
    def weight(self):
        return self.weight_t.t()

    def forward(self, tokens):
        return self.weight[tokens].contiguous()                                             # (B, T, hidden)


class SparseAttention(Attention):
    """Attention whose q, k and v, all of them sparse, share a launch of the kernel.

    Takes over the submodules of `dense`, an Attention, under their names. counts: (3, 2), those of q, k and v.
    """

    def __init__(self, dense, counts):
        nn.Module.__init__(self)
        self.__dict__.update(dense.__dict__)               # a module's attributes and submodules, all of them
        self.counts = counts

    def qkv(self, x):
        linears = [self.q_proj, self.k_proj, self.v_proj]
        state = self.q_proj.state
        if not (is_sparse(state, x) and fits_kernel(state, x)):
            return super().qkv(x)
        y = kernel.sparse_gemv_group(x.flatten(0, 1), [linear.weight_t for linear in linears],
                                     [linear.threshold for linear in linears], counts=self.counts)
        y = y.view(*x.shape[:-1], -1)
        return y if linears[0].bias is None else y + torch.cat([linear.bias for linear in linears])


class SparseMLP(MLP):
    """An MLP whose gate and up, both sparse, share a launch of the kernel, with silu(gate) * up applied in it.

    Takes over the submodules of `dense`, an MLP, under their names. counts: (2, 2), those of gate and up.
    """

    def __init__(self, dense, counts):
        nn.Module.__init__(self)
        self.__dict__.update(dense.__dict__)
        self.counts = counts

    def gated(self, x):
        gate, up = self.gate_proj, self.up_proj
        if not (is_sparse(gate.state, x) and fits_kernel(gate.state, x)) or gate.bias is not None:
            return super().gated(x)                        # a bias comes before the silu, which the kernel applies itself
        y = kernel.sparse_gated(x.flatten(0, 1), gate.weight_t, up.weight_t, gate.threshold, up.threshold,
                                counts=self.counts)
        return y.view(*x.shape[:-1], -1)


def sparsify(model, thresholds):
    """Makes the named linears of a Llama sparse, in place, and returns the model.

    thresholds: {name of a linear, as in "model.layers.0.mlp.down_proj": number, 0-d tensor, or tensor (in,)}.
    A linear not named stays as it is: dense, or with the threshold it had. Weights are transposed one by
    one, so that no second copy of the model is needed. Raises InputError for a name or a shape that does not fit.
    """
    modules = dict(model.named_modules())
    for name, threshold in thresholds.items():             # all checks first: what is refused changes nothing
        if not isinstance(modules.get(name), (nn.Linear, SparseLinear)):
            raise InputError(f"thresholds name {name}, which is not a linear of this model")
        check_threshold(name, threshold, modules[name].in_features)
    kept = {name: module.threshold.clone() for name, module in modules.items() if isinstance(module, SparseLinear) and module.state}
    for name in thresholds:
        if isinstance(modules[name], nn.Linear):
            dense = modules.pop(name)                      # so that its weight is freed with it, before the next one's turn
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, SparseLinear(dense.weight.detach().t().contiguous(), dense.bias))
            if name == "lm_head" and model.config.tie_word_embeddings:
                model.model.embed_tokens = TransposedEmbedding(model.lm_head.weight_t)
            del dense
    linears = {name: module for name, module in model.named_modules()
               if isinstance(module, SparseLinear) and (name in kept or name in thresholds)}
    device = model.device
    dtype = torch.promote_types(model.model.embed_tokens.weight.dtype, torch.float32)
    state = SparseState("decode", 0, torch.zeros(sum(l.in_features for l in linears.values()), device=device, dtype=dtype),
                        torch.zeros(len(linears), 2, device=device, dtype=torch.int64))
    views = state.thresholds.split([linear.in_features for linear in linears.values()])
    for linear, view, counts in zip(linears.values(), views, state.counts):
        linear.share(state, view, counts)
    model.sparse_state = state
    set_thresholds(model, kept | thresholds)

    # Where all that share an input are sparse, they share a launch. They stand side by side in the state.
    places = {linear: place for place, linear in enumerate(linears.values())}
    for block in model.model.layers:
        attention, mlp = block.self_attn, block.mlp
        if {attention.q_proj, attention.k_proj, attention.v_proj} <= places.keys():
            first = places[attention.q_proj]
            block.self_attn = SparseAttention(attention, state.counts[first:first + 3])
        if {mlp.gate_proj, mlp.up_proj} <= places.keys():
            first = places[mlp.gate_proj]
            block.mlp = SparseMLP(mlp, state.counts[first:first + 2])
    return model


def check_threshold(name, threshold, in_features):
    """Raises InputError if `threshold` cannot be that of the linear `name`."""
    value = torch.as_tensor(threshold)
    if value.shape not in ((), (in_features,)):
        raise InputError(f"threshold of {name}: shape {tuple(value.shape)}, expected () or ({in_features},)")
    if not torch.isfinite(value).all():
        raise InputError(f"threshold of {name} is not finite")


def set_thresholds(model, thresholds):
    """Sets the thresholds of sparse linears by name; those not named stay. The tensors stay where they are."""
    modules = dict(model.named_modules())
    for name, threshold in thresholds.items():
        linear = modules.get(name)
        if not isinstance(linear, SparseLinear) or linear.state is None:
            raise InputError(f"thresholds name {name}, which is not a sparse linear of this model")
        check_threshold(name, threshold, linear.in_features)
    for name, threshold in thresholds.items():
        own = modules[name].threshold
        own.copy_(torch.as_tensor(threshold, dtype=own.dtype).expand(len(own)))


@contextlib.contextmanager
def sparse_mode(model, where="decode", thresholds=None, dense_prefix=0):
    """Changes, inside a `with`, when and how strongly a sparsified model is sparse; weights are not touched.

    where: "decode": calls with one token are sparse, calls with more are dense
           "all": every call is sparse, except the first `dense_prefix` positions of what it is given
           "off": every call is dense
    dense_prefix: counts in mode "all" alone
    thresholds: {name of a sparse linear: number, 0-d tensor or tensor (in,)}, in force inside; others stay.
        Or all of them at once, a copy of model.sparse_state.thresholds, which is quick enough for every step.
    A model that was not sparsified is dense whatever the mode.
    """
    if where not in ("decode", "all", "off"):
        raise InputError(f'where is "decode", "all" or "off", not {where!r}')
    if dense_prefix < 0:
        raise InputError(f"dense_prefix is {dense_prefix}, expected at least 0")
    state = getattr(model, "sparse_state", None)
    if state is None:
        yield
        return
    before = state.where, state.dense_prefix, state.thresholds.clone()
    try:
        state.where, state.dense_prefix = where, dense_prefix
        if isinstance(thresholds, torch.Tensor):
            state.thresholds.copy_(thresholds)
        else:
            set_thresholds(model, thresholds or {})
        yield
    finally:
        state.where, state.dense_prefix = before[:2]
        state.thresholds.copy_(before[2])


# ---------------------------------------------------------------------------------------------------------
# Measures

def realised_sparsity(model):
    """The share of weights in the blocks' linears that sparse steps did not read, since `reset_counts`.

    Each linear counts with its size; a dense one counts as read whole. 0.0 for a model that took no sparse step.
    """
    skipped = total = 0
    for block in model.model.layers:
        for module in block.modules():
            if isinstance(module, (nn.Linear, SparseLinear)):
                size = module.in_features * module.out_features
                total += size
                if isinstance(module, SparseLinear) and module.state:
                    kept, seen = module.counts.tolist()
                    skipped += size * (1 - kept / seen) if seen else 0
    return skipped / total


def reset_counts(model):
    """Forgets what was counted for `realised_sparsity`."""
    if hasattr(model, "sparse_state"):
        model.sparse_state.counts.zero_()


def windows_of(tokens, context, stride=None):
    """tokens (N,) as windows (W, context + 1), each of which predicts `context` tokens; they begin `stride` apart.

    stride None: `context`, so that every token but the first is predicted once. The rest behind the last whole
    window is left out. Raises InputError for a text shorter than one window.
    """
    if context < 1 or stride is not None and stride < 1:
        raise InputError(f"windows of {context} tokens, {stride or context} apart: expected at least 1")
    if tokens.numel() <= context:
        raise InputError(f"the text has {tokens.numel()} tokens, a window of {context} needs {context + 1}: give more text")
    return tokens.unfold(0, context + 1, stride or context)


def default_context(model):
    return min(model.config.max_position_embeddings, 2048)


@torch.no_grad()
def perplexity(model, tokens, context=None, dense_prefix=0):
    """exp of the mean cross-entropy a token, over windows of `context` tokens that start with nothing before them.

    tokens: (N,) int64. context: None is the model's own, at most 2048. A sparsified model is sparse here, in every
    position from `dense_prefix` on of each window, except inside sparse_mode(model, "off").
    """
    check_tokens(tokens, model.config)
    windows = windows_of(tokens, context or default_context(model))
    state = getattr(model, "sparse_state", None)
    reset_counts(model)
    total = 0.0
    with sparse_mode(model, "off" if state and state.where == "off" else "all", dense_prefix=dense_prefix):
        for part in windows.split(4):
            logits = model(part[:, :-1].to(model.device))
            total += F.cross_entropy(logits.flatten(0, 1), part[:, 1:].flatten().to(model.device), reduction="sum").item()
    return math.exp(total / windows[:, 1:].numel())


# ---------------------------------------------------------------------------------------------------------
# Text to measure on

def read_tokens(tokenizer, path, part):
    """(tokens (N,) int64, what they are): the text file at `path`, or a part of the standard library if None.

    part: "train" or "held-out"; the files of a part come in an order drawn once.
    """
    if path is not None:
        try:
            text = Path(path).read_bytes().decode("utf-8")
        except OSError as error:
            raise InputError(f"{path}: cannot be read: {error.strerror}") from None
        except UnicodeDecodeError as error:
            raise InputError(f"{path}: not UTF-8 text: {error.reason} at byte {error.start}") from None
        return torch.tensor(tokenizer.encode(text), dtype=torch.int64), str(path)
    from demo import corpus
    texts = [text for _, text in corpus.files(part)]
    order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(1))
    ids = [i for index in order for i in [*tokenizer.encode(texts[index]), tokenizer.eos_ids[0]]]
    return torch.tensor(ids, dtype=torch.int64), f"{part} part of {corpus.NAME}"


if __name__ == "__main__":
    from judge import main                                 # which imports this file as a module: its table is of that one's classes
    command_line(main)
