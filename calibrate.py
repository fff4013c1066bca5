"""Where thresholds come from: how large activations are, and how much of them each linear drops.

To drop half of the inputs of a linear one has to know the magnitude that half of them stay below.
TEAL finds it offline (arXiv 2408.14690, section 4): run some text through the dense model, keep the
distribution of |x| where each linear reads it, and use its quantiles as thresholds. At sparsity s,

    t(s) = the value that a share s of all |x| stays below

    share of |x|
      ▇
      ▇ ▆
      ▇ ▇ ▅
      ▇ ▇ ▇ ▄ ▃ ▂ ▂ ▁ ▁ ▁ ▁
      └─────┴──────────────────► |x|
         t(50 %)

A block has four places where linears read, and so four distributions: attention in (q, k, v),
attention out (o), MLP in (gate, up), MLP middle (down). 10,000 tokens give thresholds within a few
percent. The first tokens of a window are left out: they are attention sinks, to which heads that
have nothing to say attend, with activations many times as large as all others (arXiv 2309.17453).

How much of a model-wide sparsity each linear gets is a second question. An answer is called an
allocation, and stands here as a table: for some levels of model-wide sparsity, the share of its
inputs that each linear drops. This file makes two:

    uniform    every linear the same share                                        (TEAL, section 4)
    greedy     block by block: raise the one of the seven linears that adds least to the error of
               the block's output, by equal numbers of weights             (TEAL, algorithm 1)

A calibration belongs to a model, so it says what it was made from, and is refused elsewhere. The
statistics that TEAL's authors publish for Llama-2, Llama-3 and Mistral can be read in its place.

    python calibrate.py [--model FOLDER] [--text FILE]      writes FOLDER/calibration.safetensors
    python calibrate.py --greedy                            with the greedy allocation, too
    python calibrate.py --tokens 2000 --context 512         quicker; 16,000 tokens if not told

Interrupted, all go on where they were, from FOLDER/calibration.safetensors.partial.
"""
import contextlib
import csv
import hashlib
import json
import time
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import torch

from kernel import kept
from model import (EMBEDDING, HEAD, Config, InputError, Parser, asked_context, block_linears,
                   check_output, check_tokens, command_line, default_context, linear_names,
                   load_model, natural, note, progress, read_header, read_safetensors, read_tokens,
                   require, tensor_paths, windows_of, write_safetensors)

SITES = ("attention in", "attention out", "MLP in", "MLP middle")
SITE_OF = {                  # where each of the seven linears of a block reads
    "self_attn.q_proj": 0, "self_attn.k_proj": 0, "self_attn.v_proj": 0, "self_attn.o_proj": 1,
    "mlp.gate_proj": 2, "mlp.up_proj": 2, "mlp.down_proj": 3,
}
LINEARS = tuple(SITE_OF)

FORMAT = "minTEAL calibration 3"         # what the file says it is
SINKS = 4                                # tokens left out at the start of each window
BATCH = 4                                # windows that run together
TOKENS = 16_000                          # that the commands take if they are not told

# Magnitudes are counted on a logarithmic scale that needs no look at the data first: 32 bins an
# octave, 2.2 % wide, from 2^-20 (what is smaller falls into bin 0, zeros too) to 2^12.
LOWEST, HIGHEST, PER_OCTAVE = -20, 12, 32
BINS = (HIGHEST - LOWEST) * PER_OCTAVE


def histogram(x):
    """Return the counts (BINS,) int64 of the magnitudes in x (any shape)."""
    bins = (x.abs().float().log2() - LOWEST) * PER_OCTAVE            # -inf for zeros
    require(bins.max() < float("inf"), "the activations hold NaN or infinity: the model cannot be "
                                       "calibrated in this dtype")
    return torch.bincount(bins.clamp(0, BINS - 1).long().flatten(), minlength=BINS)


