"""How reading less of the cache is measured: behind long texts.

    sizes        what a step reads of weights and cache, on paper
    layers       which layers are to read all (attend.py): those whose choices the next ones can
                 take over at the least cost. That is measured for every pair of layers: how far the
                 distributions of the next token move (KL, in nats) when one layer alone reads what
                 one before it chose
    perplexity   of the last 512 tokens of windows as long as the context, read one by one
    needle       a sentence with a number, hidden in a text at ten depths and asked for at its end.
                 The text is read as a prompt is, the question token by token (as in Quest), for
                 there the number is found or not
    speed        milliseconds a step: weights dense and sparse, the cache whole and in part
    draft        speculation whose draft reads less: tokens a pass, and tokens a second

Parts 4, 8 and 16 stand for a quarter, an eighth and a sixteenth of the text's positions, which a
layer reads. With --out the text goes to FOLDER/attend_NAME.txt, with a figure beside it. What takes
long goes on, if it was interrupted, from FOLDER/attend_NAME.partial.

The seams: attend.py's, and that a step is make_step(model, cache).

    python -m beyond.longtext layers --model FOLDER --text FILE      writes FOLDER/attend.json
    python -m beyond.longtext perplexity --model FOLDER --text FILE --out figures
    python -m beyond.longtext needle --model FOLDER --text FILE --out figures
    python -m beyond.longtext speed --model random:llama-3.2-1b --behind 1000 8000 32000
    python -m beyond.longtext draft --model FOLDER --text FILE --behind 4000
"""
import functools
import math
import statistics
import time
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F

from beyond import attend, drafts, record
from beyond.allocate import add_quantize, check_figure, load, pyplot, save_figure
from beyond.attend import Plan, plan_of, read_less
from calibrate import Partial, load_calibration, origin_of
from generate import generate, stream
from kernel import memory_bandwidth
from model import (Config, Llama, Parser, check_output, command_line, linear_names, natural,
                   preset_config, progress, read_tokens, replacing, require, share, windows_of,
                   write_json)
from sparsify import SparseLinear, realised_sparsity, reset_counts, sparse_mode, sparsify

MODES = {"dense": "off", "sparse": "decode"}
QUESTION = "The secret number of {} is"
PLACES = ("Lisbon", "Oslo", "Cairo", "Lima", "Kyoto", "Quito", "Riga", "Accra", "Hanoi", "Turin")
ANSWER = 8               # tokens in which a number of five digits has room
ROOM = 64                # tokens in which a sentence with one, a question and an answer have room
ROUNDS = 23              # of timed steps
WARM_UP = 3              # of them, which set things up


class Setting(NamedTuple):
    """One way to decode."""
    weights: str                     # "dense" or "sparse"
    cache: str                       # "whole", or a name in attend.SCORES
    part: int                        # a layer reads 1 / part of the positions
    plan: Plan

    @property
    def positions(self):
        """The share of the positions that a layer reads, in a table."""
        return "all" if self.cache == "whole" else f"1/{self.part}"


