"""How reading less of the cache is measured: behind long texts.

    sizes        what a step reads of weights and cache, on paper
    layers       which layers are to read all (attend.py): those whose choices the next layers can
                 take over at the least cost. Measured for every pair of layers: how far the
                 distributions of the next token move (KL, in nats) when one layer alone reads what
                 an earlier one chose. Writes FOLDER/attend.json
    perplexity   of the last 512 tokens, half at most, of windows as long as the context, which are
                 read one by one
    needle       a sentence with a number, hidden in a text at ten depths and asked for at its end.
                 The text is read as a prompt is, the question token by token (as in Quest), since
                 the model finds the number there or nowhere
    speed        milliseconds a step: weights dense and sparse, the cache whole and in part

A part of 16 is a sixteenth of the text's positions, which a layer reads. With --out the text goes
to FOLDER/attend_NAME.txt, with a figure beside it.

    python -m beyond.lab.longtext perplexity --model FOLDER --text FILE --out figures
    python -m beyond.lab.longtext speed --model random:llama-3.2-1b --behind 1000 8000 32000
"""
import functools
import math
import statistics
from collections import defaultdict
from pathlib import Path

import torch
import torch.nn.functional as F

from beyond import attend, record
from beyond.attend import Plan, read_less
from beyond.folders import read_config
from beyond.lab.figures import check_figure, pyplot, save_figure
from beyond.lab.timing import ROUNDS, WARM_UP, seconds_of
from beyond.quantize import add_quantize, load
from calibrate import load_calibration
from generate import circumstances
from model import (Parser, block_linears, check_output, command_line, default_context, linear_names,
                   natural, preset_config, progress, read_tokens, replacing, require, share,
                   windows_of, write_json)
from sparsify import skipped_share, sparse_mode, sparsify

MODES = {"dense": "off", "sparse": "decode"}                   # {weights: sparse_mode}
QUESTION = "The secret number of {} is"
PLACES = ("Lisbon", "Oslo", "Cairo", "Lima", "Kyoto", "Quito", "Riga", "Accra", "Hanoi", "Turin")
ANSWER = 8               # tokens in which a number of five digits has room
ROOM = 64                # tokens in which a sentence with one, a question and an answer have room
COLUMNS = f"{'weights':>8} {'cache':>8} {'positions':>10}"


