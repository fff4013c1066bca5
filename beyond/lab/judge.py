"""What sparsity costs: many settings beside the dense model, on text that it has not seen.

For each setting, over the same windows of tokens:

    realised     the share of the blocks' weights that was not read
    perplexity   exp of the mean cross-entropy of the next token; at target: at the sparsity asked
                 for, interpolated if the realised one misses it
    agreement    how often the likeliest next token is the dense model's
    KL           how far the distribution of the next token is from the dense model's, in nats

The first tokens of a window stay dense: they are attention sinks, which a calibration leaves out,
and where a model decodes they belong to the prompt. `python sparsify.py` prints some of this. Here
are more protocols, other people's ways to skip weights (peers.py), and two other questions: where
the loss comes from, and what is left to skip where several texts are decoded at once.

    python -m beyond.lab.judge [--model FOLDER] [--text FILE]      the table
    python -m beyond.lab.judge --paper                             as TEAL measures
    python -m beyond.lab.judge --sources                           where the loss comes from
    python -m beyond.lab.judge --batch 1 2 4 8 16                  what several texts at once read
"""
import contextlib
import functools
import itertools
import json
import math
from pathlib import Path

import numpy as np
import torch

from beyond.lab.figures import check_figure, pyplot, save_figure
from beyond.lab.peers import PEERS, peer_maker
from beyond.quantize import add_quantize, load
from calibrate import (BINS, SINKS, SITE_OF, histogram, load_calibration, quantile, run_windows,
                       some_windows)
from kernel import kept
from model import (Parser, command_line, default_context, natural, read_tokens, require,
                   share, windows_of)
from sparsify import quality, sparse_mode, sparsify


# A setting, which becomes a row of the table, is {(name, sparsity asked for): way}. A way is what
# quality takes: a function that returns a context in which the model is sparse: by_thresholds, or
# peers.skipping for other people's.

@contextlib.contextmanager
def by_thresholds(model, thresholds, dense_prefix=0):
    """Make a model sparse by thresholds, as sparsify takes them, in a `with`; None: dense."""
    if thresholds:
        sparsify(model, thresholds)
    with sparse_mode(model, "all" if thresholds else "off", dense_prefix=dense_prefix):
        yield


def dense(model):
    """Return the setting that comes first."""
    return {("dense", 0.0): functools.partial(by_thresholds, model, None)}


def judge(model, windows, settings, scored=None):
    """Return the quality under each of `settings`, of which the first is dense.

    windows, scored: as sparsify.quality takes them. The model becomes sparse. Returns a list of
    dicts: allocation, target, sparsity (realised), perplexity, agreement and kl.
    """
    rows = quality(model, windows, list(settings.values()), scored).tolist()
    return [{"allocation": name, "target": target, "sparsity": sparsity, "perplexity": perplexity,
             "agreement": agreement, "kl": kl}
            for (name, target), (perplexity, kl, agreement, sparsity) in zip(settings, rows)]


def at_target(rows):
    """Add to rows, as from `judge`, the perplexity at the target itself.

    Thresholds set on one text drop somewhat more or less of another. Where that is over half a
    point, the perplexity is interpolated between those of the allocation, log-linearly in the
    realised sparsity; it is None where the target does not lie between two of them.
    """
    for row in rows:
        points = sorted((each["sparsity"], math.log(each["perplexity"])) for each in rows
                        if each["allocation"] in ("dense", row["allocation"]))
        log = np.interp(row["target"], *zip(*points), left=np.nan, right=np.nan)
        row["perplexity_at_target"] = None if np.isnan(log) else math.exp(log)
        if abs(row["sparsity"] - row["target"]) <= 0.005:
            row["perplexity_at_target"] = row["perplexity"]


# --------------------------------------------------------------------------------------------------
# What is measured

def table_settings(model, calibration, allocations, levels, dense_prefix=0, windows=None):
    """Return the settings of allocations and levels, of peers for levels that they can reach.

    model: the dense one; windows: held-in text (W, T), for peers that are made of text.
    """
    settings = {}
    for name in allocations:
        if name in PEERS:
            way_at = peer_maker(name, model, calibration, windows)
        else:
            def way_at(level):
                return functools.partial(by_thresholds, model, calibration.thresholds(level, name))
        for level in levels:
            way = way_at(level)
            if way:
                settings[name, level] = functools.partial(way, dense_prefix)
    return settings


