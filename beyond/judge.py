"""What sparsity costs: many settings beside the dense model, on text that it has not seen.

For each setting, over the same windows of tokens:

    realised     the share of the blocks' weights that was not read
    perplexity   exp of the mean cross-entropy of the next token; at target: at the sparsity asked
                 for, interpolated if the realised one misses it
    agreement    how often the likeliest next token is the dense model's
    KL           how far the distribution of the next token is from the dense model's, in nats
    functions    the share of functions, begun by a person and completed by the model, that Python
                 can parse (demo model)

The first tokens of a window stay dense and count for nothing: they are attention sinks, which a
calibration leaves out, and where a model decodes they belong to the prompt. If they were sparse,
nearly all of their weights would be skipped, which lifts what windows of 512 tokens realise by 0.4
points.

`python sparsify.py` prints some of this. Here are more protocols, other people's ways to skip
weights (peers.py), and two other questions: where the loss comes from, and what is left to skip
where several texts are decoded at once.

The seam: `sparsify` gives other thresholds to a model that is sparse already, so one model takes
all settings in turn.

    python -m beyond.judge [--model FOLDER] [--text FILE]      the table
    python -m beyond.judge --sources                           where the loss comes from
    python -m beyond.judge --batch 1 2 4 8 16                  what several texts at once read
"""
import ast
import contextlib
import io
import json
import math
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import Callable

import torch
import torch.nn.functional as F

from beyond.allocate import add_quantize, check_figure, load, pyplot, refuse_beside, save_figure
from beyond.peers import PEERS, peer_maker
from calibrate import SINKS, even_table, load_calibration, some_windows
from kernel import kept
from model import (Parser, block_linears, check_tokens, command_line, default_context, linear_names,
                   natural, progress, read_tokens, require, share, windows_of)
from sparsify import realised_sparsity, reset_counts, sparse_mode, sparsify


@dataclass
class Setting:
    """One way to make the model sparse, a row of the table.

    thresholds: as sparsify takes them; None: dense. peer(model, mode, prefix): another way to skip
    weights instead, of peers.py.
    """
    name: str
    target: float
    thresholds: dict | None = None
    peer: Callable | None = None
    dense_prefix: int = 0

    @contextlib.contextmanager
    def applied(self, model, mode):
        """Make the model sparse so inside a `with`; mode: "all" or "decode", as for sparse_mode.

        Yields a function that returns the share of the blocks' weights that was not read inside.
        """
        if self.peer is not None:
            peer = self.peer(model, mode, self.dense_prefix)
            with sparse_mode(model, "off"), peer as realised:
                yield realised
            return
        if self.thresholds is None:
            mode = "off"
        else:
            sparsify(model, self.thresholds)
        reset_counts(model)
        with sparse_mode(model, mode, dense_prefix=self.dense_prefix):
            yield lambda: realised_sparsity(model)


@torch.no_grad()
def judge(model, tokens, settings, context=None, scored=None):
    """Return the quality under each of `settings` (a list of Setting) beside the dense model's.

    tokens (N,) int64 in windows of `context`, whose last `scored` positions count (None: all). The
    model becomes sparse. Returns a list of dicts, the dense model first: allocation, target,
    sparsity (realised), perplexity, agreement (share of positions whose likeliest next token is the
    dense model's) and kl (mean KL divergence from the dense distribution, nats).
    """
    check_tokens(tokens, model.config)
    context = context or default_context(model)
    scored = scored or context
    windows = windows_of(tokens, context, scored)
    settings = [Setting("dense", 0.0), *settings]
    sums = torch.zeros(len(settings), 4, dtype=torch.float64)
    for part in progress(windows.split(4), f"judging {len(settings)} settings"):
        inputs = part[:, :-1].to(model.device)
        targets = part[:, 1:][:, -scored:].flatten().to(model.device)
        for i, setting in enumerate(settings):
            with setting.applied(model, "all") as realised:
                log_p = model(inputs)[:, -scored:].flatten(0, 1).log_softmax(-1)    # (N, vocab)
                if i == 0:
                    dense = log_p
                sums[i] += torch.tensor([
                    F.nll_loss(log_p, targets, reduction="sum").item(),
                    (log_p.argmax(-1) == dense.argmax(-1)).sum().item(),
                    F.kl_div(log_p, dense, reduction="sum", log_target=True).item(),
                    realised() * len(targets),
                ], dtype=torch.float64)
    means = (sums / (len(windows) * scored)).tolist()
    return [{"allocation": setting.name, "target": setting.target, "sparsity": sparsity,
             "perplexity": math.exp(loss), "agreement": agreement, "kl": kl}
            for setting, (loss, agreement, kl, sparsity) in zip(settings, means)]


