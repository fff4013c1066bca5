"""What a calibration is, and how the threshold of each linear is read from it.

To drop half of the inputs of a linear one has to know the magnitude that half of them stay below. TEAL takes it
offline (arXiv 2408.14690, section 4): run some text through the dense model, keep the distribution of |x| where each
linear reads it, and use its quantiles as thresholds. At sparsity s,

    t(s) = the value that a share s of all |x| stays below

    share of |x|
      ▇
      ▇ ▆
      ▇ ▇ ▅
      ▇ ▇ ▇ ▄ ▃ ▂ ▂ ▁ ▁ ▁ ▁
      └─────┴──────────────────► |x|
         t(50 %)

A block has four places where linears read, and so four distributions: attention in (q, k, v), attention out (o),
MLP in (gate, up), MLP middle (down).

How much of a model-wide sparsity each linear gets is a second question: an answer is called an allocation, and allocate.py
explains those that there are. Some weigh each channel by how much it matters; then the distribution is that of |x| times the
channel's weight, and its quantile over that weight is a threshold for each channel (`Calibration._read`). A calibration holds what they are read from. It belongs to a model, so it says what it was made
from, and is refused elsewhere.
"""
import json
from dataclasses import dataclass, field
from types import SimpleNamespace

import torch

from checkpoint import block_linears, linear_names, read_header, read_safetensors, write_safetensors
from cli import InputError

SITES = ("attention in", "attention out", "MLP in", "MLP middle")
SITE_OF = {  # where each of the seven linears of a block reads, in the order of block_linears
    "self_attn.q_proj": 0, "self_attn.k_proj": 0, "self_attn.v_proj": 0, "self_attn.o_proj": 1,
    "mlp.gate_proj": 2, "mlp.up_proj": 2, "mlp.down_proj": 3,
}
LINEARS = tuple(SITE_OF)
PRICED_AT = (0.3, 0.5, 0.65, 0.75)       # model-wide sparsities at which prices are measured
BEST_FIRST = ("priced", "balanced", "fisher-channel", "fisher", "greedy", "uniform", "wina")       # the first held is used if none is named
EVEN = ("uniform", "wina")       # those of them that give every linear the same share

FORMAT = "minTEAL calibration 2"         # what the file says it is

# Magnitudes are counted on a logarithmic scale that needs no look at the data first: 32 bins an octave, 2.2 % wide,
# from 2^-20 (what is smaller falls into bin 0, zeros too) to 2^12.
LOWEST, HIGHEST, PER_OCTAVE = -20, 12, 32
BINS = (HIGHEST - LOWEST) * PER_OCTAVE


def histogram(x):
    """Counts (BINS,) int64 of the magnitudes in x (any shape)."""
    place = (x.abs().float().log2() - LOWEST) * PER_OCTAVE                   # -inf for zeros
    if not place.max() < float("inf"):
        raise InputError("the activations hold NaN or infinity: the model cannot be calibrated in this dtype")
    return torch.bincount(place.clamp(0, BINS - 1).long().flatten(), minlength=BINS)


def quantile(counts, share):
    """The magnitudes (...) that shares (...) in [0, 1) of what was counted (..., BINS) stay below; 0 for a share of 0."""
    share = torch.as_tensor(share, dtype=torch.float64).expand(counts.shape[:-1])
    total = counts.double().cumsum(-1)                                       # (..., BINS)
    wanted = (share * total[..., -1]).unsqueeze(-1)
    place = torch.searchsorted(total, wanted).clamp(max=BINS - 1)            # the bin in which it lies
    inside = counts.double().gather(-1, place)
    below = total.gather(-1, place) - inside
    position = (place + (wanted - below) / inside.clamp(min=1)).squeeze(-1)  # in bins, with the fraction of the last one
    return torch.exp2(position / PER_OCTAVE + LOWEST) * (share > 0)


def share_below(counts, value):
    """The inverse of `quantile`: the share (...) of what was counted (..., BINS) that lies below `value` (...)."""
    position = ((value.double().log2() - LOWEST) * PER_OCTAVE).clamp(0, BINS - 1e-6).unsqueeze(-1)
    place = position.long()
    total = counts.double().cumsum(-1)
    inside = counts.double().gather(-1, place)
    below = total.gather(-1, place) - inside
    return ((below + (position - place) * inside) / total[..., -1:]).squeeze(-1)


