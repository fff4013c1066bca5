"""How a model-wide sparsity is shared out: by what the loss pays for each weight that goes unread.

Some linears lose little when three quarters of their inputs are dropped, others much at a quarter.
calibrate.py makes the two allocations of the paper, uniform (every linear the same) and greedy
(block by block, by the error of the block's output). This chapter adds

    balanced    drop what raises the loss least a byte. Dropping x_i changes the loss by about
                F x_i² / 2, F the mean square of the loss's gradient at the inputs of the linear,
                and saves one column, `out` weights: keep x_i where F x_i² > λ · out, λ a price.
                One λ for the whole model empties linears of the blocks where F is small, to 98 %
                and more, and there the estimate, made for small changes, no longer holds. One λ for
                each block moves nothing between blocks. Balanced is halfway between the two
    priced      each linear's price is measured where it is paid, in the sparse model: how much the
                distance (KL) from the dense model's distributions grows for each weight less that
                is read: dropping x_i moves it by - x_i · gradient. Shares fall where the price is
                high and rise where it is low, until all are equal. It takes minutes (--priced)

F comes from one backward pass, with labels drawn from the model itself, so that F is the Fisher
information and any text will do. The pass runs one block at a time, and the head text by text.
Memory beside the weights, for four windows: one block's activations with gradients, the input of
each block, and a few times the logits of one window in float32.

Whatever the shares, a threshold drops another share than it was made for where inputs were dropped
before it: it was read from distributions of the dense model. So at the end all allocations are
*settled*: at four levels the sparse model runs, each threshold is found where it acts, and the
table gets the share of the dense inputs that the threshold corresponds to.

The seam: a `Calibration` holds tables of shares that one interpolation reads; this file adds some.
Whatever reads thresholds from a calibration has these allocations too, the last one as its default.

    python -m beyond.allocate [--model FOLDER] [--text FILE]   writes FOLDER/calibration.safetensors
    python -m beyond.allocate --greedy --priced                with all allocations
    python -m beyond.allocate --no-gradients                   uniform alone, settled
"""
import contextlib
import functools

import torch
import torch.nn.functional as F

from beyond.quantize import add_quantize, load
from calibrate import (BATCH, BINS, HIGHEST, LINEARS, LOWEST, PER_OCTAVE, SINKS, SITE_OF,
                       calibration_for, check_dense, histogram, make_parser, output_of, quantile,
                       some_windows)
from kernel import kept
from model import (block_linears, command_line, default_context, linear_names, progress, require)

# Where a table is filled in. The shares of a level have it as their mean, and so have those on the
# line between two levels.
LEVELS = (0.25, 0.5, 0.65, 0.8)
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
# What runs: a model that drops inputs, and its gradients

@contextlib.contextmanager
def dropping(model, shares, see=None):
    """Make a dense model drop given shares (layers, 7) of its inputs inside a `with`.

    The first tokens of each window stay as they are, as those of a prompt do. Yields the list of
    the linears' thresholds (), which the first forward pass finds: each is the quantile of what its
    linear is given there, with all inputs dropped before it that are to be. In a backward pass
    see(number of the linear, x, gradient at what is left of x) is called; both (B, T, in).
    """
    thresholds = [None] * shares.numel()

    def drop(number, module, inputs):
        x = inputs[0]
        if thresholds[number] is None:
            counts = histogram(x[:, SINKS:].detach()).cpu()
            thresholds[number] = quantile(counts, shares.view(-1)[number]).float().to(x.device)
        keep = kept(x, thresholds[number])
        keep[:, :SINKS] = True
        left = x * keep
        if left.requires_grad:
            left.register_hook(functools.partial(see, number, x.detach()))
        return left

    with contextlib.ExitStack() as hooks:
        for number, name in enumerate(linear_names(model.config)):
            hook = functools.partial(drop, number)
            hooks.enter_context(model.get_submodule(name).register_forward_pre_hook(hook))
        yield thresholds


