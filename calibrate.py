"""Where thresholds come from: how large activations are, and how much of them each linear drops.

To drop half of the inputs of a linear, know the magnitude that half of them stay below. TEAL finds
it offline (arXiv 2408.14690, section 4): run some text through the dense model, keep the
distribution of |x| where each linear reads it, and take its quantiles as thresholds. At sparsity s,

    t(s) = the value that a share s of all |x| stays below

    share of |x|
      ▇
      ▇ ▆
      ▇ ▇ ▅
      ▇ ▇ ▇ ▄ ▃ ▂ ▂ ▁ ▁ ▁ ▁
      └─────┴──────────────────► |x|
         t(50 %)

Linears read at four places in a block, which so has four distributions: attention in (q, k, v),
attention out (o), MLP in (gate, up), MLP middle (down). 10,000 tokens give thresholds within a few
percent. The first tokens of a window are left out: they are attention sinks, with activations many
times as large as all others (arXiv 2309.17453).

An allocation says how much of a model-wide sparsity each linear gets. It is a table: for some
levels of model-wide sparsity, the share of its inputs that each linear drops. This file makes two:

    uniform    every linear drops the same share                                  (TEAL, section 4)
    greedy     block by block, step by step: the one of the seven linears that adds least to the
               error of the block's output drops more weights              (TEAL, algorithm 1)

A calibration lies in the folder of its model, and is refused beside a model of another shape.

    python calibrate.py [--model FOLDER] [--text FILE]      writes FOLDER/calibration.safetensors
    python calibrate.py --greedy                            with the greedy allocation, too
    python calibrate.py --tokens 2000 --context 512         quicker; 16,000 tokens if not told
"""
import contextlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

from kernel import kept
from model import (InputError, Parser, asked_context, block_linears, check_output, check_tokens,
                   command_line, default_context, linear_names, load_model, progress, read_header,
                   read_safetensors, read_tokens, require, windows_of, write_safetensors)

import torch

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
    # Bin 0 has no lower edge: a threshold in it drops zeros alone.
    return torch.exp2(position / PER_OCTAVE + LOWEST) * (share > 0) * (at.squeeze(-1) > 0)


# --------------------------------------------------------------------------------------------------
# The calibration of a model

class Table(NamedTuple):
    """An allocation: the share of its inputs that each linear drops, at some sparsities."""
    levels: torch.Tensor             # (L,) rising, above 0 and below 1; may be empty
    shares: torch.Tensor             # (L, layers, 7)

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


def even_table(layers):
    """Return the Table that gives every linear the same share."""
    return Table(torch.zeros(0), torch.zeros(0, layers, len(LINEARS)))


