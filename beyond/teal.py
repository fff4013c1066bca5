"""The statistics that TEAL's authors publish, as a calibration.

github.com/FasterDecoding/TEAL has, in models/NAME, histograms of the inputs of each block and the
paths of the greedy allocation, for Llama-2, Llama-3 and Mistral. With them a model has the paper's
own thresholds, and no text is run:

    histograms/layer-I/{self_attn,mlp}/histograms.pt     h1: attention in, MLP in
                                                         h2: attention out, MLP middle
    lookup/layer-I/results.csv                           a row for each step of the greedy path

The seam: a `Calibration` holds distributions and tables of shares, wherever they come from.

    python -m beyond.teal --model FOLDER TEAL/models/NAME    writes FOLDER/calibration.safetensors
"""
import csv
from pathlib import Path

import numpy as np
import torch

from beyond.folders import read_config
from calibrate import BINS, HIGHEST, LINEARS, LOWEST, SITES, Calibration, output_of, shares_at
from model import Parser, command_line, refusing, require


def import_teal(folder, config):
    """Return a Calibration with the paper's two allocations, from the authors' files for a model.

    folder: models/NAME of their repository. Raises InputError for files that are missing or hold
    something else.
    """
    folder = Path(folder)
    inputs = []
    paths = []
    for layer in range(config.num_hidden_layers):
        for part in ("self_attn", "mlp"):
            path = folder / "histograms" / f"layer-{layer}" / part / "histograms.pt"
            inputs += [authors_histogram(path, key) for key in ("h1", "h2")]
        paths.append(authors_path(folder / "lookup" / f"layer-{layer}" / "results.csv"))
    require(not (folder / "histograms" / f"layer-{config.num_hidden_layers}").exists(),
            f"{folder}: statistics of more layers than the model's {config.num_hidden_layers}")
    calibration = Calibration(
        config, f"the statistics TEAL's authors publish for {folder.name}",
        torch.stack(inputs).view(-1, len(SITES), BINS),
        {"uniform": (torch.zeros(0), torch.zeros(0, len(paths), len(LINEARS)))})
    size = calibration.weight_shares()
    tables = [(path[1:] @ size, path[1:]) for path in paths]         # of each block
    levels = torch.arange(1, 100, dtype=torch.float64) / 100         # each that all paths reach
    levels = levels[levels < min(reached[-1] for reached, _ in tables) + 1e-9]           # rounding
    shares = [torch.stack([shares_at(table, level) for table in tables]) for level in levels]
    calibration.tables["greedy"] = levels, torch.stack(shares)       # (L, layers, 7)
    return calibration


def authors_histogram(path, key):
    """Return the counts (BINS,) int64 of |x| from one of the authors' histograms, `key` of a file.

    The authors count x with its sign. Their threshold for a sparsity s is the value below which a
    share 0.5 + s/2 of x lies, as if x were symmetric. So a share 2 * cdf(v) - 1 of |x| is taken to
    lie below v.
    """
    with refusing(f"{path}: not a histogram of TEAL's authors", Exception):     # of many kinds
        tensors = torch.load(path, weights_only=True)
        centers = tensors[f"{key}_centers"].double()
        counts = tensors[key].double()
        require((centers.diff() > 0).all() and (counts >= 0).all() and counts.sum() > 0,
                f"expected counts of {key}, and their centers rising")
        below = counts.cumsum(0) / counts.sum()                      # at each center
        edges = torch.linspace(LOWEST, HIGHEST, BINS + 1, dtype=torch.float64).exp2()
        cdf = torch.from_numpy(np.interp(edges, centers, below, right=1.0))
    share = (2 * cdf - 1).clamp(min=0)
    share[0] = 0
    share[-1] = 1
    return (share.diff() * 2**40).long()


def authors_path(path):
    """Return the greedy path (steps, 7) in one of the authors' lookup tables.

    At its far end, from 72 % on in some, shares reach 1 and more. The path is cut there.
    """
    names = [linear.split(".")[1].removesuffix("_proj") for linear in LINEARS]
    rows = [[0.0] * len(LINEARS)]
    with refusing(f"{path}: not a greedy path of TEAL's authors", OSError, LookupError, TypeError,
                  ValueError):
        with open(path, newline="") as file:
            rows += [[float(row[name]) for name in names] for row in csv.DictReader(file)]
        shares = torch.tensor(rows, dtype=torch.float64)
        shares = shares[(shares < 1).all(1).cumprod(0).bool()]
        require(len(shares) > 1 and (shares >= 0).all() and (shares.diff(dim=0) > -1e-6).all(),
                f"expected rising shares below 1 under {', '.join(names)}")
    return shares.cummax(0).values


def main():
    parser = Parser(description="Writes a calibration from the statistics of TEAL's authors.")
    parser.add_argument("teal", metavar="DIR", type=Path, help="models/NAME of their repository")
    parser.add_argument("--model", required=True, metavar="FOLDER",
                        help="the checkpoint folder (no default: it is needed)")
    parser.add_argument("--out", metavar="FILE", type=Path,
                        help="(default: calibration.safetensors in the checkpoint folder)")
    arguments = parser.parse_args()
    path = output_of(arguments)
    calibration = import_teal(arguments.teal, read_config(arguments.model))
    calibration.save(path)
    print(f"{path}: {calibration.source}; allocations: {', '.join(calibration.allocations)}")


if __name__ == "__main__":
    command_line(main)