def quantile(counts, share):
    """Return the magnitudes (...) that shares (...) in [0, 1) of counts (..., BINS) stay below."""
    share = torch.as_tensor(share, dtype=torch.float64).expand(counts.shape[:-1])
    below = counts.double().cumsum(-1)                               # (..., BINS)
    wanted = (share * below[..., -1]).unsqueeze(-1)
    at = torch.searchsorted(below, wanted).clamp(max=BINS - 1)       # the bin in which it lies
    inside = counts.double().gather(-1, at)
    fraction = (wanted - (below.gather(-1, at) - inside)) / inside.clamp(min=1)
    position = (at + fraction).squeeze(-1)                           # in bins
    return torch.exp2(position / PER_OCTAVE + LOWEST) * (share > 0)


# --------------------------------------------------------------------------------------------------
# The calibration of a model

class Table(NamedTuple):
    """An allocation: the share of its inputs that each linear drops, at some sparsities."""
    levels: torch.Tensor             # (L,) rising, above 0 and below 1; may be empty
    shares: torch.Tensor             # (L, layers, 7)
    weights: str = ""                # the channel weights that |x| is multiplied with; "": none

    def at(self, sparsity):
        """Return the shares (layers, 7), float64, at a model-wide sparsity in [0, 1).

        They are linear between levels. After the last one what is kept shrinks evenly, until at 1
        nothing is: a table without levels is the uniform allocation.
        """
        zeros = torch.zeros(1, *self.shares.shape[1:])
        levels = torch.cat((torch.zeros(1), self.levels, torch.ones(1))).double()
        shares = torch.cat((zeros, self.shares, zeros + 1)).double()
        after = int(torch.searchsorted(levels, sparsity, right=True))
        fraction = (sparsity - levels[after - 1]) / (levels[after] - levels[after - 1])
        return shares[after - 1] + fraction * (shares[after] - shares[after - 1])


def even_table(layers, weights=""):
    """Return the Table that gives every linear the same share."""
    return Table(torch.zeros(0), torch.zeros(0, layers, len(LINEARS)), weights)