def at_target(rows):
    """Add to rows (one allocation's, as from `judge`) the perplexity at the target itself.

    Thresholds set on one text drop somewhat more or less of another. Where that is over half a
    point, the perplexity at the target is interpolated between the measured ones, log-linearly in
    the realised sparsity; it is None where the target does not lie between two of them.
    """
    points = sorted((row["sparsity"], math.log(row["perplexity"])) for row in rows)
    for row in rows:
        target = row["target"]
        if abs(row["sparsity"] - target) <= 0.005:
            row["perplexity_at_target"] = row["perplexity"]
            continue
        row["perplexity_at_target"] = None
        for (x0, y0), (x1, y1) in zip(points, points[1:]):
            if x0 <= target <= x1:
                y = y0 + (y1 - y0) * (target - x0) / (x1 - x0)
                row["perplexity_at_target"] = math.exp(y)


# --------------------------------------------------------------------------------------------------
# Functions: what the demo model writes is Python, or not

def function_beginnings(tokenizer, files, count, length=128, seed=0):
    """Return beginnings of functions in Python files, `count` of them, drawn with a seed.

    files: (path, text) pairs. Returns [(ids of the last `length` tokens up to the end of the def
    line, text of the def line)]. Those with less text before them are left out.
    """
    beginnings = []
    for _, text in files:
        lines = io.StringIO(text).readlines()      # as Python counts them: a form feed ends none
        try:
            tree = ast.parse(text)
        except SyntaxError:
            continue
        for node in ast.walk(tree):
            if not isinstance(node, ast.FunctionDef) or node.end_lineno - node.lineno < 3:
                continue
            first = [node.body[0], *getattr(node.body[0], "decorator_list", [])]
            body = min(each.lineno for each in first)
            head = "".join(lines[node.lineno - 1:body - 1])
            ids = tokenizer.encode("".join(lines[:body - 1]))[-length:]
            if head.strip() and len(ids) == length:
                beginnings.append((ids, head))
    order = torch.randperm(len(beginnings), generator=torch.Generator().manual_seed(seed))
    return [beginnings[i] for i in order[:count]]


def is_function(head, body):
    """Return whether a def line and the text after it, cut where the function ends, are Python."""
    indent = len(head) - len(head.lstrip())
    inside = []
    for line in body.splitlines(keepends=True):
        outside = line.strip() and len(line) - len(line.lstrip()) <= indent
        if outside or not line.endswith("\n"):             # the last line is unfinished
            break
        inside.append(line)
    try:
        ast.parse(textwrap.dedent(head + "".join(inside)))
    except (SyntaxError, ValueError):
        return False
    return True


@torch.no_grad()
def share_of_functions(model, tokenizer, beginnings, setting, new_tokens=96):
    """Return the share of `beginnings` that the model completes to what Python can parse.

    It decodes greedily, all of them side by side, made sparse by a Setting.
    """
    prompts = torch.tensor([ids for ids, _ in beginnings], device=model.device)     # (B, length)
    cache = model.make_cache(len(prompts), prompts.shape[1] + new_tokens)
    written = []
    with setting.applied(model, "decode"):
        tokens = prompts
        for _ in range(new_tokens):
            logits = model(tokens, cache, last_only=True)[:, -1]                # (B, vocab)
            tokens = logits.argmax(-1, keepdim=True)                            # (B, 1)
            written.append(tokens)
    texts = [tokenizer.decode(ids) for ids in torch.cat(written, 1).tolist()]
    good = [is_function(head, text) for (_, head), text in zip(beginnings, texts)]
    return sum(good) / len(good)


# --------------------------------------------------------------------------------------------------
# What is measured