def backpropagate(model, tokens, loss, blocks=True):
    """Run tokens (B, T), and take the gradient of the loss back to every block.

    Forward without a graph, keeping the input of each block, then back through one block at a time,
    whose graph alone is in memory; the head goes text by text. loss(logits (T, vocab), i) is that
    of text i. The caller's hooks see the gradients. Returns the sum of the losses, a float. blocks:
    False where the sum is all that is wanted.
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


def fisher_information(model, windows):
    """Return the mean F (layers, 7) float64 of each linear's inputs, from windows (W, T).

    F is the mean square of the gradient of the log-likelihood at the inputs of a linear, through
    that linear alone: q, k and v share an input, but not a gradient.
    """
    sums = torch.zeros(len(model.model.layers), len(LINEARS), dtype=torch.float64,
                       device=model.device)
    generator = torch.Generator(model.device).manual_seed(0)

    def loss(logits, i):
        p = logits.detach().softmax(-1)
        labels = torch.multinomial(p, 1, generator=generator)[:, 0]
        return F.cross_entropy(logits, labels, reduction="sum")

    def add(number, x, gradient):
        sums.view(-1)[number] += gradient[:, SINKS:].float().square().mean(-1).sum()

    with dropping(model, torch.zeros(sums.shape), add):              # nothing
        for part in progress(windows.split(BATCH), "calibrating, gradients"):
            backpropagate(model, part.to(model.device), loss)
    return sums.cpu() / windows[:, SINKS:].numel()


# --------------------------------------------------------------------------------------------------
# The balanced allocation

def solved(shares_at, low, high, size, level):
    """Return the shares (layers, 7) = shares_at(x) that drop `level` of all weights.

    shares_at: rises with x, which lies between low and high, and is found by bisection. size (7,):
    of each linear, its share of a block's weights.
    """
    for _ in range(60):
        middle = (low + high) / 2
        shares = shares_at(middle).clamp(max=MOST)
        if (shares @ size).mean() < level:
            low = middle
        else:
            high = middle
    return shares


def one_price(counts, unit, size, level):
    """Return the shares (layers, 7) that linears drop at one price λ, `level` of all weights.

    counts (layers, 7, BINS): the distributions; unit (layers, 7): the thresholds at λ = 1; size: as
    for `solved`. λ is what the loss may rise for a weight that is not read: the larger it is, the
    more is dropped.
    """
    # log2 √λ lies between where all is kept and where all is dropped.
    return solved(lambda x: share_below(counts, unit * x.exp2()), LOWEST - unit.max().log2(),
                  HIGHEST - unit.min().log2(), size, level)


def outputs_of(config):
    """Return how many outputs the linears of a block have, (7,)."""
    return torch.tensor([outputs for outputs, _ in block_linears(config).values()])


def table_at(levels, shares):
    """Return the table of shares (layers, 7) at each of several levels."""
    return torch.tensor(levels, dtype=torch.float64), torch.stack(shares)


def add_balanced(calibration, model, tokens, context=None):
    """Add the balanced allocation to a calibration of a dense model.

    tokens (N,) int64 and context: the text that the calibration was made of, and its windows.
    """
    check_dense(model)
    context = min(context or default_context(model), len(tokens))
    fisher = fisher_information(model, tokens.unfold(0, context, context))
    unit = (outputs_of(model.config) / fisher.clamp(min=1e-300)).sqrt()
    counts = calibration.counts[:, list(SITE_OF.values())]                      # (layers, 7, BINS)
    size = calibration.weight_shares()
    shares = []
    for level in LEVELS:
        by_model = one_price(counts, unit, size, level)
        by_block = [one_price(of[None], at[None], size, level) for of, at in zip(counts, unit)]
        shares.append((by_model + torch.cat(by_block)) / 2)
    calibration.tables["balanced"] = table_at(LEVELS, shares)


# --------------------------------------------------------------------------------------------------
# Thresholds that drop, in the sparse model, what they are to drop

WINDOWS = (8, 512)       # of text that runs in the sparse model, and tokens of each at most


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
    counts = calibration.counts[:, list(SITE_OF.values())]                      # (layers, 7, BINS)
    for name in list(calibration.tables):
        settled = []
        for level in progress(LEVELS, f"calibrating, {name} in the sparse model"):
            with dropping(model, calibration.shares(level, name)) as thresholds:
                model(windows, last_only=True)
            shares = share_below(counts, torch.stack(thresholds).cpu().view(counts.shape[:2]))
            settled.append(shares.clamp(max=MOST))
        calibration.tables[name] = table_at(LEVELS, settled)


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
def prices(model, windows, dense, shares, asked=True):
    """Return what one weight less costs in each linear of a sparse model, and what all of it costs.

    windows (W, T); dense (W, T, hidden): what the dense model's head reads there; shares (layers,
    7): what the linears drop. Returns the prices (layers, 7) float64 and a float, both in KL to the
    dense model, summed over the tokens. A linear without inputs near its threshold has NaN, and all
    have if only the float is asked for. Prices of early layers are a little too low: a gradient
    does not see that what is dropped here moves inputs further on across their own thresholds.
    """
    # The costs of inputs just dropped and just kept, and how many there are of each.
    sums = torch.zeros(*shares.shape, 2, 2, dtype=torch.float64, device=model.device)

    def loss(logits, i):
        with torch.no_grad():
            exact = model.lm_head(dense[i]).float().log_softmax(-1)             # (T, vocab)
        return F.kl_div(logits.log_softmax(-1), exact, reduction="sum", log_target=True)

    def add(number, x, gradient):
        x = x[:, SINKS:].float()
        distance = x.abs() / thresholds[number]            # 1 at the threshold
        cost = -gradient[:, SINKS:].float() * x / distance     # of dropping it, if it stood there
        near = (distance > 1 / NEAR) & (distance < NEAR)
        keep = kept(x, thresholds[number])
        for side, chosen in zip(sums.view(-1, 2, 2)[number], (near & ~keep, near & keep)):
            side += torch.stack((cost[chosen].double().sum(), chosen.sum().double()))

    with dropping(model, shares, add) as thresholds:
        total = backpropagate(model, windows, loss, asked)
    # On either side of the threshold the gradient is that of a model with the input and without it;
    # the truth lies between.
    costs = (sums[..., 0] / sums[..., 1]).mean(-1).cpu()
    return costs / outputs_of(model.config), total


@torch.no_grad()
def add_priced(calibration, model, tokens):
    """Add the priced allocation to a calibration that holds balanced, by a few windows of `tokens`.

    Starts from the balanced shares, and moves their log-odds against the logarithm of the prices.
    The first move of a level is that of the level before, as far as it went. Of all shares that
    were tried at a level, the balanced ones too, those with the smallest KL stay.
    """
    check_dense(model)
    windows = some_windows(model, tokens, *WINDOWS)
    x = model.embed(windows)
    context = model.context(windows)
    for block in model.model.layers:
        x = block(x, context)
    dense = model.model.norm(x)
    size = calibration.weight_shares()
    best_moved = torch.zeros(len(model.model.layers), len(LINEARS), dtype=torch.float64)
    chosen = []                          # (layers, 7), at each level
    for level in PRICED_AT:
        start = calibration.shares(level, "balanced").clamp(0.001, 0.995).logit()
        carried = best_moved             # by how much log-odds are off balanced, (layers, 7)
        moved = torch.zeros_like(carried)
        best_kl = float("inf")
        # After the last move of a level only its KL counts.
        for number in progress(range(MOVES + 1), f"calibrating, prices at {level:.0%}"):
            shares = solved(lambda x: (start + moved + x).sigmoid(), -40.0, 40.0, size, level)
            price, kl = prices(model, windows, dense, shares, asked=number < MOVES)
            if kl < best_kl:
                best_kl, best_shares, best_moved, best_price = kl, shares, moved, price
                stride = STRIDE
            else:
                stride /= 2
            moved = best_moved - stride * beside_mean(best_price, size)
            if number == 0 and carried.any():
                moved = carried
        chosen.append(best_shares)
    calibration.tables["priced"] = table_at(PRICED_AT, chosen)


def beside_mean(price, size):
    """Return the logarithms of prices (layers, 7), beside their mean: the move that they ask for.

    size (7,): of each linear, its share of a block's weights.
    """
    above = price[price > 0]
    typical = above.median() if len(above) else torch.tensor(1.0)
    # Too few inputs may tell nonsense.
    price = price.nan_to_num(typical.item()).clamp(min=0.03 * typical).log()
    return (price - (price @ size).mean()).clamp(-FARTHEST, FARTHEST)


def main():
    parser = make_parser("Calibrates whatever minTEAL reads, with allocations by gradients.")
    add_quantize(parser, "; needs --out")
    group = parser.add_mutually_exclusive_group()
    group.add_argument("--priced", action="store_true",
                       help="with the priced allocation, which takes minutes (default: no)")
    group.add_argument("--no-gradients", action="store_true",
                       help="the paper's allocations alone, settled (default: balanced, too)")
    arguments = parser.parse_args()
    path = output_of(arguments)
    require(arguments.out or not arguments.quantize,
            "--quantize needs --out: calibration.safetensors in the folder is that of the weights "
            "as they are")
    model, tokenizer = load(arguments)
    calibration, tokens = calibration_for(arguments, model, tokenizer)
    if not arguments.no_gradients:
        add_balanced(calibration, model, tokens, arguments.context)
    if arguments.priced:
        add_priced(calibration, model, tokens)
    settle(calibration, model, tokens)
    calibration.save(path)
    print(f"{path}: from {calibration.source}; allocations: {', '.join(calibration.allocations)}")


if __name__ == "__main__":
    command_line(main)
