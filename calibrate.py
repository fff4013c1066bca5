"""Where thresholds come from: what the activations of a model look like, and how much each of them matters.

To drop half of the inputs of a linear one has to know the magnitude that half of them stay below. TEAL takes it
offline (arXiv 2408.14690, section 4): run some text through the dense model, keep the distribution of |x| where each
linear reads it, and use its quantiles as thresholds. At sparsity s,

    t(s) = the value that a share s of all |x| stays below

    share of |x|
      ▇
      ▇ ▆
      ▇ ▇ ▅
      ▇ ▇ ▇ ▄ ▃ ▂ ▂ ▁ ▁ ▁ ▁
      └─────┴──────────────────► |x|
         t(50 %)

A block has four places where linears read, and so four distributions: attention in (q, k, v), attention out (o),
MLP in (gate, up), MLP middle (down). The first tokens of a sequence are left out: they are attention sinks, to which
heads that have nothing to say attend, with activations many times as large as all others (arXiv 2309.17453).

How to share out a model-wide sparsity is a second question; an answer is called an allocation here.

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

Thresholds belong to a model, so a calibration says what it was made from, and is refused elsewhere.

    python calibrate.py [--model FOLDER] [--text FILE]      writes FOLDER/calibration.safetensors
    python calibrate.py --greedy                            with the greedy allocation, which takes minutes
    python calibrate.py --figures figures                   draws what the calibration holds
"""
import csv
import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F

from model import (DEMO, Config, InputError, Parser, block_linears, causal_mask, check_tokens, command_line, linear_names, load_model, natural,
                   progress_line, read_header, read_safetensors, read_shards, rope_tables, write_safetensors)
from sparsify import default_context, read_tokens, windows_of

SITES = ("attention in", "attention out", "MLP in", "MLP middle")
SITE_OF = {  # where each of the seven linears of a block reads, in the order of block_linears
    "self_attn.q_proj": 0, "self_attn.k_proj": 0, "self_attn.v_proj": 0, "self_attn.o_proj": 1,
    "mlp.gate_proj": 2, "mlp.up_proj": 2, "mlp.down_proj": 3,
}
LINEARS = tuple(SITE_OF)
SINKS = 4                # tokens left out at the start of each window
BEST_FIRST = ("priced", "balanced", "fisher-channel", "fisher", "greedy", "uniform", "wina")       # the first held is used if none is named

# Magnitudes are counted on a logarithmic scale that needs no look at the data first: 32 bins an octave, 2.2 % wide,
# from 2^-20 (what is smaller falls into bin 0, zeros too) to 2^12.
LOWEST, HIGHEST, PER_OCTAVE = -20, 12, 32
BINS = (HIGHEST - LOWEST) * PER_OCTAVE


def histogram(x):
    """Counts (BINS,) int64 of the magnitudes in x (any shape)."""
    place = (x.abs().float().log2() - LOWEST) * PER_OCTAVE                   # -inf for zeros
    if not place.max() < float("inf"):
        raise InputError("the activations hold NaN or infinity: the model cannot be calibrated in this dtype")
    return torch.bincount(place.clamp(0, BINS - 1).long().flatten(), minlength=BINS)


def quantile(counts, share):
    """The magnitudes (...) that shares (...) in [0, 1) of what was counted (..., BINS) stay below; 0 for a share of 0."""
    share = torch.as_tensor(share, dtype=torch.float64).expand(counts.shape[:-1])
    total = counts.double().cumsum(-1)                                       # (..., BINS)
    wanted = (share * total[..., -1]).unsqueeze(-1)
    place = torch.searchsorted(total, wanted).clamp(max=BINS - 1)            # the bin in which it lies
    inside = counts.double().gather(-1, place)
    below = total.gather(-1, place) - inside
    position = (place + (wanted - below) / inside.clamp(min=1)).squeeze(-1)  # in bins, with the fraction of the last one
    return torch.exp2(position / PER_OCTAVE + LOWEST) * (share > 0)


def share_below(counts, value):
    """The inverse of `quantile`: the share (...) of what was counted (..., BINS) that lies below `value` (...)."""
    position = ((value.double().log2() - LOWEST) * PER_OCTAVE).clamp(0, BINS - 1e-6).unsqueeze(-1)
    place = position.long()
    total = counts.double().cumsum(-1)
    inside = counts.double().gather(-1, place)
    below = total.gather(-1, place) - inside
    return ((below + (position - place) * inside) / total[..., -1:]).squeeze(-1)