@dataclass
class Calibration:
    """What is known of a model's activations, from which thresholds for any sparsity are read.

    shapes: what the model looks like; source: what text this was made from
    fingerprint: (256,) float32 of the model's embedding, which tells models of one shape apart
    distributions: {"input": (layers, 4, BINS) of |x| by site, "head": (BINS,) of the head's |x|,
        and for each of the weights (layers, 7, BINS) of |x| times them}, int64. Chapters add more.
    tables: {allocation: Table}. The one added last is the default.
    weights: {name: {linear: (in,)}}: how much each channel counts. A threshold on |x| times its
        weight is a threshold for each channel.
    """
    shapes: dict
    source: str
    fingerprint: torch.Tensor
    distributions: dict
    tables: dict = field(default_factory=dict)
    weights: dict = field(default_factory=dict)

    @property
    def allocations(self):
        """The names of the allocations, the default first."""
        return list(reversed(self.tables))

    def sparsities(self, sparsity, allocation=None):
        """Return the share (layers, 7) of each linear's inputs that an allocation drops."""
        require(0 <= sparsity < 1, f"sparsity is {sparsity}, expected at least 0 and below 1")
        return self._table(allocation).at(sparsity)

    def thresholds(self, sparsity, allocation=None):
        """Return {linear: tensor () or (in,), float32}: thresholds for a model-wide sparsity.

        sparsity: in [0, 1), a share of the weights in all blocks. allocation: one of `allocations`,
        or None for the first. With inputs dropped before it, a layer sees others than those that
        were counted here: the share realised differs by a point or so.
        """
        shares = self.sparsities(sparsity, allocation)               # (layers, 7)
        return self.thresholds_at(shares, self._table(allocation).weights)

    def thresholds_at(self, shares, weights=""):
        """Return the thresholds that drop given shares (layers, 7), of |x| times the `weights`."""
        names = linear_names(SimpleNamespace(**self.shapes))
        values = dict(zip(names, quantile(self.counts_of(weights), shares).flatten()))
        if weights:
            values = {name: value / self.weights[weights][name] for name, value in values.items()}
        return {name: value.float() for name, value in values.items()}

    def counts_of(self, weights):
        """Return the distributions (layers, 7, BINS) of |x| times the `weights`; "": of |x|."""
        return self.distributions[weights] if weights else (
            self.distributions["input"][:, list(SITE_OF.values())])

    def head_threshold(self, sparsity):
        """Return the threshold () at which the head drops `sparsity` of its inputs.

        The paper leaves the head dense.
        """
        require("head" in self.distributions, f"this calibration holds no distribution of the "
                                              f"head's inputs: it is {self.source}")
        return quantile(self.distributions["head"], sparsity).float()

    def sizes(self):
        """Return the outputs (7,) of a block's linears, and their shares (7,) of its weights."""
        shapes = block_linears(SimpleNamespace(**self.shapes)).values()
        shapes = torch.tensor(list(shapes), dtype=torch.float64)
        weights = shapes.prod(1)
        return shapes[:, 0], weights / weights.sum()

    def _table(self, allocation):
        allocation = allocation or self.allocations[0]
        require(allocation in self.tables,
                f"allocation {allocation!r} is not in this calibration, which holds "
                f"{', '.join(self.allocations)}; greedy is made by python calibrate.py --greedy, "
                f"others by python -m beyond.allocate")
        return self.tables[allocation]

    def check(self, model):
        """Raise InputError if this was made for another model."""
        for key, value in shapes_of(model.config).items():
            require(self.shapes.get(key) == value,
                    f"this calibration was made for another model: {key} is "
                    f"{self.shapes.get(key)} in it, {value} in the model")
        own = own_fingerprint(model)
        difference = (own - self.fingerprint).norm() / own.norm()
        require(difference < 2**-2,                        # 4 bits bring half as much
                "this calibration was made for another model of the same shape: the embeddings "
                "differ")

    def save(self, path):
        """Write the calibration as a safetensors file."""
        tensors = {"fingerprint": self.fingerprint}
        for name, counts in self.distributions.items():
            dtype = torch.int32 if counts.max() < 2**31 else torch.int64
            tensors[f"distributions {name}"] = counts.to(dtype)
        for name, table in self.tables.items():
            tensors[f"levels {name}"] = table.levels.double()
            tensors[f"shares {name}"] = table.shares.double()
        for weights, values in self.weights.items():
            for linear, value in values.items():
                tensors[f"weights {weights} {linear}"] = value
        tables = {name: table.weights for name, table in self.tables.items()}
        write_safetensors(path, tensors, {"format": FORMAT, "source": self.source,
                                          "shapes": json.dumps(self.shapes),
                                          "tables": json.dumps(tables)})

    @staticmethod
    def load(path):
        """Return what `save` wrote; raises InputError for anything else."""
        metadata = read_header(path)[1]
        require(metadata.get("format") == FORMAT,
                f"{path}: not a calibration of this version: format is "
                f"{metadata.get('format')!r}, expected {FORMAT!r}; make it with: "
                f"python calibrate.py --model FOLDER")
        tensors = {name: tensor.clone() for name, tensor in read_safetensors(path).items()}
        try:
            calibration = Calibration(json.loads(metadata["shapes"]), metadata["source"],
                                      tensors.pop("fingerprint"), {})
            for name, weights in json.loads(metadata["tables"]).items():
                calibration.tables[name] = Table(tensors.pop(f"levels {name}"),
                                                 tensors.pop(f"shares {name}"), weights)
            for name, tensor in tensors.items():
                kind, _, rest = name.partition(" ")
                if kind == "distributions":
                    calibration.distributions[rest] = tensor.long()
                else:
                    weights, linear = rest.split(" ")
                    calibration.weights.setdefault(weights, {})[linear] = tensor
            calibration.check_whole()
        except (AttributeError, LookupError, TypeError, ValueError, RuntimeError) as error:
            raise InputError(f"{path}: a damaged calibration ({error}); make it with: "
                             f"python calibrate.py --model FOLDER") from None
        return calibration

    def check_whole(self):
        """Raise InputError, naming it, if a part is missing, misshapen or makes no sense."""
        layers = self.shapes["num_hidden_layers"]
        require(self.fingerprint.shape == (256,), "fingerprint")
        require(self.distributions["input"].shape == (layers, len(SITES), BINS), "input")
        for name, counts in self.distributions.items():
            require(counts.shape[-1] == BINS and (counts >= 0).all() and (counts.sum(-1) > 0).all(),
                    name)
        require(self.tables, "no allocation")
        for name, (levels, shares, weights) in self.tables.items():
            require(levels.ndim == 1 and shares.shape == (len(levels), layers, len(LINEARS)), name)
            require(bool((levels > 0).all() and (levels < 1).all() and (levels.diff() > 0).all()
                         and (shares >= 0).all() and (shares < 1).all()), name)
            require(not weights or weights in self.weights, name)
        inputs = {f"model.layers.{layer}.{linear}": size for layer in range(layers)
                  for linear, (_, size) in block_linears(SimpleNamespace(**self.shapes)).items()}
        for name, values in self.weights.items():
            require(self.distributions[name].shape == (layers, len(LINEARS), BINS), name)
            require({linear: len(value) for linear, value in values.items()} == inputs, name)
            every = torch.cat(list(values.values()))
            require(bool((every > 0).all() and every.isfinite().all()), name)


