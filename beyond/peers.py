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

import torch

from calibrate import BATCH, SINKS, quantile
from kernel import kept
from model import block_linears, linear_names, progress, require

PEERS = ("cats", "wina-turned", "larosa", "rsparse")
LOW_RANK = 0.1           # of a linear's weights: what rsparse's low rank has


class Reads:
    """Counts, under hooks, the weights of the blocks' linears that a decoding step would read.

    mode: "all", or "decode": calls with one token are sparse; prefix: positions that stay dense at
    the start of a call, with "all". more: weights that each token reads beside the linears.
    """

    def __init__(self, config, mode, prefix, more):
        self.total = config.num_hidden_layers * sum(linear_sizes(config).values())
        self.mode = mode
        self.prefix = prefix if mode == "all" else 0
        self.more = more
        self.tokens = 0
        self.skipped = 0.0

    def is_sparse(self, x):
        """Return whether the call is sparse that gives a module x (B, T, ...)."""
        return self.mode == "all" or x.shape[1] == 1

    def note_tokens(self, model, inputs, named):
        """Count the tokens of a call of the model: a forward pre-hook."""
        tokens = inputs[0] if inputs else named["tokens"]
        if self.is_sparse(tokens):
            self.tokens += len(tokens) * (tokens.shape[1] - self.prefix)

    def add(self, keep, size):
        """Keep all of the prefix in keep (B, T, n), of a matrix of `size` weights, and count."""
        keep[:, :self.prefix] = True
        counted = keep[:, self.prefix:].float()
        self.skipped += (1 - counted.mean().item()) * size * counted[..., 0].numel()

    def sparsity(self):
        """Return the share of the weights that was not read, what is read beside them set off.

        0.0 if no call was sparse.
        """
        if not self.tokens:
            return 0.0
        return (self.skipped / self.tokens - self.more) / self.total


@contextlib.contextmanager
def hooked(model, mode, prefix, more, hooks_of):
    """Run a dense model with a peer's hooks inside a `with`; yield what gives its sparsity.

    hooks_of(reads) yields the handles of the hooks, which tell a Reads what is kept.
    """
    reads = Reads(model.config, mode, prefix, more)
    with contextlib.ExitStack() as hooks:
        for handle in hooks_of(reads):
            hooks.enter_context(handle)
        hooks.enter_context(model.register_forward_pre_hook(reads.note_tokens, with_kwargs=True))
        yield reads.sparsity


def linear_sizes(config):
    """Return {name of a block's linear: its weights}."""
    return {name: math.prod(shape) for name, shape in block_linears(config).items()}


def cats_size(config):
    """Return the weights of a block that CATS acts on: those of up and down."""
    sizes = linear_sizes(config)
    return sizes["mlp.up_proj"] + sizes["mlp.down_proj"]


def cats(thresholds, model, mode, prefix=0):
    """Skip channels of the MLPs with |activation(gate)| up to thresholds (layers,), in a `with`."""
    size = cats_size(model.config)

    def hooks_of(reads):
        def drop(mlp, threshold, module, inputs, gate):                    # (B, T, middle)
            if not reads.is_sparse(gate):
                return gate
            keep = kept(mlp.activation(gate), threshold)
            reads.add(keep, size)
            return gate * keep           # an activation of 0 is 0: the channel's product is gone
        for block, threshold in zip(model.model.layers, thresholds.to(model.device)):
            hook = functools.partial(drop, block.mlp, threshold)
            yield block.mlp.gate_proj.register_forward_hook(hook)
    return hooked(model, mode, prefix, 0, hooks_of)


