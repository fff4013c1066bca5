"""What is dropped: small inputs, by a threshold on their magnitude.

TEAL (arXiv 2408.14690, section 4) replaces every linear of a block, y = W x, by

    y = W s(x)        s(x)_i = x_i if |x_i| > t, else 0

with one threshold t for each input, found offline so that a wanted share of the entries falls below it. The
activations of a Llama are centred on zero with a sharp peak there, so that many entries are small, and dropping
channel i changes y by |x_i| times the norm of column i of W: little, where |x_i| is little.

    entries of x:   0.9  -0.1   0.02  -1.3   0.3  -0.05   0.7   0.1
    |x| > 0.25:      ■     ·     ·      ■     ■      ·     ■     ·       4 of 8 columns of W are read

`sparsify(model, thresholds)` puts a `SparseLinear` in the place of each named linear of a Llama. While one token is
decoded, its small inputs are dropped and their columns never read (kernel.py). Whatever has more tokens than one,
the prompt for instance, is dense: it is bound by arithmetic, which skipping memory does not help.
`sparse_mode` overrides that, since quality is measured on whole sequences.

    python sparsify.py [--model FOLDER] [--text FILE]      quality against sparsity, as a table
"""
import ast
import contextlib
import io
import json
import math
import textwrap
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

import kernel
from model import DEMO, Attention, InputError, MLP, Parser, check_tokens, command_line, load_model, natural, progress_line


# ---------------------------------------------------------------------------------------------------------
# The sparse linears of a model share one state: when they are sparse, their thresholds, and what they counted.

@dataclass
class SparseState:
    where: str               # "decode", "all" or "off": see sparse_mode
    dense_prefix: int        # positions at the start of a sequence that stay dense in mode "all"
    thresholds: torch.Tensor     # (inputs of all sparse linears,) one behind another, so that one copy swaps all
    counts: torch.Tensor         # (sparse linears, 2) int64: entries kept, entries seen


class SparseLinear(nn.Module):
    """A linear that reads only the weights of its large inputs.

    weight_t: (in, out), the transposed weight, the only copy there is; a tensor or a QuantizedWeight.
    `share` gives it its part of the model's state; before, it is dense.
    """

    def __init__(self, weight_t, bias=None):
        super().__init__()
        self.weight_t = nn.Parameter(weight_t, requires_grad=False) if isinstance(weight_t, torch.Tensor) else weight_t
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        self.in_features, self.out_features = weight_t.shape
        self.state = None

    @property
    def weight(self):
        """(out, in), as a dense linear has it; of a quantized one, what it is multiplied with, in float32."""
        return (self.weight_t if isinstance(self.weight_t, torch.Tensor) else self.weight_t.dequantized(torch.float32)).t()

    def share(self, state, threshold, counts):
        """state: the model's; threshold (in,) and counts (2,): views of this linear's part of it."""
        self.state, self.threshold, self.counts = state, threshold, counts

    def forward(self, x):
        """x (B, T, in) -> (B, T, out)"""
        y = self.product(x)
        return y if self.bias is None else y + self.bias

    def product(self, x):
        if not is_sparse(self.state, x):
            return kernel.dense(x, self.weight_t)
        if fits_kernel(self.state, x):
            y = kernel.sparse_gemv(x.flatten(0, 1), self.weight_t, self.threshold, counts=self.counts)
            return y.view(*x.shape[:-1], -1)
        # Many tokens: the same function as a dense product with zeros in it.
        keep = ~(x.to(self.threshold.dtype).abs() <= self.threshold)                        # (B, T, in); NaN is kept
        prefix = self.state.dense_prefix if self.state.where == "all" else 0
        keep[:, :prefix] = True
        counted = keep[:, prefix:]
        self.counts[0] += counted.sum()
        self.counts[1] += counted.numel()
        return kernel.dense(x * keep, self.weight_t)


def is_sparse(state, x):
    """Whether small entries of x (B, T, in) are dropped: a step of decoding has T = 1."""
    return state is not None and (state.where == "all" or state.where == "decode" and x.shape[1] == 1)


