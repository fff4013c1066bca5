"""Other ways to skip weights without training, measured beside ours in judge.py.

    wina            each linear keeps the largest |x_i| · ‖column i‖        (arXiv 2505.19427)
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
wina-turned. A low rank is two narrow matrices more.
"""
import contextlib
import functools
import math

import torch

from calibrate import BATCH, SINKS, count, quantile
from kernel import kept
from model import block_linears, linear_names, progress
from sparsify import sparse_mode

PEERS = ("wina", "cats", "wina-turned", "larosa", "rsparse")
LOW_RANK = 0.1           # of a linear's weights: what rsparse's low rank has


class Reads(contextlib.ExitStack):
    """A dense model with a peer's hooks, inside a `with`; counts the weights that it does not read.

    mode: "all", or "decode": calls with one token are sparse; prefix: positions that stay dense at
    the start of a call, with "all"; more: weights that each token reads beside the linears.
    """

    def __init__(self, model, mode, prefix, more=0):
        super().__init__()
        self.enter_context(sparse_mode(model, "off"))
        self.mode = mode
        self.prefix = prefix if mode == "all" else 0
        self.more = more
        self.total = len(model.model.layers) * sum(linear_sizes(model.config).values())
        self.skipped = {}                # {what it is of: (inputs dropped, seen, weights)}

    def is_sparse(self, x):
        """Return whether the call is sparse that gives a module x (B, T, ...)."""
        return self.mode == "all" or x.shape[1] == 1

    def add(self, name, keep, size):
        """Keep all of the prefix in keep (B, T, n), of a matrix of `size` weights, and count."""
        keep[:, :self.prefix] = True
        counted = keep[:, self.prefix:]
        dropped, seen, _ = self.skipped.get(name, (0, 0, size))
        dropped += counted.numel() - counted.sum().item()
        self.skipped[name] = dropped, seen + counted.numel(), size

    def sparsity(self):
        """Return the share of the weights not read, `more` set off; 0.0 if no call was sparse."""
        skipped = sum(dropped / seen * size for dropped, seen, size in self.skipped.values())
        return (skipped - self.more) / self.total if self.skipped else 0.0


def linear_sizes(config):
    """Return {name of a block's linear: its weights}."""
    return {name: math.prod(shape) for name, shape in block_linears(config).items()}


def cats_size(config):
    """Return the weights of a block that CATS acts on: those of up and down."""
    sizes = linear_sizes(config)
    return sizes["mlp.up_proj"] + sizes["mlp.down_proj"]


@contextlib.contextmanager
def cats(thresholds, model, mode, prefix=0):
    """Skip channels of the MLPs with |activation(gate)| up to thresholds (layers,), in a `with`."""
    with Reads(model, mode, prefix) as reads:
        for block, threshold in zip(model.model.layers, thresholds.to(model.device)):
            def drop(module, inputs, gate, mlp=block.mlp, threshold=threshold):     # (B, T, middle)
                if not reads.is_sparse(gate):
                    return gate
                keep = kept(mlp.activation(gate), threshold)
                reads.add(module, keep, cats_size(model.config))
                return gate * keep       # an activation of 0 is 0: the channel's product is gone
            reads.enter_context(block.mlp.gate_proj.register_forward_hook(drop))
        yield reads.sparsity


@contextlib.contextmanager
def turned(bases, weights, share, more, model, mode, prefix=0):
    """Keep the largest entries of linears' inputs in bases of their own, in a `with`.

    bases: {linear: (in, in), orthogonal, in columns, or None}; weights: {linear: (in,)} with which
    |x| is multiplied, or {}; share: of each linear's inputs that is dropped, in every token; more:
    weights read beside the linears.
    """
    with Reads(model, mode, prefix, more) as reads:
        for name, basis in bases.items():
            def drop(module, inputs, name=name, basis=basis):
                x = inputs[0]
                if not reads.is_sparse(x):
                    return x
                z = x if basis is None else x @ basis                           # (B, T, in)
                size = z.abs().float() * weights.get(name, 1.0)
                dropped = size.topk(round(share * z.shape[-1]), largest=False).indices
                keep = torch.ones_like(z, dtype=torch.bool).scatter_(-1, dropped, False)
                reads.add(name, keep, module.in_features * module.out_features)
                return z * keep if basis is None else (z * keep) @ basis.T
            reads.enter_context(model.get_submodule(name).register_forward_pre_hook(drop))
        yield reads.sparsity


def stream_readers(model):
    """Return [(layer, names of linears that read one input of the stream), ...], two a layer."""
    readers = (("self_attn.k_proj", "self_attn.q_proj", "self_attn.v_proj"),
               ("mlp.gate_proj", "mlp.up_proj"))
    return [(layer, [f"model.layers.{layer}.{name}" for name in names])
            for layer in range(len(model.model.layers)) for names in readers]


@torch.no_grad()
def column_norms(model, bases):
    """Return {linear: (in,) float32}: the norms of its columns in `bases`, for `turned`."""
    norms = {}
    for name, basis in bases.items():
        weight = model.get_submodule(name).weight.float()                       # (out, in)
        norms[name] = (weight if basis is None else weight @ basis.float()).norm(dim=0)
    return norms


