"""How a model-wide sparsity is shared out: by what the loss pays for each weight that goes unread.

Some linears lose little when three quarters of their inputs are dropped, others much at a quarter.
Who gets how much is called an allocation. calibrate.py makes the two of the paper, uniform (every
linear the same) and greedy (block by block, by the error of the block's output). This chapter adds

    wina            |x_i| · ‖column i‖ in place of |x_i|, every linear the same share
                    (arXiv 2505.19427)
    fisher          drop what raises the loss least a byte. Dropping x_i changes the loss by about
                    F_i x_i² / 2, F_i the mean square of the loss's gradient at x_i, and saves one
                    column, `out` weights: keep x_i where F x_i² > λ · out, with one price λ for the
                    whole model and one mean F a linear
    fisher-channel  the same with F_i, so a threshold a channel: |x_i| > √(λ · out / F_i)
    balanced        the same with each linear's share halfway between what one λ for the model and
                    what one λ for each block gives it. One λ for the model empties whole linears of
                    the blocks where F is small, to 98 % and more, and there the estimate, made for
                    small changes, no longer holds; one λ a block moves nothing between blocks.
                    Halfway, the distributions of the next token stay twice as near to the dense
    priced          the same with each linear's price measured where it is paid, in the sparse
                    model: how much the distance (KL) from the dense model's distributions grows for
                    each weight less that is read. Shares are lowered where the price is high and
                    raised where it is low, until all prices are equal

The gradients come from one backward pass, with labels drawn from the model itself, so that F is the
Fisher information and any text will do. It runs one block at a time, and the head text by text.
Memory beside the weights, for four windows: one block's activations with gradients, the input of
each block, and a few times the logits of one window in float32.

Whatever the shares, a threshold drops another share than it was made for where inputs were dropped
before it: it was read from distributions of the dense model. So at the end all allocations are
*settled*: at four levels the sparse model runs, each threshold is found where it acts, and the
table gets the share of the dense inputs that it corresponds to.

The seam: a `Calibration` holds distributions, weights for the channels, and tables of shares that
one interpolation reads. This file adds to all three. Whatever reads thresholds from a calibration,
generate.py for one, then has these allocations too, the last one as its default.

    python -m beyond.allocate [--model FOLDER] [--text FILE]   writes FOLDER/calibration.safetensors
    python -m beyond.allocate --greedy                         with the greedy one, a minute or two
    python -m beyond.allocate --figures figures                draws what the calibration holds
"""
import contextlib
import functools
import itertools
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F

from beyond import quantize              # with it, load_model reads quantized folders too
from calibrate import (BATCH, BINS, HIGHEST, LINEARS, LOWEST, PER_OCTAVE, SINKS, SITES, Partial,
                       Table, check_dense, count, even_table, histogram, load_calibration,
                       make_parser, output_of, quantile, some_windows, write_calibration,
                       write_imported)
from kernel import kept
from model import (InputError, check_output, command_line, default_context, linear_names,
                   load_model, progress, replacing, require, windows_of)

# Where a table is filled in. The shares of a level have it as their mean, and so have those on the
# line between two levels.
LEVELS = torch.arange(1, 20, dtype=torch.float64) / 20
MOST = 0.9999            # that a linear drops of its inputs


def share_below(counts, value):
    """Return the shares (...) of `counts` (..., BINS) below values (...): quantile's inverse."""
    position = ((value.double().log2() - LOWEST) * PER_OCTAVE).clamp(0, BINS - 1e-6).unsqueeze(-1)
    at = position.long()                                   # the bin in which it lies
    below = counts.double().cumsum(-1)                     # (..., BINS)
    inside = counts.double().gather(-1, at)
    before = below.gather(-1, at) - inside
    return ((before + (position - at) * inside) / below[..., -1:]).squeeze(-1)


# --------------------------------------------------------------------------------------------------
# Fisher information: what a small change of an input does to the loss