def fits_kernel(state, x):
    """Whether x (B, T, in) is few enough rows for the sparse kernel, none of them exempt."""
    return x.shape[0] * x.shape[1] <= kernel.MAX_ROWS and not (state.dense_prefix and state.where == "all")


class TransposedEmbedding(nn.Module):
    """The embedding of a model whose head, tied to it, is a SparseLinear: the head's weight_t (hidden, vocab) serves both."""

    def __init__(self, weight_t):
        super().__init__()
        self.weight_t = weight_t

    @property
    def weight(self):
        return self.weight_t.t()

    def forward(self, tokens):
        return self.weight[tokens].contiguous()                                             # (B, T, hidden)


class SparseAttention(Attention):
    """Attention whose q, k and v, all of them sparse, share a launch of the kernel.

    Takes over the submodules of `dense`, an Attention, under their names. counts: (3, 2), those of q, k and v.
    """

    def __init__(self, dense, counts):
        nn.Module.__init__(self)
        self.__dict__.update(dense.__dict__)               # a module's attributes and submodules, all of them
        self.counts = counts

    def qkv(self, x):
        linears = [self.q_proj, self.k_proj, self.v_proj]
        state = self.q_proj.state
        if not (is_sparse(state, x) and fits_kernel(state, x)):
            return super().qkv(x)
        ys = kernel.sparse_gemv_group(x.flatten(0, 1), [linear.weight_t for linear in linears],
                                      [linear.threshold for linear in linears], counts=self.counts)
        ys = [y.view(*x.shape[:-1], -1) for y in ys]
        return ys if linears[0].bias is None else [y + linear.bias for y, linear in zip(ys, linears)]


class SparseMLP(MLP):
    """An MLP whose gate and up, both sparse, share a launch of the kernel, with silu(gate) * up applied in it.

    Takes over the submodules of `dense`, an MLP, under their names. counts: (2, 2), those of gate and up.
    """

    def __init__(self, dense, counts):
        nn.Module.__init__(self)
        self.__dict__.update(dense.__dict__)
        self.counts = counts

    def gated(self, x):
        gate, up = self.gate_proj, self.up_proj
        if not (is_sparse(gate.state, x) and fits_kernel(gate.state, x)) or gate.bias is not None:
            return super().gated(x)                        # a bias comes before the silu, which the kernel applies itself
        y = kernel.sparse_gated(x.flatten(0, 1), gate.weight_t, up.weight_t, gate.threshold, up.threshold,
                                counts=self.counts)
        return y.view(*x.shape[:-1], -1)


def sparsify(model, thresholds):
    """Makes the named linears of a Llama sparse, in place, and returns the model.

    thresholds: {name of a linear, as in "model.layers.0.mlp.down_proj": number, 0-d tensor, or tensor (in,)}.
    A linear not named stays as it is: dense, or with the threshold it had. Weights are transposed one by
    one, so that no second copy of the model is needed. Raises InputError for a name or a shape that does not fit.
    """
    modules = dict(model.named_modules())
    for name, threshold in thresholds.items():             # all checks first: what is refused changes nothing
        if not isinstance(modules.get(name), (nn.Linear, SparseLinear)):
            raise InputError(f"thresholds name {name}, which is not a linear of this model")
        check_threshold(name, threshold, modules[name].in_features)
    kept = {name: module.threshold.clone() for name, module in modules.items() if isinstance(module, SparseLinear) and module.state}
    for name in thresholds:
        if isinstance(modules[name], nn.Linear):
            dense = modules.pop(name)                      # so that its weight is freed with it, before the next one's turn
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, SparseLinear(dense.weight.detach().t().contiguous(), dense.bias))
            if name == "lm_head" and model.config.tie_word_embeddings:
                model.model.embed_tokens = TransposedEmbedding(model.lm_head.weight_t)
            del dense
    linears = {name: module for name, module in model.named_modules()
               if isinstance(module, SparseLinear) and (name in kept or name in thresholds)}
    device = model.device
    dtype = torch.promote_types(model.model.embed_tokens.weight.dtype, torch.float32)
    state = SparseState("decode", 0, torch.zeros(sum(l.in_features for l in linears.values()), device=device, dtype=dtype),
                        torch.zeros(len(linears), 2, device=device, dtype=torch.int64))
    views = state.thresholds.split([linear.in_features for linear in linears.values()])
    for linear, view, counts in zip(linears.values(), views, state.counts):
        linear.share(state, view, counts)
    model.sparse_state = state
    set_thresholds(model, kept | thresholds)

    # Where all that share an input are sparse, they share a launch. They stand side by side in the state.
    places = {linear: place for place, linear in enumerate(linears.values())}
    for block in model.model.layers:
        attention, mlp = block.self_attn, block.mlp
        if {attention.q_proj, attention.k_proj, attention.v_proj} <= places.keys():
            first = places[attention.q_proj]
            block.self_attn = SparseAttention(attention, state.counts[first:first + 3])
        if {mlp.gate_proj, mlp.up_proj} <= places.keys():
            first = places[mlp.gate_proj]
            block.mlp = SparseMLP(mlp, state.counts[first:first + 2])
    return model


