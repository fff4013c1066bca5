"""How a model-wide sparsity is shared out: which linears can spare more of their inputs than others.

Every linear the same sparsity is the simplest answer, but not the best: some linears lose little when three quarters of their
inputs are dropped, others much at a quarter. An answer to who gets how much is called an allocation.

    uniform         every linear the same sparsity                                          (TEAL, section 4)
    greedy          block by block: raise the one of the seven linears that adds least to the error of the
                    block's output, by equal numbers of weights, until the block's target    (TEAL, algorithm 1)
    fisher          drop what raises the loss least a byte. Dropping x_i changes the loss by about F_i x_i² / 2,
                    F_i the mean square of the loss's gradient at x_i, and saves one column, `out` weights:
                    keep x_i where F x_i² > λ · out, one λ for the whole model, F one mean a linear
    fisher-channel  the same with F_i, so a threshold a channel: |x_i| > √(λ · out / F_i)
    balanced        the same with each linear's share halfway between what one λ for the model and what one λ for each
                    block gives it. One λ alone empties whole linears of the blocks where F is small, to 98 % and more,
                    and there the estimate, made for small changes, no longer holds; one a block moves nothing between
                    blocks. Halfway, the distributions of the next token stay twice as near to the dense ones.
    priced          the same with each linear's share found by measuring its price where it is paid, in the sparse model:
                    how much the distance (KL) from the dense model's distributions grows for each weight less that
                    is read. Where a price is high the share is lowered, where it is low raised, until all are equal.
                    A price comes from the inputs near the threshold: dropping x_i moves the KL by - x_i · gradient.
    wina            |x_i| · ‖column i‖ in place of |x_i|, every linear the same sparsity     (arXiv 2505.19427)

fisher takes its gradients from one backward pass, with labels drawn from the model itself (so that F is the Fisher
information, and any text will do), one block at a time. Memory beside the weights, for four windows: the activations of one block with
gradients, the input of each block, and a few times the logits in float32, which a vocabulary of 32,000 makes 1 GB each.

This file finds what the allocations need from a model: gradients (fisher and those below it), prices, and greedy's path.
calibration.py reads thresholds for any sparsity from what was found.
"""
import contextlib
import hashlib

import torch
import torch.nn.functional as F

from calibration import LINEARS, PRICED_AT, SITE_OF, quantile
from checkpoint import linear_names, read_header, read_safetensors, write_safetensors
from cli import InputError
from model import causal_mask, rope_tables
from sparsify import default_context, windows_of

BATCH = 4                # windows at a time
SINKS = 4                # tokens left out at the start of each window


# ---------------------------------------------------------------------------------------------------------
# Fisher information: what a small change of an input does to the loss

def backpropagate(model, tokens, loss):
    """Runs tokens (B, T) forward, and the gradient of loss(logits (B * T, vocab)) back to each linear, for the hooks on them.

    Forward without a graph, keeping the input of each block, then back through one block at a time: one block's graph is held.
    """
    with torch.no_grad():
        x = model.model.embed_tokens(tokens)
        positions = torch.arange(tokens.shape[1], device=model.device)
        cos, sin = rope_tables(positions, model.config, x.dtype)
        mask = causal_mask(positions, 0, model.config.sliding_window)
        inputs = []
        for block in model.model.layers:
            inputs.append(x)
            x = block(x, cos, sin, mask, None, None)
    with torch.enable_grad():
        x = x.requires_grad_()
        gradient, = torch.autograd.grad(loss(model.lm_head(model.model.norm(x)).float().flatten(0, 1)), x)
        for block, x in zip(reversed(model.model.layers), reversed(inputs)):
            x = x.requires_grad_()
            gradient, = torch.autograd.grad(block(x, cos, sin, mask, None, None), x, gradient)


def fisher_information(model, windows, linears, progress):
    """{name: F (in,) float32}: the mean square of the gradient of the log-likelihood at each input of each linear.

    The gradient is the one through that linear alone (grad_output @ weight): q, k and v share an input, not a gradient.
    """
    sums = {name: torch.zeros(linear.in_features, device=model.device) for name, linear in linears.items()}
    hooks = contextlib.ExitStack()                         # a handle is a context manager, which takes its hook away
    for name, linear in linears.items():
        def add(module, grad_input, grad_output, total=sums[name]):
            total += grad_input[0][:, SINKS:].float().square().sum((0, 1))
        hooks.enter_context(linear.register_full_backward_hook(add))
    generator = torch.Generator(model.device).manual_seed(0)
    with hooks:
        for done, part in enumerate(windows.split(BATCH)):
            progress(f"calibrating, gradients: window {BATCH * done} of {len(windows)}")
            backpropagate(model, part[:, :-1].to(model.device), lambda logits: F.cross_entropy(
                logits, torch.multinomial(logits.detach().softmax(-1), 1, generator=generator)[:, 0], reduction="sum"))
    seen = len(windows) * (windows.shape[1] - 1 - SINKS)
    return {name: (total / seen).cpu() for name, total in sums.items()}