# ---------------------------------------------------------------------------------------------------------
# The calibration of a model

@dataclass
class Calibration:
    """What is known of a model's activations, from which thresholds for any sparsity are read.

    shapes: what the model looks like; source: what text this was made from
    fingerprint: (256,) float32 of the model's embedding, which tells models of one shape apart
    histograms: {"input": (layers, 4, BINS) of |x| by site; if known "gate": (layers, BINS) of |silu(gate)|, "head": (BINS,) of
                 the head's |x|, "fisher-channel" and "wina": (layers, 7, BINS) of |x| times that criterion's weights}, int64
    weights: {"fisher-channel" or "wina": {linear: (in,)}}: how much each channel counts, root mean square 1
    fisher: (layers, 7): the mean F of each linear
    greedy: (layers, steps, 7): the sparsity of each linear along the path of the greedy allocation; None without
    priced: (len(PRICED_AT), layers, 7): the sparsity of each linear at these levels of the priced allocation; None without
    """
    shapes: dict
    source: str
    fingerprint: torch.Tensor
    histograms: dict
    weights: dict = field(default_factory=dict)
    fisher: torch.Tensor | None = None
    greedy: torch.Tensor | None = None
    priced: torch.Tensor | None = None

    @property
    def allocations(self):
        """The names of the allocations that this calibration holds, the best first."""
        held = {"uniform"} | self.weights.keys()
        held |= {"fisher", "balanced"} if self.fisher is not None else set()
        held |= {name for name in ("greedy", "priced") if getattr(self, name) is not None}
        return [name for name in BEST_FIRST if name in held]

    def sizes(self):
        """(outputs (7,), share of a block's weights (7,)) of the linears of a block, float64."""
        shapes = torch.tensor(list(block_linears(SimpleNamespace(**self.shapes)).values()), dtype=torch.float64)
        weights = shapes.prod(1)
        return shapes[:, 0], weights / weights.sum()

    def sparsities(self, sparsity, allocation=None):
        """The share (layers, 7) of each linear's inputs that an allocation drops, float64; model-wide it is `sparsity`."""
        return self._read(sparsity, allocation)[1]

    def thresholds(self, sparsity, allocation=None):
        """{name of a linear: tensor () or (in,), float32} that let a share `sparsity` in [0, 1) of the blocks' weights go unread.

        allocation: one of `allocations`, or None for the first of them. With inputs dropped in front of it, a layer sees
        others than those that were counted here: the share realised differs by a point or so.
        """
        values, _, weights = self._read(sparsity, allocation)                # (layers, 7)
        return self._by_name(values, weights)

    def thresholds_at(self, shares):
        """The thresholds of fisher-channel that drop given shares (layers, 7)."""
        return self._by_name(quantile(self.histograms["fisher-channel"], shares), self.weights["fisher-channel"])

    def _by_name(self, values, weights):
        names = linear_names(SimpleNamespace(**self.shapes))
        return {name: (value / weights[name] if weights else value).float() for name, value in zip(names, values.flatten())}

    def _in_order(self, criterion):
        """{linear: weights} of a criterion for all linears of all blocks, in their order; KeyError if one is missing."""
        return {name: self.weights[criterion][name] for name in linear_names(SimpleNamespace(**self.shapes))}

    def gate_thresholds(self, sparsity):
        """(layers,): what a share `sparsity` of all |silu(gate)| of each block stays below, the threshold of CATS."""
        return quantile(self._counts("gate"), sparsity).float()

    def head_threshold(self, sparsity):
        """The threshold () at which the head drops a share `sparsity` of its inputs. The paper leaves the head dense."""
        return quantile(self._counts("head"), sparsity).float()

    def _counts(self, name):
        if name not in self.histograms:
            raise InputError(f"this calibration holds no distribution of the {name}: it is {self.source}")
        return self.histograms[name]

    def _read(self, sparsity, allocation):
        """(thresholds on the weighted magnitudes (layers, 7), shares they drop (layers, 7), the weights or None)"""
        if not 0 <= sparsity < 1:
            raise InputError(f"sparsity is {sparsity}, expected at least 0 and below 1")
        allocation = allocation or self.allocations[0]
        if allocation not in self.allocations:
            known = "make it with: python calibrate.py --model FOLDER" + " --greedy" * (allocation == "greedy") \
                if allocation in BEST_FIRST else f"known are {', '.join(BEST_FIRST)}"
            raise InputError(f"allocation {allocation!r} is not in this calibration, which holds "
                             f"{', '.join(self.allocations)}; {known}")
        criterion = "fisher-channel" if allocation in ("balanced", "priced") else allocation
        weights = self.weights.get(criterion)
        # (layers, 7, BINS): the distribution that each linear's threshold is read from
        counts = self.histograms[criterion] if weights else self.histograms["input"][:, list(SITE_OF.values())]
        if allocation == "greedy":
            shares = self._along_the_path(sparsity)
        elif allocation == "priced":
            shares = self._between_levels(sparsity)
        elif allocation in EVEN or sparsity == 0:
            shares = torch.full(counts.shape[:2], float(sparsity), dtype=torch.float64)
        else:
            shares = self._at_one_price(counts, sparsity)
        if allocation == "balanced" and sparsity:
            by_block = torch.cat([self._at_one_price(counts, sparsity, slice(i, i + 1)) for i in range(len(counts))])
            shares = (shares + by_block) / 2
        return quantile(counts, shares), shares, weights

    def _at_one_price(self, counts, sparsity, layers=slice(None)):
        """The shares (layers, 7) that one λ for these layers drops of `counts` (all layers, 7, BINS), `sparsity` in the mean.

        λ, the rise of the loss for each weight not read, is found by bisection: the larger, the more is dropped.
        """
        outputs, size = self.sizes()
        unit = (outputs / self.fisher[layers].double().clamp(min=1e-300)).sqrt()             # the threshold at λ = 1
        low, high = unit.max().log2().neg() + LOWEST, unit.min().log2().neg() + HIGHEST      # of log2 √λ: all kept, all dropped
        for _ in range(60):
            middle = (low + high) / 2
            shares = share_below(counts[layers], unit * middle.exp2())
            low, high = (middle, high) if (shares * size).sum(1).mean() < sparsity else (low, middle)
        return shares

    def _along_the_path(self, sparsity):
        """The sparsities (layers, 7) at which the greedy path of each block passes a model-wide sparsity."""
        _, size = self.sizes()
        found = []
        for path in self.greedy.double():                                    # (steps, 7)
            reached = path @ size                                            # (steps,), rising
            if sparsity > reached[-1]:                                       # behind its end: what is kept shrinks evenly
                found.append(1 - (1 - path[-1]) * (1 - sparsity) / (1 - reached[-1]))
                continue
            after = int(torch.searchsorted(reached, sparsity).clamp(1, len(path) - 1))
            fraction = (sparsity - reached[after - 1]) / (reached[after] - reached[after - 1])
            found.append(path[after - 1] + fraction * (path[after] - path[after - 1]))
        return torch.stack(found)

    def _between_levels(self, sparsity):
        """The priced shares (layers, 7), linear between the levels they were found at; behind the last what is kept shrinks evenly."""
        levels, shares = torch.tensor([0.0, *PRICED_AT]), torch.cat((torch.zeros_like(self.priced[:1]), self.priced)).double()
        if sparsity >= PRICED_AT[-1]:
            return 1 - (1 - shares[-1]) * (1 - sparsity) / (1 - PRICED_AT[-1])
        after = int(torch.searchsorted(levels, sparsity, right=True))
        fraction = (sparsity - levels[after - 1]) / (levels[after] - levels[after - 1])
        return shares[after - 1] + fraction * (shares[after] - shares[after - 1])

    def check(self, model):
        """Raises InputError if this was made for another model."""
        for key, value in shapes_of(model.config).items():
            if self.shapes.get(key) != value:
                raise InputError(f"this calibration was made for another model: {key} is {self.shapes.get(key)} in it, "
                                 f"{value} in the model")
        if not torch.allclose(self.fingerprint, fingerprint_of(model.model.embed_tokens.weight.detach()), rtol=2**-6, atol=1e-6):
            raise InputError("this calibration was made for another model of the same shape: the embeddings differ")

    def save(self, path):
        """Writes the calibration as a safetensors file."""
        tensors = {"fingerprint": self.fingerprint}
        tensors |= {f"histograms.{name}": counts.to(torch.int32 if counts.max() < 2**31 else torch.int64)
                    for name, counts in self.histograms.items()}
        tensors |= {f"weights.{criterion} {name}": values for criterion, linears in self.weights.items()
                    for name, values in linears.items()}
        tensors |= {name: getattr(self, name) for name in ("fisher", "greedy", "priced") if getattr(self, name) is not None}
        write_safetensors(path, tensors, {"format": FORMAT, "source": self.source, "shapes": json.dumps(self.shapes)})

    @staticmethod
    def load(path):
        """Reads what `save` wrote; raises InputError for anything else."""
        metadata = read_header(path)[1]
        if metadata.get("format") != FORMAT:
            raise InputError(f"{path}: not a calibration of this version: format is {metadata.get('format')!r}, "
                             f"expected {FORMAT!r}; make it with: python calibrate.py --model FOLDER")
        tensors = {name: tensor.clone() for name, tensor in read_safetensors(path).items()}
        for name, tensor in tensors.items():
            if tensor.is_floating_point() and not tensor.isfinite().all():
                raise InputError(f"{path}: a damaged calibration: {name} holds NaN or infinity; make it with: python calibrate.py --model FOLDER")
        try:
            made = Calibration(json.loads(metadata["shapes"]), metadata["source"], tensors.pop("fingerprint").float(), {})
            layers = made.shapes["num_hidden_layers"]
            for name, tensor in tensors.items():
                kind, _, rest = name.partition(".")
                if kind == "histograms":
                    made.histograms[rest] = tensor.long()
                elif kind == "weights":
                    criterion, linear = rest.split(" ")
                    made.weights.setdefault(criterion, {})[linear] = tensor
                elif name in ("fisher", "greedy", "priced"):
                    setattr(made, name, tensor)
            inputs = [size for _, size in block_linears(SimpleNamespace(**made.shapes)).values()] * layers
            expected = {"input": (layers, len(SITES), BINS), "gate": (layers, BINS), "head": (BINS,)}
            if not made.histograms.keys() & {"gate", "head"}:      # the statistics of TEAL's authors have neither
                expected = {"input": expected["input"]}
            expected |= {criterion: (layers, len(LINEARS), BINS) for criterion in made.weights}
            whole = made.fingerprint.shape == (256,) and made.weights.keys() <= set(BEST_FIRST) \
                and {name: tuple(counts.shape) for name, counts in made.histograms.items()} == expected \
                and all((counts >= 0).all() and (counts.sum(-1) > 0).all() for counts in made.histograms.values()) \
                and all([tuple(weight.shape) for weight in of.values()] == [(size,) for size in inputs]
                        and all((weight > 0).all() for weight in of.values()) for of in map(made._in_order, made.weights)) \
                and (made.fisher is None) == ("fisher-channel" not in made.weights) \
                and (made.fisher is None or made.fisher.shape == (layers, len(LINEARS)) and bool((made.fisher >= 0).all())) \
                and (made.greedy is None or made.greedy.shape[::2] == (layers, len(LINEARS))
                     and bool((made.greedy.diff(dim=1) >= 0).all() and made.greedy.min() == 0 and made.greedy.max() < 1)) \
                and (made.priced is None or made.fisher is not None and made.priced.shape == (len(PRICED_AT), layers, len(LINEARS))
                     and bool((made.priced >= 0).all() and (made.priced < 1).all()))
        except (AttributeError, KeyError, TypeError, ValueError, RuntimeError, RecursionError):
            whole = False
        if not whole:
            raise InputError(f"{path}: a damaged calibration: a part is missing or misshapen; make it with: python calibrate.py --model FOLDER")
        return made


def shapes_of(config):
    return {key: getattr(config, key) for key in ("hidden_size", "intermediate_size", "num_hidden_layers", "head_dim",
                                                  "num_attention_heads", "num_key_value_heads", "vocab_size")}


def fingerprint_of(weight):
    """256 values spread over the embedding (vocab, hidden), float32 (256,); the same in every dtype up to rounding."""
    place = torch.linspace(0, weight.numel() - 1, 256, dtype=torch.float64).long().to(weight.device)
    return weight[place // weight.shape[1], place % weight.shape[1]].float().cpu()
