"""What sparsity costs: many settings beside the dense model, on text that it has not seen.

For each setting, over the same windows of tokens:

    realised     the share of the blocks' weights that was not read
    perplexity   exp of the mean cross-entropy of the next token; at target: at the sparsity asked for, where the realised one is off
    agreement    how often the likeliest next token is the dense model's
    KL           how far the distribution of the next token is from the dense model's, in nats
    functions    the share of functions, begun by a person and completed by the model, that Python can parse (demo model)

    python sparsify.py [--model FOLDER] [--text FILE]      the table
    python sparsify.py --sources                           where the loss comes from
    python sparsify.py --batch 1 2 4 8 16                  what is left to skip where several texts are decoded at once
"""
import ast
import contextlib
import functools
import io
import json
import math
import textwrap
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

from calibrate import load_calibration
from cli import DEMO, InputError, Parser, check_figure, natural, progress_line, pyplot, refuse_beside
from model import check_tokens, load_model
from sparsify import SparseLinear, default_context, read_tokens, realised_sparsity, reset_counts, sparse_mode, sparsify, windows_of


@dataclass
class Setting:
    """One way to make the model sparse, a row of the table.

    thresholds: as sparse_mode takes them, with 0 for what is to stay dense. gate_thresholds: (layers,) for CATS
    (arXiv 2404.08763), which thresholds |silu(gate)| alone, and skips what `up` and `down` need for it.
    """
    name: str
    target: float
    thresholds: dict | None = None
    gate_thresholds: torch.Tensor | None = None
    dense_prefix: int = 0

    @contextlib.contextmanager
    def applied(self, model, where):
        """The model made sparse so, inside a `with`; `where` as for sparse_mode. Yields the counts, (linears, 2)."""
        if self.gate_thresholds is None:
            with sparse_mode(model, where if self.thresholds else "off", self.thresholds, self.dense_prefix):
                reset_counts(model)
                yield model.sparse_state.counts
            return
        counts, hooks = torch.zeros_like(model.sparse_state.counts), contextlib.ExitStack()
        names = [name for name, module in model.named_modules() if isinstance(module, SparseLinear) and module.state]
        for layer, (block, threshold) in enumerate(zip(model.model.layers, self.gate_thresholds.tolist())):
            skipping = [names.index(f"model.layers.{layer}.mlp.{name}_proj") for name in ("up", "down")]

            def drop(module, inputs, gate, threshold=threshold, skipping=skipping):
                if where == "decode" and gate.shape[1] > 1:
                    return gate
                keep = F.silu(gate).abs() > threshold
                keep[:, :self.dense_prefix] = True
                counted = keep[:, self.dense_prefix:]
                counts[skipping] += torch.stack((counted.sum(), torch.tensor(counted.numel(), device=keep.device)))
                return gate * keep                         # silu(0) is 0: the channel's product is gone
            hooks.enter_context(block.mlp.gate_proj.register_forward_hook(drop))
        with hooks, sparse_mode(model, "off"):
            yield counts