def backpropagate(model, tokens, loss, blocks=True):
    """Run tokens (B, T), and take the gradient of the loss back to every block.

    Forward without a graph, keeping the input of each block, then back through one block at a time,
    whose graph alone is in memory; the head goes text by text. loss(logits (T, vocab), i) is that
    of text i. The caller's hooks see the gradients. Returns the sum of the losses, a float. blocks:
    False where that is all that is wanted.
    """
    context = model.context(tokens)
    with torch.no_grad():
        x = model.embed(tokens)                                                 # (B, T, hidden)
        inputs = []
        for block in model.model.layers:
            inputs.append(x)
            x = block(x, context)
    total = 0.0
    gradients = []
    with torch.enable_grad():
        for i, text in enumerate(x):
            text = text.detach().requires_grad_()
            value = loss(model.lm_head(model.model.norm(text)).float(), i)
            total += value.item()
            if blocks:
                gradients += torch.autograd.grad(value, text)
        if not blocks:
            return total
        gradient = torch.stack(gradients)
        for block, x in zip(reversed(model.model.layers), reversed(inputs)):
            x.requires_grad_()
            gradient, = torch.autograd.grad(block(x, context), x, gradient)
    return total


def fisher_information(model, windows, names, partial=None):
    """Return {name: F (in,) float32} of the named linears, from windows (W, T + 1).

    F is the mean square of the gradient of the log-likelihood at each input of a linear, through
    that linear alone (grad_output @ weight): q, k and v share an input, but not a gradient.
    """
    sizes = [model.get_submodule(name).in_features for name in names]
    sums = torch.zeros(sum(sizes), device=model.device)
    hooks = contextlib.ExitStack()       # a handle is a context manager, which takes its hook away
    for name, of in zip(names, sums.split(sizes)):
        def add(module, grad_input, grad_output, of=of):
            of += grad_input[0][:, SINKS:].float().square().sum((0, 1))
        hooks.enter_context(model.get_submodule(name).register_full_backward_hook(add))
    generator = torch.Generator(model.device)

    def loss(logits, i):
        p = logits.detach().softmax(-1)
        labels = torch.multinomial(p, 1, generator=generator)[:, 0]
        return F.cross_entropy(logits, labels, reduction="sum")

    with hooks:
        parts = list(enumerate(windows.split(BATCH)))
        for number, part in (partial or Partial()).rest(parts, "calibrating, gradients", sums):
            generator.manual_seed(number)
            backpropagate(model, part[:, :-1].to(model.device), loss)
    positions = len(windows) * (windows.shape[1] - 1 - SINKS)
    return dict(zip(names, (sums / positions).cpu().split(sizes)))


def one_price(counts, fisher, outputs, size, level):
    """Return the shares (layers, 7) that linears drop at one price λ, `level` of all weights.

    counts (layers, 7, BINS): the distributions; fisher (layers, 7): the mean F of each linear;
    outputs, size (7,): as `Calibration.sizes`. λ is what the loss may rise for a weight that is not
    read. It is found by bisection: the larger it is, the more is dropped.
    """
    unit = (outputs / fisher.double().clamp(min=1e-300)).sqrt()      # thresholds at λ = 1
    low = LOWEST - unit.max().log2()                                 # of log2 √λ, where all is kept
    high = HIGHEST - unit.min().log2()                               # where all is dropped
    for _ in range(60):
        middle = (low + high) / 2
        shares = share_below(counts, unit * middle.exp2()).clamp(max=MOST)
        if (shares @ size).mean() < level:
            low = middle
        else:
            high = middle
    return shares


def relative(values):
    """Return values (in,) over their root mean square; thresholds are divided by them, so not 0."""
    return (values / values.square().mean().sqrt().clamp(min=1e-30)).clamp(min=2**-10)


