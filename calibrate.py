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

Linears read at four places in a block, each with a distribution of its own: attention in (q, k, v),
attention out (o), MLP in (gate, up), MLP middle (down). 10,000 tokens give thresholds within a few
percent. The first tokens of a window are left out: they are attention sinks, with activations many
times as large as all others (arXiv 2309.17453).

An allocation shares a model-wide sparsity out over the linears. It is kept as a table: for some
levels of the sparsity, the share of its inputs that each linear drops. This file makes two:

    uniform    every linear drops the same share                                  (TEAL, section 4)
    greedy     block by block, step by step: the one of the seven linears that adds least to the
               error of the block's output drops more weights              (TEAL, algorithm 1)

    python calibrate.py [--model FOLDER] [--text FILE]      writes FOLDER/calibration.safetensors
    python calibrate.py --greedy                            with the greedy allocation, too
    python calibrate.py --tokens 2000 --context 512         quicker; 16,000 tokens if not told
"""
import contextlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from kernel import kept
from model import (Config, InputError, Parser, block_linears, check_output, check_tokens,
                   command_line, default_context, linear_names, load_model, progress, read_header,
                   read_safetensors, read_tokens, require, windows_of, write_safetensors)

import torch

SITES = ("attention in", "attention out", "MLP in", "MLP middle")
SITE_OF = {                  # where each of the seven linears of a block reads
    "self_attn.q_proj": 0, "self_attn.k_proj": 0, "self_attn.v_proj": 0, "self_attn.o_proj": 1,
    "mlp.gate_proj": 2, "mlp.up_proj": 2, "mlp.down_proj": 3,
}
LINEARS = tuple(SITE_OF)
SINKS = 4                                # tokens left out at the start of each window
BATCH = 4                                # windows that run together
TOKENS = 16_000                          # that the commands take if they are not told
FORMAT = "minTEAL calibration 3"         # what the file says it is

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
    bins = torch.searchsorted(below, wanted).clamp(max=BINS - 1)     # (..., 1), where it lies
    inside = counts.double().gather(-1, bins)
    fraction = (wanted - (below.gather(-1, bins) - inside)) / inside.clamp(min=1)   # of the bin
    position = (bins + fraction).squeeze(-1)                         # in bins
    # Bin 0 reaches down to 0: a quantile in it is returned as 0, which drops zeros alone.
    return torch.exp2(position / PER_OCTAVE + LOWEST) * (share > 0) * (bins.squeeze(-1) > 0)


# --------------------------------------------------------------------------------------------------
# The calibration of a model

class Table(NamedTuple):
    """An allocation: the share of its inputs that each linear drops, at some levels of sparsity."""
    levels: torch.Tensor             # (L,) rising, above 0 and below 1; may be empty
    shares: torch.Tensor             # (L, layers, 7)

    def at(self, sparsity):
        """Return the shares (layers, 7), float64, at a model-wide sparsity in [0, 1).

        They are linear between levels, of which two are implied: 0, where nothing is dropped, and
        1, where all is. So a table without levels is the uniform allocation.
        """
        zeros = torch.zeros(1, *self.shares.shape[1:])
        levels = torch.cat((torch.zeros(1), self.levels, torch.ones(1))).double()
        shares = torch.cat((zeros, self.shares, zeros + 1)).double()
        after = int(torch.searchsorted(levels, sparsity, right=True))
        fraction = (sparsity - levels[after - 1]) / (levels[after] - levels[after - 1])
        return shares[after - 1] + fraction * (shares[after] - shares[after - 1])


def uniform_table(layers):
    """Return the Table of the uniform allocation."""
    return Table(torch.zeros(0), torch.zeros(0, layers, len(LINEARS)))


@dataclass
class Calibration:
    """The distributions of a model's activations; they give thresholds for any sparsity."""
    shapes: dict                     # of the model: see shapes_of
    source: str                      # the text that was run
    counts: torch.Tensor             # (layers, 4, BINS) int64, the distributions of |x| by site
    tables: dict[str, Table]         # by name of the allocation; the last one is the default

    @property
    def allocations(self):
        """The names of the allocations, the default first."""
        return list(reversed(self.tables))

    @property
    def config(self):
        """A Config of the model's shapes, which are all that is asked of it."""
        return Config(max_position_embeddings=0, **self.shapes)

    def shares(self, sparsity, allocation=None):
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
        return self.thresholds_at(self.shares(sparsity, allocation))

    def thresholds_at(self, shares):
        """Return the thresholds that drop given shares (layers, 7) of the inputs of each linear."""
        values = quantile(self.counts[:, list(SITE_OF.values())], shares).float()
        return dict(zip(linear_names(self.config), values.flatten()))

    def weight_shares(self):
        """Return the shares (7,) of a block's weights that its linears hold, float64."""
        shapes = list(block_linears(self.config).values())
        sizes = torch.tensor(shapes, dtype=torch.float64).prod(1)
        return sizes / sizes.sum()

    def check(self, model, name="this calibration"):
        """Raise InputError if this, called `name`, was made for a model of another shape."""
        for key, value in shapes_of(model.config).items():
            require(self.shapes.get(key) == value,
                    f"{name} was made for another model: {key} is {self.shapes.get(key)} in it, "
                    f"{value} in the model; calibrate.py makes one")

    def save(self, path):
        """Write the calibration as a safetensors file."""
        tensors = {"distributions input": self.counts}
        for name, table in self.tables.items():
            tensors[f"levels {name}"] = table.levels.double()
            tensors[f"shares {name}"] = table.shares.double()
        write_safetensors(path, tensors, {
            "format": FORMAT, "source": self.source, "shapes": json.dumps(self.shapes),
            "tables": json.dumps(dict.fromkeys(self.tables, ""))})

    @staticmethod
    def load(path):
        """Return what `save` wrote; raises InputError for anything else."""
        metadata, tensors = read_header(path)[1], read_safetensors(path)
        try:
            require(metadata.get("format") == FORMAT,
                    f"format is {metadata.get('format')!r}, expected {FORMAT!r}")
            # A kind other than "" is an earlier version's, whose shares mean something else.
            tables = {name: Table(tensors[f"levels {name}"], tensors[f"shares {name}"])
                      for name, kind in json.loads(metadata["tables"]).items() if not kind}
            calibration = Calibration(json.loads(metadata["shapes"]), metadata["source"],
                                      tensors["distributions input"].long(), tables)
            layers = calibration.shapes["num_hidden_layers"]
            require(calibration.counts.shape == (layers, len(SITES), BINS)
                    and (calibration.counts.sum(-1) > 0).all() and tables, "distributions")
            for name, (levels, shares) in tables.items():
                rising = torch.cat((torch.zeros(1), levels, torch.ones(1))).diff() > 0
                require(rising.all() and ((shares >= 0) & (shares < 1)).all()
                        and shares.shape == (len(levels), layers, len(LINEARS)), name)
        except (AttributeError, LookupError, TypeError, ValueError, RuntimeError) as error:
            raise InputError(f"{path}: not a calibration of this version, or damaged: {error}; "
                             f"make one with: python calibrate.py --model FOLDER") from None
        return calibration