def shapes_of(config):
    """Return the numbers of a Config that a calibration depends on."""
    return {key: getattr(config, key) for key in (
        "hidden_size", "intermediate_size", "num_hidden_layers", "head_dim", "num_attention_heads",
        "num_key_value_heads", "vocab_size")}


def fingerprint_of(embed, config):
    """Return 256 values spread over an embedding, nearly the same in each dtype.

    embed: a function of tokens (1, T) -> (1, T, hidden)
    """
    size = config.vocab_size * config.hidden_size
    at = torch.linspace(0, size - 1, 256, dtype=torch.float64).long()
    rows = embed(at[None] // config.hidden_size)[0].detach().float().cpu()      # (256, hidden)
    return rows[torch.arange(256), at % config.hidden_size]


def own_fingerprint(model):
    """Return the fingerprint of a Llama."""
    return fingerprint_of(lambda tokens: model.embed(tokens.to(model.device)), model.config)


# --------------------------------------------------------------------------------------------------
# Making one

class Partial:
    """What long work has computed so far, from where it goes on if it was killed.

    It is a dictionary of tensors, and a safetensors file written anew with each `keep`. What is
    found in the file counts if it was made from the same `origin`, a text. path None: no file. Each
    kind of work has a label of its own, which says all that it depends on beside the origin.
    """

    def __init__(self, path=None, origin=""):
        self.path = path
        self.origin = origin
        self.tensors = {}
        if path and path.exists():
            try:
                if read_header(path)[1].get("origin") == origin:
                    found = read_safetensors(path)
                    self.tensors = {name: tensor.clone() for name, tensor in found.items()}
                    note(f"going on from {path}")
            except InputError as error:
                note(f"beginning anew: {error}")

    def keep(self, tensors):
        """Add tensors {name: tensor}, or put them in the place of those there are."""
        self.tensors |= tensors
        if self.path:
            write_safetensors(self.path, self.tensors, {"origin": self.origin})

    def rest(self, items, label, sums):
        """Yield those of a list's items that are not done yet; what they come to is in `sums`.

        sums: a tensor that the caller adds to, in place; it begins as far as the work was. What was
        kept in another shape is of other work.
        """
        done = 0
        if label in self.tensors and self.tensors[label].shape == sums.shape:
            sums += self.tensors[label].to(sums.device)
            done = int(self.tensors[f"{label}: done"])
        for item in progress(items[done:], label):
            yield item
            done += 1
            self.keep({label: sums, f"{label}: done": torch.tensor(done)})


@torch.no_grad()
def count(model, windows, watched, label, partial=None):
    """Run windows (W, T + 1) through the dense model; return the counts (watched, BINS) int64.

    watched: a list of (module, function(input, output) -> values (B, T, ...)), whose magnitudes are
    counted, except at the first tokens of a window.
    """
    counts = torch.zeros(len(watched), BINS, dtype=torch.int64)
    hooks = contextlib.ExitStack()       # a handle is a context manager, which takes its hook away
    for (module, values), of in zip(watched, counts):
        def add(module, inputs, output, values=values, of=of):
            of += histogram(values(inputs[0], output)[:, SINKS:]).to(of.device)
        hooks.enter_context(module.register_forward_hook(add))
    with hooks:
        for part in (partial or Partial()).rest(windows.split(BATCH), label, counts):
            model(part[:, :-1].to(model.device), last_only=True)
    return counts


def calibrate(model, tokens, context=None, source="unknown text", partial=None):
    """Return the Calibration of a dense model on `tokens` (N,) int64, with the uniform allocation.

    context: tokens a window; None: the model's own, at most 2048. Memory does not grow with the
    number of tokens. partial: a Partial, from where the work goes on.
    """
    check_dense(model)
    check_tokens(tokens, model.config)
    context = context or default_context(model)
    require(context > SINKS, f"a window of {context} tokens leaves none after the first {SINKS}")
    windows = windows_of(tokens, context)
    watched = [(model.model.layers[-1], lambda x, y: model.model.norm(y))]     # what the head reads
    for block in model.model.layers:
        for linear in ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj"):
            watched.append((block.get_submodule(linear), lambda x, y: x))      # SITES, in order
    head, *inputs = count(model, windows, watched, "calibrating", partial)
    return Calibration(shapes_of(model.config), f"{len(windows) * context:,} tokens of {source}",
                       own_fingerprint(model),
                       {"input": torch.stack(inputs).view(-1, len(SITES), BINS), "head": head},
                       {"uniform": even_table(len(model.model.layers))})


def evenly(windows, number):
    """Return `number` of windows (W, ...), evenly apart; all of them if there are no more."""
    return windows[torch.linspace(0, len(windows) - 1, min(number, len(windows))).round().long()]


def some_windows(model, tokens, number, length):
    """Return windows (W, T) of tokens (N,), evenly apart, on the model's device.

    At most `number` of at most `length` tokens: shorter where the model's context or the text is.
    """
    length = min(length, default_context(model), len(tokens) - 1)
    return evenly(windows_of(tokens, length), number)[:, :-1].to(model.device)


def spread(tokens, number, length):
    """Return at most `number` of tokens (N,), in stretches of `length` that lie evenly apart.

    A text may speak of one thing for thousands of tokens, and what is small there is not small
    elsewhere.
    """
    if number <= length or len(tokens) <= number:
        return tokens[:number]
    stretches = evenly(windows_of(tokens, length), number // length)
    return torch.cat((stretches[:, :-1].flatten(), stretches[-1, -1:]))


def check_dense(model):
    """Raise InputError for a model that was made sparse."""
    require(not hasattr(model, "sparse_state"),
            "a calibration needs the dense model: this one was made sparse")


STEP = 0.01              # of a block's weights, dropped in one step of the greedy path
END = 0.9                # of a block's weights, where its path ends
GREEDY = (2, 256)        # windows, and tokens of each at most, on which errors are measured
GREEDY_COST = 100_000    # tokens a forward pass has in the same time: two trials a step


@torch.no_grad()
def greedy_path(block, x, context, counts, size):
    """Return the path (steps, 7) of the shares that a block's linears drop, from none to END.

    x: (B, T, hidden), inputs of the block in the dense model; context: theirs; counts: (4, BINS),
    its distributions; size: (7,), shares of the block's weights. In each step the linear that adds
    least to the error of the block's output drops STEP more of the block's weights. All seven have
    their own threshold.

    TEAL tries all seven in every step. But what a linear adds to the squared error changes little
    from one step to the next. So the one that added least when it was last tried is tried anew,
    until the one that adds least is new: about two trials a step.
    """
    linears = [block.get_submodule(name) for name in LINEARS]
    counts = counts[list(SITE_OF.values())]                          # (7, BINS)
    thresholds = torch.zeros(len(LINEARS), device=x.device)

    def drop(module, inputs):
        threshold = thresholds[linears.index(module)]
        return inputs[0] * kept(inputs[0], threshold)

    late = slice(x.shape[1] // 4, None)                              # far from the sinks
    exact = block(x, context)[:, late].float()
    path = [torch.zeros(len(LINEARS), dtype=torch.float64)]
    error = 0.0                                                      # squared, of the path so far
    added = torch.zeros(len(LINEARS))                                # to it, by one step more
    new = torch.zeros(len(LINEARS), dtype=torch.bool)                # measured in this step
    with contextlib.ExitStack() as hooks:
        for linear in linears:
            hooks.enter_context(linear.register_forward_pre_hook(drop))
        while path[-1] @ size < END - STEP / 2:
            raised = path[-1] + STEP / size
            added[raised >= 1] = float("inf")
            best = int(added.argmin())
            if added[best] == float("inf"):
                break
            before = thresholds[best].clone()
            thresholds[best] = quantile(counts[best], raised[best]).float()
            if new[best]:
                path.append(path[-1].clone())
                path[-1][best] = raised[best]
                error += added[best]
                new[:] = False
            else:
                added[best] = (block(x, context)[:, late].float() - exact).square().sum() - error
                thresholds[best] = before
                new[best] = True
    return torch.stack(path)


def table_of(paths, size):
    """Return the Table of a path (steps, 7) for each block, at each percent that all of them reach.

    size: (7,), shares of a block's weights.
    """
    reached = [path.double() @ size for path in paths]               # (steps,) each, rising
    last = min(float(levels[-1]) for levels in reached)
    levels = torch.arange(1, 100, dtype=torch.float64) / 100
    levels = levels[levels < last + 1e-9]
    shares = []
    for path, of in zip(paths, reached):
        after = torch.searchsorted(of, levels - 1e-9).clamp(1, len(of) - 1)
        fraction = (levels - of[after - 1]) / (of[after] - of[after - 1]).clamp(min=1e-12)
        fraction = fraction.clamp(0, 1)
        shares.append(path[after - 1] + fraction[:, None] * (path[after] - path[after - 1]))
    return Table(levels, torch.stack(shares, 1))                     # (L, layers, 7)


@torch.no_grad()
def add_greedy(calibration, model, tokens, partial=None):
    """Add the greedy allocation to a calibration of the model, by a few windows of `tokens` (N,).

    The block inputs are computed once, in the dense model, and handed from block to block. partial:
    a Partial, from where the work goes on after the last block that was done.
    """
    check_dense(model)
    partial = partial or Partial()
    windows = some_windows(model, tokens, *GREEDY)
    _, size = calibration.sizes()
    x = model.embed(windows)
    context = model.context(windows)
    paths = []
    for layer in progress(range(len(model.model.layers)), "greedy allocation, blocks"):
        block = model.model.layers[layer]
        name = f"greedy {layer}"
        if name not in partial.tensors:
            counts = calibration.distributions["input"][layer]
            partial.keep({name: greedy_path(block, x, context, counts, size)})
        paths.append(partial.tensors[name])
        x = block(x, context)
    calibration.tables["greedy"] = table_of(paths, size)


# --------------------------------------------------------------------------------------------------
# The statistics that TEAL's authors publish (github.com/FasterDecoding/TEAL, models/NAME)

def import_teal(folder, config, fingerprint):
    """Return a Calibration with the paper's allocations, from the authors' files for a model.

    folder: models/NAME of their repository, with histograms/layer-i/{self_attn,mlp}/histograms.pt
    and lookup/layer-i/results.csv. Raises InputError for files that are missing or hold something
    else.
    """
    folder = Path(folder)
    inputs, paths = [], []
    for layer in range(config.num_hidden_layers):
        for part in ("self_attn", "mlp"):
            path = folder / "histograms" / f"layer-{layer}" / part / "histograms.pt"
            inputs += [authors_histogram(path, key) for key in ("h1", "h2")]
        paths.append(authors_path(folder / "lookup" / f"layer-{layer}" / "results.csv"))
    require(not (folder / "histograms" / f"layer-{config.num_hidden_layers}").exists(),
            f"{folder}: statistics of more layers than the model's {config.num_hidden_layers}")
    calibration = Calibration(
        shapes_of(config), f"the statistics TEAL's authors publish for {folder.name}", fingerprint,
        {"input": torch.stack(inputs).view(-1, len(SITES), BINS)},
        {"uniform": even_table(len(paths))})
    calibration.tables["greedy"] = table_of(paths, calibration.sizes()[1])
    return calibration


def authors_histogram(path, key):
    """Return the counts (BINS,) of |x| from one of the authors' histograms, `key` of a file.

    They count x with its sign, and their threshold for a sparsity s is the value below which a
    share 0.5 + s/2 lies, as if x were symmetric; so a share 2 * cdf(v) - 1 of |x| is taken to lie
    below v.
    """
    try:
        tensors = torch.load(path, weights_only=True)
        centers, counts = tensors[f"{key}_centers"].double(), tensors[key].double()
        whole = (centers.shape == counts.shape and len(centers) > 1
                 and bool((centers.diff() > 0).all() and (counts >= 0).all() and counts.sum() > 0))
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None
    except Exception:                    # what torch.load raises for other files is of many kinds
        whole = False
    require(whole, f"{path}: not a histogram of TEAL's authors: expected {key} and {key}_centers")
    edges = torch.linspace(LOWEST, HIGHEST, BINS + 1, dtype=torch.float64).exp2()
    below = counts.cumsum(0) / counts.sum()                          # at each center
    after = torch.searchsorted(centers, edges).clamp(1, len(centers) - 1)
    fraction = (edges - centers[after - 1]) / (centers[after] - centers[after - 1])
    cdf = below[after - 1] + fraction * (below[after] - below[after - 1])
    share = torch.where(edges > centers[-1], 1.0, 2 * cdf - 1).clamp(0, 1).cummax(0).values
    share[0] = 0
    share[-1] = 1
    return (share.diff() * 2**40).long()


def authors_path(path):
    """Return the greedy path (steps, 7) in one of the authors' lookup tables.

    At its far end, from 72 % on in some, shares reach 1 and more; it is cut there.
    """
    names = [linear.split(".")[1].removesuffix("_proj") for linear in LINEARS]
    try:
        with open(path, newline="") as file:
            rows = [[float(row[name]) for name in names] for row in csv.DictReader(file)]
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None
    except (KeyError, TypeError, ValueError):
        rows = []
    shares = torch.tensor([[0.0] * len(LINEARS), *rows], dtype=torch.float64)
    beyond = (~(shares < 1)).any(1).nonzero()
    shares = shares[:int(beyond[0])] if len(beyond) else shares
    require(len(shares) > 1 and bool((shares.diff(dim=0) > -1e-6).all() and (shares >= 0).all()),
            f"{path}: not a greedy path of TEAL's authors: expected rising shares below 1 under "
            f"{', '.join(names)}")
    return shares.cummax(0).values


# --------------------------------------------------------------------------------------------------

def load_calibration(model, name, path=None):
    """Return the calibration beside the checkpoint `name`, or at `path`, checked to be the model's.

    For "random:PRESET" it is made now, of random tokens: it means as little as the weights.
    """
    if path is None and str(name).startswith("random:"):
        generator = torch.Generator().manual_seed(0)
        tokens = torch.randint(model.config.vocab_size, (129,), generator=generator)
        return calibrate(model, tokens, 128, "random tokens")
    path = Path(path or Path(name) / "calibration.safetensors")
    command = "-m beyond.allocate" if model.config.quantization_config else "calibrate.py"
    hint = f"make one with: python {command} --model {name}"
    require(path.exists(), f"{path}: no calibration; {hint}")
    calibration = Calibration.load(path)
    try:
        calibration.check(model)
    except InputError as error:
        raise InputError(f"{path}: {error}; {hint}") from None
    return calibration


def make_parser(description):
    """Return the Parser of `python calibrate.py`; python -m beyond.allocate adds options to it."""
    parser = Parser(description=description)
    parser.add_model()
    parser.add_argument("--text", metavar="FILE",
                        help="UTF-8 text to run (default: the standard library's held-in part)")
    parser.add_argument("--tokens", type=natural, default=TOKENS,
                        help=f"how many tokens of it at most (default: {TOKENS})")
    parser.add_argument("--context", type=natural,
                        help="tokens a window (default: the model's own, at most 2048)")
    parser.add_argument("--greedy", action="store_true",
                        help="with the greedy allocation, which takes minutes (default: no)")
    parser.add_argument("--import-teal", metavar="DIR",
                        help="instead: the paper's thresholds, from models/NAME of the authors' "
                             "repository (default: no)")
    parser.add_argument("--out", metavar="FILE", type=Path,
                        help="(default: calibration.safetensors in the checkpoint folder)")
    return parser


def output_of(arguments):
    """Return where the calibration lies that the command line asks for."""
    name = arguments.model
    require(not name.startswith("random:"), f"{name} has random weights: commands calibrate it on "
                                            f"random tokens as they start")
    require(Path(name).is_dir(), f"{name}: no such folder")
    return arguments.out or Path(name) / "calibration.safetensors"


def origin_of(model, tokens, context):
    """Return what a Partial depends on, as a text: the model, its dtype, and the text's windows."""
    values = [tokens.double()]
    for tensor in model.state_dict().values():             # a few of each, quantized ones too
        at = torch.linspace(0, tensor.numel() - 1, 64, dtype=torch.float64).long()
        values.append(tensor.flatten()[at.to(tensor.device)].double().cpu())
    digest = hashlib.sha256(torch.cat(values).numpy().tobytes()).hexdigest()
    return f"{FORMAT}, {model.dtype}, windows of {context}, {digest}"


def announce(model, tokens, context, cost):
    """Say on standard error how long a forward pass of `cost` tokens takes: one window is timed."""
    window = windows_of(tokens, context)[:1, :-1].to(model.device)
    model(window[:, :8], last_only=True)
    began = time.perf_counter()
    model(window, last_only=True)
    minutes = (time.perf_counter() - began) / context * cost / 60
    note(f"calibrating on {len(tokens):,} tokens: this takes about {minutes:.1f} minutes")


def write_imported(arguments, path):
    """Write the calibration that --import-teal asks for."""
    name = arguments.model
    config = Config.read(name)
    embedding = embedding_of(name)
    fingerprint = fingerprint_of(lambda tokens: embedding[tokens], config)
    calibration = import_teal(arguments.import_teal, config, fingerprint)
    calibration.save(path)
    print(f"{path}: {calibration.source}; allocations: {', '.join(calibration.allocations)}")


def write_calibration(arguments, path, model, tokenizer, add=None, cost=0):
    """Calibrate a model as the command line asks for, write the calibration, and print what it is.

    add(calibration, tokens (N,), partial) adds to it before it is written, which takes as long as a
    forward pass of `cost` tokens. What is done is kept in a file, PATH.partial, as long as it may
    be needed.
    """
    tokens, source = read_tokens(tokenizer, arguments.text, "train")
    context = asked_context(model, arguments.context)
    first_half = tokens[:max(arguments.tokens, len(tokens) // 2)]    # rotate.py takes the second
    tokens = spread(first_half, arguments.tokens, context)
    partial_path = path.with_name(f"{path.name}.partial")
    partial = Partial(partial_path, origin_of(model, tokens, context))
    announce(model, tokens, context, 1.3 * len(tokens) + arguments.greedy * GREEDY_COST + cost)
    calibration = calibrate(model, tokens, context, source, partial)
    if arguments.greedy:
        add_greedy(calibration, model, tokens, partial)
    if add:
        add(calibration, tokens, partial)
    calibration.save(path)
    partial_path.unlink(missing_ok=True)                   # not before the whole is safe
    print(f"{path}: from {calibration.source}; allocations: {', '.join(calibration.allocations)}")
    print("median of |x| where linears read, by block:")
    print(f"{'block':>6}" + "".join(f"{site:>15}" for site in SITES))
    for layer, values in enumerate(quantile(calibration.distributions["input"], 0.5)):
        print(f"{layer:6}" + "".join(f"{value:15.4f}" for value in values))


def main():
    parser = make_parser("Calibrates a checkpoint: what its thresholds are read from.")
    arguments = parser.parse_args()
    path = output_of(arguments)
    check_output(path, "--out")
    if arguments.import_teal:
        require(not arguments.text and not arguments.greedy,
                "--text and --greedy mean nothing with --import-teal")
        write_imported(arguments, path)
        return
    model, tokenizer = load_model(arguments.model, arguments.device, arguments.dtype)
    write_calibration(arguments, path, model, tokenizer)


def embedding_of(folder):
    """Return the embedding (vocab, hidden) of a checkpoint folder, without loading the rest."""
    paths = tensor_paths(folder)
    name = EMBEDDING if EMBEDDING in paths else HEAD       # a tied head may be stored alone
    require(name in paths, f"{folder}: tensor {EMBEDDING} is missing from the checkpoint")
    return read_safetensors(paths[name])[name]


if __name__ == "__main__":
    command_line(main)