def add_allocations(calibration, model, tokens, context=None, fisher=True, partial=None):
    """Add to a calibration the allocations wina, fisher, fisher-channel and balanced.

    model: the dense model, and tokens (N,) int64 and context the text, that it was made of. fisher:
    False leaves the backward pass out, and adds wina alone. The distribution "gate" (layers, BINS)
    is added too: of |activation(gate)|, which CATS (peers.py) thresholds. partial: a Partial, from
    where the work goes on.
    """
    check_dense(model)
    windows = windows_of(tokens, context or default_context(model))
    names = linear_names(model.config)
    layers = len(model.model.layers)
    weights = {"wina": {}}
    for name in names:
        norms = model.get_submodule(name).weight.detach().float().norm(dim=0)             # (in,)
        weights["wina"][name] = relative(norms).cpu()
    if fisher:
        information = fisher_information(model, windows, names, partial)
        weights["fisher-channel"] = {name: relative(of.sqrt()) for name, of in information.items()}
    calibration.weights |= weights
    calibration.distributions |= count_weighted(model, windows, weights, partial)
    calibration.tables = {"wina": even_table(layers, "wina")} | calibration.tables
    if fisher:
        means = torch.stack([of.mean() for of in information.values()]).view(layers, len(LINEARS))
        add_fisher(calibration, means)


def count_weighted(model, windows, weights, partial=None):
    """Return the distributions {"gate": (layers, BINS), each of weights: (layers, 7, BINS)}."""
    watched = []
    for block in model.model.layers:
        activation = block.mlp.activation
        watched.append((block.mlp.gate_proj, lambda x, y, activation=activation: activation(y)))
    for of in weights.values():
        for name, weight in of.items():
            weight = weight.to(model.device)
            watched.append((model.get_submodule(name), lambda x, y, weight=weight: x * weight))
    layers = len(model.model.layers)
    label = f"calibrating, weighted by {' and '.join(weights) or 'nothing'}"
    gate, *counts = count(model, windows, watched, label, partial).split(
        [layers] + [layers * len(LINEARS)] * len(weights))
    counts = [of.view(layers, len(LINEARS), BINS) for of in counts]
    return {"gate": gate} | dict(zip(weights, counts))


def add_fisher(calibration, fisher):
    """Add fisher, fisher-channel and balanced, given the mean F of each linear (layers, 7)."""
    outputs, size = calibration.sizes()
    plain = calibration.counts_of("")                                           # (layers, 7, BINS)
    weighted = calibration.counts_of("fisher-channel")

    def shares_of(counts, layers=slice(None)):
        return torch.stack([one_price(counts[layers], fisher[layers], outputs, size, level)
                            for level in LEVELS.tolist()])                      # (L, layers, 7)

    by_model = shares_of(weighted)
    by_block = torch.cat([shares_of(weighted, slice(i, i + 1)) for i in range(len(fisher))], dim=1)
    calibration.tables["fisher"] = Table(LEVELS, shares_of(plain))
    calibration.tables["fisher-channel"] = Table(LEVELS, by_model, "fisher-channel")
    calibration.tables["balanced"] = Table(LEVELS, (by_model + by_block) / 2, "fisher-channel")


# --------------------------------------------------------------------------------------------------
# In the sparse model: thresholds that drop what they are to drop, and what that costs

WINDOWS = (8, 512)       # of text that runs in the sparse model, and tokens of each at most
SETTLED_AT = (0.25, 0.5, 0.65, 0.8)      # sparsities at which an allocation's table is settled


class Dropping:
    """Makes a dense model drop given shares of its inputs inside a `with`.

    The first tokens of each window stay as they are, as those of a prompt do.

    shares: (layers, 7). weights: {linear: (in,)}, with which |x| is multiplied, or None. The first
    forward pass finds the thresholds: each linear's is the quantile of what the linear is given
    there, with all inputs dropped before it that are to be. They are `values` (layers, 7), on |x|
    times its weight, and `thresholds` {linear: () or (in,)}, on |x|.
    """

    def __init__(self, model, shares, weights=None):
        self.model = model
        self.names = linear_names(model.config)
        self.shares = shares
        self.weights = weights
        self.values = torch.zeros(shares.shape)
        self.thresholds = {}
        self.hooks = contextlib.ExitStack()

    def __enter__(self):
        for number, name in enumerate(self.names):
            hook = functools.partial(self.drop, number, name)
            linear = self.model.get_submodule(name)
            self.hooks.enter_context(linear.register_forward_pre_hook(hook))
        return self

    def __exit__(self, *error):
        self.hooks.close()

    def drop(self, number, name, module, inputs):
        x = inputs[0]
        if name not in self.thresholds:
            weight = self.weights[name].to(x.device) if self.weights else 1.0
            counts = histogram(x[:, SINKS:].detach() * weight).cpu()
            value = quantile(counts, self.shares.view(-1)[number]).float()
            self.values.view(-1)[number] = value
            self.thresholds[name] = value.to(x.device) / weight
        keep = kept(x, self.thresholds[name])
        keep[:, :SINKS] = True
        return x * keep