def shapes_of(config):
    """Return the numbers of a Config that a calibration depends on: all that shapes depend on."""
    return {key: getattr(config, key) for key in (
        "hidden_size", "intermediate_size", "num_hidden_layers", "head_dim", "num_attention_heads",
        "num_key_value_heads", "vocab_size")}


# --------------------------------------------------------------------------------------------------
# Making one

@torch.no_grad()
def count(model, windows, watched, label):
    """Return the counts (watched, BINS) int64 of windows (W, T + 1), run through the dense model.

    watched: a list of (module, function(input, output) -> values (B, T, ...)), of which `calibrate`
    takes the inputs. Their magnitudes are counted, except at the first tokens of a window.
    """
    counts = torch.zeros(len(watched), BINS, dtype=torch.int64)
    hooks = contextlib.ExitStack()       # a handle is a context manager, which takes its hook away
    for (module, values), row in zip(watched, counts):
        def add(module, inputs, output, values=values, row=row):     # those of this turn
            row += histogram(values(inputs[0], output)[:, SINKS:]).to(row.device)
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
                       {"uniform": uniform_table(len(model.model.layers))})


def evenly(windows, number):
    """Return `number` of windows (W, ...), evenly apart; all of them if there are no more."""
    return windows[torch.linspace(0, len(windows) - 1, min(number, len(windows))).round().long()]


