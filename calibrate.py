"""Making a calibration: some text through the dense model, watched where its linears read.

    text ─► windows of tokens ─┬─► forward and back, with labels drawn from the model itself ─► F, how much inputs matter (allocate.py)
                               └─► forward ─► at each linear, the distribution of |x| (and of |x| times how much it matters)
    then, from the distributions, the shares of the priced and the greedy allocation (allocate.py)

10,000 tokens are enough for thresholds within a few percent. The first tokens of a window are left out: they are attention
sinks, to which heads that have nothing to say attend, with activations many times as large as all others (arXiv 2309.17453).

Statistics that TEAL's authors publish for Llama-2, Llama-3 and Mistral can be read in place of all this.

    python calibrate.py [--model FOLDER] [--text FILE]      writes FOLDER/calibration.safetensors
    python calibrate.py --greedy                            with the greedy allocation, which takes minutes
    python calibrate.py --figures figures                   draws what the calibration holds
"""
import contextlib
import csv
import itertools
from pathlib import Path

import torch
import torch.nn.functional as F

from allocate import BATCH, SINKS, add_greedy, add_priced, fisher_information
from calibration import BINS, EVEN, HIGHEST, LINEARS, LOWEST, PER_OCTAVE, SITE_OF, SITES, Calibration, fingerprint_of, histogram, quantile, shapes_of
from checkpoint import Config, linear_names, read_shards
from cli import DEMO, InputError, Parser, command_line, natural, progress_line, pyplot, refuse_beside
from model import check_tokens, load_model
from sparsify import default_context, read_tokens, windows_of


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


@torch.no_grad()
def count_magnitudes(model, windows, linears, weights, progress):
    """The histograms of a Calibration, from one forward pass over windows (W, context + 1)."""
    layers, device = model.config.num_hidden_layers, model.device
    counts = {"input": torch.zeros(layers, len(SITES), BINS), "gate": torch.zeros(layers, BINS), "head": torch.zeros(BINS)}
    counts |= {criterion: torch.zeros(layers, len(LINEARS), BINS) for criterion in weights}
    counts = {name: tensor.long().to(device) for name, tensor in counts.items()}
    weights = {criterion: {name: weight.to(device) for name, weight in of.items()} for criterion, of in weights.items()}
    hooks = contextlib.ExitStack()                         # a handle is a context manager, which takes its hook away
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
        hooks.enter_context(linear.register_forward_hook(count))

    def count_head(module, inputs):
        counts["head"] += histogram(inputs[0][:, SINKS:])
    hooks.enter_context(model.lm_head.register_forward_pre_hook(count_head))
    with hooks:
        for done, part in enumerate(windows.split(BATCH)):
            progress(f"calibrating, magnitudes: window {BATCH * done} of {len(windows)}")
            model(part[:, :-1].to(device))
    return {name: tensor.cpu() for name, tensor in counts.items()}


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


# ---------------------------------------------------------------------------------------------------------
# Figures, and the command line

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
    names = [name for name in calibration.allocations if name not in EVEN] or ["uniform"]
    figure, axes = plt.subplots(-(-len(names) // 3), 3, figsize=(9, 2.8 * -(-len(names) // 3)), sharey=True, layout="constrained", squeeze=False)
    for place, (axis, allocation) in enumerate(itertools.zip_longest(axes.flat, names)):
        if allocation is None:
            axis.remove()
            continue
        shares = calibration.sparsities(sparsity, allocation)
        for i, linear in enumerate(LINEARS):
            axis.plot(shares[:, i] * 100, marker="o", ms=3, lw=1.2, label=linear.split(".")[1].removesuffix("_proj"))
        axis.axhline(sparsity * 100, color="grey", lw=0.8, ls="--")
        axis.set(title=allocation, xlabel="block", ylim=(0, 100))
        if place % 3 == 0:
            axis.set_ylabel(f"sparsity of each linear\nat {sparsity:.0%} of all (%)")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside right center")
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
    parser.add_argument("--import-teal", metavar="DIR", help="instead: the paper's thresholds, from models/NAME of the authors' repository (default: no)")
    parser.add_argument("--figures", metavar="FOLDER", type=Path, help="only draw what the calibration holds, as PNG files (default: no)")
    parser.add_argument("--out", metavar="FILE", type=Path, help="(default: calibration.safetensors in the checkpoint folder)")
    parser.add_device()
    parser.add_precision("; needs --out")
    arguments = parser.parse_args()
    if arguments.model.startswith("random:"):
        raise InputError(f"{arguments.model} has random weights: commands calibrate it on random tokens as they start")
    refuse_beside(arguments, {"import_teal": ("figures", "text", "greedy", "no_fisher"), "figures": ("text", "greedy", "no_fisher")})
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
