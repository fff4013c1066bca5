"""Where thresholds come from: what the activations of a model look like.

To drop half of the inputs of a linear one has to know the magnitude that half of them stay below: the median
of |x|. TEAL takes it offline (arXiv 2408.14690, section 4): run some text through the dense model, keep the
distribution of |x| where each linear reads it, and use its quantiles as thresholds. At sparsity s,

    t(s) = the value that a share s of all |x| stays below

    share of |x|
      ▇
      ▇ ▆
      ▇ ▇ ▅
      ▇ ▇ ▇ ▄ ▃ ▂ ▂ ▁ ▁ ▁ ▁
      └─────┴──────────────────► |x|
         t(50 %)

A block has four places where linears read, and so four distributions:

    attention in     q_proj, k_proj, v_proj     the normalised residual stream
    attention out    o_proj                     what the heads have gathered
    MLP in           gate_proj, up_proj         the normalised residual stream
    MLP middle       down_proj                  silu(gate) * up

The first tokens of a sequence are left out: they are attention sinks, whose activations are many times as large
as all others (arXiv 2309.17453). Thresholds belong to a model, so a calibration says what it was made from,
and is refused elsewhere.

    python calibrate.py [--model FOLDER] [--text FILE]      writes FOLDER/calibration.safetensors
"""
import argparse
import json
from dataclasses import dataclass
from pathlib import Path

import torch

from model import (DEMO, InputError, block_linears, check_tokens, command_line, load_model, progress_line, read_header,
                   read_safetensors, write_safetensors)
from sparsify import default_context, read_tokens, windows_of

SITES = {  # where linears of a block read, and which read there
    "attention in": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "attention out": ("self_attn.o_proj",),
    "MLP in": ("mlp.gate_proj", "mlp.up_proj"),
    "MLP middle": ("mlp.down_proj",),
}
SINKS = 4                # tokens at the start of a sequence that are no measure of the others

# Magnitudes are counted on a logarithmic scale that needs no look at the data first: 64 bins an octave, 1.1 % wide,
# from 2^-30 (what is smaller falls into bin 0, zeros too) to 2^18.
LOWEST, HIGHEST, PER_OCTAVE = -30, 18, 64
BINS = (HIGHEST - LOWEST) * PER_OCTAVE


def histogram(x):
    """Counts (BINS,) int64 of the magnitudes in x (any shape)."""
    place = (x.abs().float().log2() - LOWEST) * PER_OCTAVE                   # -inf for zeros
    return torch.bincount(place.clamp(0, BINS - 1).long().flatten(), minlength=BINS)


def quantile(counts, share):
    """The magnitude that a `share` in [0, 1) of what was counted (..., BINS) stays below; 0.0 for a share of 0."""
    total = counts.double().cumsum(-1)                                       # (..., BINS)
    wanted = share * total[..., -1:]
    place = torch.searchsorted(total, wanted).clamp(max=BINS - 1)            # the bin in which it lies
    inside = counts.double().gather(-1, place)
    below = total.gather(-1, place) - inside
    position = place + (wanted - below) / inside.clamp(min=1)                # in bins, with the fraction of the last one
    value = torch.exp2(position / PER_OCTAVE + LOWEST).squeeze(-1)
    return value if share > 0 else torch.zeros_like(value)


@dataclass
class Calibration:
    """The distributions of a model's activations, from which thresholds for any sparsity are read.

    histograms: (layers, 4, BINS) int64, in the order of SITES
    shapes: what the model looks like; source: what text it was made from
    fingerprint: (256,) float32 of the model's embedding, which tells models of one shape apart
    """
    histograms: torch.Tensor
    shapes: dict
    source: str
    fingerprint: torch.Tensor

    def thresholds(self, sparsity, allocation=None):
        """{name of a linear: 0-d tensor} that make a share `sparsity` in [0, 1) of the blocks' weights skippable.

        allocation: how the sparsity is shared out. "uniform": each linear's own quantile (TEAL, section 4).
        None: the best this calibration holds.
        """
        if not 0 <= sparsity < 1:
            raise InputError(f"sparsity is {sparsity}, expected at least 0 and below 1")
        if allocation not in (None, "uniform"):
            raise InputError(f"allocation {allocation!r} is not in this calibration; it holds: uniform")
        values = quantile(self.histograms, sparsity).float()                 # (layers, 4)
        return {f"model.layers.{layer}.{name}": values[layer, site]
                for layer in range(len(values)) for site, names in enumerate(SITES.values()) for name in names}

    def check(self, model):
        """Raises InputError if this was made for another model."""
        shapes = shapes_of(model.config)
        for key, value in shapes.items():
            if self.shapes.get(key) != value:
                raise InputError(f"this calibration was made for another model: {key} is {self.shapes.get(key)} in it, "
                                 f"{value} in the model")
        if not torch.allclose(self.fingerprint, fingerprint_of(model), rtol=2**-6, atol=1e-6):
            raise InputError("this calibration was made for another model of the same shape: the embeddings differ")

    def save(self, path):
        """Writes the calibration as a safetensors file."""
        write_safetensors(path, {"histograms": self.histograms.to(torch.int32), "fingerprint": self.fingerprint},
                          {"format": "minTEAL calibration 1", "source": self.source, "shapes": json.dumps(self.shapes)})

    @staticmethod
    def load(path):
        """Reads what `save` wrote; raises InputError for anything else."""
        metadata = read_header(path)[1]
        if metadata.get("format") != "minTEAL calibration 1":
            raise InputError(f"{path}: not a calibration: format is {metadata.get('format')!r}, "
                             f"expected 'minTEAL calibration 1'")
        tensors = read_safetensors(path)
        shapes = json.loads(metadata.get("shapes", "{}"))
        expected = (shapes.get("num_hidden_layers"), len(SITES), BINS)
        if {"histograms", "fingerprint"} - tensors.keys() or tensors["histograms"].shape != expected:
            raise InputError(f"{path}: not a whole calibration: expected histograms {expected} and a fingerprint")
        histograms = tensors["histograms"].long()
        if (histograms < 0).any() or (histograms.sum(-1) == 0).any():
            raise InputError(f"{path}: a damaged calibration: a histogram is empty or has negative counts")
        return Calibration(histograms, shapes, metadata.get("source", "unknown text"), tensors["fingerprint"].clone())