def turned(bases, weights, share, more, model, mode, prefix=0):
    """Keep the largest entries of linears' inputs in bases of their own, in a `with`.

    bases: {linear: (in, in), orthogonal, in columns, or None}; weights: {linear: (in,)} with which
    |x| is multiplied, or {}; share: of each linear's inputs that is dropped, in every token; more:
    weights read beside the linears.
    """
    def hooks_of(reads):
        def drop(name, module, inputs):
            x = inputs[0]
            if not reads.is_sparse(x):
                return x
            basis = bases[name]
            z = x if basis is None else x @ basis                               # (B, T, in)
            size = z.abs().float() * weights.get(name, 1.0)
            dropped = round(share * z.shape[-1])
            keep = torch.ones_like(z, dtype=torch.bool)
            keep.scatter_(-1, size.topk(dropped, largest=False).indices, False)
            reads.add(keep, module.in_features * module.out_features)
            z = z * keep
            return z if basis is None else z @ basis.T
        for name in linear_names(model.config):
            hook = functools.partial(drop, name)
            yield model.get_submodule(name).register_forward_pre_hook(hook)
    return hooked(model, mode, prefix, more, hooks_of)


def stream_readers(model):
    """Yield the names of the linears that read one input of the stream, two lists a layer."""
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
    """Return the bases of larosa: the principal directions of the layers' inputs in windows."""
    size = model.config.hidden_size
    moments = torch.zeros(model.config.num_hidden_layers, size, size, device=model.device)
    with contextlib.ExitStack() as hooks:
        for number, names in enumerate(stream_readers(model)):
            def add(module, inputs, of=moments[number // 2]):
                x = inputs[0][:, SINKS:].flatten(0, 1).float()
                of += x.T @ x
            hooks.enter_context(model.get_submodule(names[0]).register_forward_pre_hook(add))
        for part in progress(windows.split(BATCH), "larosa, principal directions"):
            model(part, last_only=True)
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


def weights_of(ranks):
    """Return how many weights the matrices of `low_ranks` have."""
    return sum(part.numel() for pair in ranks.values() for part in pair)


def rsparse(ranks, thresholds, model, mode, prefix=0):
    """Send what thresholds drop through a low rank, in a `with`; ranks: of `low_ranks`."""
    def hooks_of(reads):
        dropped = {}

        def drop(name, module, inputs):
            x = inputs[0]
            dropped[name] = None
            if not reads.is_sparse(x):
                return x
            keep = kept(x, thresholds[name].to(x.device))
            reads.add(keep, module.in_features * module.out_features)
            dropped[name] = x * ~keep
            return x * keep

        def add(name, module, inputs, y):
            U, V = ranks[name]
            return y if dropped[name] is None else y + dropped[name] @ V @ U
        for name in linear_names(model.config):
            linear = model.get_submodule(name)
            yield linear.register_forward_pre_hook(functools.partial(drop, name))
            yield linear.register_forward_hook(functools.partial(add, name))
    return hooked(model, mode, prefix, weights_of(ranks), hooks_of)


def peer_maker(name, model, calibration, windows):
    """Return a function of a sparsity: the peer as `Setting` takes it, or None if out of its reach.

    windows (W, T): held-in text, for what is made of text.
    """
    config = model.config
    sizes = sum(linear_sizes(config).values())             # of a block
    if name == "cats":
        require("gate" in calibration.distributions,
                f"this calibration holds no distribution of the gate, which cats needs: it is "
                f"{calibration.source}; python -m beyond.allocate makes one that does")
        gate = calibration.distributions["gate"]

        def share_of(level):
            return level / (cats_size(config) / sizes)

        def make(share):
            return functools.partial(cats, quantile(gate, share).float())
    else:
        if name == "rsparse":
            ranks = low_ranks(model)
            more = weights_of(ranks)

            def make(share):
                return functools.partial(rsparse, ranks, calibration.thresholds(share, "uniform"))
        else:
            turns = 2 if name == "wina-turned" else 1      # of the stream, in a layer
            bases, weights = wina_basis(model) if turns == 2 else (larosa_basis(model, windows), {})
            more = turns * config.hidden_size ** 2 * config.num_hidden_layers

            def make(share):
                return functools.partial(turned, bases, weights, share, more)

        def share_of(level):             # what is read beside the linears is dropped in them
            return level + more / (config.num_hidden_layers * sizes)
    return lambda level: make(share_of(level)) if share_of(level) < 0.99 else None
