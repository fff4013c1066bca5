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

from kernel import kept
from model import (Config, InputError, Parser, block_linears, check_output, check_tokens,
                   command_line, default_context, linear_names, load_model, progress,
                   read_safetensors, read_tokens, require, write_safetensors)

import torch

SITES = {                                # where the seven linears of a block read
    "attention in": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "attention out": ("self_attn.o_proj",),
    "MLP in": ("mlp.gate_proj", "mlp.up_proj"),
    "MLP middle": ("mlp.down_proj",),
}
SITE_OF = {linear: i for i, linears in enumerate(SITES.values()) for linear in linears}
LINEARS = tuple(SITE_OF)                 # in the order of model.block_linears
SINKS = 4                                # tokens left out at the start of each window
BATCH = 4                                # windows that run together
TOKENS = 16_000                          # that the commands take if they are not told
FORMAT = "minTEAL calibration 3"         # what the file says it is
SHAPES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
          "num_key_value_heads", "head_dim", "vocab_size")     # of a Config, that a file is for

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

def shares_at(table, sparsity):
    """Return the shares (...) float64 of a table (levels (L,), shares (L, ...)) at a sparsity.

    They are linear between levels, of which two are implied: 0, where nothing is dropped, and 1,
    where all is. So a table without levels is the uniform allocation.
    """
    levels, shares = table
    zeros = torch.zeros(1, *shares.shape[1:])
    levels = torch.cat((torch.zeros(1), levels, torch.ones(1))).double()
    shares = torch.cat((zeros, shares, zeros + 1)).double()
    after = int(torch.searchsorted(levels, sparsity, right=True))
    fraction = (sparsity - levels[after - 1]) / (levels[after] - levels[after - 1])
    return shares[after - 1] + fraction * (shares[after] - shares[after - 1])


@dataclass
class Calibration:
    """The distributions of a model's activations; they give thresholds for any sparsity."""
    config: Config                   # of the model: its SHAPES
    source: str                      # the text that was run
    counts: torch.Tensor             # (layers, 4, BINS) int64, the distributions of |x| by site
    tables: dict[str, tuple]         # {allocation: (levels, shares)}, of which the last is default
    # levels: (L,), of the model-wide sparsity, rising, above 0 and below 1; may be empty
    # shares: (L, layers, 7), of its inputs that each linear drops at a level

    @property
    def allocations(self):
        """The names of the allocations, the default first."""
        return list(reversed(self.tables))

    def shares(self, sparsity, allocation=None):
        """Return the share (layers, 7) of each linear's inputs that an allocation drops."""
        require(0 <= sparsity < 1, f"sparsity is {sparsity}, expected at least 0 and below 1")
        allocation = allocation or self.allocations[0]
        require(allocation in self.tables,
                f"allocation {allocation!r} is not in this calibration, which holds "
                f"{', '.join(self.allocations)}; greedy is made by python calibrate.py --greedy, "
                f"others by python -m beyond.allocate")
        return shares_at(self.tables[allocation], sparsity)

    def thresholds(self, sparsity, allocation=None):
        """Return {linear: tensor () float32}: thresholds for a model-wide sparsity.

        sparsity: in [0, 1), a share of the weights in all blocks. allocation: one of `allocations`,
        or None for the first. The share realised differs by a point or so, as inputs dropped in one
        layer change those of the next.
        """
        shares = self.shares(sparsity, allocation)
        values = quantile(self.counts[:, list(SITE_OF.values())], shares).float()
        return dict(zip(linear_names(self.config), values.flatten()))

    def weight_shares(self):
        """Return the shares (7,) of a block's weights that its linears hold, float64."""
        shapes = list(block_linears(self.config).values())
        sizes = torch.tensor(shapes, dtype=torch.float64).prod(1)
        return sizes / sizes.sum()

    def save(self, path):
        """Write the calibration as a safetensors file."""
        tensors = {"distributions input": self.counts}
        for name, (levels, shares) in self.tables.items():
            tensors[f"levels {name}"] = levels.double()
            tensors[f"shares {name}"] = shares.double()
        write_safetensors(path, tensors, {
            "format": FORMAT, "source": self.source,
            "shapes": json.dumps({key: getattr(self.config, key) for key in SHAPES}),
            "tables": json.dumps(dict.fromkeys(self.tables, ""))})

    @staticmethod
    def load(path):
        """Return what `save` wrote; raises InputError for anything else."""
        metadata = {}
        tensors = read_safetensors(path, metadata)
        try:
            require(metadata.get("format") == FORMAT,
                    f"format is {metadata.get('format')!r}, expected {FORMAT!r}")
            # A kind other than "" is an earlier version's, whose shares mean something else.
            tables = {name: (tensors[f"levels {name}"], tensors[f"shares {name}"])
                      for name, kind in json.loads(metadata["tables"]).items() if not kind}
            config = Config(max_position_embeddings=0, **json.loads(metadata["shapes"]))
            counts = tensors["distributions input"].long()
            layers = config.num_hidden_layers
            require(counts.shape == (layers, len(SITES), BINS) and tables, "distributions")
            for name, (levels, shares) in tables.items():
                require(shares.shape == (len(levels), layers, len(LINEARS)), name)
            return Calibration(config, metadata["source"], counts, tables)
        except (AttributeError, LookupError, TypeError, ValueError) as error:
            raise InputError(f"{path}: not a calibration of this version, or damaged: {error}; "
                             f"make one with: python calibrate.py --model FOLDER") from None


