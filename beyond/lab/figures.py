"""Figures: what the measures draw with, and a picture of what a calibration holds.

    distributions.png    the density of x where linears read, with its thresholds
    allocations.png      the share of its inputs that each allocation makes each linear drop

    python -m beyond.lab.figures [--model FOLDER] [--out FOLDER]
"""
from pathlib import Path

import torch

from beyond.folders import load_model
from calibrate import BINS, LINEARS, LOWEST, PER_OCTAVE, SITES, load_calibration, quantile
from model import InputError, Parser, check_output, command_line, replacing, require


def pyplot():
    """Return matplotlib's pyplot, set up for figures to be read on a light and on a dark page."""
    try:
        import matplotlib
    except ImportError:
        raise InputError("figures need matplotlib: pip install matplotlib") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot
    pyplot.rcParams.update({"figure.dpi": 110, "savefig.facecolor": "white", "font.size": 9,
                            "axes.spines.top": False, "axes.spines.right": False,
                            "axes.grid": True, "grid.alpha": 0.25, "legend.frameon": False})
    return pyplot


def check_figure(path, option="--figure"):
    """Raise InputError, before anything is measured, if no PNG can be drawn at `path`."""
    require(str(path).endswith(".png"), f"{option} is {path}, expected a name that ends in .png")
    check_output(path, option)
    pyplot()


def save_figure(figure, path):
    """Write a figure of pyplot as a PNG, whole or not at all, and forget it."""
    with replacing(path) as file:
        figure.savefig(file, format="png")
    pyplot().close(figure)


# --------------------------------------------------------------------------------------------------
# What a calibration holds

def draw_distributions(calibration, path):
    """Draw the density of x at the four sites of an early, a middle and a late block, as a PNG."""
    layers = len(calibration.counts)                                 # (layers, 4, BINS)
    edges = torch.exp2(torch.arange(0, BINS + 1, 8) / PER_OCTAVE + LOWEST)
    middles = (edges[1:] + edges[:-1]) / 2
    figure, axes = pyplot().subplots(3, 4, figsize=(10, 6), layout="constrained")
    for layer, row in zip((0, layers // 2, layers - 1), axes):
        for site, axis in enumerate(row):
            counts = calibration.counts[layer, site]
            share = counts.view(-1, 8).sum(1) / counts.sum()
            density = share / edges.diff() / 2             # of x: half lies on either side of 0
            reach = quantile(counts, 0.98).item()
            shown = (middles <= reach) & (middles > reach / 400)
            axis.fill_between(torch.cat((-middles[shown].flip(0), middles[shown])),
                              torch.cat((density[shown].flip(0), density[shown])),
                              color="tab:blue", alpha=0.5, lw=0)
            for sparsity, style in ((0.25, ":"), (0.5, "--"), (0.65, "-")):
                threshold = quantile(counts, sparsity).item()
                axis.vlines((-threshold, threshold), 0, 1, color="tab:red", lw=0.9, ls=style,
                            transform=axis.get_xaxis_transform(),
                            label=f"{sparsity:.0%} lie inside")
            axis.set(yticks=[], xlim=(-reach, reach), ylim=(0, None))
            axis.set_title(f"{SITES[site]}, block {layer}", fontsize=9)
    for axis in axes[:, 0]:
        axis.set_ylabel("density")
    for axis in axes[2]:
        axis.set_xlabel("activation x")
    axes[0, 3].legend(fontsize=7, loc="upper right")
    save_figure(figure, path)


def draw_allocations(calibration, path, sparsity=0.5):
    """Draw the share that each allocation makes each linear drop, over depth, as a PNG."""
    names = calibration.allocations
    rows = -(-len(names) // 3)
    figure, axes = pyplot().subplots(rows, 3, figsize=(9, 2.8 * rows), sharey=True,
                                     layout="constrained", squeeze=False)
    for axis, allocation in zip(axes.flat, names):
        shares = calibration.shares(sparsity, allocation)            # (layers, 7)
        lines = axis.plot(shares * 100, marker="o", ms=3, lw=1.2)
        axis.axhline(sparsity * 100, color="grey", lw=0.8, ls="--")
        axis.set(title=allocation, xlabel="block", ylim=(0, 100))
    for axis in axes.flat[len(names):]:
        axis.remove()
    for axis in axes[:, 0]:
        axis.set_ylabel(f"sparsity of each linear\nat {sparsity:.0%} of all (%)")
    figure.legend(lines, [linear.split(".")[1].removesuffix("_proj") for linear in LINEARS],
                  loc="outside right center")
    save_figure(figure, path)


def main():
    parser = Parser(description="Draws what a calibration holds.")
    parser.add_model()
    parser.add_calibration()
    parser.add_argument("--out", metavar="FOLDER", type=Path, default="figures",
                        help="where the PNG files go (default: figures)")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    paths = [arguments.out / name for name in ("distributions.png", "allocations.png")]
    for path in paths:
        check_figure(path, "--out")
    model, _ = load_model(arguments.model, arguments.device, arguments.dtype)
    calibration = load_calibration(model, arguments.model, arguments.calibration)
    for draw, path in zip((draw_distributions, draw_allocations), paths):
        draw(calibration, path)
        print(path)


if __name__ == "__main__":
    command_line(main)