def check_threshold(name, threshold, in_features):
    """Raises InputError if `threshold` cannot be that of the linear `name`."""
    value = torch.as_tensor(threshold)
    if value.shape not in ((), (in_features,)):
        raise InputError(f"threshold of {name}: shape {tuple(value.shape)}, expected () or ({in_features},)")
    if not torch.isfinite(value).all():
        raise InputError(f"threshold of {name} is not finite")


def set_thresholds(model, thresholds):
    """Sets the thresholds of sparse linears by name; those not named stay. The tensors stay where they are."""
    modules = dict(model.named_modules())
    for name, threshold in thresholds.items():
        linear = modules.get(name)
        if not isinstance(linear, SparseLinear) or linear.state is None:
            raise InputError(f"thresholds name {name}, which is not a sparse linear of this model")
        check_threshold(name, threshold, linear.in_features)
    for name, threshold in thresholds.items():
        own = modules[name].threshold
        own.copy_(torch.as_tensor(threshold, dtype=own.dtype).expand(len(own)))


@contextlib.contextmanager
def sparse_mode(model, where="decode", thresholds=None, dense_prefix=0):
    """Changes, inside a `with`, when and how strongly a sparsified model is sparse; weights are not touched.

    where: "decode": calls with one token are sparse, calls with more are dense
           "all": every call is sparse, except the first `dense_prefix` positions of what it is given
           "off": every call is dense
    dense_prefix: counts in mode "all" alone
    thresholds: {name of a sparse linear: number, 0-d tensor or tensor (in,)}, in force inside; others stay.
        Or all of them at once, a copy of model.sparse_state.thresholds, which is quick enough for every step.
    A model that was not sparsified is dense whatever the mode.
    """
    if where not in ("decode", "all", "off"):
        raise InputError(f'where is "decode", "all" or "off", not {where!r}')
    if dense_prefix < 0:
        raise InputError(f"dense_prefix is {dense_prefix}, expected at least 0")
    state = getattr(model, "sparse_state", None)
    if state is None:
        yield
        return
    before = state.where, state.dense_prefix, state.thresholds.clone()
    try:
        state.where, state.dense_prefix = where, dense_prefix
        if isinstance(thresholds, torch.Tensor):
            state.thresholds.copy_(thresholds)
        else:
            set_thresholds(model, thresholds or {})
        yield
    finally:
        state.where, state.dense_prefix = before[:2]
        state.thresholds.copy_(before[2])


# ---------------------------------------------------------------------------------------------------------
# Measures

