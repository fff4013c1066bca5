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
from typing import Callable, NamedTuple

import torch

from calibrate import BINS, SINKS, histogram, quantile, run_windows
from kernel import kept
from model import linear_names, progress
from sparsify import sparse_mode

PEERS = ("wina", "cats", "wina-turned", "larosa", "rsparse")
LOW_RANK = 0.1           # of a linear's weights: what rsparse's low rank has


class Place(NamedTuple):
    """Where a peer drops values: in the input of a linear, or, for cats, in its output."""
    linear: str              # its name
    weights: int             # that are not read if all of the values are dropped
    change: Callable         # values (B, T, n) -> (what is put in their place, which are kept)
    of_output: bool = False


@contextlib.contextmanager
def skipping(model, places, more, dense_prefix=0):
    """Make a dense model skip weights as a peer does, in a `with`: a way of judge.py.

    Afterwards sparsify.realised_sparsity is the peer's. more: weights that each token reads beside
    the linears. dense_prefix: of sparse_mode.
    """
    counts = [[0, 0] for _ in places]        # values dropped, and seen

    def change(place, counted, x):
        y, keep = place.change(x[:, dense_prefix:])
        counted[0] += keep.numel() - keep.sum().item()
        counted[1] += keep.numel()
        return torch.cat((x[:, :dense_prefix], y), 1)

    with sparse_mode(model, "off"), contextlib.ExitStack() as hooks:
        for place, counted in zip(places, counts):
            linear = model.get_submodule(place.linear)
            of = functools.partial(change, place, counted)
            if place.of_output:
                hook = linear.register_forward_hook(lambda module, inputs, y, of=of: of(y))
            else:
                hook = linear.register_forward_pre_hook(lambda module, inputs, of=of: of(inputs[0]))
            hooks.enter_context(hook)
        yield
    skipped = sum(dropped / seen * place.weights for place, (dropped, seen) in zip(places, counts))
    model.realised = (skipped - more) / sum(sizes_of(model).values())


def sizes_of(model):
    """Return {name of a linear in the blocks: its weights}."""
    linears = {name: model.get_submodule(name) for name in linear_names(model.config)}
    return {name: linear.in_features * linear.out_features for name, linear in linears.items()}


# --------------------------------------------------------------------------------------------------
# What the peers do to the values at a Place

def cats(activation, threshold, gate):
    """Drop the channels of an MLP with |activation(gate)| up to a threshold ()."""
    keep = kept(activation(gate), threshold)
    return gate * keep, keep             # an activation of 0 is 0: the channel's product is gone


def rsparse(V, threshold, x):
    """Send what a threshold () drops through a low rank, the weight behind V Vᵀ; V (in, rank)."""
    keep = kept(x, threshold)
    return x * keep + (x * ~keep) @ V @ V.T, keep


def turned(basis, weights, share, x):
    """Keep the largest entries of x in a basis, a share of which is dropped in every token.

    basis: (in, in), orthogonal, in columns, or None; weights: (in,), with which |x| is multiplied.
    """
    z = x if basis is None else x @ basis                                       # (B, T, in)
    size = z.abs().float() * weights
    dropped = size.topk(round(share * z.shape[-1]), largest=False).indices
    keep = torch.ones_like(z, dtype=torch.bool).scatter_(-1, dropped, False)
    return z * keep if basis is None else (z * keep) @ basis.T, keep


# --------------------------------------------------------------------------------------------------
# What they take from the weights and from text. Each maker returns a function of the share that is
# dropped, which returns the Places, and how many weights are read beside the linears.

def make_cats(model, windows):
    linears = [block.mlp.gate_proj for block in model.model.layers]
    activations = [block.mlp.activation for block in model.model.layers]
    counts = torch.zeros(len(linears), BINS, dtype=torch.int64)
    with contextlib.ExitStack() as hooks:
        for linear, activation, row in zip(linears, activations, counts):
            def add(module, inputs, y, activation=activation, row=row):
                row += histogram(activation(y)[:, SINKS:]).cpu()
            hooks.enter_context(linear.register_forward_hook(add))
        run_windows(model, windows, "cats, gates")
    size = 2 * linears[0].in_features * linears[0].out_features      # of up and down

    def places_at(share):
        thresholds = quantile(counts, share).float().to(model.device)
        return [Place(f"model.layers.{i}.mlp.gate_proj", size,
                      functools.partial(cats, activation, threshold), of_output=True)
                for i, (activation, threshold) in enumerate(zip(activations, thresholds))]
    return places_at, 0