# ---------------------------------------------------------------------------------------------------------
# The priced allocation

MOVES = 2                # how often the shares are moved against the prices, at each of the levels
NEAR = 1.25              # inputs up to this factor above and below a threshold tell its price
# One move: a linear whose price is e times the mean one has the log-odds of its share lowered by STRIDE; a logarithm counts as
# FARTHEST at most.
STRIDE, FARTHEST = 0.4, 2.0
PRICED_WINDOWS = 32


@torch.no_grad()
def prices(model, windows, linears, thresholds):
    """(what one weight less costs in each linear of a sparse model, (layers, 7) float64, in KL to the dense model; that KL).

    Both are sums over the tokens of the windows.
    linears: {name: module} of the dense model; thresholds: {name: () or (in,)}, made of it by hooks. A linear without inputs
    near its threshold has NaN. A little too low for early layers: a gradient does not see that inputs further on, moved by
    what is dropped here, cross their own thresholds.
    """
    seen, hooks, dropping, total = {}, contextlib.ExitStack(), False, 0.0
    sums = {name: torch.zeros(2, 2, dtype=torch.float64, device=model.device) for name in linears}     # dropped, kept: sum, count
    thresholds = {name: threshold.to(model.device) for name, threshold in thresholds.items()}

    def drop(module, inputs, name):
        if not dropping:
            return None
        seen[name] = inputs[0].detach()
        return inputs[0] * (inputs[0].abs() > thresholds[name]),

    def record(module, grad_input, grad_output, name):
        x, gradient = seen[name][:, SINKS:].float(), grad_input[0][:, SINKS:].float()
        distance = x.abs() / thresholds[name]              # 1 at the threshold
        cost = -gradient * x / distance                    # of dropping, if the input stood at the threshold
        for side, place in zip(sums[name], ((distance <= 1) & (distance > 1 / NEAR), (distance > 1) & (distance < NEAR))):
            side += torch.stack((cost[place].double().sum(), place.sum().double()))

    for name, linear in linears.items():
        hooks.enter_context(linear.register_forward_pre_hook(lambda module, inputs, name=name: drop(module, inputs, name)))
        hooks.enter_context(linear.register_full_backward_hook(lambda module, *gradients, name=name: record(module, *gradients, name)))
    with hooks:
        for part in windows.split(BATCH):
            tokens = part[:, :-1].to(model.device)
            dense = model(tokens).flatten(0, 1).log_softmax(-1)
            dropping = True
            kl = []

            def loss(logits, dense=dense, kl=kl):
                kl.append(F.kl_div(logits.log_softmax(-1), dense, reduction="sum", log_target=True))
                return kl[0]
            backpropagate(model, tokens, loss)
            total += kl[0].item()
            dropping = False
    # On either side of the threshold the gradient is that of a model with the input and without; the truth lies between.
    found = torch.stack([(side[:, 0] / side[:, 1]).mean() for side in sums.values()]).cpu()
    outs = torch.tensor([linear.out_features for linear in linears.values()], dtype=torch.float64)
    return (found / outs).view(-1, len(LINEARS)), total


def add_priced(calibration, model, tokens, progress=lambda text: None):
    """Adds the priced allocation to a calibration of the dense model, from 32 windows of `tokens` (N,).

    Starts from the balanced shares, moves their log-odds against the logarithm of the prices, and hands what was moved on
    to the next level. Of all shares that were tried at a level those with the smallest KL are kept.
    """
    if hasattr(model, "sparse_state"):
        raise InputError("add_priced needs the dense model: this one was made sparse")
    windows, (_, size) = windows_of(tokens, default_context(model))[:PRICED_WINDOWS], calibration.sizes()
    linears, found = {name: model.get_submodule(name) for name in linear_names(model.config)}, []
    moved = torch.zeros(len(calibration.fisher), len(LINEARS), dtype=torch.float64)
    for level in PRICED_AT:
        start, tried = calibration.sparsities(level, "balanced").clamp(0.001, 0.995).logit(), []     # (layers, 7)

        def attempt(moved):
            progress(f"calibrating, prices at {level:.0%}: {len(tried) + 1} of {MOVES + 2 if found else MOVES + 1}")
            shares = at_level(start + moved, size, level)
            price, kl = prices(model, windows, linears, calibration.thresholds_at(shares))
            tried.append((kl, len(tried), shares, moved, price))

        attempt(torch.zeros_like(moved))
        if found:
            attempt(moved)
        for _ in range(MOVES):
            _, _, _, moved, price = min(tried)             # the best so far, by its KL
            typical = price[price > 0].median() if (price > 0).any() else torch.tensor(1.0)
            price = price.nan_to_num(typical.item()).clamp(min=0.03 * typical).log()        # too few inputs may tell nonsense
            stride = STRIDE / 2 ** (len(tried) - 1 - min(tried)[1])                         # shorter where the last one led astray
            attempt(moved - stride * (price - (price * size).sum(1).mean()).clamp(-FARTHEST, FARTHEST))
        _, _, shares, moved, _ = min(tried)
        found.append(shares)
    calibration.priced = torch.stack(found).float()


