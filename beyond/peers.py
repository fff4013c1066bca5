"""Other ways to skip weights without training, measured beside ours in judge.py.

    cats            a channel of the MLP whose |activation(gate)| is small is skipped by up and down
                    (arXiv 2404.08763, section 3)
    wina-turned     WINA with its orthogonal transformation: q, k, v and gate, up read their input
                    in the basis of the right singular vectors of k and gate, where columns are
                    orthogonal; each linear keeps the largest |x_i| · ‖column i‖
                    (arXiv 2505.19427, section 3)
    larosa          q, k, v, gate and up read their input in the principal directions of their
                    layer's inputs; each linear keeps the largest |x_i|
                    (arXiv 2507.01299, section 3)
    rsparse         what is dropped goes through the strongest singular directions of the weight
                    instead of through none (arXiv 2504.19449, section 3)

Each is written for measuring: it runs dense products with zeros in them, under hooks, and tells how
many of the blocks' weights a decoding step would have to read. A basis of a layer's own is a matrix
more to read for each change of basis, (hidden, hidden): one a layer for larosa, two for
wina-turned. A low rank is two narrow matrices more. wina without its transformation is an
allocation (allocate.py).

The seam: a forward pre-hook of a linear may change what it reads.
"""
import contextlib
import functools
import math
from types import SimpleNamespace

import torch

from calibrate import BATCH, SINKS, quantile
from kernel import kept
from model import block_linears, linear_names, progress, require

PEERS = ("cats", "wina-turned", "larosa", "rsparse")
LOW_RANK = 0.1           # of a linear's weights: what rsparse's low rank has


class Reads:
    """Counts, under hooks, the weights of a block's linears that a decoding step would read."""

    def __init__(self, config):
        sizes = {name: math.prod(shape) for name, shape in block_linears(config).items()}
        self.total = config.num_hidden_layers * sum(sizes.values())
        self.tokens = 0
        self.skipped = 0.0
        self.more = 0.0                  # of each token, beside the linears

    def add(self, keep, prefix, size):
        """Count what is kept (B, T, n) of a matrix of `size` weights."""
        counted = keep[:, prefix:].float()
        self.skipped += (1 - counted.mean().item()) * size * counted[..., 0].numel()

    def sparsity(self):
        """Return the share of the weights that was not read, what is read beside them set off.

        0.0 if no call was sparse.
        """
        if not self.tokens:
            return 0.0
        return (self.skipped / self.tokens - self.more) / self.total


@contextlib.contextmanager
def hooked(model, mode, prefix, hooks_of):
    """Run a dense model with a peer's hooks inside a `with`; yield what gives its sparsity.

    hooks_of(reads, sparse) puts hooks into an ExitStack and returns it; sparse(x) tells whether the
    call that gives a linear x (B, T, in) is sparse: with mode "decode", if it has one token.
    """
    reads = Reads(model.config)

    def sparse(x):
        return mode == "all" or x.shape[1] == 1

    def note(module, inputs, keywords):
        tokens = inputs[0] if inputs else keywords["tokens"]
        if sparse(tokens):
            reads.tokens += len(tokens) * (tokens.shape[1] - prefix)

    with hooks_of(reads, sparse) as hooks:
        hooks.enter_context(model.register_forward_pre_hook(note, with_kwargs=True))
        yield reads.sparsity


def cats_part(config):
    """Return the share of a block's weights that CATS acts on: those of up and down."""
    sizes = {name: math.prod(shape) for name, shape in block_linears(config).items()}
    return (sizes["mlp.up_proj"] + sizes["mlp.down_proj"]) / sum(sizes.values())


def cats(thresholds, model, mode, prefix=0):
    """Skip channels of the MLPs with |activation(gate)| up to thresholds (layers,), in a `with`."""
    sizes = {name: math.prod(shape) for name, shape in block_linears(model.config).items()}
    size = sizes["mlp.up_proj"] + sizes["mlp.down_proj"]

    def hooks_of(reads, sparse):
        hooks = contextlib.ExitStack()

        def drop(mlp, threshold, module, inputs, gate):                    # (B, T, middle)
            if not sparse(gate):
                return gate
            keep = kept(mlp.activation(gate), threshold)
            keep[:, :prefix] = True
            reads.add(keep, prefix, size)
            return gate * keep           # an activation of 0 is 0: the channel's product is gone
        for block, threshold in zip(model.model.layers, thresholds.to(model.device)):
            hook = functools.partial(drop, block.mlp, threshold)
            hooks.enter_context(block.mlp.gate_proj.register_forward_hook(hook))
        return hooks
    return hooked(model, mode, prefix, hooks_of)


def turned(bases, weights, share, more, model, mode, prefix=0):
    """Keep the largest entries of linears' inputs in bases of their own, in a `with`.

    bases: {linear: (in, in), orthogonal, in columns, or None}; weights: {linear: (in,)} with which
    |x| is multiplied, or {}; share: of each linear's inputs that is dropped, in every token; more:
    weights read beside the linears.
    """
    def hooks_of(reads, sparse):
        reads.more = more
        hooks = contextlib.ExitStack()

        def drop(name, module, inputs):
            x = inputs[0]
            if not sparse(x):
                return x
            basis = bases[name]
            z = x if basis is None else x @ basis                               # (B, T, in)
            size = z.abs().float() * weights.get(name, 1.0)
            dropped = round(share * z.shape[-1])
            keep = torch.ones_like(z, dtype=torch.bool)
            keep.scatter_(-1, size.topk(dropped, largest=False).indices, False)
            keep[:, :prefix] = True
            reads.add(keep, prefix, module.in_features * module.out_features)
            z = z * keep
            return z if basis is None else z @ basis.T
        for name in linear_names(model.config):
            linear = model.get_submodule(name)
            hooks.enter_context(linear.register_forward_pre_hook(functools.partial(drop, name)))
        return hooks
    return hooked(model, mode, prefix, hooks_of)


