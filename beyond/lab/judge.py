"""What sparsity costs: many settings beside the dense model, on text that it has not seen.

For each setting, over the same windows of tokens:

    realised     the share of the blocks' weights that was not read
    perplexity   exp of the mean cross-entropy of the next token; at target: at the sparsity asked
                 for, interpolated if the realised one misses it
    agreement    how often the likeliest next token is the dense model's
    KL           how far the distribution of the next token is from the dense model's, in nats
    functions    the share of functions, begun by a person and completed by the model, that Python
                 can parse (demo model)

The first tokens of a window stay dense: they are attention sinks, which a calibration leaves out,
and where a model decodes they belong to the prompt. Sparse, nearly all of their weights would be
skipped, which lifts what windows of 512 tokens realise by 0.4 points.

`python sparsify.py` prints some of this. Here are more protocols, other people's ways to skip
weights (peers.py), and two other questions: where the loss comes from, and what is left to skip
where several texts are decoded at once.

    python -m beyond.lab.judge [--model FOLDER] [--text FILE]      the table
    python -m beyond.lab.judge --context 2560 --scored 512 --dense-prefix 1280     as TEAL measures
    python -m beyond.lab.judge --sources                           where the loss comes from
    python -m beyond.lab.judge --batch 1 2 4 8 16                  what several texts at once read
"""
import contextlib
import functools
import json
import math
from pathlib import Path
from typing import Callable, NamedTuple

import numpy as np
import torch

from beyond.lab.figures import check_figure, pyplot, save_figure
from beyond.lab.functions import function_beginnings, share_of_functions
from beyond.lab.peers import PEERS, peer_maker
from beyond.quantize import add_quantize, load
from calibrate import SINKS, count, load_calibration, quantile, some_windows, uniform_table
from kernel import kept
from model import (Parser, block_linears, check_tokens, command_line,
                   default_context, linear_names, natural, progress, read_tokens, require, share,
                   windows_of)
from sparsify import counted, measures, realised_sparsity, sparse_mode, sparsify


class Setting(NamedTuple):
    """One way to make the model sparse, a row of the table.

    way(model, mode, dense_prefix) returns a context in which the model is sparse; mode: "all" or
    "decode", as for sparse_mode. It yields a function that returns, behind it, the share of the
    blocks' weights that was not read inside. `by_thresholds` is one way; peers.py has others.
    """
    name: str
    target: float
    way: Callable
    dense_prefix: int = 0


@contextlib.contextmanager
def by_thresholds(thresholds, model, mode, dense_prefix=0):
    """Make a model sparse by thresholds, as sparsify takes them, in a `with`; None: dense."""
    if thresholds is None:
        mode = "off"
    else:
        sparsify(model, thresholds)
    with counted(model), sparse_mode(model, mode, dense_prefix=dense_prefix):
        yield lambda: realised_sparsity(model)


def own(name, level, thresholds, dense_prefix=0):
    """Return the Setting of an allocation's thresholds."""
    return Setting(name, level, functools.partial(by_thresholds, thresholds), dense_prefix)


DENSE = own("dense", 0.0, None)


@torch.no_grad()
def judge(model, tokens, settings, context=None, scored=None):
    """Return the quality under each of `settings` (a list of Setting) beside the dense model's.

    tokens (N,) int64 in windows of `context`, whose last `scored` positions count (None: all). The
    model becomes sparse. Returns a list of dicts, the dense model first: allocation, target,
    sparsity (realised), perplexity, and agreement and kl as sparsify.measures has them, a token.
    """
    check_tokens(tokens, model.config)
    context = context or default_context(model)
    scored = scored or context
    windows = windows_of(tokens, context, scored)
    settings = [DENSE, *settings]
    sums = torch.zeros(len(settings), 4, dtype=torch.float64)
    for part in progress(windows.split(4), f"judging {len(settings)} settings"):
        inputs = part[:, :-1].to(model.device)
        targets = part[:, 1:][:, -scored:].flatten().to(model.device)
        for i, setting in enumerate(settings):
            with setting.way(model, "all", setting.dense_prefix) as realised:
                log_p = model(inputs)[:, -scored:].flatten(0, 1).log_softmax(-1)    # (N, vocab)
            if i == 0:
                dense = log_p
            sums[i, :3] += measures(log_p, dense, targets)
            sums[i, 3] += realised() * len(targets)
    means = (sums / (len(windows) * scored)).tolist()
    return [{"allocation": setting.name, "target": setting.target, "sparsity": sparsity,
             "perplexity": math.exp(loss), "agreement": agreement, "kl": kl}
            for setting, (loss, kl, agreement, sparsity) in zip(settings, means)]