def make_rsparse(model, calibration):
    sizes = sizes_of(model)
    directions = {}                      # {linear: (in, rank)}, its strongest, in columns
    more = 0
    for name in progress(list(sizes), "rsparse, singular directions"):
        weight = model.get_submodule(name).weight.float()                       # (out, in)
        rank = round(LOW_RANK * sizes[name] / sum(weight.shape))
        V = torch.linalg.svd(weight, full_matrices=False).Vh[:rank].T
        directions[name] = V.to(model.activation_dtype)
        more += rank * sum(weight.shape)

    def places_at(share):
        thresholds = calibration.thresholds(share, "uniform")
        return [Place(name, sizes[name],
                      functools.partial(rsparse, V, thresholds[name].to(model.device)))
                for name, V in directions.items()]
    return places_at, more


def make_turned(name, model, windows):       # wina, wina-turned or larosa
    sizes = sizes_of(model)
    bases = dict.fromkeys(sizes)
    if name == "wina-turned":
        bases |= stream_bases(model, lambda layer, first: torch.linalg.svd(
            model.get_submodule(first).weight.float()).Vh.T)
    elif name == "larosa":
        moments = second_moments(model, windows).double()
        bases |= stream_bases(
            model, lambda layer, first: torch.linalg.eigh(moments[layer]).eigenvectors)
    norms = dict.fromkeys(sizes, 1.0)
    if name != "larosa":                 # of the columns
        for linear, basis in bases.items():
            weight = model.get_submodule(linear).weight.float()                 # (out, in)
            norms[linear] = (weight if basis is None else weight @ basis.float()).norm(dim=0)

    def places_at(share):
        return [Place(linear, size, functools.partial(turned, bases[linear], norms[linear], share))
                for linear, size in sizes.items()]
    turns = {"wina": 0, "larosa": 1, "wina-turned": 2}[name]         # of the stream, in a layer
    return places_at, turns * model.config.hidden_size ** 2 * len(model.model.layers)


def stream_bases(model, basis_of):
    """Return {linear: basis (in, in)} of the inputs that are read from the stream, two in a layer.

    basis_of(layer, first): that of a k_proj or gate_proj and of what else reads its input.
    """
    bases = {}
    for layer in progress(range(len(model.model.layers)), "bases"):
        for readers in (("self_attn.k_proj", "self_attn.q_proj", "self_attn.v_proj"),
                        ("mlp.gate_proj", "mlp.up_proj")):
            names = [f"model.layers.{layer}.{reader}" for reader in readers]
            basis = basis_of(layer, names[0]).to(model.device, model.activation_dtype)
            bases |= dict.fromkeys(names, basis)
    return bases


def second_moments(model, windows):
    """Return (layers, hidden, hidden), of what layers read from the stream in windows."""
    size = model.config.hidden_size
    moments = torch.zeros(len(model.model.layers), size, size, device=model.device)
    with contextlib.ExitStack() as hooks:
        for block, of in zip(model.model.layers, moments):
            def add(module, inputs, of=of):
                x = inputs[0][:, SINKS:].flatten(0, 1).float()
                of += x.T @ x
            for linear in (block.self_attn.k_proj, block.mlp.gate_proj):
                hooks.enter_context(linear.register_forward_pre_hook(add))
        run_windows(model, windows, "larosa, principal directions")
    return moments


@torch.no_grad()
def peer_maker(name, model, calibration, windows):
    """Return a function of a sparsity, which returns the peer's way; None: out of its reach.

    windows (W, T): held-in text, for what is made of text.
    """
    places_at, more = (make_cats(model, windows) if name == "cats" else
                       make_rsparse(model, calibration) if name == "rsparse" else
                       make_turned(name, model, windows))
    total = sum(sizes_of(model).values())
    reach = sum(place.weights for place in places_at(0.0))

    def way_at(level):                   # what is read beside the linears is dropped in them
        share = (level * total + more) / reach
        return functools.partial(skipping, model, places_at(share), more) if share < 0.99 else None
    return way_at