def table_settings(model, calibration, allocations, levels, dense_prefix=0, windows=None):
    """Return a Setting for each allocation and level, of peers for levels that they can reach.

    model: the dense one; windows: held-in text (W, T), from which peers.py makes larosa.
    """
    settings = []
    for allocation in allocations:
        make = None
        if allocation in PEERS:
            make = peer_maker(allocation, model, calibration, windows)
        for level in levels:
            if make is None:
                thresholds = calibration.thresholds(level, allocation)
                settings.append(Setting(allocation, level, thresholds, None, dense_prefix))
            elif peer := make(level):
                settings.append(Setting(allocation, level, None, peer, dense_prefix))
    require(settings, f"nothing to measure: {' and '.join(allocations)} reach none of the levels")
    return settings


def source_settings(model, calibration, dense_prefix=0, level=0.5):
    """Return a Setting for each place that loss may come from.

    They are the start of a sequence, each of the seven linears alone, and the head. dense_prefix:
    of all but the first.
    """
    thresholds = calibration.thresholds(level) | {"lm_head": None}
    settings = [Setting(f"{prefix} dense", level, thresholds, None, prefix)
                for prefix in (0, 1, 4, 16, 64)]
    layers = model.config.num_hidden_layers
    uniform = calibration.thresholds_at(even_table(layers).at(level))      # nothing else is sparse
    nothing = dict.fromkeys([*linear_names(model.config), "lm_head"])
    for linear in block_linears(model.config):
        alone = {name: value for name, value in uniform.items() if name.endswith(linear)}
        of = nothing | alone
        settings.append(Setting(linear.split(".")[1], level, of, None, dense_prefix))
    for dropped in (0.25, 0.4, 0.5):
        head = {"lm_head": calibration.head_threshold(dropped)}
        settings.append(Setting("lm_head", dropped, nothing | head, None, dense_prefix))
    return settings