def settings_of(arguments, config, positions):
    """Return the Settings that the command line asks for, behind a text of so many positions."""
    settings = []
    for weights in ("dense", "sparse") if arguments.sparsity else ("dense",):
        settings.append(Setting(weights, "whole", 1, Plan(config.max_position_embeddings, ())))
        for by in arguments.by:
            for part in arguments.parts:
                plan = plan_of(arguments, config, max(1, positions // part), by)
                settings.append(Setting(weights, by, part, plan))
    return settings


class Page:
    """What a command says: it is printed, and with a folder written there, with a figure."""

    def __init__(self, folder, name):
        self.folder, self.name, self.lines = folder, name, []
        if folder is not None:
            check_figure(self.path("png"), "--out")

    def path(self, ending):
        """Return the path of a file of this page, None without a folder."""
        return None if self.folder is None else self.folder / f"attend_{self.name}.{ending}"

    def say(self, text):
        print(text, flush=True)
        self.lines.append(text)

    def write(self, draw):
        """Write the text, and the figure that draw(pyplot) returns."""
        if self.folder is not None:
            with replacing(self.path("txt")) as file:
                file.write("".join(f"{line}\n" for line in self.lines).encode())
            save_figure(draw(pyplot()), self.path("png"))
            self.path("partial").unlink(missing_ok=True)


# --------------------------------------------------------------------------------------------------
# Behind a text

@torch.no_grad()
def behind(model, tokens, room):
    """Return a cache that holds tokens (N,), read dense and whole, with room for more."""
    cache = model.make_cache(1, len(tokens) + room)
    with sparse_mode(model, "off"):
        model(tokens[None].to(model.device), cache, last_only=True)
    return cache


def begin(model, cache, used, setting):
    """Return a step as a setting says, with a cache of which `used` positions count."""
    cache.used = used
    read_less(model, setting.plan)
    reset_counts(model)
    return attend.make_step(model, cache)


@torch.no_grad()
def losses_behind(model, cache, used, tokens, setting):
    """Return the cross-entropy (N,) of tokens[1:], as tokens (N + 1,) are read one by one."""
    losses = []
    with sparse_mode(model, MODES[setting.weights]):
        step = begin(model, cache, used, setting)
        for token, following in zip(tokens[:-1].view(-1, 1, 1), tokens[1:]):
            losses.append(F.cross_entropy(step(token)[0], following[None]))
    return torch.stack(losses)


def measure_perplexity(arguments, model, tokenizer, tokens, page):
    """Measure the command `perplexity`, on tokens (N,)."""
    context, scored = arguments.context, arguments.scored
    windows = windows_of(tokens, context)[:arguments.texts]
    settings = settings_of(arguments, model.config, context)
    results = torch.zeros(len(windows), len(settings), scored + 2)     # losses, cache read, skipped
    work = [(w, s) for w in range(len(windows)) for s in range(len(settings))]
    origin = f"{origin_of(model, tokens, context)}, {settings}, {arguments.sparsity}"
    partial = Partial(page.path("partial"), origin)
    last = None
    for w, s in partial.rest(work, "perplexity", results):
        window = windows[w]
        if w != last:
            cache = behind(model, window[:-scored - 1], scored)
            last = w
        results[w, s, :scored] = losses_behind(model, cache, context - scored,
                                               window[-scored - 1:].to(model.device), settings[s])
        results[w, s, scored:] = torch.tensor([model.reading.share, realised_sparsity(model)])
    page.say(f"perplexity of the last {scored} of {context} tokens, {len(windows)} texts; layers "
             f"that read all: {listed(settings[-1].plan.layers)}")
    page.say(f"{'weights':>8} {'skipped':>8} {'cache':>8} {'positions':>10} {'read':>7} "
             f"{'perplexity':>11} {'over whole':>11}")
    points = {}                          # {(weights, cache): [(share read, ratio), ...]}
    for s, setting in enumerate(settings):
        losses = results[:, s, :scored].flatten().double()
        read, skipped = results[:, s, scored:].mean(0).tolist()
        if setting.cache == "whole":
            whole = losses
        over = losses - whole
        ratio = over.mean().exp().item() - 1
        error = over.std().item() / math.sqrt(len(over))
        points.setdefault((setting.weights, setting.cache), []).append((read, ratio))
        page.say(f"{setting.weights:>8} {skipped:8.1%} {setting.cache:>8} {setting.positions:>10} "
                 f"{read:7.1%} {losses.mean().exp():11.3f} "
                 + (f"{ratio:+6.1%} ± {error:.1%}" if setting.cache != "whole" else ""))
    page.write(functools.partial(draw_quality, points, "perplexity above the whole cache's (%)",
                                 "share of the cache"))


def listed(numbers):
    return " ".join(map(str, numbers)) or "none"


def draw_quality(points, label, what, plt):
    """Return a figure with a panel for each kind of weights, and a line for each way to choose.

    points: {(weights, cache): [(share of what was read, value), ...]}
    """
    kinds = list(dict.fromkeys(weights for weights, _ in points))
    figure, axes = plt.subplots(1, len(kinds), figsize=(1 + 3.2 * len(kinds), 3), sharey=True,
                                layout="constrained", squeeze=False)
    for (weights, cache), line in points.items():
        axis = axes[0, kinds.index(weights)]
        if cache != "whole":
            axis.plot([100 * read for read, _ in line], [100 * value for _, value in line],
                      marker="o", ms=3.5, lw=1.3, label=cache)
        axis.set(title=f"{weights} weights", xlabel=f"{what} read (%)")
    axes[0, 0].set_ylabel(label)
    axes[0, 0].legend()
    return figure


# --------------------------------------------------------------------------------------------------
# A needle

def hide(tokenizer, text, number, place, depth):
    """Return (tokens of a text with a sentence in it, tokens of the question), two tensors.

    text (N,): what it is hidden in, at the end of the line nearest to the share `depth` of it.
    """
    question = "\n" + QUESTION.format(place)
    sentence = torch.tensor(tokenizer.encode(f"{question} {number}.\n", bos=False))
    ends = [i + 1 for i, token in enumerate(text.tolist()) if "\n" in tokenizer.decode([token])]
    at = min([0, *ends, len(text)], key=lambda end: abs(end - depth * len(text)))
    return (torch.cat((text[:at], sentence, text[at:])),
            torch.tensor(tokenizer.encode(question, bos=False)))


@torch.no_grad()
def answers(model, tokenizer, cache, used, question, number, setting):
    """Return whether a model writes the number after the question, read token by token."""
    written = []
    with sparse_mode(model, MODES[setting.weights]):
        step = begin(model, cache, used, setting)
        for token in question.to(model.device):
            logits = step(token.view(1, 1))
        for _ in range(ANSWER):
            written.append(logits[0, -1].argmax().item())
            if len(written) < ANSWER:
                logits = step(torch.tensor([[written[-1]]], device=model.device))
    return tokenizer.decode(written).strip().startswith(str(number))


def measure_needle(arguments, model, tokenizer, tokens, page):
    """Measure the command `needle`, in tokens (N,)."""
    length = arguments.context - ROOM
    texts = windows_of(tokens, length)[:, :-1]
    depths = len(PLACES)
    require(len(texts) >= -(-arguments.prompts // depths),
            f"the text has {len(tokens)} tokens, {arguments.prompts} prompts of "
            f"{arguments.context} need {-(-arguments.prompts // depths)} times {length}")
    settings = settings_of(arguments, model.config, length)
    generator = torch.Generator().manual_seed(0)
    numbers = torch.randint(10000, 100000, (arguments.prompts,), generator=generator).tolist()
    found = torch.zeros(arguments.prompts, len(settings))
    origin = f"{origin_of(model, tokens, length)}, {settings}, {arguments.sparsity}, {QUESTION}"
    partial = Partial(page.path("partial"), origin)
    for i in partial.rest(list(range(arguments.prompts)), "needle", found):
        depth = (i % depths + 0.5) / depths
        text, question = hide(tokenizer, texts[i // depths], numbers[i], PLACES[i % depths], depth)
        cache = behind(model, text, ROOM)
        for s, setting in enumerate(settings):
            found[i, s] = answers(model, tokenizer, cache, len(text), question, numbers[i], setting)
    page.say(f"a number hidden in {arguments.context} tokens and asked for at the end: found, of "
             f"those that are with the whole cache; layers that read all: "
             f"{listed(settings[-1].plan.layers)}")
    page.say(f"{'weights':>8} {'cache':>8} {'positions':>10} {'found':>9}  by depth, "
             f"{depths} of them")
    points = {}
    depth_of = torch.arange(arguments.prompts) % depths
    for s, setting in enumerate(settings):
        these = found[:, s] > 0
        total = arguments.prompts
        if setting.cache == "whole":
            known = these
        else:
            these = these & known
            total = int(known.sum())
        count = int(these.sum())
        by_depth = " ".join(str(int(these[depth_of == depth].sum())) for depth in range(depths))
        page.say(f"{setting.weights:>8} {setting.cache:>8} {setting.positions:>10} {count:3} of "
                 f"{total:2}  {by_depth}")
        points.setdefault((setting.weights, setting.cache), []).append(
            (1 / setting.part, count / max(1, total)))
    page.write(functools.partial(draw_quality, points, "numbers still found (%)",
                                 "positions that a layer"))


# --------------------------------------------------------------------------------------------------
# Bytes and time

WAYS = {                 # {name: (sparse_mode, whether steps read less)}
    "neither": ("off", False), "weights": ("decode", False), "cache": ("off", True),
    "both": ("decode", True),
}


def bytes_read(model, realised, positions):
    """Return the bytes that a step reads: of the linears, and of so many positions in a layer."""
    blocks = head = 0
    for name, linear in model.named_modules():
        if isinstance(linear, (torch.nn.Linear, SparseLinear)):
            size = sum(tensor.nbytes for tensor in linear.state_dict().values())
            head += size if name == "lm_head" else 0
            blocks += size if name != "lm_head" else 0
    attention = model.model.layers[0].self_attn
    a_position = 2 * attention.k_proj.out_features * model.dtype.itemsize      # its key and value
    return blocks * (1 - realised) + head + positions * a_position


def show_sizes(arguments):
    """Print what a step of each model reads behind texts of several lengths: `sizes`."""
    sparsity = arguments.sparsity
    print(f"{'MB a step, bfloat16':22} {'weights':>8} {f'{sparsity:.0%} of them':>11} "
          + f"{'cache,':>7}" + "".join(f"{used:>9,}" for used in arguments.behind))
    print(f"{'':22} {'':8} {'skipped':>11} {'a token':>7}"
          + f"{'tokens':>9}" * len(arguments.behind))
    for name in arguments.model:
        preset = name.removeprefix("random:")
        config = Config.read(name) if preset == name else preset_config(preset)
        model = Llama.shapes(config).to(torch.bfloat16)
        weights = [bytes_read(model, skipped, 0) for skipped in (0, sparsity)]
        token = bytes_read(model, sparsity, config.num_hidden_layers) - weights[1]
        print(f"{Path(preset).name:22} {weights[0] / 1e6:8,.0f} {weights[1] / 1e6:11,.0f} "
              f"{token / 1e6:7.3f}" + "".join(f"{used * token / 1e6:9,.0f}"
                                             for used in arguments.behind))


@torch.no_grad()
def time_behind(model, used, plan):
    """Return {name in WAYS: (seconds of a step behind `used` tokens, bytes it reads)}.

    The cache holds random numbers, of which neighbours have nothing in common. All ways take turns.
    """
    cache = model.make_cache(1, used + 1)
    cache.keys.normal_()
    cache.values.normal_()
    token = torch.ones(1, 1, dtype=torch.int64, device=model.device)
    reading = read_less(model, plan)
    steps, times, sizes = {}, {}, {}
    for _ in range(ROUNDS):
        for name, (mode, less) in WAYS.items():
            with sparse_mode(model, mode), reading.switched(less):
                cache.used = used
                if name not in steps:
                    steps[name] = record.make_step(model, cache)
                began = time.perf_counter()
                steps[name](token)
                if model.device.type == "cuda":
                    torch.cuda.synchronize()
                times.setdefault(name, []).append(time.perf_counter() - began)
    layers = len(model.model.layers)
    for name, (mode, less) in WAYS.items():
        with sparse_mode(model, mode), reading.switched(less):
            reset_counts(model)
            cache.used = used
            model(token, cache)          # a step on a GPU does not count each time
        positions = plan.read(used + 1, layers) if less else layers * (used + 1)
        sizes[name] = bytes_read(model, realised_sparsity(model), positions)
    return {name: (statistics.median(times[name][WARM_UP:]), sizes[name]) for name in WAYS}


def measure_speed(arguments, model, tokenizer, tokens, page):
    """Measure the command `speed`."""
    bandwidth = memory_bandwidth(model.device)
    part = arguments.part
    plan = plan_of(arguments, model.config, 1, "tidal")
    page.say(f"{arguments.model}, {str(model.dtype).removeprefix('torch.')}, {model.device.type}, "
             f"{torch.get_num_threads()} threads, torch {torch.__version__}; "
             f"{bandwidth / 1e9:.1f} GB/s")
    page.say(f"weights: {arguments.sparsity:.0%} skipped; cache: 1/{part} of the positions, layers "
             f"that read all: {listed(plan.layers)}")
    page.say(f"{'ms a step':>10}" + "".join(f"{name:>9}" for name in WAYS)
             + f"{'both/weights':>14}  share of the bandwidth")
    timed = {}
    for used in progress(arguments.behind, "timing steps behind several texts"):
        plan = plan_of(arguments, model.config, max(1, used // part), "tidal")
        timed[used] = time_behind(model, used, plan)
        seconds = {name: one for name, (one, _) in timed[used].items()}
        shares = [size / one / bandwidth for one, size in timed[used].values()]
        page.say(f"{used:10}" + "".join(f"{1e3 * seconds[name]:9.2f}" for name in WAYS)
                 + f"{seconds['weights'] / seconds['both']:13.2f}x  "
                 + " ".join(f"{one:4.0%}" for one in shares))
    page.write(functools.partial(draw_speed, timed))


def draw_speed(timed, plt):
    """Return a figure of milliseconds a step against the tokens before it, a line for each way."""
    figure, axis = plt.subplots(figsize=(4.6, 3.2), layout="constrained")
    for name in WAYS:
        axis.plot(list(timed), [1e3 * ways[name][0] for ways in timed.values()], marker="o", ms=3.5,
                  lw=1.3, label=name)
    axis.set(xlabel="tokens before the step", ylabel="ms a step", ylim=(0, None))
    axis.legend(title="skipped in part")
    return figure


# --------------------------------------------------------------------------------------------------
# Drafts

def measure_draft(arguments, model, tokenizer, tokens, page):
    """Measure the command `draft`, behind texts of tokens (N,)."""
    used, new = arguments.behind, arguments.max_new_tokens
    prompts = [text.tolist() for text in windows_of(tokens, used)[:arguments.texts, :-1]]
    calibration = load_calibration(model, arguments.model)
    names = linear_names(model.config)
    plan = plan_of(arguments, model.config, max(1, used // arguments.part), "tidal")
    page.say(f"{len(prompts)} texts of {used} tokens, {new} more; drafts that read 1/"
             f"{arguments.part} of the positions, layers that read all: {listed(plan.layers)}")
    page.say(f"{'draft':>24} {'cache read':>11} {'tokens a pass':>14} {'tokens/s':>9} {'ratio':>7}")
    drafting = [(sparsity, less) for sparsity in arguments.draft_sparsity for less in (False, True)]
    rows = {}
    for prompt in progress(prompts, "drafts, texts"):
        for kind in [None, *drafting]:
            reading = read_less(model, plan)
            reading.active = False       # a draft switches it on for its guesses
            with sparse_mode(model, "off"):
                if kind is None:
                    text = generate(model, prompt, new, make_step=record.make_step)
                else:
                    sparsity, less = kind
                    thresholds = (calibration.thresholds(sparsity) if sparsity
                                  else dict.fromkeys(names, 0.0))
                    text = drafts.speculate(
                        model, prompt, new, "sparse", thresholds, arguments.draft_tokens,
                        kind=attend.Speculation if less else drafts.TreeSpeculation,
                        make_step=attend.make_step)
                ids, _, seconds, interrupted = stream(text, None, lambda _: None)
            if interrupted:
                raise KeyboardInterrupt
            count = len(ids) - 1         # the first token is the prompt's
            written = passes = count
            if kind is not None:
                written, passes = text.statistics.tokens, text.statistics.passes
            rows.setdefault(kind, []).append((count, seconds, written, passes, reading.share))
    rates = {}
    for kind, row in rows.items():
        count, seconds, written, passes, shares = map(sum, zip(*row))
        rates[kind] = count / seconds
        name = "none" if kind is None else f"{kind[0]:.0%} sparse" + ", less cache" * kind[1]
        page.say(f"{name:>24} {shares / len(row):11.1%} {written / passes:14.2f} "
                 f"{rates[kind]:9.1f} {rates[kind] / rates[None]:6.2f}x")
    page.write(functools.partial(draw_drafts, rates))


def draw_drafts(rates, plt):
    """Return a figure of tokens a second, a bar for each kind of draft."""
    figure, axis = plt.subplots(figsize=(4.6, 3), layout="constrained")
    names = ["none" if kind is None else f"{kind[0]:.0%}" + "\nless cache" * kind[1]
             for kind in rates]
    axis.bar(names, list(rates.values()))
    axis.set(xlabel="weights that the draft skips", ylabel="tokens/s")
    return figure


# --------------------------------------------------------------------------------------------------
# Which layers are to read all?

def masked(q, k, v, sees):
    """Return attention of q (1, H, T, D) to what `sees` (1 or G, T, S) shows, (1, H, T, D)."""
    heads, groups = q.shape[1], k.shape[1]
    sees = sees.expand(groups, -1, -1).repeat_interleave(heads // groups, 0)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=sees[None], enable_gqa=True)


def choices(q, k, sees, plan, by):
    """Return what each of T queries q (1, H, T, D) would choose of k (1, G, S, D), (G, T, S) bool.

    sees (T, S): what it can see.
    """
    T, S = sees.shape
    chosen = torch.zeros(k.shape[1], T, S, dtype=torch.bool, device=k.device)
    for t in range(T):
        mask = sees[t:t + 1]
        scores = attend.SCORES[by](q[:, :, t:t + 1], k, mask, plan.over, plan.shared)
        positions = attend.pick(scores, mask, plan.positions)[0]
        chosen[:, t].scatter_(1, positions.expand(len(chosen), -1), True)
    return chosen & sees


@torch.no_grad()
def costs_of_taking_over(model, tokens, scored, plan, label=""):
    """Return what it costs that a layer reads what another chose, float64 (layers + 1, layers).

    [i, l]: the KL in nats from the whole cache's distributions, a mean over the last `scored` of
    tokens (N,), where layer l alone reads what layer i - 1 chose, i <= l. Row 0: the last positions
    and the first, which are read where no layer has chosen. label: what the progress is called.
    """
    blocks = model.model.layers
    cache = behind(model, tokens[:-scored], scored)
    rest = tokens[None, -scored:].to(model.device)
    context = model.context(rest, cache)
    inputs, chosen = [], []
    x = model.embed(rest)
    own = [block.self_attn.attend for block in blocks]
    sees = context.mask
    if sees is None:                     # a single token, which sees all
        sees = torch.ones(1, len(tokens), dtype=torch.bool, device=model.device)

    def note_choice(whole, q, k, v, mask):
        if not chosen:
            chosen.append(choices(q, k, sees, plan, "window"))
        chosen.append(choices(q, k, sees, plan, "tidal"))
        return whole(q, k, v, mask)

    def log_p(x):
        return model.lm_head(model.model.norm(x))[0].float().log_softmax(-1)

    for block, whole in zip(blocks, own):
        inputs.append(x)
        block.self_attn.attend = functools.partial(note_choice, whole)
        x = block(x, context)
        block.self_attn.attend = whole
    expected = log_p(x)
    costs = torch.full((len(blocks) + 1, len(blocks)), float("inf"), dtype=torch.float64)
    pairs = [(i, layer) for layer in range(len(blocks)) for i in range(layer + 1)]
    for i, layer in progress(pairs, f"{label}what taking over costs, pairs of layers"):
        attention = blocks[layer].self_attn
        attention.attend = lambda q, k, v, mask: masked(q, k, v, chosen[i])
        x = blocks[layer](inputs[layer], context)
        attention.attend = own[layer]
        for block in blocks[layer + 1:]:
            x = block(x, context)
        costs[i, layer] = F.kl_div(log_p(x), expected, reduction="sum", log_target=True) / scored
    return costs


def best_layers(costs, count):
    """Return (sum of what all layers pay, the `count` layers that are to read all for the least).

    costs: as above. A layer takes over from the last one before it that reads all. The best ways to
    place one such layer after another are found from the first to the last (dynamic programming).
    """
    layers = costs.shape[1]
    sums = torch.cat((torch.zeros(len(costs), 1), costs.nan_to_num(posinf=0).cumsum(1)), 1)

    def paid(last, end):
        """What the layers between the reading layer `last` (-1: none) and `end` pay."""
        return float(sums[last + 1, end] - sums[last + 1, last + 1])

    ways = {-1: (0.0, ())}               # {the last layer that reads all: (paid so far, all such)}
    for _ in range(count):
        ways = {layer: min((total + paid(last, layer), (*before, layer))
                           for last, (total, before) in ways.items() if last < layer)
                for layer in range(min(ways) + 1, layers)}
    return min((total + paid(last, layers), before) for last, (total, before) in ways.items())


def measure_layers(arguments, model, tokenizer, tokens, page):
    """Measure the command `layers`, on tokens (N,), and write what is best."""
    context, layers = arguments.context, len(model.model.layers)
    part = arguments.part
    plan = plan_of(arguments, model.config, max(1, context // part), "tidal")
    windows = windows_of(tokens, context - 1)[:arguments.texts]
    costs = sum(costs_of_taking_over(model, window, arguments.scored, plan,
                                     f"text {number} of {len(windows)}, ")
                for number, window in enumerate(windows, start=1)) / len(windows)
    print(f"{len(windows)} texts of {context} tokens, of which the last {arguments.scored} "
          f"count; 1/{part} of the positions")
    print(f"{'read all':>8} {'KL':>8} {'cache read':>11}  layers")
    for count in range(1, layers // 2 + 1):
        total, best = best_layers(costs, count)
        read = Plan(plan.positions, best).read(context, layers) / (context * layers)
        print(f"{count:8} {total:8.4f} {read:11.1%}  {listed(best)}")
    chosen = best_layers(costs, arguments.count or layers // 3)[1]
    path = Path(arguments.model) / attend.LAYERS_FILE
    write_json(path, {"layers": list(chosen)})
    print(f"{path}: {listed(chosen)}")


# --------------------------------------------------------------------------------------------------
# The command line

COMMANDS = {             # {name: its function of arguments, model, tokenizer, tokens, page}
    "layers": (measure_layers, "which layers are to read all"),
    "perplexity": (measure_perplexity, "of the last tokens of long texts"),
    "needle": (measure_needle, "numbers hidden in long texts and asked for"),
    "speed": (measure_speed, "milliseconds a step"),
    "draft": (measure_draft, "speculation whose draft reads less"),
}


def make_parser():
    """Return the Parser of all commands, each of which has options of its own."""
    parser = Parser(description="Measures what reading less of the cache costs, and brings.")
    commands = parser.add_subparsers(dest="what", required=True, metavar="COMMAND")
    sizes = commands.add_parser("sizes", help="what a step reads, on paper")
    sizes.add_argument("--model", nargs="+", default=["random:llama-3-8b", "random:llama-2-7b"],
                       help="checkpoint folders, or random:PRESET (default: random:llama-3-8b "
                            "random:llama-2-7b)")
    sizes.add_argument("--sparsity", type=share, default=0.5, metavar="S",
                       help="share of the blocks' weights to skip (default: 0.5)")
    sizes.add_argument("--behind", nargs="+", type=natural, metavar="N",
                       default=[1000, 4000, 8000, 32000],
                       help="tokens before a step (default: 1000 4000 8000 32000)")
    for name, (_, help_text) in COMMANDS.items():
        command = commands.add_parser(name, help=help_text, description=f"Measures {help_text}.")
        command.add_model()
        add_quantize(command)
        attend.add_choices(command)

        def add(option, default, help_text, **more):
            told = " ".join(map(str, default)) if isinstance(default, list) else default
            command.add_argument(option, default=default, help=f"{help_text} (default: {told})",
                                 **more)

        several = {"nargs": "+", "metavar": "N", "type": natural}
        one = {"metavar": "N", "type": natural}
        if name != "speed":
            part = "held-in" if name == "layers" else "held-out"
            command.add_argument("--text", metavar="FILE",
                                 help=f"UTF-8 text (default: the standard library's {part} part)")
        if name in ("layers", "perplexity", "needle"):
            command.add_argument("--context", **one,
                                 help="tokens of a text (default: the model's context)")
        if name in ("layers", "perplexity"):
            add("--scored", 128 if name == "layers" else 512, "tokens at its end that count", **one)
        if name in ("layers", "perplexity", "draft"):
            add("--texts", 2, "how many at most", **one)
        if name in ("perplexity", "needle"):
            add("--by", list(attend.SCORES), "how positions are chosen", nargs="+",
                choices=attend.SCORES)
            add("--parts", [4, 8, 16], "a layer reads 1/N of the positions", **several)
        else:
            add("--part", 16, "a layer reads 1/N of the positions", **one)
        if name in ("perplexity", "needle", "speed"):
            add("--sparsity", 0.5, "share of the blocks' weights to skip; 0: only dense",
                type=share, metavar="S")
        if name == "layers":
            command.add_argument("--count", **one,
                                 help="how many are to read all (default: a third)")
        else:
            command.add_argument("--out", type=Path, metavar="FOLDER",
                                 help="where text and figure go (default: the text is printed)")
        if name == "needle":
            add("--prompts", 40, "how many", **one)
        if name == "speed":
            add("--behind", [1000, 2000, 4000, 8000], "tokens before a step", **several)
        if name == "draft":
            add("--behind", 4000, "tokens of a text", **one)
            add("--max-new-tokens", 128, "how many follow", **one)
            add("--draft-sparsity", [0.0, 0.5], "of drafts", nargs="+", type=share, metavar="S")
            command.add_argument("--draft-tokens", help="guesses a pass (default: what is fastest)",
                                 **one)
    return parser


def settle(arguments, config):
    """Check the arguments that depend on the model, and put values where none were given."""
    longest = config.max_position_embeddings
    if "context" in arguments:
        arguments.context = arguments.context or longest
        require(arguments.context <= longest, f"--context {arguments.context} does not fit the "
                                              f"model's context of {longest}")
    if arguments.what == "needle":
        require(arguments.context > ROOM,
                f"--context {arguments.context}, expected more than {ROOM}: so many are for the "
                f"sentence, the question and the answer")
    if "scored" in arguments:
        require(arguments.scored < arguments.context - 1,
                f"--scored {arguments.scored}, expected less than the {arguments.context} tokens "
                f"of a text")
    layers = config.num_hidden_layers
    if arguments.what == "layers":
        require((arguments.count or 0) <= layers,
                f"--count {arguments.count}, expected at most {layers}, the model's layers")
    if arguments.what == "draft":
        require(arguments.max_new_tokens > 1,
                "--max-new-tokens 1, expected at least 2: the first one is the prompt's")
    if "behind" in arguments and not arguments.model.startswith("random:"):
        most = max(arguments.behind) if arguments.what == "speed" else (
            arguments.behind + arguments.max_new_tokens)
        require(most < longest, f"--behind {most} does not fit the model's context of {longest}")
    plan_of(arguments, config, 1, "tidal").check(config)


def main():
    arguments = make_parser().parse_args()
    what = arguments.what
    if what == "sizes":
        show_sizes(arguments)
        return
    require(what == "speed" or not arguments.model.startswith("random:"),
            f"{arguments.model} has random weights: only its speed can be measured")
    if what == "layers":
        check_output(Path(arguments.model) / attend.LAYERS_FILE, "--model")
    page = Page(getattr(arguments, "out", None), what)
    model, tokenizer = load(arguments)
    settle(arguments, model.config)
    tokens = None
    if what != "speed":
        part = "train" if what == "layers" else "held-out"
        tokens, _ = read_tokens(tokenizer, arguments.text, part)
    if getattr(arguments, "sparsity", 0):
        thresholds = load_calibration(model, arguments.model).thresholds(arguments.sparsity)
        sparsify(model, thresholds | {"lm_head": None})
    elif what != "layers":               # the same kernels; a draft has thresholds of its own
        value = 0.0 if what == "draft" else None
        sparsify(model, dict.fromkeys(linear_names(model.config), value) | {"lm_head": None})
    COMMANDS[what][0](arguments, model, tokenizer, tokens, page)


if __name__ == "__main__":
    command_line(main)