@torch.no_grad()
def judge(model, tokens, settings, context=None, scored=None, progress=lambda text: None):
    """Quality under each of `settings` (a list of Setting) beside the dense model's, for a model made sparse already.

    tokens (N,) int64 in windows of `context`, whose last `scored` positions count (None: all). Returns a list of dicts,
    the dense model first: allocation, target, sparsity (realised), perplexity, agreement (share of positions whose
    likeliest next token is the dense model's) and kl (mean KL divergence from the dense distribution, nats).
    """
    check_tokens(tokens, model.config)
    if not hasattr(model, "sparse_state"):
        raise InputError("judge needs a model that was made sparse: sparsify(model, thresholds)")
    context = context or default_context(model)
    windows = windows_of(tokens, context, scored)
    settings = [Setting("dense", 0.0), *settings]
    sums = torch.zeros(len(settings), 3, dtype=torch.float64)              # loss, agreements, KL
    counts = [torch.zeros_like(model.sparse_state.counts) for _ in settings]
    done = 0
    for part in windows.split(4):
        inputs, late = part[:, :-1].to(model.device), slice(context - (scored or context), None)
        targets = part[:, 1:][:, late].flatten().to(model.device)
        for i, setting in enumerate(settings):
            with setting.applied(model, "all") as counted:
                log_p = model(inputs)[:, late].flatten(0, 1).log_softmax(-1)                # (B * scored, vocab)
                counts[i] += counted
            likeliest = log_p.argmax(-1)
            if i == 0:
                dense, dense_likeliest = log_p, likeliest
            sums[i, 0] += F.nll_loss(log_p, targets, reduction="sum").item()
            sums[i, 1] += (likeliest == dense_likeliest).sum().item()
            sums[i, 2] += F.kl_div(log_p, dense, reduction="sum", log_target=True).item()
        done += targets.numel()
        progress(f"judging: window {done // len(targets) * len(part)} of {len(windows)}, {len(settings)} settings")
    rows = []
    for setting, (loss, agreed, kl), counted in zip(settings, (sums / done).tolist(), counts):
        model.sparse_state.counts.copy_(counted)
        rows.append({"allocation": setting.name, "target": setting.target, "sparsity": realised_sparsity(model),
                     "perplexity": math.exp(loss), "agreement": agreed, "kl": kl})
    reset_counts(model)
    return rows


def at_target(rows):
    """Adds to rows (one allocation's, as from `judge`) the perplexity at the target itself.

    Thresholds set on one text drop somewhat more or less of another. Where that is over half a point, the
    perplexity at the target is read between the measured ones, log-linearly in the realised sparsity.
    """
    points = sorted((row["sparsity"], math.log(row["perplexity"])) for row in rows)
    for row in rows:
        near = abs(row["sparsity"] - row["target"]) <= 0.005
        row["perplexity_at_target"] = row["perplexity"] if near else None    # None: not between two measured ones
        if not near:
            for (x0, y0), (x1, y1) in zip(points, points[1:]):
                if x0 <= row["target"] <= x1:
                    row["perplexity_at_target"] = math.exp(y0 + (y1 - y0) * (row["target"] - x0) / (x1 - x0))


def function_beginnings(tokenizer, files, count, length=128, seed=0):
    """Beginnings of functions in Python files, drawn with a seed: [(ids of the last `length` tokens up to the end of
    the def line, text of the def line)]. files: (path, text) pairs. Those with less text before them are left out."""
    found = []
    for _, text in files:
        lines = io.StringIO(text).readlines()              # as Python counts them: a form feed ends none
        try:
            functions = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.FunctionDef)]
        except SyntaxError:
            continue
        for node in functions:
            body = min(place.lineno for place in [node.body[0], *getattr(node.body[0], "decorator_list", [])])
            head = "".join(lines[node.lineno - 1:body - 1])
            ids = tokenizer.encode("".join(lines[:body - 1]))[-length:]
            if head.strip() and len(ids) == length and node.end_lineno - node.lineno >= 3:
                found.append((ids, head))
    order = torch.randperm(len(found), generator=torch.Generator().manual_seed(seed))[:count]
    return [found[i] for i in order]


def is_function(head, body):
    """Whether a def line and what a model wrote behind it, cut where the function ends, are Python."""
    indent = len(head) - len(head.lstrip())
    kept = []
    for line in body.splitlines(keepends=True):
        if not line.endswith("\n") or line.strip() and len(line) - len(line.lstrip()) <= indent:
            break                                          # the last line is unfinished, or what follows stands outside
        kept.append(line)
    try:
        ast.parse(textwrap.dedent(head + "".join(kept)))
    except (SyntaxError, ValueError):
        return False
    return True