def at_target(rows):
    """Add to rows (one allocation's, as from `judge`) the perplexity at the target itself.

    Thresholds set on one text drop somewhat more or less of another. Where that is over half a
    point, the perplexity at the target is interpolated between the measured ones, log-linearly in
    the realised sparsity; it is None where the target does not lie between two of them.
    """
    points = sorted((row["sparsity"], math.log(row["perplexity"])) for row in rows)
    for row in rows:
        log = np.interp(row["target"], *zip(*points), left=np.nan, right=np.nan)
        row["perplexity_at_target"] = None if np.isnan(log) else math.exp(log)
        if abs(row["sparsity"] - row["target"]) <= 0.005:
            row["perplexity_at_target"] = row["perplexity"]


# --------------------------------------------------------------------------------------------------
# What is measured

def table_settings(model, calibration, allocations, levels, dense_prefix=0, windows=None):
    """Return a Setting for each allocation and level, of peers for levels that they can reach.

    model: the dense one; windows: held-in text (W, T), for peers that are made of text.
    """
    settings = []
    for allocation in allocations:
        if allocation in PEERS:
            way_at = peer_maker(allocation, model, calibration, windows)
        else:
            def way_at(level, allocation=allocation):
                thresholds = calibration.thresholds(level, allocation)
                return functools.partial(by_thresholds, thresholds)
        settings += [Setting(allocation, level, way, dense_prefix) for level in levels
                     if (way := way_at(level))]
    require(settings, f"nothing to measure: {' and '.join(allocations)} reach none of the levels")
    return settings


def source_settings(model, calibration, windows, dense_prefix=0, level=0.5):
    """Return a Setting for each place that loss may come from.

    They are the start of a sequence, each of the seven linears alone, and the head, which the paper
    leaves dense. windows: held-in text (W, T), for the head's thresholds; dense_prefix: of all
    settings but the first.
    """
    thresholds = calibration.thresholds(level) | {"lm_head": None}
    settings = [own(f"{prefix} dense", level, thresholds, prefix) for prefix in (0, 1, 4, 16, 64)]
    layers = model.config.num_hidden_layers
    uniform = calibration.thresholds_at(uniform_table(layers).at(level))   # nothing else is sparse
    nothing = dict.fromkeys([*linear_names(model.config), "lm_head"])
    for linear in block_linears(model.config):
        alone = {name: value for name, value in uniform.items() if name.endswith(linear)}
        settings.append(own(linear.split(".")[1], level, nothing | alone, dense_prefix))
    watched = [(model.model.layers[-1], lambda x, y: model.model.norm(y))]     # what the head reads
    counts = count(model, windows, watched, "the head's inputs")[0]
    for dropped in (0.25, 0.4, 0.5):
        head = {"lm_head": quantile(counts, dropped).float()}
        settings.append(own("lm_head", dropped, nothing | head, dense_prefix))
    return settings