def at_level(odds, size, level):
    """Shares (layers, 7) of log-odds `odds` plus the number that makes them `level`, weighted by size (7,), in the mean of the layers."""
    low, high = -40.0, 40.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if ((odds + middle).sigmoid() * size).sum(1).mean() < level else (low, middle)
    return (odds + middle).sigmoid().clamp(max=0.9999)


# ---------------------------------------------------------------------------------------------------------
# The greedy allocation (TEAL, algorithm 1)

STEP = 0.01              # of a block's weights, dropped in one step
END = 0.9                # of a block's weights, where its path ends


@torch.no_grad()
def greedy_path(block, x, cos, sin, mask, counts, size):
    """The path (steps, 7) of the sparsities of a block's linears, from dense to END.

    x: (B, T, hidden), inputs of the block in the dense model; counts: (4, BINS), its histograms; size: (7,), share of
    the block's weights. In each step every linear is tried with STEP more of the block's weights dropped, in it
    alone; the one that adds least to the error of the block's output keeps it. All seven have their own threshold.
    """
    linears = [block.get_submodule(name) for name in LINEARS]
    sites = list(SITE_OF.values())
    thresholds = [0.0] * len(LINEARS)

    def drop(module, inputs):
        threshold = thresholds[linears.index(module)]
        return inputs[0] * (inputs[0].abs() > threshold) if threshold else inputs[0]

    late = slice(x.shape[1] // 4, None)                    # the later part of each sequence, far from the sinks
    exact = block(x, cos, sin, mask, None, None)[:, late].float()
    hooks = contextlib.ExitStack()
    for linear in linears:
        hooks.enter_context(linear.register_forward_pre_hook(drop))
    path = [torch.zeros(len(LINEARS), dtype=torch.float64)]
    with hooks:
        while path[-1] @ size < END - STEP / 2:
            errors = []
            for i in range(len(LINEARS)):
                raised = path[-1][i] + STEP / size[i]
                if raised >= 1:
                    errors.append(float("inf"))
                    continue
                before = thresholds[i]
                thresholds[i] = quantile(counts[sites[i]], raised).item()
                errors.append((block(x, cos, sin, mask, None, None)[:, late].float() - exact).norm().item())
                thresholds[i] = before
            best = min(range(len(LINEARS)), key=errors.__getitem__)
            if errors[best] == float("inf"):
                break
            path.append(path[-1].clone())
            path[-1][best] += STEP / size[best]
            thresholds[best] = quantile(counts[sites[best]], path[-1][best]).item()
    return torch.stack(path)


@torch.no_grad()
def add_greedy(calibration, model, tokens, partial_path, progress=lambda text: None):
    """Adds the greedy allocation to a calibration of the model: each block on four windows of `tokens` (N,).

    The block inputs are computed once, in the dense model, and handed from block to block. After each block what is done
    is written to `partial_path`, from where a run that was killed goes on; the caller removes it when all is saved.
    """
    windows = windows_of(tokens, default_context(model))[:4, :-1].to(model.device)
    _, size = calibration.sizes()
    # A path belongs to one model in one dtype, and to these tokens.
    origin = torch.cat((calibration.fingerprint.double(), windows.flatten().double().cpu())).numpy().tobytes()
    origin = f"{hashlib.sha256(origin).hexdigest()} {model.model.embed_tokens.weight.dtype}"
    done = {}
    if partial_path.exists() and read_header(partial_path)[1].get("origin") == origin:
        done = {int(layer): path.clone() for layer, path in read_safetensors(partial_path).items()}
    x = model.model.embed_tokens(windows)
    positions = torch.arange(windows.shape[1], device=model.device)
    cos, sin = rope_tables(positions, model.config, x.dtype)
    mask = causal_mask(positions, 0, model.config.sliding_window)
    for layer, block in enumerate(model.model.layers):
        if layer not in done:
            progress(f"calibrating, greedy: block {layer + 1} of {len(model.model.layers)}")
            done[layer] = greedy_path(block, x, cos, sin, mask, calibration.histograms["input"][layer], size)
            write_safetensors(partial_path, {str(i): path for i, path in done.items()}, {"origin": origin})
        x = block(x, cos, sin, mask, None, None)
    steps = max(len(path) for path in done.values())       # paths may differ by a step: the last point is repeated
    calibration.greedy = torch.stack([torch.cat((path, path[-1:].expand(steps - len(path), -1)))
                                      for _, path in sorted(done.items())]).float()