@dataclass
class Calibration:
    """The distributions of a model's activations; they give thresholds for any sparsity."""
    shapes: dict                     # the model's, see shapes_of
    source: str                      # the text that was run
    counts: torch.Tensor             # (layers, 4, BINS) int64, the distributions of |x| by site
    tables: dict[str, Table] = field(default_factory=dict)     # by allocation; default: the last

    @property
    def allocations(self):
        """The names of the allocations, the default first."""
        return list(reversed(self.tables))

    def sparsities(self, sparsity, allocation=None):
        """Return the share (layers, 7) of each linear's inputs that an allocation drops."""
        require(0 <= sparsity < 1, f"sparsity is {sparsity}, expected at least 0 and below 1")
        allocation = allocation or self.allocations[0]
        require(allocation in self.tables,
                f"allocation {allocation!r} is not in this calibration, which holds "
                f"{', '.join(self.allocations)}; greedy is made by python calibrate.py --greedy, "
                f"others by python -m beyond.allocate")
        return self.tables[allocation].at(sparsity)

    def thresholds(self, sparsity, allocation=None):
        """Return {linear: tensor () float32}: thresholds for a model-wide sparsity.

        sparsity: in [0, 1), a share of the weights in all blocks. allocation: one of `allocations`,
        or None for the first. The share realised differs by a point or so, as inputs dropped in one
        layer change those of the next.
        """
        return self.thresholds_at(self.sparsities(sparsity, allocation))

    def thresholds_at(self, shares):
        """Return the thresholds that drop given shares (layers, 7) of the inputs of each linear."""
        values = quantile(self.counts[:, list(SITE_OF.values())], shares).float()
        return dict(zip(linear_names(SimpleNamespace(**self.shapes)), values.flatten()))

    def sizes(self):
        """Return the outputs (7,) of a block's linears, and their shares (7,) of its weights."""
        shapes = block_linears(SimpleNamespace(**self.shapes)).values()
        shapes = torch.tensor(list(shapes), dtype=torch.float64)
        weights = shapes.prod(1)
        return shapes[:, 0], weights / weights.sum()

    def check(self, model):
        """Raise InputError if this was made for a model of another shape."""
        for key, value in shapes_of(model.config).items():
            require(self.shapes.get(key) == value,
                    f"this calibration was made for another model: {key} is "
                    f"{self.shapes.get(key)} in it, {value} in the model")

    def save(self, path):
        """Write the calibration as a safetensors file."""
        small = self.counts.max() < 2**31
        tensors = {"distributions input": self.counts.int() if small else self.counts}
        for name, table in self.tables.items():
            tensors[f"levels {name}"] = table.levels.double()
            tensors[f"shares {name}"] = table.shares.double()
        write_safetensors(path, tensors, {
            "format": FORMAT, "source": self.source, "shapes": json.dumps(self.shapes),
            "tables": json.dumps(dict.fromkeys(self.tables, ""))})

    @staticmethod
    def load(path):
        """Return what `save` wrote; raises InputError for anything else."""
        metadata = read_header(path)[1]
        require(metadata.get("format") == FORMAT,
                f"{path}: not a calibration of this version: format is "
                f"{metadata.get('format')!r}, expected {FORMAT!r}; make it with: "
                f"python calibrate.py --model FOLDER")
        tensors = read_safetensors(path)
        try:
            # A table that names channel weights, of an earlier version, is one of other numbers.
            tables = json.loads(metadata["tables"])
            names = [name for name in tables if not tables[name]]
            calibration = Calibration(
                json.loads(metadata["shapes"]), metadata["source"],
                tensors["distributions input"].long(),
                {name: Table(tensors[f"levels {name}"].clone(), tensors[f"shares {name}"].clone())
                 for name in names})
            layers = calibration.shapes["num_hidden_layers"]
            require(calibration.counts.shape == (layers, len(SITES), BINS)
                    and (calibration.counts.sum(-1) > 0).all() and names, "distributions")
            for name, (levels, shares) in calibration.tables.items():
                rising = torch.cat((torch.zeros(1), levels, torch.ones(1))).diff() > 0
                require(bool(rising.all() and ((shares >= 0) & (shares < 1)).all())
                        and shares.shape == (len(levels), layers, len(LINEARS)), name)
        except (AttributeError, LookupError, TypeError, ValueError, RuntimeError) as error:
            raise InputError(f"{path}: a damaged calibration ({error}); make it with: "
                             f"python calibrate.py --model FOLDER") from None
        return calibration


def shapes_of(config):
    """Return the numbers of a Config that a calibration depends on."""
    return {key: getattr(config, key) for key in (
        "hidden_size", "intermediate_size", "num_hidden_layers", "head_dim", "num_attention_heads",
        "num_key_value_heads", "vocab_size")}


# --------------------------------------------------------------------------------------------------
# Making one

@torch.no_grad()
def count(model, windows, watched, label):
    """Run windows (W, T + 1) through the dense model; return the counts (watched, BINS) int64.

    watched: a list of (module, function(input, output) -> values (B, T, ...)). The magnitudes of
    these values are counted, except at the first tokens of a window.
    """
    counts = torch.zeros(len(watched), BINS, dtype=torch.int64)
    hooks = contextlib.ExitStack()       # a handle is a context manager, which takes its hook away
    for (module, values), of in zip(watched, counts):
        def add(module, inputs, output, values=values, of=of):
            of += histogram(values(inputs[0], output)[:, SINKS:]).to(of.device)
        hooks.enter_context(module.register_forward_hook(add))
    with hooks:
        for part in progress(windows.split(BATCH), label):
            model(part[:, :-1].to(model.device), last_only=True)
    return counts