@torch.no_grad()
def share_of_functions(model, tokenizer, beginnings, setting, new_tokens=96):
    """The share of `beginnings` that the model, decoding greedily under a Setting, completes to what Python can parse."""
    prompts = torch.tensor([ids for ids, _ in beginnings], device=model.device)             # (B, length)
    cache = model.make_cache(len(prompts), prompts.shape[1] + new_tokens)
    written = []
    with setting.applied(model, "decode"):
        step = prompts
        for _ in range(new_tokens):
            step = model(step, cache, last_only=True)[:, -1].argmax(-1, keepdim=True)       # (B, 1)
            written.append(step)
    texts = [tokenizer.decode(ids) for ids in torch.cat(written, 1).tolist()]
    return sum(is_function(head, text) for (_, head), text in zip(beginnings, texts)) / len(beginnings)


def table_settings(calibration, allocations, levels):
    """A Setting for each allocation and level; "cats" where its sparsity of the MLP can reach the level."""
    settings = []
    for allocation in allocations:
        for level in levels:
            if allocation != "cats":
                settings.append(Setting(allocation, level, calibration.thresholds(level, allocation)))
                continue
            _, sizes = calibration.sizes()                 # up and down are the last two of the seven
            share = level / sizes[-2:].sum().item()
            if share < 0.99:
                settings.append(Setting("cats", level, None, calibration.gate_thresholds(share)))
    return settings


def source_settings(calibration, level=0.5):
    """Where the loss comes from: the start of a sequence, each of the seven linears alone, and the head."""
    thresholds = calibration.thresholds(level)
    settings = [Setting(f"{prefix} dense", level, thresholds, dense_prefix=prefix) for prefix in (0, 1, 4, 16, 64)]
    uniform = calibration.thresholds(level, "uniform")
    for linear in dict.fromkeys(name.split(".", 3)[3] for name in uniform):
        alone = {name: value if name.endswith(linear) else 0.0 for name, value in uniform.items()}
        settings.append(Setting(linear.split(".")[1], level, alone))
    nothing = dict.fromkeys(uniform, 0.0)
    settings += [Setting("lm_head", share, nothing | {"lm_head": calibration.head_threshold(share)}) for share in (0.25, 0.4, 0.5)]
    return settings