@torch.no_grad()
def settle(calibration, model, tokens):
    """Make the allocations of a calibration drop, in the sparse model, what they are to drop.

    Once: a table that was settled no longer says what was asked for.

    Distributions are those of the dense model, and where inputs are dropped others come later: the
    uniform allocation at 50 % drops 52 % of SmolLM2. So each table is filled in anew, with the
    shares of the dense model's inputs that have the right thresholds for the sparse one's.
    """
    check_dense(model)
    windows = some_windows(model, tokens, *WINDOWS)
    settled = {}
    work = list(itertools.product(calibration.tables, SETTLED_AT))
    for name, level in progress(work, "calibrating, thresholds in the sparse model"):
        weights = calibration.tables[name].weights
        wanted = calibration.sparsities(level, name)
        with Dropping(model, wanted, calibration.weights.get(weights)) as dropping:
            model(windows, last_only=True)
        shares = share_below(calibration.counts_of(weights), dropping.values)
        settled.setdefault(name, []).append(shares.clamp(max=MOST))
    levels = torch.tensor(SETTLED_AT, dtype=torch.float64)
    for name, shares in settled.items():
        weights = calibration.tables[name].weights
        calibration.tables[name] = Table(levels, torch.stack(shares), weights)


# --------------------------------------------------------------------------------------------------
# The priced allocation

PRICED_AT = (0.3, 0.5, 0.7)              # model-wide sparsities at which prices are measured
MOVES = 3                # how often the shares are moved against the prices, at each of them
NEAR = 1.25              # inputs up to this factor above and below a threshold tell its price
# A linear whose price is e times the mean one has the log-odds of its share lowered by STRIDE in
# one move; a logarithm counts as FARTHEST at most.
STRIDE = 0.4
FARTHEST = 2.0


@torch.no_grad()
def prices(model, windows, dense, dropping, asked=True):
    """Return what one weight less costs in each linear of a sparse model, and what all of it costs.

    windows (W, T); dense (W, T, hidden): what the dense model's head reads there; dropping: a
    Dropping of the model. Returns the prices (layers, 7) float64 and a float, both in KL to the
    dense model, summed over the tokens. A linear without inputs near its threshold has NaN, and all
    have if only the float is asked for. Prices of early layers are a little too low: a gradient
    does not see that what is dropped here moves inputs further on across their own thresholds.
    """
    def loss(logits, i):
        with torch.no_grad():
            exact = model.lm_head(dense[i]).float().log_softmax(-1)             # (T, vocab)
        return F.kl_div(logits.log_softmax(-1), exact, reduction="sum", log_target=True)

    sums = []
    with dropping, contextlib.ExitStack() as hooks:
        for name in dropping.names:
            sums.append(torch.zeros(2, 2, dtype=torch.float64, device=model.device))
            add_costs(model.get_submodule(name), name, dropping, sums[-1], hooks)
        total = backpropagate(model, windows, loss, asked)
    # On either side of the threshold the gradient is that of a model with the input and without it;
    # the truth lies between.
    costs = torch.stack([(of[:, 0] / of[:, 1]).mean() for of in sums]).cpu()
    outputs = [model.get_submodule(name).out_features for name in dropping.names]
    return (costs / torch.tensor(outputs, dtype=torch.float64)).view(-1, len(LINEARS)), total


