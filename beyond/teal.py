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

import torch

from beyond.folders import read_config
from calibrate import (BINS, HIGHEST, LINEARS, LOWEST, SITES, Calibration, output_of, shapes_of,
                       table_of, uniform_table)
from model import InputError, Parser, check_output, command_line, require


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
        shapes_of(config), f"the statistics TEAL's authors publish for {folder.name}",
        torch.stack(inputs).view(-1, len(SITES), BINS), {"uniform": uniform_table(len(paths))})
    calibration.tables["greedy"] = table_of(paths, calibration.weight_shares())
    return calibration


def authors_histogram(path, key):
    """Return the counts (BINS,) int64 of |x| from one of the authors' histograms, `key` of a file.

    The authors count x with its sign. Their threshold for a sparsity s is the value below which a
    share 0.5 + s/2 of x lies, as if x were symmetric. So a share 2 * cdf(v) - 1 of |x| is taken to
    lie below v.
    """
    try:
        tensors = torch.load(path, weights_only=True)
        centers = tensors[f"{key}_centers"].double()
        counts = tensors[key].double()
        whole = (centers.shape == counts.shape and len(centers) > 1
                 and bool((centers.diff() > 0).all() and (counts >= 0).all() and counts.sum() > 0))
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None
    except Exception:                    # what torch.load raises for other files is of many kinds
        whole = False
    require(whole, f"{path}: not a histogram of TEAL's authors: expected {key} and {key}_centers")
    edges = torch.linspace(LOWEST, HIGHEST, BINS + 1, dtype=torch.float64).exp2()
    below = counts.cumsum(0) / counts.sum()                          # at each center
    after = torch.searchsorted(centers, edges).clamp(1, len(centers) - 1)
    fraction = (edges - centers[after - 1]) / (centers[after] - centers[after - 1])
    cdf = below[after - 1] + fraction * (below[after] - below[after - 1])
    share = torch.where(edges > centers[-1], 1.0, 2 * cdf - 1).clamp(0, 1).cummax(0).values
    share[0] = 0
    share[-1] = 1
    return (share.diff() * 2**40).long()


def authors_path(path):
    """Return the greedy path (steps, 7) in one of the authors' lookup tables.

    At its far end, from 72 % on in some, shares reach 1 and more. The path is cut there.
    """
    names = [linear.split(".")[1].removesuffix("_proj") for linear in LINEARS]
    try:
        with open(path, newline="") as file:
            rows = [[float(row[name]) for name in names] for row in csv.DictReader(file)]
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None
    except (KeyError, TypeError, ValueError):
        rows = []
    shares = torch.tensor([[0.0] * len(LINEARS), *rows], dtype=torch.float64)
    too_large = (~(shares < 1)).any(1).nonzero()
    shares = shares[:int(too_large[0])] if len(too_large) else shares
    require(len(shares) > 1 and bool((shares.diff(dim=0) > -1e-6).all() and (shares >= 0).all()),
            f"{path}: not a greedy path of TEAL's authors: expected rising shares below 1 under "
            f"{', '.join(names)}")
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
    check_output(path, "--out")
    calibration = import_teal(arguments.teal, read_config(arguments.model))
    calibration.save(path)
    print(f"{path}: {calibration.source}; allocations: {', '.join(calibration.allocations)}")


if __name__ == "__main__":
    command_line(main)