def some_windows(model, tokens, number, length):
    """Return at most `number` windows (W, T) of tokens (N,), evenly apart, on the model's device.

    T is `length`, or less where the model's context or the text is shorter: no token is a target.
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
    return torch.cat((stretches[:, :-1].flatten(), stretches[-1, -1:]))         # and a last target


def check_dense(model):
    """Raise InputError for a model that was made sparse."""
    require(not hasattr(model, "sparse_state"),
            "a calibration needs the dense model: this one was made sparse")


STEP = 0.01              # share of a block's weights that one step of its greedy path drops
END = 0.9                # share of a block's weights that is dropped where its path ends
GREEDY = (2, 256)        # windows, and tokens of each at most, on which errors are measured


@torch.no_grad()
def greedy_path(block, x, context, counts, weight_shares):
    """Return the path (steps, 7) of the shares that a block's linears drop, from none to END.

    x: (B, T, hidden), inputs of the block in the dense model; context: of these; counts: (4, BINS),
    the block's distributions; weight_shares: (7,). In each step one linear drops STEP more of the
    block's weights: the one by which the error of the block's output grows least.

    TEAL measures in every step what each of the seven would add. That changes slowly, so here an
    older measurement stands until it is the smallest, and is then repeated. Once the smallest is
    one of this step, that linear drops more: about two measurements a step.
    """
    linears = [block.get_submodule(name) for name in LINEARS]
    counts = counts[list(SITE_OF.values())]                          # (7, BINS)
    thresholds = torch.zeros(len(LINEARS), device=x.device)
    late = slice(x.shape[1] // 4, None)                              # far from the sinks
    exact = block(x, context)[:, late].float()

    def drop(module, inputs):
        return inputs[0] * kept(inputs[0], thresholds[linears.index(module)])

    def error_of(shares):
        thresholds.copy_(quantile(counts, shares))
        return (block(x, context)[:, late].float() - exact).square().sum()

    step = STEP / weight_shares                                      # (7,), of a linear's inputs
    path = [torch.zeros(len(LINEARS), dtype=torch.float64)]
    error = 0.0                                                      # squared, of the path so far
    added = torch.zeros(len(LINEARS))                                # to it, by one more step
    with contextlib.ExitStack() as hooks:
        for linear in linears:
            hooks.enter_context(linear.register_forward_pre_hook(drop))
        while path[-1] @ weight_shares < END - STEP / 2 and (path[-1] + step < 1).any():
            options = path[-1] + torch.diag(step)                    # row i: linear i drops more
            added[options.diag() >= 1] = float("inf")                # a linear that cannot
            measured = set()                                         # in this step
            while (best := int(added.argmin())) not in measured:
                added[best] = error_of(options[best]) - error
                measured.add(best)
            path.append(options[best])
            error += added[best]
    return torch.stack(path)


def table_of(paths, weight_shares):
    """Return the Table of a path (steps, 7) for each block, at each percent that all of them reach.

    weight_shares: (7,), of the block's weights. A path is a Table, too: its steps are its levels.
    """
    tables = [Table(path[1:] @ weight_shares, path[1:]) for path in paths]
    levels = torch.arange(1, 100, dtype=torch.float64) / 100
    levels = levels[levels < min(table.levels[-1] for table in tables) + 1e-9]  # 1e-9: rounding
    return Table(levels, torch.stack([torch.stack([table.at(level) for table in tables])
                                      for level in levels]))         # (L, layers, 7)


@torch.no_grad()
def add_greedy(calibration, model, tokens):
    """Add the greedy allocation to a model's calibration, by a few windows of `tokens` (N,)."""
    check_dense(model)
    windows = some_windows(model, tokens, *GREEDY)
    weight_shares = calibration.weight_shares()
    x = model.embed(windows)                               # the input of each block in turn
    context = model.context(windows)
    paths = []
    for block, counts in progress(list(zip(model.model.layers, calibration.counts)),
                                  "greedy allocation, blocks"):
        paths.append(greedy_path(block, x, context, counts, weight_shares))
        x = block(x, context)
    calibration.tables["greedy"] = table_of(paths, weight_shares)


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
    require(path.exists(), f"{path}: no calibration; make one with: python calibrate.py --model "
                           f"{name}")
    calibration = Calibration.load(path)
    calibration.check(model, path)
    return calibration


def make_parser(description):
    """Return the options of `main` and of python -m beyond.allocate, which adds to them."""
    parser = Parser(description=description)
    parser.add_model()
    parser.add_text("training", TOKENS)
    parser.add_argument("--greedy", action="store_true",
                        help="with the greedy allocation, which takes minutes (default: no)")
    parser.add_argument("--out", metavar="FILE", type=Path,
                        help="(default: calibration.safetensors in the checkpoint folder)")
    return parser


def output_of(arguments):
    """Return where the command line wants the calibration, checked."""
    name = arguments.model
    require(not name.startswith("random:"), f"{name} has random weights: commands calibrate it on "
                                            f"random tokens as they start")
    require(Path(name).is_dir(), f"{name}: no such folder")
    path = arguments.out or Path(name) / "calibration.safetensors"
    check_output(path, "--out")
    return path


def write_calibration(arguments, path, model, tokenizer, add=None):
    """Calibrate a model as the command line asks for, write the calibration, and print what it is.

    add(calibration, tokens (N,)): what python -m beyond.allocate adds to it first.
    """
    tokens, source = read_tokens(tokenizer, arguments.text, "train")
    context = default_context(model, arguments.context)
    # From the first half, if it is long enough: beyond/rotate.py learns from the second.
    tokens = spread(tokens[:max(arguments.tokens, len(tokens) // 2)], arguments.tokens, context)
    calibration = calibrate(model, tokens, context, source)
    if arguments.greedy:
        add_greedy(calibration, model, tokens)
    if add:
        add(calibration, tokens)
    calibration.save(path)
    print(f"{path}: from {calibration.source}; allocations: {', '.join(calibration.allocations)}")


def main():
    parser = make_parser("Calibrates a checkpoint: what its thresholds are read from.")
    parser.add_argument("--import-teal", metavar="DIR", help="the authors' own statistics: see "
                        "python -m beyond.teal (default: no)")
    arguments = parser.parse_args()
    require(not arguments.import_teal,
            f"the authors' statistics are read by: python -m beyond.teal --model {arguments.model} "
            f"{arguments.import_teal}")
    path = output_of(arguments)
    model, tokenizer = load_model(arguments.model, arguments.device, arguments.dtype)
    write_calibration(arguments, path, model, tokenizer)


if __name__ == "__main__":
    command_line(main)