def add_costs(linear, name, dropping, sums, hooks):
    """Add up what the inputs near a linear's threshold cost, until `hooks` end.

    sums (2, 2): the costs of inputs just dropped and just kept, and how many there are of each.
    Dropping x_i moves the KL by - x_i · gradient.
    """
    x = None                             # what the linear was last given, (W, T, in)

    def remember(module, inputs):
        nonlocal x
        x = inputs[0].detach()

    def add(module, grad_input, grad_output):
        late = x[:, SINKS:].float()
        gradient = grad_input[0][:, SINKS:].float()
        distance = late.abs() / dropping.thresholds[name]  # 1 at the threshold
        cost = -gradient * late / distance                 # of dropping it, if it stood there
        near = (distance > 1 / NEAR) & (distance < NEAR)
        keep = kept(late, dropping.thresholds[name])
        for side, chosen in zip(sums, (near & ~keep, near & keep)):
            side += torch.stack((cost[chosen].double().sum(), chosen.sum().double()))

    hooks.enter_context(linear.register_forward_pre_hook(remember, prepend=True))
    hooks.enter_context(linear.register_full_backward_hook(add))


class Attempt(NamedTuple):
    """Shares that were tried. The smallest of several has the smallest KL."""
    kl: float
    number: int
    shares: torch.Tensor                 # (layers, 7)
    moved: torch.Tensor                  # (layers, 7): by how much their log-odds are off balanced
    price: torch.Tensor                  # (layers, 7)


@torch.no_grad()
def add_priced(calibration, model, tokens, partial=None):
    """Add the priced allocation to a calibration that holds balanced, by a few windows of `tokens`.

    Starts from the balanced shares, and moves their log-odds against the logarithm of the prices.
    The first move of a level is that of the level before, as far as it went. Of all shares that
    were tried at a level, the balanced ones too, those with the smallest KL stay. partial: a
    Partial, from where the work goes on.
    """
    check_dense(model)
    partial = partial or Partial()
    windows = some_windows(model, tokens, *WINDOWS)
    x = model.embed(windows)
    context = model.context(windows)
    for block in model.model.layers:
        x = block(x, context)
    dense = model.model.norm(x)
    _, size = calibration.sizes()
    carried = torch.zeros(len(model.model.layers), len(LINEARS), dtype=torch.float64)
    chosen = []                          # (layers, 7), at each level
    # After the last move of a level only its KL counts.
    work = [(level, move) for level in PRICED_AT for move in range(MOVES + 1)]
    for level, move in progress(work, "calibrating, prices"):
        if not move:
            start = calibration.sparsities(level, "balanced").clamp(0.001, 0.995).logit()
            attempts = []
            moved = torch.zeros_like(carried)
        elif move == 1 and carried.any():
            moved = carried
        else:
            best = min(attempts)
            above = best.price[best.price > 0]
            typical = above.median() if len(above) else torch.tensor(1.0)
            # Too few inputs may tell nonsense.
            price = best.price.nan_to_num(typical.item()).clamp(min=0.03 * typical).log()
            beside_mean = (price - (price @ size).mean()).clamp(-FARTHEST, FARTHEST)
            astray = len(attempts) - 1 - best.number       # attempts since the best: step shorter
            moved = best.moved - STRIDE / 2 ** astray * beside_mean
        name = f"priced shares {level} {move}"
        if name not in partial.tensors:
            shares = at_level(start + moved, size, level)
            dropping = Dropping(model, shares, calibration.weights["fisher-channel"])
            price, kl = prices(model, windows, dense, dropping, move < MOVES)
            kl = torch.full_like(price, kl)
            partial.keep({name: torch.stack((kl, shares, price))})
        kl, shares, price = partial.tensors[name]
        attempts.append(Attempt(kl[0, 0].item(), move, shares, moved, price))
        if move == MOVES:
            carried = min(attempts).moved
            chosen.append(min(attempts).shares)
    levels = torch.tensor(PRICED_AT, dtype=torch.float64)
    calibration.tables["priced"] = Table(levels, torch.stack(chosen), "fisher-channel")