# ---------------------------------------------------------------------------------------------------------
# The calibration of a model

@dataclass
class Calibration:
    """What is known of a model's activations, from which thresholds for any sparsity are read.

    shapes: what the model looks like; source: what text this was made from
    fingerprint: (256,) float32 of the model's embedding, which tells models of one shape apart
    histograms: {"input": (layers, 4, BINS) of |x| by site; if known "gate": (layers, BINS) of |silu(gate)|, "head": (BINS,) of
                 the head's |x|, "fisher-channel" and "wina": (layers, 7, BINS) of |x| times that criterion's weights}, int64
    weights: {"fisher-channel" or "wina": {linear: (in,)}}: how much each channel counts, root mean square 1
    fisher: (layers, 7): the mean F of each linear
    greedy: (layers, steps, 7): the sparsity of each linear along the path of the greedy allocation; None without
    priced: (len(PRICED_AT), layers, 7): the sparsity of each linear at these levels of the priced allocation; None without
    """
    shapes: dict
    source: str
    fingerprint: torch.Tensor
    histograms: dict
    weights: dict = field(default_factory=dict)
    fisher: torch.Tensor | None = None
    greedy: torch.Tensor | None = None
    priced: torch.Tensor | None = None

    @property
    def allocations(self):
        """The names of the allocations that this calibration holds, the best first."""
        held = {"uniform"} | self.weights.keys()
        held |= {"fisher", "balanced"} if self.fisher is not None else set()
        held |= {name for name in ("greedy", "priced") if getattr(self, name) is not None}
        return [name for name in BEST_FIRST if name in held]

    def sizes(self):
        """(outputs (7,), share of a block's weights (7,)) of the linears of a block, float64."""
        shapes = torch.tensor(list(block_linears(SimpleNamespace(**self.shapes)).values()), dtype=torch.float64)
        weights = shapes.prod(1)
        return shapes[:, 0], weights / weights.sum()

    def sparsities(self, sparsity, allocation=None):
        """The share (layers, 7) of each linear's inputs that an allocation drops, float64; model-wide it is `sparsity`."""
        return self._read(sparsity, allocation)[1]

    def thresholds(self, sparsity, allocation=None):
        """{name of a linear: tensor () or (in,), float32} that let a share `sparsity` in [0, 1) of the blocks' weights go unread.

        allocation: one of `allocations`, or None for the first of them. With inputs dropped in front of it, a layer sees
        others than those that were counted here: the share realised differs by a point or so.
        """
        values, _, weights = self._read(sparsity, allocation)                # (layers, 7)
        return self._by_name(values, weights)

    def thresholds_at(self, shares):
        """The thresholds of fisher-channel that drop given shares (layers, 7)."""
        return self._by_name(quantile(self.histograms["fisher-channel"], shares), self.weights["fisher-channel"])

    def _by_name(self, values, weights):
        names = linear_names(SimpleNamespace(**self.shapes))
        return {name: (value / weights[name] if weights else value).float() for name, value in zip(names, values.flatten())}

    def _in_order(self, criterion):
        """{linear: weights} of a criterion for all linears of all blocks, in their order; KeyError if one is missing."""
        return {name: self.weights[criterion][name] for name in linear_names(SimpleNamespace(**self.shapes))}

    def gate_thresholds(self, sparsity):
        """(layers,): what a share `sparsity` of all |silu(gate)| of each block stays below, the threshold of CATS."""
        return quantile(self._counts("gate"), sparsity).float()

    def head_threshold(self, sparsity):
        """The threshold () at which the head drops a share `sparsity` of its inputs. The paper leaves the head dense."""
        return quantile(self._counts("head"), sparsity).float()

    def _counts(self, name):
        if name not in self.histograms:
            raise InputError(f"this calibration holds no distribution of the {name}: it is {self.source}")
        return self.histograms[name]

    def _read(self, sparsity, allocation):
        """(thresholds on the weighted magnitudes (layers, 7), shares they drop (layers, 7), the weights or None)"""
        if not 0 <= sparsity < 1:
            raise InputError(f"sparsity is {sparsity}, expected at least 0 and below 1")
        allocation = allocation or self.allocations[0]
        if allocation not in self.allocations:
            known = "make it with: python calibrate.py --model FOLDER" + " --greedy" * (allocation == "greedy") \
                if allocation in BEST_FIRST else f"known are {', '.join(BEST_FIRST)}"
            raise InputError(f"allocation {allocation!r} is not in this calibration, which holds "
                             f"{', '.join(self.allocations)}; {known}")
        criterion = "fisher-channel" if allocation in ("balanced", "priced") else allocation
        weights = self.weights.get(criterion)
        # (layers, 7, BINS): the distribution that each linear's threshold is read from
        counts = self.histograms[criterion] if weights else self.histograms["input"][:, list(SITE_OF.values())]
        if allocation == "greedy":
            shares = self._along_the_path(sparsity)
        elif allocation == "priced":
            shares = self._between_levels(sparsity)
        elif allocation in ("uniform", "wina") or sparsity == 0:
            shares = torch.full(counts.shape[:2], float(sparsity), dtype=torch.float64)
        else:
            shares = self._at_one_price(counts, sparsity)
        if allocation == "balanced" and sparsity:
            by_block = torch.cat([self._at_one_price(counts, sparsity, slice(i, i + 1)) for i in range(len(counts))])
            shares = (shares + by_block) / 2
        return quantile(counts, shares), shares, weights

    def _at_one_price(self, counts, sparsity, layers=slice(None)):
        """The shares (layers, 7) that one λ for these layers drops of `counts` (all layers, 7, BINS), `sparsity` in the mean.

        λ, the rise of the loss for each weight not read, is found by bisection: the larger, the more is dropped.
        """
        outputs, size = self.sizes()
        unit = (outputs / self.fisher[layers].double().clamp(min=1e-300)).sqrt()             # the threshold at λ = 1
        low, high = unit.max().log2().neg() + LOWEST, unit.min().log2().neg() + HIGHEST      # of log2 √λ: all kept, all dropped
        for _ in range(60):
            middle = (low + high) / 2
            shares = share_below(counts[layers], unit * middle.exp2())
            low, high = (middle, high) if (shares * size).sum(1).mean() < sparsity else (low, middle)
        return shares

    def _along_the_path(self, sparsity):
        """The sparsities (layers, 7) at which the greedy path of each block passes a model-wide sparsity."""
        _, size = self.sizes()
        found = []
        for path in self.greedy.double():                                    # (steps, 7)
            reached = path @ size                                            # (steps,), rising
            if sparsity > reached[-1]:                                       # behind its end: what is kept shrinks evenly
                found.append(1 - (1 - path[-1]) * (1 - sparsity) / (1 - reached[-1]))
                continue
            after = int(torch.searchsorted(reached, sparsity).clamp(1, len(path) - 1))
            fraction = (sparsity - reached[after - 1]) / (reached[after] - reached[after - 1])
            found.append(path[after - 1] + fraction * (path[after] - path[after - 1]))
        return torch.stack(found)

    def _between_levels(self, sparsity):
        """The priced shares (layers, 7), linear between the levels they were found at; behind the last what is kept shrinks evenly."""
        levels, shares = torch.tensor([0.0, *PRICED_AT]), torch.cat((torch.zeros_like(self.priced[:1]), self.priced)).double()
        if sparsity >= PRICED_AT[-1]:
            return 1 - (1 - shares[-1]) * (1 - sparsity) / (1 - PRICED_AT[-1])
        after = int(torch.searchsorted(levels, sparsity, right=True))
        fraction = (sparsity - levels[after - 1]) / (levels[after] - levels[after - 1])
        return shares[after - 1] + fraction * (shares[after] - shares[after - 1])

    def check(self, model):
        """Raises InputError if this was made for another model."""
        for key, value in shapes_of(model.config).items():
            if self.shapes.get(key) != value:
                raise InputError(f"this calibration was made for another model: {key} is {self.shapes.get(key)} in it, "
                                 f"{value} in the model")
        if not torch.allclose(self.fingerprint, fingerprint_of(model.model.embed_tokens.weight.detach()), rtol=2**-6, atol=1e-6):
            raise InputError("this calibration was made for another model of the same shape: the embeddings differ")

    def save(self, path):
        """Writes the calibration as a safetensors file."""
        tensors = {"fingerprint": self.fingerprint}
        tensors |= {f"histograms.{name}": counts.to(torch.int32 if counts.max() < 2**31 else torch.int64)
                    for name, counts in self.histograms.items()}
        tensors |= {f"weights.{criterion} {name}": values for criterion, linears in self.weights.items()
                    for name, values in linears.items()}
        tensors |= {name: getattr(self, name) for name in ("fisher", "greedy", "priced") if getattr(self, name) is not None}
        write_safetensors(path, tensors, {"format": FORMAT, "source": self.source, "shapes": json.dumps(self.shapes)})

    @staticmethod
    def load(path):
        """Reads what `save` wrote; raises InputError for anything else."""
        metadata = read_header(path)[1]
        if metadata.get("format") != FORMAT:
            raise InputError(f"{path}: not a calibration of this version: format is {metadata.get('format')!r}, "
                             f"expected {FORMAT!r}; make it with: python calibrate.py --model FOLDER")
        tensors = {name: tensor.clone() for name, tensor in read_safetensors(path).items()}
        for name, tensor in tensors.items():
            if tensor.is_floating_point() and not tensor.isfinite().all():
                raise InputError(f"{path}: a damaged calibration: {name} holds NaN or infinity; make it with: python calibrate.py --model FOLDER")
        try:
            made = Calibration(json.loads(metadata["shapes"]), metadata["source"], tensors.pop("fingerprint").float(), {})
            layers = made.shapes["num_hidden_layers"]
            for name, tensor in tensors.items():
                kind, _, rest = name.partition(".")
                if kind == "histograms":
                    made.histograms[rest] = tensor.long()
                elif kind == "weights":
                    criterion, linear = rest.split(" ")
                    made.weights.setdefault(criterion, {})[linear] = tensor
                elif name in ("fisher", "greedy", "priced"):
                    setattr(made, name, tensor)
            inputs = [size for _, size in block_linears(SimpleNamespace(**made.shapes)).values()] * layers
            expected = {"input": (layers, len(SITES), BINS), "gate": (layers, BINS), "head": (BINS,)}
            if not made.histograms.keys() & {"gate", "head"}:      # the statistics of TEAL's authors have neither
                expected = {"input": expected["input"]}
            expected |= {criterion: (layers, len(LINEARS), BINS) for criterion in made.weights}
            whole = made.fingerprint.shape == (256,) and made.weights.keys() <= {"wina", "fisher-channel"} \
                and {name: tuple(counts.shape) for name, counts in made.histograms.items()} == expected \
                and all((counts >= 0).all() and (counts.sum(-1) > 0).all() for counts in made.histograms.values()) \
                and all([tuple(weight.shape) for weight in of.values()] == [(size,) for size in inputs]
                        and all((weight > 0).all() for weight in of.values()) for of in map(made._in_order, made.weights)) \
                and (made.fisher is None) == ("fisher-channel" not in made.weights) \
                and (made.fisher is None or made.fisher.shape == (layers, len(LINEARS)) and bool((made.fisher >= 0).all())) \
                and (made.greedy is None or made.greedy.shape[::2] == (layers, len(LINEARS))
                     and bool((made.greedy.diff(dim=1) >= 0).all() and made.greedy.min() == 0 and made.greedy.max() < 1)) \
                and (made.priced is None or made.fisher is not None and made.priced.shape == (len(PRICED_AT), layers, len(LINEARS))
                     and bool((made.priced >= 0).all() and (made.priced < 1).all()))
        except (AttributeError, KeyError, TypeError, ValueError, RuntimeError, RecursionError):
            whole = False
        if not whole:
            raise InputError(f"{path}: a damaged calibration: a part is missing or misshapen; make it with: python calibrate.py --model FOLDER")
        return made


