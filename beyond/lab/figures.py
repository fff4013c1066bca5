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
    figure, axes = pyplot().subplots(3, 4, figsize=(10, 6), layout="constrained")
    for layer, row in zip((0, layers // 2, layers - 1), axes):
        for site, axis in enumerate(row):
            counts = calibration.counts[layer, site]
            # Half of x lies on either side of 0.
            density = counts.view(-1, 8).sum(1) / counts.sum() / edges.diff() / 2
            reach = quantile(counts, 0.98).item()
            shown = int((edges < reach / 400).sum())       # further in there are few
            for side in (-1, 1):
                axis.stairs(density[shown:], side * edges[shown:], fill=True, color="tab:blue",
                            alpha=0.5)
            for sparsity, style in ((0.25, ":"), (0.5, "--"), (0.65, "-")):
                threshold = quantile(counts, sparsity).item()
                axis.axvspan(-threshold, threshold, fill=False, ec="tab:red", lw=0.9, ls=style,
                             label=f"{sparsity:.0%} lie inside")
            axis.set(yticks=[], xlim=(-reach, reach), title=f"{list(SITES)[site]}, block {layer}")
    figure.supxlabel("activation x")
    figure.supylabel("density")
    axes[0, 3].legend(fontsize=7)
    save_figure(figure, path)


def draw_allocations(calibration, path, sparsity=0.5):
    """Draw the share that each allocation makes each linear drop, over depth, as a PNG."""
    names = calibration.allocations
    figure, axes = pyplot().subplots(1, len(names), figsize=(3 * len(names), 2.8), sharey=True,
                                     layout="constrained", squeeze=False)
    for axis, allocation in zip(axes[0], names):
        shares = calibration.shares(sparsity, allocation)            # (layers, 7)
        lines = axis.plot(shares * 100, marker="o", ms=3, lw=1.2)
        axis.axhline(sparsity * 100, color="grey", lw=0.8, ls="--")
        axis.set(title=allocation, xlabel="block", ylim=(0, 100))
    axes[0, 0].set_ylabel(f"sparsity of each linear\nat {sparsity:.0%} of all (%)")
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
    distributions = arguments.out / "distributions.png"
    allocations = arguments.out / "allocations.png"
    check_figure(distributions, "--out")
    model, _ = load_model(arguments.model, arguments.device, arguments.dtype)
    calibration = load_calibration(model, arguments.model, arguments.calibration)
    draw_distributions(calibration, distributions)
    draw_allocations(calibration, allocations)
    print(f"{distributions}\n{allocations}")


if __name__ == "__main__":
    command_line(main)