# --------------------------------------------------------------------------------------------------
# Making one

@torch.no_grad()
def calibrate(model, tokens, context=None, source="unknown text"):
    """Return the Calibration of a dense model on `tokens` (N,) int64, with the uniform allocation.

    context: tokens a window; None: the model's own, at most 2048. A short text is one window.
    Memory does not grow with the number of tokens.
    """
    check_dense(model)
    check_tokens(tokens, model.config)
    context = min(context or default_context(model), len(tokens))
    require(context > SINKS, f"a window of {context} tokens leaves none after the first {SINKS}")
    windows = tokens.unfold(0, context, context)
    counts = {block.get_submodule(first): torch.zeros(BINS, dtype=torch.int64)
              for block in model.model.layers for first, *_ in SITES.values()}

    def add(linear, inputs):
        counts[linear] += histogram(inputs[0][:, SINKS:]).cpu()

    with contextlib.ExitStack() as hooks:                  # takes them away again
        for linear in counts:
            hooks.enter_context(linear.register_forward_pre_hook(add))
        run_windows(model, windows, "calibrating")
    layers = len(model.model.layers)
    return Calibration(model.config, f"{windows.numel():,} tokens of {source}",
                       torch.stack(list(counts.values())).view(layers, len(SITES), BINS),
                       {"uniform": (torch.zeros(0), torch.zeros(0, layers, len(LINEARS)))})


def run_windows(model, windows, label):
    """Run windows (W, T) through a model, a few at a time, for hooks to look on."""
    for part in progress(windows.split(BATCH), label):
        model(part.to(model.device), last_only=True)


def some_windows(model, tokens, number, length):
    """Return at most `number` windows (W, T) of tokens (N,), on the model's device.

    T is `length`, or less where the model's context or the text is shorter. The windows lie evenly
    apart: a text may keep to one subject for thousands of tokens.
    """
    length = min(length, model.config.max_position_embeddings, len(tokens))
    require(length, "the text has no tokens")
    windows = tokens.unfold(0, length, length)
    places = torch.linspace(0, len(windows) - 1, min(number, len(windows))).round().long()
    return windows[places].to(model.device)


def check_dense(model):
    """Raise InputError for a model that was made sparse."""
    require(not hasattr(model, "sparse_state"),
            "a calibration needs the dense model: this one was made sparse")


STEPS = 90               # of a block's greedy path; each drops one percent of the block's weights
GREEDY = (2, 256)        # windows, and tokens of each at most, on which errors are measured