FORMAT = "minTEAL calibration 2"


def shapes_of(config):
    return {key: getattr(config, key) for key in ("hidden_size", "intermediate_size", "num_hidden_layers", "head_dim",
                                                  "num_attention_heads", "num_key_value_heads", "vocab_size")}


def fingerprint_of(weight):
    """256 values spread over the embedding (vocab, hidden), float32 (256,); the same in every dtype up to rounding."""
    place = torch.linspace(0, weight.numel() - 1, 256, dtype=torch.float64).long().to(weight.device)
    return weight[place // weight.shape[1], place % weight.shape[1]].float().cpu()


# ---------------------------------------------------------------------------------------------------------
# Making it: a backward pass for F, a forward pass for the distributions

BATCH = 4                # windows at a time


def calibrate(model, tokens, context=None, source="unknown text", fisher=True, progress=lambda text: None):
    """Runs `tokens` (N,) int64 through the dense model, in windows of `context`, and returns their Calibration.

    context: None is the model's own, at most 2048. fisher: False leaves the backward pass out, and with it the
    allocations that need it. Memory does not grow with the number of tokens.
    """
    check_tokens(tokens, model.config)
    if hasattr(model, "sparse_state"):
        raise InputError("calibrate needs the dense model: this one was made sparse")
    context = context or default_context(model)
    if context <= SINKS:
        raise InputError(f"a window of {context} tokens leaves none behind the first {SINKS}")
    windows = windows_of(tokens, context)
    linears = {name: model.get_submodule(name) for name in linear_names(model.config)}
    norms = {name: linear.weight.detach().float().norm(dim=0).cpu() for name, linear in linears.items()}
    made = Calibration(shapes_of(model.config), f"{len(windows) * context:,} tokens of {source}", fingerprint_of(model.model.embed_tokens.weight.detach()), {},
                       {"wina": {name: relative(norm) for name, norm in norms.items()}})
    if fisher:
        information = fisher_information(model, windows, linears, progress)
        made.fisher = torch.stack([of.mean() for of in information.values()]).view(-1, len(LINEARS))
        made.weights["fisher-channel"] = {name: relative(of.sqrt()) for name, of in information.items()}
    made.histograms = count_magnitudes(model, windows, linears, made.weights, progress)
    return made


def relative(values):
    """values (in,) over their root mean square, none of them so small that a threshold over it is no number."""
    return (values / values.square().mean().sqrt().clamp(min=1e-30)).clamp(min=2**-10)


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
    hooks = []
    for name, linear in linears.items():
        def add(module, grad_input, grad_output, total=sums[name]):
            total += grad_input[0][:, SINKS:].float().square().sum((0, 1))
        hooks.append(linear.register_full_backward_hook(add))
    generator = torch.Generator(model.device).manual_seed(0)
    try:
        for done, part in enumerate(windows.split(BATCH)):
            progress(f"calibrating, gradients: window {BATCH * done} of {len(windows)}")
            backpropagate(model, part[:, :-1].to(model.device), lambda logits: F.cross_entropy(
                logits, torch.multinomial(logits.detach().softmax(-1), 1, generator=generator)[:, 0], reduction="sum"))
    finally:
        for hook in hooks:
            hook.remove()
    seen = len(windows) * (windows.shape[1] - 1 - SINKS)
    return {name: (total / seen).cpu() for name, total in sums.items()}


@torch.no_grad()
def count_magnitudes(model, windows, linears, weights, progress):
    """The histograms of a Calibration, from one forward pass over windows (W, context + 1)."""
    layers, device = model.config.num_hidden_layers, model.device
    counts = {"input": torch.zeros(layers, len(SITES), BINS), "gate": torch.zeros(layers, BINS), "head": torch.zeros(BINS)}
    counts |= {criterion: torch.zeros(layers, len(LINEARS), BINS) for criterion in weights}
    counts = {name: tensor.long().to(device) for name, tensor in counts.items()}
    weights = {criterion: {name: weight.to(device) for name, weight in of.items()} for criterion, of in weights.items()}
    hooks = []
    for i, (name, linear) in enumerate(linears.items()):
        layer, place = divmod(i, len(LINEARS))

        def count(module, inputs, output, name=name, layer=layer, place=place):
            x = inputs[0][:, SINKS:]
            site = SITE_OF[LINEARS[place]]
            if site not in list(SITE_OF.values())[:place]:                   # the first that reads there counts for all
                counts["input"][layer, site] += histogram(x)
            for criterion, of in weights.items():
                counts[criterion][layer, place] += histogram(x * of[name])
            if LINEARS[place] == "mlp.gate_proj":
                counts["gate"][layer] += histogram(F.silu(output[:, SINKS:]))
        hooks.append(linear.register_forward_hook(count))

    def count_head(module, inputs):
        counts["head"] += histogram(inputs[0][:, SINKS:])
    hooks.append(model.lm_head.register_forward_pre_hook(count_head))
    try:
        for done, part in enumerate(windows.split(BATCH)):
            progress(f"calibrating, magnitudes: window {BATCH * done} of {len(windows)}")
            model(part[:, :-1].to(device))
    finally:
        for hook in hooks:
            hook.remove()
    return {name: tensor.cpu() for name, tensor in counts.items()}


# ---------------------------------------------------------------------------------------------------------
# The priced allocation

PRICED_AT = (0.3, 0.5, 0.65, 0.75)       # model-wide sparsities at which prices are measured
MOVES = 2                # against the prices, at each
NEAR = 1.25              # inputs up to this factor above and below a threshold tell its price
STRIDE, FARTHEST = 0.4, 2.0      # log-odds move by -STRIDE times the logarithm of a price over the mean one, taken as FARTHEST at most
PRICED_WINDOWS = 32


@torch.no_grad()
def prices(model, windows, linears, thresholds):
    """(what one weight less costs in each linear of a sparse model, (layers, 7) float64, in KL to the dense model; that KL).

    Both are sums over the tokens of the windows.
    linears: {name: module} of the dense model; thresholds: {name: () or (in,)}, made of it by hooks. A linear without inputs
    near its threshold has NaN. A little too low for early layers: a gradient does not see that inputs further on, moved by
    what is dropped here, cross their own thresholds.
    """
    seen, hooks, dropping, total = {}, [], False, 0.0
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
        hooks.append(linear.register_forward_pre_hook(lambda module, inputs, name=name: drop(module, inputs, name)))
        hooks.append(linear.register_full_backward_hook(lambda module, *gradients, name=name: record(module, *gradients, name)))
    try:
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
    finally:
        for hook in hooks:
            hook.remove()
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
    hooks = [linear.register_forward_pre_hook(drop) for linear in linears]
    path = [torch.zeros(len(LINEARS), dtype=torch.float64)]
    try:
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
    finally:
        for hook in hooks:
            hook.remove()
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


# ---------------------------------------------------------------------------------------------------------
# The statistics that TEAL's authors publish (github.com/FasterDecoding/TEAL, models/NAME)

def import_teal(folder, config, fingerprint):
    """A Calibration with the uniform and greedy allocations of the paper, from the authors' files for this model.

    folder: models/NAME of their repository: histograms/layer-i/{self_attn,mlp}/histograms.pt and lookup/layer-i/results.csv.
    Their histograms count x with its sign, and their threshold for a sparsity s is the value below which a share 0.5 + s/2
    lies (as if x were symmetric); so a share 2 * cdf(v) - 1 of |x| is taken to lie below v. Raises InputError for
    files that are missing or hold something else.
    """
    def histogram_of(path, key):
        try:
            found = torch.load(path, weights_only=True)
            centers, counts = found[f"{key}_centers"].double(), found[key].double()
            whole = found.keys() == expected and centers.shape == counts.shape and len(centers) > 1 \
                and bool((centers.diff() > 0).all() and (counts >= 0).all() and counts.sum() > 0)
        except OSError as error:
            raise InputError(f"{path}: cannot be read: {error.strerror}") from None
        except Exception:                                  # what torch.load raises for other files is of many kinds
            whole = False
        if not whole:
            raise InputError(f"{path}: not a histogram of TEAL's authors: expected {', '.join(sorted(expected))}")
        below = counts.cumsum(0) / counts.sum()            # at each center
        after = torch.searchsorted(centers, edges).clamp(1, len(centers) - 1)
        fraction = (edges - centers[after - 1]) / (centers[after] - centers[after - 1])
        share = below[after - 1] + fraction * (below[after] - below[after - 1])
        share = torch.where(edges > centers[-1], 1.0, 2 * share - 1).clamp(0, 1).cummax(0).values
        share[0], share[-1] = 0, 1
        return (share.diff() * 2**40).long()

    folder = Path(folder)
    edges = torch.linspace(LOWEST, HIGHEST, BINS + 1, dtype=torch.float64).exp2()
    inputs, paths = [], []
    for layer in range(config.num_hidden_layers):
        for part, more in (("self_attn", ()), ("mlp", ("h1.5",))):
            expected = {f"{key}{suffix}" for key in ("h1", "h2", *more) for suffix in ("", "_centers")}
            inputs += [histogram_of(folder / "histograms" / f"layer-{layer}" / part / "histograms.pt", key) for key in ("h1", "h2")]
        path = folder / "lookup" / f"layer-{layer}" / "results.csv"
        try:
            with open(path, newline="") as file:
                rows = [[float(row[name.split(".")[1].removesuffix("_proj")]) for name in LINEARS] for row in csv.DictReader(file)]
        except OSError as error:
            raise InputError(f"{path}: cannot be read: {error.strerror}") from None
        except (KeyError, TypeError, ValueError):
            rows = []
        found = torch.tensor([[0.0] * len(LINEARS), *rows])
        if not rows or not ((found.diff(dim=0) > -1e-6).all() and found.max() < 1):
            raise InputError(f"{path}: not a greedy path of TEAL's authors: expected rising shares below 1 under q, k, v, o, gate, up, down")
        paths.append(found.cummax(0).values)
    if (folder / "histograms" / f"layer-{config.num_hidden_layers}").exists():
        raise InputError(f"{folder}: statistics of more layers than the model's {config.num_hidden_layers}")
    steps = max(map(len, paths))
    made = Calibration(shapes_of(config), f"the statistics TEAL's authors publish for {folder.name}", fingerprint,
                       {"input": torch.stack(inputs).view(-1, len(SITES), BINS)})
    made.greedy = torch.stack([torch.cat((path, path[-1:].expand(steps - len(path), -1))) for path in paths])
    return made


def pyplot():
    """matplotlib, set up for figures that can be read on a light and on a dark page."""
    try:
        import matplotlib
    except ImportError:
        raise InputError("figures need matplotlib: pip install matplotlib") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot
    pyplot.rcParams.update({"figure.dpi": 110, "savefig.facecolor": "white", "font.size": 9, "axes.spines.top": False,
                            "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.25, "legend.frameon": False})
    return pyplot


def draw_distributions(calibration, path):
    """The density of x at the four sites of an early, a middle and a late block, thresholds marked."""
    plt = pyplot()
    layers = calibration.histograms["input"].shape[0]
    edges = torch.exp2(torch.arange(0, BINS + 1, 8) / PER_OCTAVE + LOWEST)
    figure, axes = plt.subplots(3, 4, figsize=(10, 6), layout="constrained")
    for row, layer in enumerate((0, layers // 2, layers - 1)):
        for site, axis in enumerate(axes[row]):
            counts = calibration.histograms["input"][layer, site]
            density = counts.view(-1, 8).sum(1) / counts.sum() / edges.diff() / 2            # of x: half on either side
            centre = (edges[1:] + edges[:-1]) / 2
            reach = quantile(counts, 0.98).item()
            shown = (centre <= reach) & (centre > reach / 400)
            axis.fill_between(torch.cat((-centre[shown].flip(0), centre[shown])),
                              torch.cat((density[shown].flip(0), density[shown])), color="tab:blue", alpha=0.5, lw=0)
            for sparsity, style in ((0.25, ":"), (0.5, "--"), (0.65, "-")):
                for sign in (-1, 1):
                    axis.axvline(sign * quantile(counts, sparsity).item(), color="tab:red", lw=0.9, ls=style,
                                 label=f"{sparsity:.0%} lie inside" if sign > 0 else None)
            axis.set(yticks=[], xlim=(-reach, reach), ylim=(0, None))
            axis.set_title(f"{SITES[site]}, block {layer}", fontsize=9)
            if site == 0:
                axis.set_ylabel("density")
            if row == 2:
                axis.set_xlabel("activation x")
    axes[0, 3].legend(fontsize=7, loc="upper right")
    figure.savefig(path)
    plt.close(figure)


def draw_allocations(calibration, path, sparsity=0.5):
    """The sparsity that each allocation gives each linear, over depth, at one model-wide sparsity."""
    plt = pyplot()
    names = [name for name in calibration.allocations if name not in ("uniform", "wina")] or ["uniform"]
    figure, axes = plt.subplots(1, len(names), figsize=(3.4 * len(names), 3), sharey=True, layout="constrained", squeeze=False)
    for axis, allocation in zip(axes[0], names):
        shares = calibration.sparsities(sparsity, allocation)
        for i, linear in enumerate(LINEARS):
            axis.plot(shares[:, i] * 100, marker="o", ms=3, lw=1.2, label=linear.split(".")[1].removesuffix("_proj"))
        axis.axhline(sparsity * 100, color="grey", lw=0.8, ls="--")
        axis.set(title=allocation, xlabel="block", ylim=(0, 100))
    axes[0, 0].set_ylabel(f"sparsity of each linear at {sparsity:.0%} of all (%)")
    axes[0, -1].legend(loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(path)
    plt.close(figure)


# ---------------------------------------------------------------------------------------------------------

def load_calibration(model, name, path=None):
    """The calibration beside the checkpoint `name`, or at `path`, checked to be the model's.

    For "random:PRESET" it is made now, from random tokens: its thresholds are as meaningless as the weights.
    """
    if path is None and str(name).startswith("random:"):
        tokens = torch.randint(model.config.vocab_size, (129,), generator=torch.Generator().manual_seed(0))
        return calibrate(model, tokens, 128, "random tokens", fisher=False, progress=progress_line)
    path = Path(path or Path(name) / "calibration.safetensors")
    if not path.exists():
        raise InputError(f"{path}: no calibration. Make one with: python calibrate.py --model {name}")
    calibration = Calibration.load(path)
    try:
        calibration.check(model)
    except InputError as error:
        raise InputError(f"{path}: {error}; make one with: python calibrate.py --model {name}") from None
    return calibration


def main():
    parser = Parser(description="Calibrates a checkpoint: what its thresholds are read from.")
    parser.add_argument("--model", default=str(DEMO), help="checkpoint folder (default: the demo model)")
    parser.add_argument("--text", metavar="FILE", help="UTF-8 text to run (default: the standard library's held-in part)")
    parser.add_argument("--tokens", type=natural, default=100_000, help="how many tokens of it at most (default: 100000)")
    parser.add_argument("--greedy", action="store_true", help="with the greedy allocation, which takes minutes (default: no)")
    parser.add_argument("--no-fisher", action="store_true", help="leave the backward passes out, and what needs them (default: no)")
    parser.add_argument("--import-teal", metavar="DIR", help="instead: the paper's thresholds, from models/NAME of the authors' repository")
    parser.add_argument("--figures", metavar="FOLDER", type=Path, help="only draw what the calibration holds, as PNG files")
    parser.add_argument("--out", metavar="FILE", type=Path, help="(default: calibration.safetensors in the checkpoint folder)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu",
                        help="(default: cuda where there is one, else cpu)")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], help="(default: the checkpoint's own)")
    parser.add_argument("--quantize", choices=["int8", "int4"], help="round the blocks' weights first; needs --out (default: as they are)")
    arguments = parser.parse_args()
    if arguments.model.startswith("random:"):
        raise InputError(f"{arguments.model} has random weights: commands calibrate it on random tokens as they start")
    if arguments.quantize and not arguments.out:
        raise InputError("--quantize needs --out: calibration.safetensors in the folder is that of the weights as they are")
    path = arguments.out or Path(arguments.model) / "calibration.safetensors"
    if arguments.import_teal:
        embedding = next((tensors["model.embed_tokens.weight"] for _, tensors in read_shards(arguments.model)
                          if "model.embed_tokens.weight" in tensors), None)
        if embedding is None:
            raise InputError(f"{arguments.model}: tensor model.embed_tokens.weight is missing from the checkpoint")
        calibration = import_teal(arguments.import_teal, Config.read(arguments.model), fingerprint_of(embedding))
        calibration.save(path)
        print(f"{path}: {calibration.source}; allocations: {', '.join(calibration.allocations)}")
        return
    model, tokenizer = load_model(arguments.model, arguments.device, arguments.dtype, arguments.quantize)
    if arguments.figures:
        calibration = load_calibration(model, arguments.model, path)
        arguments.figures.mkdir(parents=True, exist_ok=True)
        draw_distributions(calibration, arguments.figures / "distributions.png")
        draw_allocations(calibration, arguments.figures / "allocations.png")
        print(f"{arguments.figures}: distributions.png, allocations.png")
        return
    tokens, source = read_tokens(tokenizer, arguments.text, "train")
    tokens = tokens[:arguments.tokens]
    calibration = calibrate(model, tokens, source=source, fisher=not arguments.no_fisher, progress=progress_line)
    if not arguments.no_fisher:
        add_priced(calibration, model, tokens, progress_line)
    if arguments.greedy:
        add_greedy(calibration, model, tokens, path.with_suffix(".greedy"), progress_line)
    calibration.save(path)
    path.with_suffix(".greedy").unlink(missing_ok=True)    # not before the whole is safe
    print(f"{path}: from {calibration.source}; allocations: {', '.join(calibration.allocations)}")
    print("median of |x| where linears read, by block:")
    print(f"{'block':>6}" + "".join(f"{site:>15}" for site in SITES))
    for layer, values in enumerate(quantile(calibration.histograms["input"], 0.5)):
        print(f"{layer:6}" + "".join(f"{value:15.4f}" for value in values))


if __name__ == "__main__":
    command_line(main)