def settings_of(arguments, config, positions):
    """Return (the ways to decode behind a text of so many positions, the layers that read all).

    A way is (weights, "dense" or "sparse"; cache, "whole" or a name in attend.SCORES; the part of
    the positions that most layers read, as text; Plan). For each kind of weights the whole cache
    comes first.
    """
    layers = attend.layers_of(arguments.model, config)
    ways = [("whole", "all", Plan(config.max_position_embeddings, ()))]
    ways += [(by, f"1/{part}", Plan(max(1, positions // part), layers, by))
             for by in arguments.by for part in arguments.parts]
    return [(weights, *way) for weights in MODES for way in ways
            if weights == "dense" or arguments.sparsity], layers


def listed(numbers):
    return " ".join(map(str, numbers)) or "none"


# --------------------------------------------------------------------------------------------------
# Behind a text

def behind(model, tokens, room):
    """Return a cache that holds tokens (N,), read dense and whole, with room for more."""
    cache = model.make_cache(1, len(tokens) + room)
    with sparse_mode(model, "off"):
        model(tokens[None].to(model.device), cache, last_only=True)
    return cache


def steps_behind(model, tokens, room, settings):
    """Yield (setting, step as it says, token -> logits (1, vocab)), each behind tokens (N,)."""
    cache = behind(model, tokens, room)
    for setting in settings:
        weights, _, _, plan = setting
        cache.used = len(tokens)
        read_less(model, plan)
        with sparse_mode(model, MODES[weights]):
            step = record.make_step(model, cache)
            yield setting, lambda token: step(torch.tensor([[token]], device=model.device))[0]


def measure_perplexity(arguments, model, tokenizer, tokens):
    """Return the lines of the table `perplexity`, on tokens (N,), and what `draw` is given."""
    context = arguments.context
    scored = min(512, context // 2)
    windows = windows_of(tokens, context)[:arguments.texts].to(model.device)
    settings, layers = settings_of(arguments, model.config, context)
    losses = defaultdict(list)
    for window in progress(windows, "perplexity, texts"):
        text, rest = window[:context - scored], window[context - scored:]
        for setting, step in steps_behind(model, text, scored, settings):
            losses[setting] += [F.cross_entropy(step(token), following[None])
                                for token, following in zip(rest.tolist(), rest[1:])]
    skipped = [skipped_share(model, window.tolist(), context - scored) for window in windows]
    lines = [f"perplexity of the last {scored} of {context} tokens, {len(windows)} texts; layers "
             f"that read all: {listed(layers)}; sparse weights: "
             f"{statistics.mean(skipped):.1%} skipped",
             f"{COLUMNS} {'read':>7} {'perplexity':>11} {'over whole':>11}"]
    points = defaultdict(list)
    for weights, cache, part, plan in settings:
        loss = torch.stack(losses[weights, cache, part, plan]).double()
        read = plan.share(model.config, context - scored, context)
        row = f"{weights:>8} {cache:>8} {part:>10} {read:7.1%} {loss.mean().exp():11.3f}"
        if cache == "whole":
            whole = loss
        else:
            over = loss - whole
            ratio = over.mean().exp().item() - 1
            row += f" {ratio:+6.1%} ± {over.std().item() / math.sqrt(len(over)):.1%}"
            points[f"{weights} weights", cache].append((100 * read, 100 * ratio))
        lines.append(row)
    axes = "share of the cache read (%)", "perplexity above the whole cache's (%)"
    return lines, (points, *axes)


# --------------------------------------------------------------------------------------------------
# A needle

def hide(tokenizer, text, number, place, depth):
    """Return (tokens of a text with a sentence in it, tokens of the question), two tensors.

    text (N,): the sentence is put at the end of the line nearest to the share `depth` of it.
    """
    question = "\n" + QUESTION.format(place)
    sentence = torch.tensor(tokenizer.encode(f"{question} {number}.\n", bos=False))
    ends = [i + 1 for i, token in enumerate(text.tolist()) if "\n" in tokenizer.decode([token])]
    at = min([0, *ends, len(text)], key=lambda end: abs(end - depth * len(text)))
    return (torch.cat((text[:at], sentence, text[at:])),
            torch.tensor(tokenizer.encode(question, bos=False)))


def answers(tokenizer, step, question, number):
    """Return whether the number is written after the question, which is read token by token."""
    for token in question.tolist():
        logits = step(token)
    written = [logits.argmax().item()]
    while len(written) < ANSWER:
        written.append(step(written[-1]).argmax().item())
    return tokenizer.decode(written).strip().startswith(str(number))


def measure_needle(arguments, model, tokenizer, tokens):
    """Return the lines of the table `needle`, in tokens (N,), and what `draw` is given."""
    length, prompts, depths = arguments.context - ROOM, arguments.prompts, len(PLACES)
    texts = windows_of(tokens, length)[:, :-1]
    settings, layers = settings_of(arguments, model.config, length)
    generator = torch.Generator().manual_seed(0)
    numbers = torch.randint(10000, 100000, (prompts,), generator=generator)
    found = {setting: torch.zeros(prompts, dtype=torch.int64) for setting in settings}
    for i, number in enumerate(progress(numbers.tolist(), "needle, prompts")):
        depth = (i % depths + 0.5) / depths
        text, question = hide(tokenizer, texts[i // depths % len(texts)], number,
                              PLACES[i % depths], depth)
        for setting, step in steps_behind(model, text, ROOM, settings):
            found[setting][i] = answers(tokenizer, step, question, number)
    lines = [f"a number hidden in {arguments.context} tokens and asked for at the end: found, of "
             f"those that are with the whole cache; layers that read all: "
             f"{listed(layers)}",
             f"{COLUMNS} {'found':>9}  by depth, {depths} of them"]
    points = defaultdict(list)
    for (weights, cache, part, plan), these in found.items():
        total = prompts
        if cache == "whole":
            known = these
        else:
            these, total = these & known, known.sum().item()
            points[f"{weights} weights", cache].append(
                (100 * plan.positions / length, 100 * these.sum().item() / max(1, total)))
        lines.append(f"{weights:>8} {cache:>8} {part:>10} {these.sum():3} of {total:2}  "
                     + listed(these[depth::depths].sum().item() for depth in range(depths)))
    return lines, (points, "positions that a layer reads (%)", "numbers still found (%)")


# --------------------------------------------------------------------------------------------------
# Bytes, on paper, and time

WAYS = {                 # {name: (sparse_mode, whether steps read less)}
    "neither": ("off", False), "weights": ("decode", False), "cache": ("off", True),
    "both": ("decode", True),
}


def show_sizes(arguments):
    """Print what a step of each model reads behind texts of several lengths: `sizes`."""
    texts = arguments.behind or [1000, 4000, 8000, 32000]
    print(f"{'MB a step, bfloat16':22} {'weights':>8} {f'{arguments.sparsity:.0%} of them':>11} "
          + f"{'cache,':>7}" + "".join(f"{used:>9,}" for used in texts))
    print(f"{'':22} {'':8} {'skipped':>11} {'a token':>7}" + f"{'tokens':>9}" * len(texts))
    for name in arguments.model:
        preset = name.removeprefix("random:")
        config = read_config(name) if preset == name else preset_config(preset)
        layers = 2e-6 * config.num_hidden_layers                         # MB a number, in all
        blocks = layers * sum(map(math.prod, block_linears(config).values()))
        head = 2e-6 * config.vocab_size * config.hidden_size
        token = layers * 2 * config.num_key_value_heads * config.head_dim
        print(f"{Path(preset).name:22} {blocks + head:8,.0f} "
              f"{blocks * (1 - arguments.sparsity) + head:11,.0f} {token:7.3f}"
              + "".join(f"{used * token:9,.0f}" for used in texts))


def measure_speed(arguments, model, tokenizer, tokens):
    """Return the lines of the table `speed`, and what `draw` is given.

    The cache holds random numbers, of which neighbours have nothing in common. All ways take turns.
    """
    texts = arguments.behind or [1000, 2000, 4000, 8000]
    layers = attend.layers_of(arguments.model, model.config)
    lines = [circumstances(arguments.model, model),
             f"weights: {arguments.sparsity:.0%} skipped; cache: 1/{arguments.part} of the "
             f"positions, layers that read all: {listed(layers)}",
             f"{'ms a step':>10}" + "".join(f"{name:>9}" for name in WAYS)
             + f"{'both/weights':>14}"]
    points = {("skipped in part", name): [] for name in WAYS}
    token = torch.ones(1, 1, dtype=torch.int64, device=model.device)
    for used in progress(texts, "timing steps behind several texts"):
        cache = model.make_cache(1, used + 1)
        cache.keys.normal_()
        cache.values.normal_()
        reading = read_less(model, Plan(max(1, used // arguments.part), layers))
        steps = {}
        times = defaultdict(list)
        for name, (mode, less) in list(WAYS.items()) * ROUNDS:
            with sparse_mode(model, mode), reading.switched(less):
                cache.used = used
                if name not in steps:
                    steps[name] = record.make_step(model, cache)
                times[name].append(seconds_of(lambda: steps[name](token), model.device))
        timed = {name: 1e3 * statistics.median(times[name][WARM_UP:]) for name in WAYS}
        lines.append(f"{used:10}" + "".join(f"{one:9.2f}" for one in timed.values())
                     + f"{timed['weights'] / timed['both']:13.2f}x")
        for name in WAYS:
            points["skipped in part", name].append((used, timed[name]))
    return lines, (points, "tokens before the step", "ms a step")


# --------------------------------------------------------------------------------------------------
# Which layers are to read all?

def choices(q, k, sees, K, by):
    """Return which K each of T queries q (1, H, T, D) would choose of k (1, G, S, D), (T, S) bool.

    sees (T, S): the positions that a query can see.
    """
    chosen = torch.zeros_like(sees)
    for t in range(len(sees)):
        chosen[t, attend.choose(q[:, :, t:t + 1], k, sees[t:t + 1], K, by)[0]] = True
    return chosen & sees


def costs_of_taking_over(model, tokens, scored, K):
    """Return what it costs that a layer reads what another chose, float64 (layers + 1, layers).

    [i, l]: the KL in nats from the whole cache's distributions, a mean over the last `scored` of
    tokens (N,), where layer l alone reads K positions that layer i - 1 chose, i <= l. Row 0: the
    last positions and the first, which are read where no layer has chosen.
    """
    cache = behind(model, tokens[:-scored], scored)
    used = cache.used
    rest = tokens[None, used:].to(model.device)
    attentions = [block.self_attn for block in model.model.layers]
    own = [attention.attend for attention in attentions]
    chosen = []                          # (scored, N) bool: by no layer, by layer 0, ...

    def note_choice(whole, q, k, v, mask):
        for by in ("tidal",) if chosen else ("window", "tidal"):
            chosen.append(choices(q, k, mask, K, by))
        return whole(q, k, v, mask)

    def log_p():
        cache.used = used
        return model(rest, cache)[0].log_softmax(-1)

    for attention, whole in zip(attentions, own):
        attention.attend = functools.partial(note_choice, whole)
    expected = log_p()
    for attention, whole in zip(attentions, own):
        attention.attend = whole
    costs = torch.full((len(own) + 1, len(own)), float("inf"), dtype=torch.float64)
    pairs = [(i, layer) for layer in range(len(own)) for i in range(layer + 1)]
    for i, layer in progress(pairs, "what taking over costs, pairs of layers"):
        attentions[layer].attend = lambda q, k, v, mask: own[layer](q, k, v, chosen[i])
        costs[i, layer] = F.kl_div(log_p(), expected, reduction="sum", log_target=True) / scored
        attentions[layer].attend = own[layer]
    return costs


def best_layers(costs, count):
    """Return (sum of what all layers pay, the `count` layers that are to read all for the least).

    costs: as above. A layer takes over from the last one before it that reads all. The best ways to
    place one such layer after another are found from the first to the last (dynamic programming).
    """
    layers = costs.shape[1]

    def paid(last, end):
        """Return what the layers between the reading layer `last` (-1: none) and `end` pay."""
        return costs[last + 1, last + 1:end].sum().item()

    ways = {-1: (0.0, ())}               # {the last layer that reads all: (paid so far, all such)}
    for _ in range(count):
        ways = {layer: min((total + paid(last, layer), (*before, layer))
                           for last, (total, before) in ways.items() if last < layer)
                for layer in range(min(ways) + 1, layers)}
    return min((total + paid(last, layers), before) for last, (total, before) in ways.items())


def measure_layers(arguments, model, tokenizer, tokens):
    """Write attend.json by what tokens (N,) tell, and return the lines of the table `layers`."""
    path = Path(arguments.model) / attend.LAYERS_FILE
    check_output(path, "--model")
    context, layers = arguments.context, model.config.num_hidden_layers
    scored = min(128, context // 2)
    K = max(1, context // arguments.part)
    windows = windows_of(tokens, context - 1)[:arguments.texts]
    costs = sum(costs_of_taking_over(model, window, scored, K) for window in windows) / len(windows)
    lines = [f"{len(windows)} texts of {context} tokens, of which the last {scored} count; "
             f"1/{arguments.part} of the positions",
             f"{'read all':>8} {'KL':>8} {'cache read':>11}  layers"]
    for count in range(1, layers // 2 + 1):
        total, best = best_layers(costs, count)
        read = Plan(K, best).share(model.config, context - 1, context)
        lines.append(f"{count:8} {total:8.4f} {read:11.1%}  {listed(best)}")
    best = best_layers(costs, layers // 3)[1]
    write_json(path, {"layers": best})
    return [*lines, f"{path}: {listed(best)}"], None


# --------------------------------------------------------------------------------------------------
# The command line

COMMANDS = {             # {name: (its function, what it measures, its options)}
    "sizes": (show_sizes, "what a step reads, on paper", "model sparsity behind"),
    "layers": (measure_layers, "which layers are to read all", "text context texts part"),
    "perplexity": (measure_perplexity, "the perplexity of the last tokens of long texts",
                   "text context texts by parts sparsity out"),
    "needle": (measure_needle, "whether numbers hidden in long texts are found",
               "text context prompts by parts sparsity out"),
    "speed": (measure_speed, "milliseconds a step", "behind part sparsity out"),
}
ONE = {"metavar": "N", "type": natural}
SEVERAL = ONE | {"nargs": "+"}
OPTIONS = {
    "model": {"nargs": "+", "default": ["random:llama-3-8b", "random:llama-2-7b"],
              "help": "checkpoint folders, or random:PRESET (default: two presets)"},
    "text": {"help": "UTF-8 text (default: the standard library's)"},
    "context": ONE | {"help": "tokens of a text (default: the model's context)"},
    "texts": ONE | {"default": 2, "help": "how many at most (default: 2)"},
    "prompts": ONE | {"default": 40, "help": "how many (default: 40)"},
    "by": {"nargs": "+", "choices": attend.SCORES, "default": list(attend.SCORES),
           "help": "how positions are chosen (default: in all ways)"},
    "parts": SEVERAL | {"default": [4, 8, 16],
                        "help": "layers read 1/N of the positions (default: 4 8 16)"},
    "part": ONE | {"default": 16, "help": "layers read 1/N of the positions (default: 16)"},
    "sparsity": {"type": share, "default": 0.5, "metavar": "S",
                 "help": "share of the blocks' weights to skip; 0: only dense (default: 0.5)"},
    "behind": SEVERAL | {"help": "tokens before a step (default: 1000 and three more)"},
    "out": {"type": Path, "metavar": "FOLDER",
            "help": "where text and figure go (default: the text is printed)"},
}


def make_parser():
    """Return the Parser of all commands, each of which has options of its own."""
    parser = Parser(description="Measures what reading less of the cache costs, and brings.")
    commands = parser.add_subparsers(dest="what", required=True, metavar="COMMAND")
    for what, (_, measures, options) in COMMANDS.items():
        command = commands.add_parser(what, help=measures, description=f"Measures {measures}.")
        if what != "sizes":
            command.add_model()
            add_quantize(command)
        for option in options.split():
            command.add_argument(f"--{option}", **OPTIONS[option])
    return parser


def draw(path, points, xlabel, ylabel):
    """Draw {(panel, label): [(x, y), ...]} as lines in panels side by side, a PNG."""
    panels = sorted({panel for panel, _ in points})
    figure, axes = pyplot().subplots(1, len(panels), figsize=(1.4 + 3.2 * len(panels), 3.1),
                                     sharey=True, layout="constrained", squeeze=False)
    for (panel, label), line in points.items():
        axis = axes[0, panels.index(panel)]
        axis.plot(*zip(*line), marker="o", ms=3.5, lw=1.3, label=label)
        axis.set(title=panel, xlabel=xlabel)
        axis.axhline(0, color="grey", lw=0.8)
    axes[0, 0].set_ylabel(ylabel)
    axes[0, 0].legend()
    save_figure(figure, path)


def main():
    arguments = make_parser().parse_args()
    what = arguments.what
    if what == "sizes":
        show_sizes(arguments)
        return
    require(what == "speed" or not arguments.model.startswith("random:"),
            f"{arguments.model} has random weights: only its speed can be measured")
    out = getattr(arguments, "out", None)
    if out:
        check_figure(out / f"attend_{what}.png", "--out")
    model, tokenizer = load(arguments)
    tokens = None
    if what != "speed":
        context = arguments.context or model.config.max_position_embeddings
        arguments.context = default_context(model, context)
        require(context > ROOM, f"--context {context}, expected more than {ROOM}: so many are for "
                                f"the end of a text")
        part = "train" if what == "layers" else "held-out"
        tokens, _ = read_tokens(tokenizer, arguments.text, part)
    if what != "layers":
        thresholds = dict.fromkeys(linear_names(model.config))       # dense, by the same kernels
        if arguments.sparsity:
            thresholds = load_calibration(model, arguments.model).thresholds(arguments.sparsity)
        sparsify(model, thresholds | {"lm_head": None})
    lines, figure = COMMANDS[what][0](arguments, model, tokenizer, tokens)
    print(*lines, sep="\n")
    if out:
        with replacing(out / f"attend_{what}.txt") as file:
            file.writelines(f"{line}\n".encode() for line in lines)
        draw(out / f"attend_{what}.png", *figure)


if __name__ == "__main__":
    command_line(main)