def realised_sparsity(model):
    """The share of weights in the blocks' linears that sparse steps did not read, since `reset_counts`.

    Each linear counts with its size; a dense one counts as read whole. 0.0 for a model that took no sparse step.
    """
    skipped = total = 0
    for block in model.model.layers:
        for module in block.modules():
            if isinstance(module, (nn.Linear, SparseLinear)):
                size = module.in_features * module.out_features
                total += size
                if isinstance(module, SparseLinear) and module.state:
                    kept, seen = module.counts.tolist()
                    skipped += size * (1 - kept / seen) if seen else 0
    return skipped / total


def reset_counts(model):
    """Forgets what was counted for `realised_sparsity`."""
    if hasattr(model, "sparse_state"):
        model.sparse_state.counts.zero_()


def windows_of(tokens, context, stride=None):
    """tokens (N,) as windows (W, context + 1), each of which predicts `context` tokens; they begin `stride` apart.

    stride None: `context`, so that every token but the first is predicted once. The rest behind the last whole
    window is left out. Raises InputError for a text shorter than one window.
    """
    if context < 1 or stride is not None and stride < 1:
        raise InputError(f"windows of {context} tokens, {stride or context} apart: expected at least 1")
    if tokens.numel() <= context:
        raise InputError(f"the text has {tokens.numel()} tokens, a window of {context} needs {context + 1}: give more text")
    return tokens.unfold(0, context + 1, stride or context)


def default_context(model):
    return min(model.config.max_position_embeddings, 2048)


@torch.no_grad()
def perplexity(model, tokens, context=None, dense_prefix=0):
    """exp of the mean cross-entropy a token, over windows of `context` tokens that start with nothing before them.

    tokens: (N,) int64. context: None is the model's own, at most 2048. A sparsified model is sparse here, in every
    position from `dense_prefix` on of each window, except inside sparse_mode(model, "off").
    """
    check_tokens(tokens, model.config)
    windows = windows_of(tokens, context or default_context(model))
    state = getattr(model, "sparse_state", None)
    reset_counts(model)
    total = 0.0
    with sparse_mode(model, "off" if state and state.where == "off" else "all", dense_prefix=dense_prefix):
        for part in windows.split(4):
            logits = model(part[:, :-1].to(model.device))
            total += F.cross_entropy(logits.flatten(0, 1), part[:, 1:].flatten().to(model.device), reduction="sum").item()
    return math.exp(total / windows[:, 1:].numel())


# ---------------------------------------------------------------------------------------------------------
# Judging: many settings beside the dense model, from one pass over the text

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
        counts, hooks = torch.zeros_like(model.sparse_state.counts), []
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
            hooks.append(block.mlp.gate_proj.register_forward_hook(drop))
        try:
            with sparse_mode(model, "off"):
                yield counts
        finally:
            for hook in hooks:
                hook.remove()


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


def draw_quality(rows, path, plt):
    """Added perplexity against realised sparsity, a line an allocation; plt: matplotlib.pyplot."""
    dense = rows[0]["perplexity"]
    figure, axis = plt.subplots(figsize=(6, 3.8), layout="constrained")
    for allocation in dict.fromkeys(row["allocation"] for row in rows):
        own = [row for row in rows if row["allocation"] == allocation and row["sparsity"] > 0]
        if not own:                                        # a dense model
            continue
        axis.plot([100 * row["sparsity"] for row in own], [100 * (row["perplexity"] / dense - 1) for row in own],
                  marker="o", ms=3.5, lw=1.3, label=allocation)
    axis.set(xlabel="weights of the blocks not read (%)", ylabel=f"perplexity above the dense {dense:.2f} (%)",
             yscale="log", ylim=(0.05, None))
    axis.legend()
    figure.savefig(path)
    plt.close(figure)


# ---------------------------------------------------------------------------------------------------------
# Text to measure on