def at_level(odds, size, level):
    """Return shares (layers, 7) of log-odds `odds` plus one number that makes their mean `level`.

    size (7,): of each linear, its share of a block's weights.
    """
    low = -40.0
    high = 40.0
    for _ in range(60):
        middle = (low + high) / 2
        shares = (odds + middle).sigmoid().clamp(max=MOST)
        if (shares @ size).mean() < level:
            low = middle
        else:
            high = middle
    return shares


# --------------------------------------------------------------------------------------------------
# What the commands of these chapters share

def pyplot():
    """Return matplotlib's pyplot, set up for figures to be read on a light and on a dark page."""
    try:
        import matplotlib
    except ImportError:
        raise InputError("figures need matplotlib: pip install matplotlib") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot
    pyplot.rcParams.update({"figure.dpi": 110, "savefig.facecolor": "white", "font.size": 9,
                            "axes.spines.top": False, "axes.spines.right": False,
                            "axes.grid": True, "grid.alpha": 0.25, "legend.frameon": False})
    return pyplot


def check_figure(path, option="--figure"):
    """Raise InputError, before anything is measured, if no PNG can be drawn at `path`."""
    require(str(path).endswith(".png"), f"{option} is {path}, expected a name that ends in .png")
    check_output(path, option)
    pyplot()


def save_figure(figure, path):
    """Write a figure of pyplot as a PNG, whole or not at all, and forget it."""
    with replacing(path) as file:
        figure.savefig(file, format="png")
    pyplot().close(figure)


def refuse_beside(arguments, meaningless):
    """Raise InputError for an option given beside one that leaves it without meaning.

    meaningless: {the latter: the former ones}, by their names in `arguments`.
    """
    for option, others in meaningless.items():
        for other in others:
            require(not (getattr(arguments, option) and getattr(arguments, other)),
                    f"--{other.replace('_', '-')} means nothing with --{option.replace('_', '-')}")


def add_quantize(parser, needs=""):
    """Add --quantize, which `load` follows; needs: what more it asks for."""
    parser.add_argument("--quantize", choices=["int8", "int4"],
                        help=f"round the weights first{needs} (default: as they are)")
    parser.add_argument("--head-bits", type=int, choices=[16, 8, 4],
                        help="with --quantize: of the head and the embedding (default: 8)")
    parser.add_argument("--float-activations", action="store_true",
                        help="multiply quantized weights by activations as they are, not rounded "
                             "to 8 bits (default: rounded, where that is faster)")


def load(arguments, name=None):
    """Return (model, tokenizer) as --device, --dtype and --quantize ask for; name None: --model."""
    name = name or arguments.model
    model, tokenizer = load_model(name, arguments.device, arguments.dtype)
    quantize.follow(arguments, model, name)
    return model, tokenizer


# --------------------------------------------------------------------------------------------------
# Figures, and the command line