def source_settings(model, calibration, windows, dense_prefix=0, level=0.5):
    """Return a setting for each place that loss may come from.

    They are the start of a sequence, each of the seven linears alone, and the head, which the paper
    leaves dense. windows: held-in text (W, T), for the head's thresholds; dense_prefix: of all
    settings but the first.
    """
    thresholds = calibration.thresholds(level) | {"lm_head": None}
    settings = {(f"{prefix} dense", level):
                functools.partial(by_thresholds, model, thresholds, prefix)
                for prefix in (0, 1, 4, 16, 64)}
    alone = {}                           # {setting: thresholds of what alone is sparse}
    values = quantile(calibration.counts, level).float()             # (layers, 4)
    for linear, site in SITE_OF.items():
        alone[linear.split(".")[1], level] = {f"model.layers.{layer}.{linear}": value
                                              for layer, value in enumerate(values[:, site])}
    counts = torch.zeros(BINS, dtype=torch.int64)

    def add(block, inputs, x):           # of what the head reads
        counts.add_(histogram(model.model.norm(x)[:, SINKS:]).cpu())

    with model.model.layers[-1].register_forward_hook(add):
        run_windows(model, windows, "the head's inputs")
    for dropped in (0.25, 0.4, 0.5):
        alone["lm_head", dropped] = {"lm_head": quantile(counts, dropped).float()}
    nothing = dict.fromkeys(thresholds)
    return settings | {key: functools.partial(by_thresholds, model, nothing | some, dense_prefix)
                       for key, some in alone.items()}