def read_tokens(tokenizer, path, part):
    """(tokens (N,) int64, what they are): the text file at `path`, or a part of the standard library if None.

    part: "train" or "held-out"; the files of a part come in an order drawn once.
    """
    if path is not None:
        try:
            text = Path(path).read_bytes().decode("utf-8")
        except OSError as error:
            raise InputError(f"{path}: cannot be read: {error.strerror}") from None
        except UnicodeDecodeError as error:
            raise InputError(f"{path}: not UTF-8 text: {error.reason} at byte {error.start}") from None
        return torch.tensor(tokenizer.encode(text), dtype=torch.int64), str(path)
    from demo import corpus
    texts = [text for _, text in corpus.files(part)]
    order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(1))
    ids = [i for index in order for i in [*tokenizer.encode(texts[index]), tokenizer.eos_ids[0]]]
    return torch.tensor(ids, dtype=torch.int64), f"{part} part of {corpus.NAME}"


def main():
    from calibrate import load_calibration, pyplot

    parser = Parser(description="Quality against sparsity, for each allocation, beside the dense model.")
    parser.add_argument("--model", default=str(DEMO), help="checkpoint folder, calibrated (default: the demo model)")
    parser.add_argument("--text", metavar="FILE", help="UTF-8 text to measure on (default: the standard library's held-out part)")
    parser.add_argument("--tokens", type=natural, default=100_000, help="how many tokens of it at most (default: 100000)")
    parser.add_argument("--sparsity", nargs="+", type=float, default=[0.25, 0.4, 0.5, 0.6, 0.65, 0.75],
                        help="levels to measure (default: 0.25 0.4 0.5 0.6 0.65 0.75)")
    parser.add_argument("--allocation", nargs="+", help="of those in the calibration, or cats (default: all of them)")
    parser.add_argument("--beside", metavar="FOLDER", help="another checkpoint with the same tokenizer, calibrated, whose rows follow "
                        "under its folder's name (default: none)")
    parser.add_argument("--sources", action="store_true", help="instead: where the loss at 50 %% comes from")
    parser.add_argument("--context", type=natural, help="tokens in a window (default: the model's context, at most 2048)")
    parser.add_argument("--scored", type=natural, help="how many at the end of each window count (default: all)")
    parser.add_argument("--dense-prefix", type=int, default=0, help="tokens at the start of each that stay dense (default: 0)")
    parser.add_argument("--paper", action="store_true", help="TEAL's protocol: 2048 tokens before 512 scored, half of all dense")
    parser.add_argument("--functions", type=int, metavar="N", help="of the held-out part to complete and parse (default: 120; 0 with --text)")
    parser.add_argument("--json", action="store_true", help="print the rows as JSON (default: as a table)")
    parser.add_argument("--figure", metavar="FILE", help="draw perplexity against sparsity as a PNG")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu",
                        help="(default: cuda where there is one, else cpu)")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], help="(default: the checkpoint's own)")
    parser.add_argument("--quantize", choices=["int8", "int4"], help="round the blocks' weights first (default: as they are)")
    arguments = parser.parse_args()
    if arguments.functions is not None and arguments.functions < 0:
        raise InputError(f"--functions is {arguments.functions}, expected at least 0")
    if arguments.figure:
        if not arguments.figure.endswith(".png") or not Path(arguments.figure).parent.is_dir():
            raise InputError(f"--figure is {arguments.figure}, expected a name in a folder that exists, ending in .png")
        pyplot()                                           # is it there? Now, not when all is measured
    if arguments.paper:
        arguments.context, arguments.scored, arguments.dense_prefix = 2560, 512, 1280
    if arguments.model.startswith("random:"):
        raise InputError(f"{arguments.model} has random weights: it has no quality to measure")
    model, tokenizer = load_model(arguments.model, arguments.device, arguments.dtype, arguments.quantize)
    calibration = load_calibration(model, arguments.model)
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
        if arguments.sources or arguments.functions:
            raise InputError("--beside is for the table of perplexities, without --sources and --functions")
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
        draw_quality(rows, arguments.figure, pyplot())
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


if __name__ == "__main__":
    from sparsify import main as main_of_the_module        # so that a SparseLinear here is the one that quantize.py knows
    command_line(main_of_the_module)