@torch.no_grad()
def share_read(model, thresholds, tokens, count, length=256):
    """Return the share of the blocks' weights that decoding `count` texts at once reads.

    A weight is read if any of the texts needs it. The dense model's inputs stand for the sparse
    one's. tokens (N,) int64: its texts are windows of `length`, of which the later half counts.
    """
    texts = windows_of(tokens, length)[:128, :-1]                               # (W, length)
    texts = texts[:len(texts) // count * count].to(model.device)    # W a multiple of count
    require(len(texts), f"the text has {len(tokens)} tokens, {count} texts of {length} need more")
    sizes = {}
    read = {}
    with contextlib.ExitStack() as hooks:
        for name, threshold in thresholds.items():
            def look(module, inputs, name=name, threshold=threshold.to(model.device)):
                keep = kept(inputs[0][:, length // 2:], threshold)          # (W, length / 2, in)
                by_any = keep.unflatten(0, (-1, count)).any(1)
                sizes[name] = module.in_features * module.out_features
                read[name] = sizes[name] * by_any.double().mean().item()
            hooks.enter_context(model.get_submodule(name).register_forward_pre_hook(look))
        model(texts)
    return sum(read.values()) / sum(sizes.values())


# --------------------------------------------------------------------------------------------------
# The figure, and the command line

def draw_quality(rows, path):
    """Draw added perplexity against realised sparsity, a line for each allocation, as a PNG."""
    plt = pyplot()
    dense = rows[0]["perplexity"]
    figure, axis = plt.subplots(figsize=(6.4, 4), layout="constrained")
    colours = {}                         # of allocations; another checkpoint's lines are dashed
    names = list(dict.fromkeys(row["allocation"] for row in rows))
    for name in names:
        own = [row for row in rows if row["allocation"] == name and row["sparsity"] > 0]
        if not own:                      # a dense model
            continue
        *checkpoint, allocation = name.split()
        axis.plot([100 * row["sparsity"] for row in own],
                  [100 * (row["perplexity"] / dense - 1) for row in own],
                  marker="o", ms=3.5, lw=1.3, ls="--" if checkpoint else "-",
                  color=colours.setdefault(allocation, f"C{len(colours)}"), label=name)
    axis.set(xlabel="weights of the blocks not read (%)",
             ylabel=f"perplexity above the dense {dense:.2f} (%)", yscale="log", ylim=(0.05, None))
    axis.yaxis.set_major_formatter("{x:g}")
    axis.legend(ncols=2 if any(" " in name for name in names) else 1, fontsize=8)
    save_figure(figure, path)


def read_arguments():
    """Return the command line, checked as far as it can be without a model."""
    parser = Parser(description="Quality against sparsity, for each allocation, beside the dense "
                                "model.")
    parser.add_model()
    add_quantize(parser)
    parser.add_argument("--text", metavar="FILE",
                        help="UTF-8 text to measure on (default: the standard library's held-out "
                             "part)")
    parser.add_argument("--tokens", type=natural, default=100_000,
                        help="how many tokens of it at most (default: 100000)")
    parser.add_argument("--calibration", metavar="FILE",
                        help="(default: calibration.safetensors in the checkpoint folder)")
    parser.add_argument("--sparsity", nargs="+", type=share,
                        help="levels to measure (default: 0.25 0.4 0.5 0.6 0.65 0.75)")
    parser.add_argument("--allocation", nargs="+",
                        help=f"of those in the calibration, or {', '.join(PEERS)} (default: all of "
                             f"the calibration, and cats)")
    parser.add_argument("--held-in", metavar="FILE",
                        help="UTF-8 text from which larosa takes its directions (default: the "
                             "standard library's held-in part)")
    parser.add_argument("--beside", metavar="FOLDER",
                        help="another checkpoint with the same tokenizer, calibrated, whose rows "
                             "follow under its folder's name (default: none)")
    parser.add_argument("--sources", action="store_true",
                        help="instead: where the loss at 50 %% comes from (default: no)")
    parser.add_argument("--batch", nargs="+", type=natural, metavar="B",
                        help="instead: how much is read at 50 %% for B texts side by side "
                             "(default: no)")
    parser.add_argument("--context", type=natural,
                        help="tokens in a window (default: the model's context, at most 2048)")
    parser.add_argument("--scored", type=natural,
                        help="how many at the end of each window count (default: all)")
    parser.add_argument("--dense-prefix", type=int,
                        help=f"tokens at the start of each that stay dense (default: {SINKS})")
    parser.add_argument("--paper", action="store_true",
                        help="TEAL's protocol: 2048 tokens before 512 scored, half of all dense "
                             "(default: no)")
    parser.add_argument("--functions", type=int, metavar="N",
                        help="of the held-out part to complete and parse (default: 120; 0 with "
                             "--text)")
    parser.add_argument("--json", action="store_true",
                        help="print the rows as JSON (default: as a table)")
    parser.add_argument("--figure", metavar="FILE",
                        help="draw perplexity against sparsity as a PNG (default: no figure)")
    arguments = parser.parse_args()
    table = "sparsity", "allocation", "beside", "figure", "functions"
    refuse_beside(arguments, {"sources": ("batch", *table),
                              "batch": (*table, "context", "scored", "paper"),
                              "paper": ("context", "scored", "dense_prefix"),
                              "beside": ("functions",)})
    require(not arguments.held_in or "larosa" in (arguments.allocation or ()),
            "--held-in means nothing without --allocation larosa")
    if arguments.sparsity is None:
        arguments.sparsity = [0.25, 0.4, 0.5, 0.6, 0.65, 0.75]
    if arguments.functions is None:
        elsewhere = arguments.text or arguments.sources or arguments.beside
        arguments.functions = 0 if elsewhere else 120
    require(arguments.functions >= 0, f"--functions is {arguments.functions}, expected at least 0")
    if arguments.figure:
        check_figure(arguments.figure)
    if arguments.paper:
        arguments.context = 2560
        arguments.scored = 512
        arguments.dense_prefix = 1280
    elif arguments.dense_prefix is None:
        arguments.dense_prefix = SINKS
    require(not arguments.model.startswith("random:"),
            f"{arguments.model} has random weights: it has no quality to measure")
    return arguments


def check_windows(arguments, model):
    """Check --context, --scored and --dense-prefix for a model, and fill in the first two."""
    longest = model.config.max_position_embeddings
    context = arguments.context = arguments.context or default_context(model)
    require(context <= longest,
            f"a window of {context} tokens does not fit the model's context of {longest}")
    scored = arguments.scored = arguments.scored or context
    require(scored <= context, f"--scored is {scored}, expected 1 to {context}")
    require(0 <= arguments.dense_prefix < context,
            f"--dense-prefix is {arguments.dense_prefix}, expected 0 to {context - 1}")


def judge_table(arguments, model, tokenizer, calibration, tokens, name=""):
    """Return the Settings that the command line asks for, and the rows of one checkpoint.

    name: what stands before those of the allocations.
    """
    if arguments.sources:
        settings = source_settings(model, calibration, arguments.dense_prefix)
        return settings, judge(model, tokens, settings, arguments.context, arguments.scored)
    everything = [*calibration.allocations, *["cats"] * ("gate" in calibration.distributions)]
    allocations = arguments.allocation or everything
    levels = sorted(arguments.sparsity)
    windows = None
    if "larosa" in allocations:
        held_in = read_tokens(tokenizer, arguments.held_in, "train")[0]
        windows = some_windows(model, held_in, 32, 512)
    settings = table_settings(model, calibration, allocations, levels,
                              arguments.dense_prefix, windows)
    rows = judge(model, tokens, settings, arguments.context, arguments.scored)
    for allocation in allocations:
        at_target([rows[0], *(row for row in rows if row["allocation"] == allocation)])
    for row in rows:
        row["allocation"] = name + row["allocation"]
    return settings, rows


def print_table(rows):
    """Print the rows, with a column for each thing that was measured."""
    aimed = "perplexity_at_target" in rows[0]
    completed = "functions" in rows[0]
    width = max(len(row["allocation"]) for row in rows)
    print(f"{'':>{width}} {'target':>7} {'realised':>9} {'perplexity':>11}"
          + f" {'at target':>10}" * aimed + f" {'agreement':>10} {'KL':>8}"
          + f" {'functions':>10}" * completed)
    for row in rows:
        line = (f"{row['allocation']:>{width}} {row['target']:7.0%} {row['sparsity']:9.1%} "
                f"{row['perplexity']:11.3f}")
        if aimed:
            at = row["perplexity_at_target"]
            line += f" {at:10.3f}" if at else f" {'-':>10}"
        line += f" {row['agreement']:10.1%} {row['kl']:8.4f}"
        if completed:
            line += f" {row['functions']:10.1%}" if "functions" in row else f" {'-':>10}"
        print(line)


def main():
    arguments = read_arguments()
    model, tokenizer = load(arguments)
    calibration = load_calibration(model, arguments.model, arguments.calibration)
    check_windows(arguments, model)
    tokens, source = read_tokens(tokenizer, arguments.text, "held-out")
    tokens = tokens[:arguments.tokens]
    if arguments.batch:
        thresholds = calibration.thresholds(0.5)
        print(f"{'texts side by side':>20} {'weights read, each at 50% sparsity':>36}")
        for count in arguments.batch:
            print(f"{count:20} {share_read(model, thresholds, tokens, count):36.1%}", flush=True)
        return
    settings, rows = judge_table(arguments, model, tokenizer, calibration, tokens)
    if arguments.beside:
        other, other_tokenizer = load(arguments, arguments.beside)
        require(other_tokenizer.pieces() == tokenizer.pieces(),
                f"--beside {arguments.beside}: its tokenizer is not that of {arguments.model}")
        other_calibration = load_calibration(other, arguments.beside)
        prefix = f"{Path(arguments.beside).name} "
        rows += judge_table(arguments, other, tokenizer, other_calibration, tokens, prefix)[1]
    if arguments.functions:
        from demo import corpus
        beginnings = function_beginnings(tokenizer, corpus.files("held-out"), arguments.functions)
        require(beginnings, f"no function to complete in the held-out part of {corpus.NAME}; leave "
                            f"it out with --functions 0")
        both = list(zip(rows, [Setting("dense", 0.0), *settings]))
        for row, setting in progress(both, "completing functions"):
            row["functions"] = share_of_functions(model, tokenizer, beginnings, setting)
    about = {"model": arguments.model, "text": source, "tokens": len(tokens),
             "context": arguments.context, "scored": arguments.scored,
             "dense_prefix": arguments.dense_prefix, "calibration": calibration.source}
    if arguments.figure:
        draw_quality(rows, arguments.figure)
    if arguments.json:
        print(json.dumps(about | {"rows": rows}, indent=1))
        return
    print(", ".join(f"{key.replace('_', ' ')}: {value}" for key, value in about.items()))
    print_table(rows)


if __name__ == "__main__":
    command_line(main)