def shapes_of(config):
    return {key: getattr(config, key) for key in ("hidden_size", "intermediate_size", "num_hidden_layers",
                                                  "num_attention_heads", "num_key_value_heads", "vocab_size")}


def fingerprint_of(model):
    """256 values spread over the embedding, float32 (256,); the same in every dtype up to rounding."""
    weight = model.model.embed_tokens.weight.detach().flatten()
    return weight[torch.linspace(0, len(weight) - 1, 256, dtype=torch.float64).long()].float().cpu()


@torch.no_grad()
def calibrate(model, tokens, context=None, source="unknown text", progress=lambda text: None):
    """Runs `tokens` (N,) int64 through the dense model, in windows of `context`, and returns their Calibration.

    context: None is the model's own, at most 2048. Memory does not grow with the number of tokens.
    """
    check_tokens(tokens, model.config)
    context = context or default_context(model)
    if context <= SINKS:
        raise InputError(f"a window of {context} tokens leaves none behind the first {SINKS}")
    windows = windows_of(tokens, context)
    counts = torch.zeros(model.config.num_hidden_layers, len(SITES), BINS, dtype=torch.int64, device=model.device)
    hooks = []
    for layer, block in enumerate(model.model.layers):
        for site, names in enumerate(SITES.values()):
            def count(module, inputs, place=counts[layer, site]):
                place += histogram(inputs[0][:, SINKS:])
            hooks.append(block.get_submodule(names[0]).register_forward_pre_hook(count))
    try:
        for done, part in enumerate(windows.split(4)):
            model(part[:, :-1].to(model.device), last_only=True)
            progress(f"calibrating: {min(4 * done + 4, len(windows)) * context:,} of {len(windows) * context:,} tokens")
    finally:
        for hook in hooks:
            hook.remove()
    return Calibration(counts.cpu(), shapes_of(model.config), f"{len(windows) * context:,} tokens of {source}",
                       fingerprint_of(model))


def load_calibration(model, name, path=None):
    """The calibration beside the checkpoint `name`, or at `path`, checked to be the model's.

    For "random:PRESET" it is made now, from random tokens: its thresholds are as meaningless as the weights.
    """
    if path is None and str(name).startswith("random:"):
        tokens = torch.randint(model.config.vocab_size, (129,), generator=torch.Generator().manual_seed(0))
        return calibrate(model, tokens, 128, "random tokens", progress_line)
    path = Path(path or Path(name) / "calibration.safetensors")
    if not path.exists():
        raise InputError(f"{path}: no calibration. Make one with: python calibrate.py --model {name}")
    calibration = Calibration.load(path)
    try:
        calibration.check(model)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    return calibration


def main():
    parser = argparse.ArgumentParser(description="Calibrates a checkpoint: the distributions its thresholds are read from.")
    parser.add_argument("--model", default=str(DEMO), help="checkpoint folder (default: the demo model)")
    parser.add_argument("--text", metavar="FILE", help="UTF-8 text to run (default: the standard library's held-in part)")
    parser.add_argument("--tokens", type=int, default=100_000, help="how many tokens of it at most (default: 100000)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu",
                        help="(default: cuda where there is one, else cpu)")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], help="(default: the checkpoint's own)")
    arguments = parser.parse_args()
    if arguments.model.startswith("random:"):
        raise InputError(f"{arguments.model} has random weights: commands calibrate it on random tokens as they start")
    model, tokenizer = load_model(arguments.model, arguments.device, arguments.dtype)
    tokens, source = read_tokens(tokenizer, arguments.text, "train")
    calibration = calibrate(model, tokens[:arguments.tokens], source=source, progress=progress_line)
    path = Path(arguments.model) / "calibration.safetensors"
    calibration.save(path)
    print(f"{path}: from {calibration.source}")
    print("median of |x| where linears read, by block:")
    print(f"{'block':>6}" + "".join(f"{site:>15}" for site in SITES))
    for layer, values in enumerate(quantile(calibration.histograms, 0.5)):
        print(f"{layer:6}" + "".join(f"{value:15.4f}" for value in values))


if __name__ == "__main__":
    command_line(main)