@torch.no_grad()
def share_read(model, thresholds, tokens, count, length=256):
    """The share of the blocks' weights that decoding `count` texts at once reads: a weight is read if any of them needs it.

    The dense model's inputs stand for the sparse one's. tokens (N,) int64: its texts are windows of `length`, of which the
    later half counts.
    """
    texts, kept = windows_of(tokens, length)[:128, :-1], {}
    texts = texts[:len(texts) // count * count].to(model.device)                            # (W, length), W a multiple of count
    if not len(texts):
        raise InputError(f"the text has {len(tokens)} tokens, {count} texts of {length} need more")

    def look(name, module, inputs):
        kept[name] = inputs[0][:, length // 2:].abs() > thresholds[name].to(model.device)
    with contextlib.ExitStack() as hooks:
        for name in thresholds:
            hooks.enter_context(model.get_submodule(name).register_forward_pre_hook(functools.partial(look, name)))
        model(texts)
    sizes = {name: model.get_submodule(name).weight.numel() for name in kept}
    read = {name: keep.unflatten(0, (-1, count)).any(1).double().mean().item() for name, keep in kept.items()}
    return sum(sizes[name] * read[name] for name in kept) / sum(sizes.values())


def draw_quality(rows, path):
    """Added perplexity against realised sparsity, a line an allocation."""
    plt, dense = pyplot(), rows[0]["perplexity"]
    figure, axis = plt.subplots(figsize=(6.4, 4), layout="constrained")
    colours = {}                                           # of allocations; another checkpoint's lines are dashed
    for name in dict.fromkeys(row["allocation"] for row in rows):
        own = [row for row in rows if row["allocation"] == name and row["sparsity"] > 0]
        if not own:                                        # a dense model
            continue
        *checkpoint, allocation = name.split()
        axis.plot([100 * row["sparsity"] for row in own], [100 * (row["perplexity"] / dense - 1) for row in own], marker="o", ms=3.5,
                  lw=1.3, ls="--" if checkpoint else "-", color=colours.setdefault(allocation, f"C{len(colours)}"), label=name)
    axis.set(xlabel="weights of the blocks not read (%)", ylabel=f"perplexity above the dense {dense:.2f} (%)",
             yscale="log", ylim=(0.05, None))
    axis.yaxis.set_major_formatter("{x:g}")
    axis.legend(ncols=2 if any(len(name.split()) > 1 for name in (row["allocation"] for row in rows)) else 1, fontsize=8)
    figure.savefig(path)
    plt.close(figure)


def main():
    parser = Parser(description="Quality against sparsity, for each allocation, beside the dense model.")
    parser.add_argument("--model", default=str(DEMO), help="checkpoint folder, calibrated (default: the demo model)")
    parser.add_argument("--text", metavar="FILE", help="UTF-8 text to measure on (default: the standard library's held-out part)")
    parser.add_argument("--tokens", type=natural, default=100_000, help="how many tokens of it at most (default: 100000)")
    parser.add_argument("--calibration", metavar="FILE", help="(default: calibration.safetensors in the checkpoint folder)")
    parser.add_argument("--sparsity", nargs="+", type=float,
                        help="levels to measure (default: 0.25 0.4 0.5 0.6 0.65 0.75)")
    parser.add_argument("--allocation", nargs="+", help="of those in the calibration, or cats (default: all of them)")
    parser.add_argument("--beside", metavar="FOLDER", help="another checkpoint with the same tokenizer, calibrated, whose rows follow "
                        "under its folder's name (default: none)")
    parser.add_argument("--sources", action="store_true", help="instead: where the loss at 50 %% comes from (default: no)")
    parser.add_argument("--batch", nargs="+", type=natural, metavar="B", help="instead: how much is read at 50 %% for B texts side by side (default: no)")
    parser.add_argument("--context", type=natural, help="tokens in a window (default: the model's context, at most 2048)")
    parser.add_argument("--scored", type=natural, help="how many at the end of each window count (default: all)")
    parser.add_argument("--dense-prefix", type=int, default=0, help="tokens at the start of each that stay dense (default: 0)")
    parser.add_argument("--paper", action="store_true", help="TEAL's protocol: 2048 tokens before 512 scored, half of all dense (default: no)")
    parser.add_argument("--functions", type=int, metavar="N", help="of the held-out part to complete and parse (default: 120; 0 with --text)")
    parser.add_argument("--json", action="store_true", help="print the rows as JSON (default: as a table)")
    parser.add_argument("--figure", metavar="FILE", help="draw perplexity against sparsity as a PNG (default: no figure)")
    parser.add_device()
    parser.add_precision()
    arguments = parser.parse_args()
    table = "sparsity", "allocation", "beside", "figure", "functions"
    refuse_beside(arguments, {"sources": ("batch", *table), "batch": (*table, "context", "scored", "paper"),
                              "paper": ("context", "scored", "dense_prefix"), "beside": ("functions",)})
    arguments.sparsity = arguments.sparsity or [0.25, 0.4, 0.5, 0.6, 0.65, 0.75]
    if arguments.functions is not None and arguments.functions < 0:
        raise InputError(f"--functions is {arguments.functions}, expected at least 0")
    if arguments.figure:
        check_figure(arguments.figure)
    if arguments.paper:
        arguments.context, arguments.scored, arguments.dense_prefix = 2560, 512, 1280
    if arguments.model.startswith("random:"):
        raise InputError(f"{arguments.model} has random weights: it has no quality to measure")
    model, tokenizer = load_model(arguments.model, arguments.device, arguments.dtype, arguments.quantize)
    calibration = load_calibration(model, arguments.model, arguments.calibration)
    context = arguments.context or default_context(model)
    if not 0 < context <= model.config.max_position_embeddings:
        raise InputError(f"a window of {context} tokens does not fit the model's context of {model.config.max_position_embeddings}")
    if arguments.scored is not None and arguments.scored > context:
        raise InputError(f"--scored is {arguments.scored}, expected 1 to {context}")
    if not 0 <= arguments.dense_prefix < context:
        raise InputError(f"--dense-prefix is {arguments.dense_prefix}, expected 0 to {context - 1}")
    for level in arguments.sparsity:
        if not 0 <= level < 1:
            raise InputError(f"--sparsity is {level}, expected at least 0 and below 1")
    tokens, source = read_tokens(tokenizer, arguments.text, "held-out")
    tokens = tokens[:arguments.tokens]
    if arguments.batch:
        thresholds = calibration.thresholds(0.5)
        print(f"{'texts side by side':>20} {'weights read, each at 50% sparsity':>36}")
        for count in arguments.batch:
            print(f"{count:20} {share_read(model, thresholds, tokens, count):36.1%}", flush=True)
        return

    def rows_of(model, calibration, name=""):
        """([Setting], the dense row and theirs) of one checkpoint."""
        if arguments.sources:
            settings = source_settings(calibration)
            sparsify(model, calibration.thresholds(0.0) | {"lm_head": 0.0})
            return settings, judge(model, tokens, settings, context, arguments.scored, progress_line)
        allocations = arguments.allocation or [*calibration.allocations, "cats"]
        settings = table_settings(calibration, allocations, sorted(arguments.sparsity))
        if not settings:
            raise InputError("nothing to measure: cats, which thins out two of the seven linears, reaches none of the levels")
        sparsify(model, calibration.thresholds(0.0))
        for setting in settings:
            setting.dense_prefix = arguments.dense_prefix
        rows = judge(model, tokens, settings, context, arguments.scored, progress_line)
        for allocation in {row["allocation"] for row in rows[1:]}:
            at_target([rows[0], *(row for row in rows if row["allocation"] == allocation)])
        for row in rows:
            row["allocation"] = name + row["allocation"]
        return settings, rows

    settings, rows = rows_of(model, calibration)
    rows[0]["perplexity_at_target"] = rows[0]["perplexity"]
    if arguments.beside:
        other, other_tokenizer = load_model(arguments.beside, arguments.device, arguments.dtype, arguments.quantize)
        if other_tokenizer.pieces() != tokenizer.pieces():
            raise InputError(f"--beside {arguments.beside}: its tokenizer is not that of {arguments.model}")
        rows += rows_of(other, load_calibration(other, arguments.beside), f"{Path(arguments.beside).name} ")[1]
    functions = (0 if arguments.text or arguments.sources or arguments.beside else 120) if arguments.functions is None else arguments.functions
    if functions:
        from demo import corpus
        beginnings = function_beginnings(tokenizer, corpus.files("held-out"), functions)
        if not beginnings:
            raise InputError(f"no function to complete in the held-out part of {corpus.NAME}; leave it out with --functions 0")
        for i, (row, setting) in enumerate(zip(rows, [Setting("dense", 0.0), *settings])):
            progress_line(f"completing functions: setting {i + 1} of {len(rows)}")
            row["functions"] = share_of_functions(model, tokenizer, beginnings, setting)

    about = {"model": arguments.model, "text": source, "tokens": len(tokens), "context": context,
             "scored": arguments.scored or context, "dense_prefix": arguments.dense_prefix, "calibration": calibration.source}
    if arguments.figure:
        draw_quality(rows, arguments.figure)
    if arguments.json:
        print(json.dumps(about | {"rows": rows}, indent=1))
        return
    print(", ".join(f"{key.replace('_', ' ')}: {value}" for key, value in about.items()))
    width = max(len(row["allocation"]) for row in rows)
    print(f"{'':>{width}} {'target':>7} {'realised':>9} {'perplexity':>11}" + f" {'at target':>10}" * (not arguments.sources)
          + f" {'agreement':>10} {'KL':>8}" + f" {'functions':>10}" * bool(functions))
    for row in rows:
        at = f"{row['perplexity_at_target']:10.3f}" if row.get("perplexity_at_target") else f"{'-':>10}"
        print(f"{row['allocation']:>{width}} {row['target']:7.0%} {row['sparsity']:9.1%} {row['perplexity']:11.3f} "
              + f"{at} " * (not arguments.sources) + f"{row['agreement']:10.1%} {row['kl']:8.4f}"
              + (f" {row['functions']:10.1%}" if functions else ""))