@torch.no_grad()
def share_read(model, thresholds, tokens, number, length=256):
    """Return the share of the blocks' weights that decoding `number` texts at once reads.

    A weight is read if any of the texts needs it. The dense model's inputs stand for the sparse
    one's. tokens (N,) int64: its texts are windows of `length`, of which the later half counts.
    """
    texts = windows_of(tokens, length)[:128, :-1]                               # (W, length)
    texts = texts[:len(texts) // number * number].to(model.device)  # W a multiple of number
    require(len(texts), f"the text has {len(tokens)} tokens, {number} texts of {length} need more")
    read = []                                              # of each linear: weights read, weights
    with contextlib.ExitStack() as hooks:
        for name, threshold in thresholds.items():
            def look(module, inputs, threshold=threshold.to(model.device)):
                keep = kept(inputs[0][:, length // 2:], threshold)          # (W, length / 2, in)
                share = keep.unflatten(0, (-1, number)).any(1).double().mean().item()
                size = module.in_features * module.out_features
                read.append((share * size, size))
            hooks.enter_context(model.get_submodule(name).register_forward_pre_hook(look))
        model(texts)
    of_all, whole = map(sum, zip(*read))
    return of_all / whole


# --------------------------------------------------------------------------------------------------
# The figure, the table, and the command line

def draw_quality(rows, path):
    """Draw added perplexity against realised sparsity, a line for each allocation, as a PNG."""
    dense = rows[0]["perplexity"]
    figure, axis = pyplot().subplots(figsize=(6.4, 4), layout="constrained")
    colours = {}                         # of allocations; another checkpoint's lines are dashed
    sparse = [row for row in rows if row["sparsity"] > 0]
    for name, points in itertools.groupby(sparse, lambda row: row["allocation"]):
        xy = [(100 * row["sparsity"], 100 * (row["perplexity"] / dense - 1)) for row in points]
        *checkpoint, allocation = name.split()
        axis.plot(*zip(*xy), marker="o", ms=3.5, lw=1.3, ls="--" if checkpoint else "-",
                  color=colours.setdefault(allocation, f"C{len(colours)}"), label=name)
    axis.set(xlabel="weights of the blocks not read (%)",
             ylabel=f"perplexity above the dense {dense:.2f} (%)", yscale="log", ylim=(0.05, None))
    axis.yaxis.set_major_formatter("{x:g}")
    axis.legend(ncols=2, fontsize=8)
    save_figure(figure, path)


COLUMNS = {                  # of the table: their heads, widths, and how a value is written
    "target": ("target", 8, ".0%"), "sparsity": ("realised", 10, ".1%"),
    "perplexity": ("perplexity", 12, ".3f"), "perplexity_at_target": ("at target", 11, ".3f"),
    "agreement": ("agreement", 11, ".1%"), "kl": ("KL", 9, ".4f"),
}


def print_table(rows):
    """Print the rows, with a column for each thing that was measured."""
    columns = {key: of for key, of in COLUMNS.items() if key in rows[0]}
    names = max(len(row["allocation"]) for row in rows)
    print(" " * names + "".join(f"{head:>{width}}" for head, width, _ in columns.values()))
    for row in rows:
        line = f"{row['allocation']:>{names}}"
        for key, (_, width, form) in columns.items():
            line += f"{'-' if row.get(key) is None else format(row[key], form):>{width}}"
        print(line)


def read_arguments():
    """Return the command line, checked as far as it can be without a model."""
    parser = Parser(description="Quality against sparsity, for each allocation, beside the dense "
                                "model.")
    parser.add_model()
    add_quantize(parser)
    parser.add_text("held-out", 100_000)
    parser.add_calibration()
    add = parser.add_argument
    add("--sparsity", nargs="+", type=share, default=[0.25, 0.4, 0.5, 0.6, 0.65, 0.75],
        help="levels to measure (default: 0.25 0.4 0.5 0.6 0.65 0.75)")
    add("--allocation", nargs="+",
        help=f"of those in the calibration, or {', '.join(PEERS)} (default: all of the former)")
    add("--held-in", metavar="FILE",
        help="UTF-8 text from which cats, larosa and --sources take what they need (default: the "
             "standard library's held-in part)")
    add("--paper", action="store_true",
        help="as the paper has it: --context 2560 --scored 512 --dense-prefix 1280 (default: no)")
    add("--scored", type=natural, help="how many at the end of each window count (default: all)")
    add("--dense-prefix", type=int, default=SINKS,
        help=f"tokens at the start of each that stay dense (default: {SINKS})")
    add("--json", action="store_true", help="print the rows as JSON (default: as a table)")
    add("--figure", metavar="FILE",
        help="draw perplexity against sparsity as a PNG (default: no figure)")
    add = parser.add_mutually_exclusive_group().add_argument
    add("--beside", metavar="FOLDER",
        help="another checkpoint with the same tokenizer, calibrated, whose rows follow under its "
             "folder's name (default: none)")
    add("--sources", action="store_true",
        help="instead: where the loss at 50 %% comes from (default: no)")
    add("--batch", nargs="+", type=natural, metavar="B",
        help="instead: how much is read at 50 %% for B texts side by side (default: no)")
    arguments = parser.parse_args()
    if arguments.paper:
        arguments.context, arguments.scored, arguments.dense_prefix = 2560, 512, 1280
    if arguments.figure:
        check_figure(arguments.figure)
    require(not arguments.model.startswith("random:"),
            f"{arguments.model} has random weights: it has no quality to measure")
    return arguments


def judge_table(arguments, model, tokenizer, calibration, windows):
    """Return the rows that the command line asks for, of one checkpoint."""
    allocations = arguments.allocation or calibration.allocations
    held_in = None
    if arguments.sources or {"cats", "larosa"} & set(allocations):
        text = read_tokens(tokenizer, arguments.held_in, "train")[0]
        held_in = some_windows(model, text, 32, 512)
    settings = dense(model)
    if arguments.sources:
        settings |= source_settings(model, calibration, held_in, arguments.dense_prefix)
    else:
        settings |= table_settings(model, calibration, allocations, arguments.sparsity,
                                   arguments.dense_prefix, held_in)
    rows = judge(model, windows, settings, arguments.scored)
    if not arguments.sources:
        at_target(rows)
    return rows


def main():
    arguments = read_arguments()
    model, tokenizer = load(arguments)
    calibration = load_calibration(model, arguments.model, arguments.calibration)
    context = default_context(model, arguments.context)
    scored = arguments.scored = arguments.scored or context
    require(scored <= context, f"--scored is {scored}, expected 1 to {context}")
    require(0 <= arguments.dense_prefix < context,
            f"--dense-prefix is {arguments.dense_prefix}, expected 0 to {context - 1}")
    tokens, source = read_tokens(tokenizer, arguments.text, "held-out")
    tokens = tokens[:arguments.tokens]
    if arguments.batch:
        thresholds = calibration.thresholds(0.5)
        print(f"{'texts side by side':>20} {'weights read, each at 50% sparsity':>36}")
        for number in arguments.batch:
            print(f"{number:20} {share_read(model, thresholds, tokens, number):36.1%}", flush=True)
        return
    windows = windows_of(tokens, context, scored)
    rows = judge_table(arguments, model, tokenizer, calibration, windows)
    if arguments.beside:
        other, other_tokenizer = load(arguments, arguments.beside)
        require(other_tokenizer.pieces() == tokenizer.pieces(),
                f"--beside {arguments.beside}: its tokenizer is not that of {arguments.model}")
        other_calibration = load_calibration(other, arguments.beside)
        for row in judge_table(arguments, other, tokenizer, other_calibration, windows):
            name = f"{Path(arguments.beside).name} {row['allocation']}"
            rows.append(row | {"allocation": name})
    if arguments.figure:
        draw_quality(rows, arguments.figure)
    about = {"model": arguments.model, "text": source, "tokens": len(tokens), "context": context,
             "scored": scored, "dense_prefix": arguments.dense_prefix,
             "calibration": calibration.source}
    if arguments.json:
        print(json.dumps(about | {"rows": rows}, indent=1))
        return
    print(", ".join(f"{key.replace('_', ' ')}: {value}" for key, value in about.items()))
    print_table(rows)


if __name__ == "__main__":
    command_line(main)