def draw_distributions(calibration, path):
    """Draw the density of x at the four sites of an early, a middle and a late block, as a PNG."""
    plt = pyplot()
    inputs = calibration.distributions["input"]                      # (layers, 4, BINS)
    layers = len(inputs)
    edges = torch.exp2(torch.arange(0, BINS + 1, 8) / PER_OCTAVE + LOWEST)
    middles = (edges[1:] + edges[:-1]) / 2
    figure, axes = plt.subplots(3, 4, figsize=(10, 6), layout="constrained")
    for row, layer in enumerate((0, layers // 2, layers - 1)):
        for site, axis in enumerate(axes[row]):
            counts = inputs[layer, site]
            share = counts.view(-1, 8).sum(1) / counts.sum()
            density = share / edges.diff() / 2             # of x: half lies on either side of 0
            reach = quantile(counts, 0.98).item()
            shown = (middles <= reach) & (middles > reach / 400)
            axis.fill_between(torch.cat((-middles[shown].flip(0), middles[shown])),
                              torch.cat((density[shown].flip(0), density[shown])),
                              color="tab:blue", alpha=0.5, lw=0)
            for sparsity, style in ((0.25, ":"), (0.5, "--"), (0.65, "-")):
                threshold = quantile(counts, sparsity).item()
                axis.axvline(-threshold, color="tab:red", lw=0.9, ls=style)
                axis.axvline(threshold, color="tab:red", lw=0.9, ls=style,
                             label=f"{sparsity:.0%} lie inside")
            axis.set(yticks=[], xlim=(-reach, reach), ylim=(0, None))
            axis.set_title(f"{SITES[site]}, block {layer}", fontsize=9)
            if site == 0:
                axis.set_ylabel("density")
            if row == 2:
                axis.set_xlabel("activation x")
    axes[0, 3].legend(fontsize=7, loc="upper right")
    save_figure(figure, path)


def draw_allocations(calibration, path, sparsity=0.5):
    """Draw the share that each allocation makes each linear drop, over depth, as a PNG."""
    plt = pyplot()
    uneven = [name for name in calibration.allocations if len(calibration.tables[name].levels)]
    names = uneven or ["uniform"]
    rows = -(-len(names) // 3)
    figure, axes = plt.subplots(rows, 3, figsize=(9, 2.8 * rows), sharey=True, layout="constrained",
                                squeeze=False)
    for place, (axis, allocation) in enumerate(itertools.zip_longest(axes.flat, names)):
        if allocation is None:
            axis.remove()
            continue
        shares = calibration.sparsities(sparsity, allocation)        # (layers, 7)
        for i, linear in enumerate(LINEARS):
            label = linear.split(".")[1].removesuffix("_proj")
            axis.plot(shares[:, i] * 100, marker="o", ms=3, lw=1.2, label=label)
        axis.axhline(sparsity * 100, color="grey", lw=0.8, ls="--")
        axis.set(title=allocation, xlabel="block", ylim=(0, 100))
        if place % 3 == 0:
            axis.set_ylabel(f"sparsity of each linear\nat {sparsity:.0%} of all (%)")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside right center")
    save_figure(figure, path)


def main():
    parser = make_parser("Calibrates a checkpoint, with every allocation there is.")
    add_quantize(parser, "; needs --out")
    parser.add_argument("--no-fisher", action="store_true",
                        help="leave the backward passes out, and what needs them (default: no)")
    parser.add_argument("--figures", metavar="FOLDER", type=Path,
                        help="only draw what the calibration holds, as PNG files (default: no)")
    arguments = parser.parse_args()
    path = output_of(arguments)
    refuse_beside(arguments, {"import_teal": ("figures", "text", "greedy", "no_fisher"),
                              "figures": ("text", "greedy", "no_fisher")})
    require(arguments.out or not arguments.quantize,
            "--quantize needs --out: calibration.safetensors in the folder is that of the weights "
            "as they are")
    if arguments.figures:
        arguments.figures.mkdir(parents=True, exist_ok=True)
        for name in ("distributions.png", "allocations.png"):
            check_figure(arguments.figures / name, "--figures")
        model, _ = load(arguments)
        calibration = load_calibration(model, arguments.model, path)
        draw_distributions(calibration, arguments.figures / "distributions.png")
        draw_allocations(calibration, arguments.figures / "allocations.png")
        print(f"{arguments.figures}: distributions.png, allocations.png")
        return
    check_output(path, "--out")
    if arguments.import_teal:
        write_imported(arguments, path)
        return
    model, tokenizer = load(arguments)

    fisher = not arguments.no_fisher

    def add(calibration, tokens, partial):
        add_allocations(calibration, model, tokens, arguments.context, fisher, partial)
        if fisher:
            add_priced(calibration, model, tokens, partial)
        settle(calibration, model, tokens)

    # In forward passes: 2 a token for weighted counts, 4 for gradients, and what follows from
    # WINDOWS for twelve prices and up to 28 thresholds.
    cost = 2 * arguments.tokens + 80_000
    write_calibration(arguments, path, model, tokenizer, add,
                      cost + fisher * (4 * arguments.tokens + 320_000))


if __name__ == "__main__":
    command_line(main)