def calibrate(model, tokens, context=None, source="unknown text"):
    """Return the Calibration of a dense model on `tokens` (N,) int64, with the uniform allocation.

    context: tokens a window; None: the model's own, at most 2048. Memory does not grow with the
    number of tokens.
    """
    check_dense(model)
    check_tokens(tokens, model.config)
    context = context or default_context(model)
    require(context > SINKS, f"a window of {context} tokens leaves none after the first {SINKS}")
    windows = windows_of(tokens, context)
    watched = [(block.get_submodule(linear), lambda x, y: x) for block in model.model.layers
               for linear in ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj",
                              "mlp.down_proj")]                      # SITES, in order
    counts = count(model, windows, watched, "calibrating")
    return Calibration(shapes_of(model.config), f"{len(windows) * context:,} tokens of {source}",
                       counts.view(-1, len(SITES), BINS),
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

    A text may keep to one subject for thousands of tokens, whose activations are not the whole's.
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


@torch.no_grad()
def greedy_path(block, x, context, counts, size):
    """Return the path (steps, 7) of the shares that a block's linears drop, from none to END.

    x: (B, T, hidden), inputs of the block in the dense model; context: of these; counts: (4, BINS),
    the block's distributions; size: (7,), shares of its weights. In each step the linear that adds
    least to the error of the block's output drops STEP more of the block's weights.

    TEAL tries all seven in every step. But the error that a linear adds changes little from step to
    step. So only the linear that added least when last tried is tried anew, until the least error
    is a new one: about two trials a step.
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
def add_greedy(calibration, model, tokens):
    """Add the greedy allocation to a calibration of the model, by a few windows of `tokens` (N,).

    The block inputs are computed once, in the dense model, and handed from block to block.
    """
    check_dense(model)
    windows = some_windows(model, tokens, *GREEDY)
    _, size = calibration.sizes()
    x = model.embed(windows)
    context = model.context(windows)
    paths = []
    for block, counts in progress(list(zip(model.model.layers, calibration.counts)),
                                  "greedy allocation, blocks"):
        paths.append(greedy_path(block, x, context, counts, size))
        x = block(x, context)
    calibration.tables["greedy"] = table_of(paths, size)


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
    hint = f"make one with: python calibrate.py --model {name}"
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
    parser.add_text("training", TOKENS)
    parser.add_argument("--greedy", action="store_true",
                        help="with the greedy allocation, which takes minutes (default: no)")
    parser.add_argument("--import-teal", metavar="DIR",
                        help="the authors' own statistics: see python -m beyond.teal "
                             "(default: no)")
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


def write_calibration(arguments, path, model, tokenizer, add=None):
    """Calibrate a model as the command line asks for, write the calibration, and print what it is.

    add(calibration, tokens (N,)) adds to it before it is written.
    """
    tokens, source = read_tokens(tokenizer, arguments.text, "train")
    context = asked_context(model, arguments.context)
    first_half = tokens[:max(arguments.tokens, len(tokens) // 2)]    # rotate.py takes the second
    tokens = spread(first_half, arguments.tokens, context)
    calibration = calibrate(model, tokens, context, source)
    if arguments.greedy:
        add_greedy(calibration, model, tokens)
    if add:
        add(calibration, tokens)
    calibration.save(path)
    print(f"{path}: from {calibration.source}; allocations: {', '.join(calibration.allocations)}")
    print("median of |x| where linears read, by block:")
    print(f"{'block':>6}" + "".join(f"{site:>15}" for site in SITES))
    for layer, values in enumerate(quantile(calibration.counts, 0.5)):
        print(f"{layer:6}" + "".join(f"{value:15.4f}" for value in values))


def main():
    parser = make_parser("Calibrates a checkpoint: what its thresholds are read from.")
    arguments = parser.parse_args()
    require(not arguments.import_teal,
            f"the authors' statistics are read by: python -m beyond.teal --model {arguments.model} "
            f"{arguments.import_teal}")
    path = output_of(arguments)
    check_output(path, "--out")
    model, tokenizer = load_model(arguments.model, arguments.device, arguments.dtype)
    write_calibration(arguments, path, model, tokenizer)


if __name__ == "__main__":
    command_line(main)