@torch.no_grad()
def greedy_path(block, x, context, counts, weight_shares):
    """Return the path (STEPS + 1, 7) of the shares that a block's linears drop, from none on.

    x: (B, T, hidden), inputs of the block in the dense model; context: of these; counts: (4, BINS),
    the block's distributions; weight_shares: (7,). In each step one linear drops a percent more of
    the block's weights: the one by which the error of the block's output grows least.

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

    step = 0.01 / weight_shares                                      # (7,), of a linear's inputs
    path = [torch.zeros(len(LINEARS), dtype=torch.float64)]
    error = 0.0                                                      # squared, of the path so far
    added = torch.zeros(len(LINEARS))                                # to it, by one more step
    with contextlib.ExitStack() as hooks:
        for linear in linears:
            hooks.enter_context(linear.register_forward_pre_hook(drop))
        for _ in range(STEPS):
            options = path[-1] + torch.diag(step)                    # row i: linear i drops more
            # No linear with under a percent left. Never all seven: a tenth is left in the end.
            added[options.diag() >= 1] = float("inf")
            measured = set()                                         # in this step
            while (best := int(added.argmin())) not in measured:
                added[best] = error_of(options[best]) - error
                measured.add(best)
            path.append(options[best])
            error += added[best]
    return torch.stack(path)


@torch.no_grad()
def add_greedy(calibration, model, tokens):
    """Add the greedy allocation to a model's calibration, by a few windows of `tokens` (N,)."""
    check_dense(model)
    windows = some_windows(model, tokens, *GREEDY)
    weight_shares = calibration.weight_shares()
    x = model.embed(windows)                               # the input of each block in turn
    context = model.context(windows)
    tables = []              # of each block: its path, and the levels that the steps of it reach
    for block, counts in progress(list(zip(model.model.layers, calibration.counts)),
                                  "greedy allocation, blocks"):
        path = greedy_path(block, x, context, counts, weight_shares)
        tables.append((path[1:] @ weight_shares, path[1:]))
        x = block(x, context)
    levels = torch.arange(1, STEPS + 1, dtype=torch.float64) / 100
    shares = [torch.stack([shares_at(table, level) for table in tables]) for level in levels]
    calibration.tables["greedy"] = levels, torch.stack(shares)       # (L, layers, 7)


# --------------------------------------------------------------------------------------------------

def load_calibration(model, name, path=None):
    """Return the calibration beside the checkpoint `name`, or at `path`, checked to be the model's.

    For "random:PRESET" it is made now, of random tokens: it means as little as the weights.
    """
    if path is None and str(name).startswith("random:"):
        generator = torch.Generator().manual_seed(0)
        tokens = torch.randint(model.config.vocab_size, (128,), generator=generator)
        return calibrate(model, tokens, 128, "random tokens")
    path = Path(path or Path(name) / "calibration.safetensors")
    require(path.exists(), f"{path}: no calibration; make one with: python calibrate.py --model "
                           f"{name}")
    calibration = Calibration.load(path)
    for key in SHAPES:
        found, expected = (getattr(each.config, key) for each in (calibration, model))
        require(found == expected, f"{path} was made for another model: {key} is {found} in it, "
                                   f"{expected} in the model; calibrate.py makes one")
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


def calibration_for(arguments, model, tokenizer):
    """Return the calibration that a command line asks for, and the tokens (N,) it was made of."""
    tokens, source = read_tokens(tokenizer, arguments.text, "train")
    # From the first half, if it is long enough: beyond/rotate.py learns from the second.
    tokens = tokens[:max(arguments.tokens, len(tokens) // 2)]
    context = min(default_context(model, arguments.context), arguments.tokens)
    tokens = some_windows(model, tokens, arguments.tokens // context, context).flatten()
    calibration = calibrate(model, tokens, context, source)
    if arguments.greedy:
        add_greedy(calibration, model, tokens)
    return calibration, tokens


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
    calibration, _ = calibration_for(arguments, model, tokenizer)
    calibration.save(path)
    print(f"{path}: from {calibration.source}; allocations: {', '.join(calibration.allocations)}")


if __name__ == "__main__":
    command_line(main)