def stream_readers(model):
    """Yield (names of a layer's linears that read one input, the first of them), two a layer."""
    for layer in range(len(model.model.layers)):
        for names in (("self_attn.k_proj", "self_attn.q_proj", "self_attn.v_proj"),
                      ("mlp.gate_proj", "mlp.up_proj")):
            yield [f"model.layers.{layer}.{name}" for name in names]


@torch.no_grad()
def wina_basis(model):
    """Return the bases and weights of wina-turned, as `turned` takes them."""
    bases = dict.fromkeys(linear_names(model.config))
    weights = {}
    for names in progress(list(stream_readers(model)), "wina, bases"):
        first = model.get_submodule(names[0]).weight.float()                    # (out, in)
        basis = torch.linalg.svd(first).Vh.T
        for name in names:
            bases[name] = basis.to(model.dtype)
            weights[name] = (model.get_submodule(name).weight.float() @ basis).norm(dim=0)
    for name, basis in bases.items():
        if basis is None:
            weights[name] = model.get_submodule(name).weight.float().norm(dim=0)
    return bases, weights


@torch.no_grad()
def larosa_basis(model, windows):
    """Return the bases of larosa: the principal directions of each layer's inputs in windows."""
    size = model.config.hidden_size
    moments = torch.zeros(model.config.num_hidden_layers, size, size, device=model.device)
    with contextlib.ExitStack() as hooks:
        for number, names in enumerate(stream_readers(model)):
            def add(module, inputs, of=moments[number // 2]):
                x = inputs[0][:, SINKS:].flatten(0, 1).float()
                of += x.T @ x
            hooks.enter_context(model.get_submodule(names[0]).register_forward_pre_hook(add))
        for part in progress(windows.split(BATCH), "larosa, principal directions"):
            model(part[:, :-1].to(model.device), last_only=True)
    bases = dict.fromkeys(linear_names(model.config))
    for number, names in enumerate(stream_readers(model)):
        basis = torch.linalg.eigh(moments[number // 2].double()).eigenvectors
        bases |= dict.fromkeys(names, basis.to(model.device, model.dtype))
    return bases


@torch.no_grad()
def low_ranks(model):
    """Return {linear: (U (r, out), V (in, r))} of its strongest singular directions."""
    ranks = {}
    for name in progress(linear_names(model.config), "rsparse, singular directions"):
        weight = model.get_submodule(name).weight.float()                       # (out, in)
        rank = round(LOW_RANK * weight.numel() / sum(weight.shape))
        U, S, Vh = torch.linalg.svd(weight, full_matrices=False)
        ranks[name] = ((S[:rank, None] * U.T[:rank]).to(model.dtype),
                       Vh[:rank].T.to(model.dtype))
    return ranks


def rsparse(ranks, thresholds, model, mode, prefix=0):
    """Send what thresholds drop through a low rank, in a `with`; ranks: of `low_ranks`."""
    def hooks_of(reads, sparse):
        hooks = contextlib.ExitStack()
        reads.more = sum(part.numel() for pair in ranks.values() for part in pair)
        dropped = {}

        def drop(name, module, inputs):
            x = inputs[0]
            dropped[name] = None
            if not sparse(x):
                return x
            keep = kept(x, thresholds[name].to(x.device))
            keep[:, :prefix] = True
            reads.add(keep, prefix, module.in_features * module.out_features)
            dropped[name] = x * ~keep
            return x * keep

        def add(name, module, inputs, y):
            U, V = ranks[name]
            return y if dropped[name] is None else y + dropped[name] @ V @ U
        for name in linear_names(model.config):
            linear = model.get_submodule(name)
            hooks.enter_context(linear.register_forward_pre_hook(functools.partial(drop, name)))
            hooks.enter_context(linear.register_forward_hook(functools.partial(add, name)))
        return hooks
    return hooked(model, mode, prefix, hooks_of)


def peer_maker(name, model, calibration, windows):
    """Return a function of a sparsity: the peer as `Setting` takes it; False if out of its reach.

    windows (W, T + 1): held-in text, for what is made of text.
    """
    config = SimpleNamespace(**calibration.shapes)
    stream = model.config.hidden_size ** 2 * model.config.num_hidden_layers
    total = Reads(model.config).total
    if name == "cats":
        require("gate" in calibration.distributions,
                f"this calibration holds no distribution of the gate, which cats needs: it is "
                f"{calibration.source}; python -m beyond.allocate makes one that does")
        gate = calibration.distributions["gate"]

        def make(level):
            share = level / cats_part(config)
            return share < 0.99 and functools.partial(cats, quantile(gate, share).float())
    elif name == "rsparse":
        ranks = low_ranks(model)
        more = sum(part.numel() for pair in ranks.values() for part in pair) / total

        def make(level):
            return level + more < 0.99 and functools.partial(
                rsparse, ranks, calibration.thresholds(level + more, "uniform"))
    else:
        bases, weights = wina_basis(model) if name == "wina-turned" else (
            larosa_basis(model, windows), {})
        more = stream * (2 if name == "wina-turned" else 1)

        def make(level):
            share = level + more / total
            return share < 0.99 and functools.partial(turned, bases, weights, share, more)
    return make