@torch.no_grad()
def share_read(model, thresholds, tokens, number, length=256):
    """Return the share of the blocks' weights that decoding `number` texts at once reads.

    A weight is read if any of the texts needs it. The dense model's inputs stand for the sparse
    one's. tokens (N,) int64: its texts are windows of `length`, of which the later half counts.
    """
    texts = windows_of(tokens, length)[:128, :-1]                               # (W, length)
    texts = texts[:len(texts) // number * number].to(model.device)  # W a multiple of number
    require(len(texts), f"the text has {len(tokens)} tokens, {number} texts of {length} need more")
    sizes = {}
    read = {}
    with contextlib.ExitStack() as hooks:
        for name, threshold in thresholds.items():
            def look(module, inputs, name=name, threshold=threshold.to(model.device)):
                keep = kept(inputs[0][:, length // 2:], threshold)          # (W, length / 2, in)
                by_any = keep.unflatten(0, (-1, number)).any(1)
                sizes[name] = module.in_features * module.out_features
                read[name] = sizes[name] * by_any.double().mean().item()
            hooks.enter_context(model.get_submodule(name).register_forward_pre_hook(look))
        model(texts)
    return sum(read.values()) / sum(sizes.values())


# --------------------------------------------------------------------------------------------------
# The figure, the table, and the command line

def draw_quality(rows, path):
    """Draw added perplexity against realised sparsity, a line for each allocation, as a PNG."""
    dense = rows[0]["perplexity"]
    figure, axis = pyplot().subplots(figsize=(6.4, 4), layout="constrained")
    lines = {}                           # {name: its points}, without the dense models
    for row in rows:
        if row["sparsity"] > 0:
            above = 100 * (row["perplexity"] / dense - 1)
            lines.setdefault(row["allocation"], []).append((100 * row["sparsity"], above))
    colours = {}                         # of allocations; another checkpoint's lines are dashed
    for name, points in lines.items():
        *checkpoint, allocation = name.split()
        axis.plot(*zip(*points), marker="o", ms=3.5, lw=1.3, ls="--" if checkpoint else "-",
                  color=colours.setdefault(allocation, f"C{len(colours)}"), label=name)
    axis.set(xlabel="weights of the blocks not read (%)",
             ylabel=f"perplexity above the dense {dense:.2f} (%)", yscale="log", ylim=(0.05, None))
    axis.yaxis.set_major_formatter("{x:g}")
    axis.legend(ncols=2 if any(" " in name for name in lines) else 1, fontsize=8)
    save_figure(figure, path)


COLUMNS = {                  # of the table: their heads, widths, and how a value is written
    "target": ("target", 8, ".0%"), "sparsity": ("realised", 10, ".1%"),
    "perplexity": ("perplexity", 12, ".3f"), "perplexity_at_target": ("at target", 11, ".3f"),
    "agreement": ("agreement", 11, ".1%"), "kl": ("KL", 9, ".4f"),
    "functions": ("functions", 11, ".1%"),
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
    add("--sparsity", nargs="+", type=share,
        help="levels to measure (default: 0.25 0.4 0.5 0.6 0.65 0.75)")
    add("--allocation", nargs="+",
        help=f"of those in the calibration, or {', '.join(PEERS)} (default: all of the former)")
    add("--held-in", metavar="FILE",
        help="UTF-8 text from which cats, larosa and --sources take what they need (default: the "
             "standard library's held-in part)")
    add("--beside", metavar="FOLDER",
        help="another checkpoint with the same tokenizer, calibrated, whose rows follow under its "
             "folder's name (default: none)")
    add("--sources", action="store_true",
        help="instead: where the loss at 50 %% comes from (default: no)")
    add("--batch", nargs="+", type=natural, metavar="B",
        help="instead: how much is read at 50 %% for B texts side by side (default: no)")
    add("--paper", action="store_true",
        help="as the paper has it: --context 2560 --scored 512 --dense-prefix 1280 (default: no)")
    add("--scored", type=natural, help="how many at the end of each window count (default: all)")
    add("--dense-prefix", type=int, default=SINKS,
        help=f"tokens at the start of each that stay dense (default: {SINKS})")
    add("--functions", type=int, metavar="N",
        help="of the held-out part to complete and parse (default: 120; 0 with --text)")
    add("--json", action="store_true", help="print the rows as JSON (default: as a table)")
    add("--figure", metavar="FILE",
        help="draw perplexity against sparsity as a PNG (default: no figure)")
    arguments = parser.parse_args()
    if arguments.paper:
        arguments.context, arguments.scored, arguments.dense_prefix = 2560, 512, 1280
    table = "sparsity", "allocation", "beside", "figure", "functions"
    for option, others in {"sources": ("batch", *table), "beside": ("functions",),
                           "batch": (*table, "held_in", "context", "scored")}.items():
        for other in others:
            require(not (getattr(arguments, option) and getattr(arguments, other)),
                    f"--{other.replace('_', '-')} means nothing with --{option}")
    arguments.sparsity = sorted(arguments.sparsity or [0.25, 0.4, 0.5, 0.6, 0.65, 0.75])
    if arguments.functions is None:
        elsewhere = arguments.text or arguments.sources or arguments.beside
        arguments.functions = 0 if elsewhere else 120
    require(arguments.functions >= 0, f"--functions is {arguments.functions}, expected at least 0")
    if arguments.figure:
        check_figure(arguments.figure)
    require(not arguments.model.startswith("random:"),
            f"{arguments.model} has random weights: it has no quality to measure")
    return arguments


def judge_table(arguments, model, tokenizer, calibration, tokens):
    """Return the Settings that the command line asks for, and the rows of one checkpoint."""
    allocations = arguments.allocation or calibration.allocations
    windows = None
    if arguments.sources or {"cats", "larosa"} & set(allocations):
        held_in = read_tokens(tokenizer, arguments.held_in, "train")[0]
        windows = some_windows(model, held_in, 32, 512)
    if arguments.sources:
        settings = source_settings(model, calibration, windows, arguments.dense_prefix)
    else:
        settings = table_settings(model, calibration, allocations, arguments.sparsity,
                                  arguments.dense_prefix, windows)
    rows = judge(model, tokens, settings, arguments.context, arguments.scored)
    if not arguments.sources:
        for allocation in allocations:
            at_target([rows[0], *(row for row in rows if row["allocation"] == allocation)])
    return settings, rows


def main():
    arguments = read_arguments()
    model, tokenizer = load(arguments)
    calibration = load_calibration(model, arguments.model, arguments.calibration)
    context = arguments.context = default_context(model, arguments.context)
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
    settings, rows = judge_table(arguments, model, tokenizer, calibration, tokens)
    if arguments.beside:
        other, other_tokenizer = load(arguments, arguments.beside)
        require(other_tokenizer.pieces() == tokenizer.pieces(),
                f"--beside {arguments.beside}: its tokenizer is not that of {arguments.model}")
        other_calibration = load_calibration(other, arguments.beside)
        for row in judge_table(arguments, other, tokenizer, other_calibration, tokens)[1]:
            name = f"{Path(arguments.beside).name} {row['allocation']}"
            rows.append(row | {"allocation": name})
    if arguments.functions:
        beginnings = function_beginnings(tokenizer, arguments.functions)
        both = list(zip(rows, [DENSE, *settings]))
        for row, setting in progress(both, "completing functions"):
            row["functions"] = share_of_functions(model, tokenizer, beginnings, setting)
    about = {"model": arguments.model, "text": source, "tokens": len(tokens), "context": context,
             "scored": scored, "dense_prefix": arguments.dense_prefix,
             "calibration": calibration.source}
    if arguments.figure:
        draw_quality(rows, arguments.figure)
    if arguments.json:
        print(json.dumps(about | {"rows": rows}, indent=1))
        return
    print(", ".join(f"{key.replace('_', ' ')}: {value}" for key, value in about.items()))
    print_table(rows)


if __name__ == "__main__":
    command_line(main)