@torch.no_grad()
def wina_bases(model):
    """Return the bases of wina-turned: the right singular vectors of the k and gate projections."""
    bases = dict.fromkeys(linear_names(model.config))
    for _, names in progress(stream_readers(model), "wina, bases"):
        first = model.get_submodule(names[0]).weight.float()                    # (out, in)
        basis = torch.linalg.svd(first).Vh.T.to(model.activation_dtype)
        bases |= dict.fromkeys(names, basis)
    return bases


@torch.no_grad()
def larosa_bases(model, windows):
    """Return the bases of larosa: the principal directions of the layers' inputs in windows."""
    size = model.config.hidden_size
    moments = torch.zeros(model.config.num_hidden_layers, size, size, device=model.device)
    with contextlib.ExitStack() as hooks:
        for layer, names in stream_readers(model):
            def add(module, inputs, of=moments[layer]):
                x = inputs[0][:, SINKS:].flatten(0, 1).float()
                of += x.T @ x
            hooks.enter_context(model.get_submodule(names[0]).register_forward_pre_hook(add))
        for part in progress(windows.split(BATCH), "larosa, principal directions"):
            model(part, last_only=True)
    bases = dict.fromkeys(linear_names(model.config))
    for layer, names in stream_readers(model):
        basis = torch.linalg.eigh(moments[layer].double()).eigenvectors
        bases |= dict.fromkeys(names, basis.to(model.device, model.activation_dtype))
    return bases


@torch.no_grad()
def low_ranks(model):
    """Return {linear: (U (r, out), V (in, r))} of its strongest singular directions."""
    ranks = {}
    for name in progress(linear_names(model.config), "rsparse, singular directions"):
        weight = model.get_submodule(name).weight.float()                       # (out, in)
        rank = round(LOW_RANK * weight.numel() / sum(weight.shape))
        U, S, Vh = torch.linalg.svd(weight, full_matrices=False)
        ranks[name] = ((S[:rank, None] * U.T[:rank]).to(model.activation_dtype),
                       Vh[:rank].T.to(model.activation_dtype))
    return ranks


def weights_of(ranks):
    """Return how many weights `low_ranks` has."""
    return sum(part.numel() for pair in ranks.values() for part in pair)


@contextlib.contextmanager
def rsparse(ranks, thresholds, model, mode, prefix=0):
    """Send what thresholds drop through a low rank, in a `with`; ranks: of `low_ranks`."""
    with Reads(model, mode, prefix, weights_of(ranks)) as reads:
        dropped = {}
        for name, (U, V) in ranks.items():
            def drop(module, inputs, name=name):
                x = inputs[0]
                dropped[name] = None
                if not reads.is_sparse(x):
                    return x
                keep = kept(x, thresholds[name].to(x.device))
                reads.add(name, keep, module.in_features * module.out_features)
                dropped[name] = x * ~keep
                return x * keep

            def add(module, inputs, y, name=name, U=U, V=V):
                return y if dropped[name] is None else y + dropped[name] @ V @ U
            linear = model.get_submodule(name)
            reads.enter_context(linear.register_forward_pre_hook(drop))
            reads.enter_context(linear.register_forward_hook(add))
        yield reads.sparsity


def gate_counts(model, windows):
    """Return the distributions (layers, BINS) of |activation(gate)| in windows, for cats."""
    watched = []
    for block in model.model.layers:
        activation = block.mlp.activation
        watched.append((block.mlp.gate_proj, lambda x, y, activation=activation: activation(y)))
    return count(model, windows, watched, "cats, gates")


def peer_maker(name, model, calibration, windows):
    """Return a function of a sparsity: the peer as `Setting` takes it, or None if out of its reach.

    windows (W, T): held-in text, for what is made of text.
    """
    config = model.config
    size = sum(linear_sizes(config).values())              # of a block
    more = 0                             # weights that are read beside the linears
    reach = 1.0                          # the share of the weights that it acts on
    if name == "cats":
        gates = gate_counts(model, windows)
        reach = cats_size(config) / size

        def make(share):
            return functools.partial(cats, quantile(gates, share).float())
    elif name == "rsparse":
        ranks = low_ranks(model)
        more = weights_of(ranks)

        def make(share):
            return functools.partial(rsparse, ranks, calibration.thresholds(share, "uniform"))
    else:
        turns = {"wina": 0, "larosa": 1, "wina-turned": 2}[name]     # of the stream, in a layer
        bases = (dict.fromkeys(linear_names(config)) if name == "wina" else wina_bases(model)
                 if name == "wina-turned" else larosa_bases(model, windows))
        weights = {} if name == "larosa" else column_norms(model, bases)
        more = turns * config.hidden_size ** 2 * config.num_hidden_layers

        def make(share):
            return functools.partial(turned, bases, weights, share, more)

    def peer_at(level):                  # what is read beside the linears is dropped in them
        share = (level + more / (config.num_hidden_layers * size)) / reach
        return make(share) if share < 0.99 else None
    return peer_at
