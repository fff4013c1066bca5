"""How reading less of the cache is measured: behind long texts.

    sizes        what a step reads of weights and cache, on paper
    layers       which layers are to read all (attend.py): those whose choices the next layers can
                 take over at the least cost. Measured for every pair of layers: how far the
                 distributions of the next token move (KL, in nats) when one layer alone reads what
                 an earlier one chose. Writes FOLDER/attend.json
    perplexity   of the last 512 tokens of windows as long as the context, read one by one
    needle       a sentence with a number, hidden in a text at ten depths and asked for at its end.
                 The text is read as a prompt is, the question token by token (as in Quest), since
                 the model finds the number there or nowhere
    speed        milliseconds a step: weights dense and sparse, the cache whole and in part

A part of 16 is a sixteenth of the text's positions, which a layer reads. With --out the text goes
to FOLDER/attend_NAME.txt, with a figure beside it.

    python -m beyond.lab.longtext layers --model FOLDER --text FILE
    python -m beyond.lab.longtext perplexity --model FOLDER --text FILE --out figures
    python -m beyond.lab.longtext needle --model FOLDER --text FILE --out figures
    python -m beyond.lab.longtext speed --model random:llama-3.2-1b --behind 1000 8000 32000
"""
import functools
import math
import statistics
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F

from beyond import attend, record
from beyond.attend import Plan, plan_of, read_less
from beyond.folders import read_config
from beyond.lab.figures import check_figure, pyplot, save_figure
from beyond.lab.timing import ROUNDS, WARM_UP, circumstances, seconds_of
from beyond.quantize import add_quantize, load
from calibrate import load_calibration
from model import (Parser, block_linears, check_output, command_line, default_context, linear_names,
                   natural, preset_config, progress, read_tokens, replacing, require, share,
                   windows_of, write_json)
from sparsify import counted, realised_sparsity, sparse_mode, sparsify

MODES = {"dense": "off", "sparse": "decode"}                   # {weights: sparse_mode}
QUESTION = "The secret number of {} is"
PLACES = ("Lisbon", "Oslo", "Cairo", "Lima", "Kyoto", "Quito", "Riga", "Accra", "Hanoi", "Turin")
ANSWER = 8               # tokens in which a number of five digits has room
ROOM = 64                # tokens in which a sentence with one, a question and an answer have room


class Setting(NamedTuple):
    """A way to decode."""
    weights: str                     # "dense" or "sparse"
    cache: str                       # "whole", or a name in attend.SCORES
    part: int                        # a layer reads 1 / part of the positions
    plan: Plan

    def __str__(self):
        """The first columns of a table."""
        positions = "all" if self.part == 1 else f"1/{self.part}"
        return f"{self.weights:>8} {self.cache:>8} {positions:>10}"


COLUMNS = f"{'weights':>8} {'cache':>8} {'positions':>10}"


def settings_of(arguments, config, positions):
    """Return the Settings that the command line asks for, behind a text of so many positions.

    For each kind of weights the whole cache comes first.
    """
    ways = [("whole", 1, Plan(config.max_position_embeddings, ()))]
    ways += [(by, part, plan_of(arguments, config, max(1, positions // part), by))
             for by in arguments.by for part in arguments.parts]
    return [Setting(weights, *way) for weights in MODES for way in ways
            if weights == "dense" or arguments.sparsity]


class Page:
    """The output of a command: it is printed, and with a folder written there, with a figure."""

    def __init__(self, folder, name):
        self.path = folder and folder / f"attend_{name}.png"
        self.text = ""
        self.panels = {}                 # of the figure: {title: {label: [(x, y), ...]}}
        if self.path:
            check_figure(self.path, "--out")

    def say(self, text):
        print(text, flush=True)
        self.text += f"{text}\n"

    def add(self, panel, label, x, y):
        self.panels.setdefault(panel, {}).setdefault(label, []).append((x, y))

    def write(self, xlabel, ylabel, lowest=None):
        """Write the text and the figure, its panels side by side."""
        if self.path is None:
            return
        with replacing(self.path.with_suffix(".txt")) as file:
            file.write(self.text.encode())
        width = 1.4 + 3.2 * len(self.panels)
        figure, axes = pyplot().subplots(1, len(self.panels), figsize=(width, 3.1), sharey=True,
                                         layout="constrained", squeeze=False)
        for axis, (panel, lines) in zip(axes[0], self.panels.items()):
            for label, points in lines.items():
                axis.plot(*zip(*points), marker="o", ms=3.5, lw=1.3, label=label)
            axis.set(title=panel, xlabel=xlabel, ylim=(lowest, None))
        axes[0, 0].set_ylabel(ylabel)
        axes[0, 0].legend()
        save_figure(figure, self.path)


def listed(numbers):
    return " ".join(map(str, numbers)) or "none"


# --------------------------------------------------------------------------------------------------
# Behind a text

@torch.no_grad()
def behind(model, tokens, room):
    """Return a cache that holds tokens (N,), read dense and whole, with room for more."""
    cache = model.make_cache(1, len(tokens) + room)
    with sparse_mode(model, "off"):
        model(tokens[None].to(model.device), cache, last_only=True)
    return cache


@torch.no_grad()
def step_behind(model, cache, used, setting):
    """Return a step as a setting says, token -> logits (1, vocab), behind `used` positions."""
    cache.used = used
    read_less(model, setting.plan)
    with sparse_mode(model, MODES[setting.weights]):
        step = record.make_step(model, cache)

    @torch.no_grad()
    def run(token):
        with sparse_mode(model, MODES[setting.weights]):
            return step(torch.tensor([[token]], device=model.device))[0]
    return run


def losses_behind(model, cache, used, tokens, setting):
    """Return the cross-entropy (N,) of tokens[1:], as tokens (N + 1,) are read one by one."""
    step = step_behind(model, cache, used, setting)
    # One by one, since a step may overwrite the logits of the one before.
    losses = [F.cross_entropy(step(token.item()), following[None])
              for token, following in zip(tokens, tokens[1:].to(model.device))]
    return torch.stack(losses).double()


def measure_perplexity(arguments, model, tokenizer, tokens, page):
    """Measure the command `perplexity`, on tokens (N,)."""
    context, scored = arguments.context, arguments.scored
    used = context - scored
    windows = windows_of(tokens, context)[:arguments.texts]
    settings = settings_of(arguments, model.config, context)
    results = {setting: [] for setting in settings}
    skipped = []
    for window in progress(windows, "perplexity, texts"):
        cache = behind(model, window[:used], scored)
        with counted(model), sparse_mode(model, "all"), torch.no_grad():
            model(window[None, used:-1].to(model.device), cache, last_only=True)
        skipped.append(realised_sparsity(model))
        for setting in settings:
            results[setting].append(losses_behind(model, cache, used, window[used:], setting))
    page.say(f"perplexity of the last {scored} of {context} tokens, {len(windows)} texts; layers "
             f"that read all: {listed(settings[-1].plan.layers)}; sparse weights: "
             f"{statistics.mean(skipped):.1%} skipped")
    page.say(f"{COLUMNS} {'read':>7} {'perplexity':>11} {'over whole':>11}")
    for setting in settings:
        losses = torch.cat(results[setting])
        read = setting.plan.share(model.config, used, context)
        row = f"{setting} {read:7.1%} {losses.mean().exp():11.3f}"
        if setting.cache == "whole":
            whole = losses
        else:
            over = losses - whole
            ratio = over.mean().exp().item() - 1
            row += f" {ratio:+6.1%} ± {over.std().item() / math.sqrt(len(over)):.1%}"
            page.add(f"{setting.weights} weights", setting.cache, 100 * read, 100 * ratio)
        page.say(row)
    page.write("share of the cache read (%)", "perplexity above the whole cache's (%)")


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


def answers(model, tokenizer, cache, used, question, number, setting):
    """Return whether a model writes the number after the question, read token by token."""
    step = step_behind(model, cache, used, setting)
    for token in question.tolist():
        logits = step(token)
    written = [logits.argmax().item()]
    while len(written) < ANSWER:
        written.append(step(written[-1]).argmax().item())
    return tokenizer.decode(written).strip().startswith(str(number))


def measure_needle(arguments, model, tokenizer, tokens, page):
    """Measure the command `needle`, in tokens (N,)."""
    length, prompts, depths = arguments.context - ROOM, arguments.prompts, len(PLACES)
    require(length > 0, f"--context {arguments.context}, expected more than {ROOM}: so many are "
                        f"for the sentence, the question and the answer")
    texts = windows_of(tokens, length)[:, :-1]
    needed = -(-prompts // depths)
    require(len(texts) >= needed, f"the text has {len(tokens)} tokens, {prompts} prompts of "
                                  f"{arguments.context} need {needed} times {length}")
    settings = settings_of(arguments, model.config, length)
    generator = torch.Generator().manual_seed(0)
    numbers = torch.randint(10000, 100000, (prompts,), generator=generator)
    found = torch.zeros(len(settings), prompts, dtype=torch.int64)
    for i, number in enumerate(progress(numbers.tolist(), "needle, prompts")):
        depth = (i % depths + 0.5) / depths
        text, question = hide(tokenizer, texts[i // depths], number, PLACES[i % depths], depth)
        cache = behind(model, text, ROOM)
        for s, setting in enumerate(settings):
            found[s, i] = answers(model, tokenizer, cache, len(text), question, number, setting)
    page.say(f"a number hidden in {arguments.context} tokens and asked for at the end: found, of "
             f"those that are with the whole cache; layers that read all: "
             f"{listed(settings[-1].plan.layers)}")
    page.say(f"{COLUMNS} {'found':>9}  by depth, {depths} of them")
    for setting, these in zip(settings, found):
        total = prompts
        if setting.cache == "whole":
            known = these
        else:
            these, total = these & known, known.sum().item()
            page.add(f"{setting.weights} weights", setting.cache, 100 / setting.part,
                     100 * these.sum().item() / max(1, total))
        page.say(f"{setting} {these.sum():3} of {total:2}  "
                 + listed(these[depth::depths].sum().item() for depth in range(depths)))
    page.write("positions that a layer reads (%)", "numbers still found (%)")


# --------------------------------------------------------------------------------------------------
# Bytes, on paper, and time

WAYS = {                 # {name: (sparse_mode, whether steps read less)}
    "neither": ("off", False), "weights": ("decode", False), "cache": ("off", True),
    "both": ("decode", True),
}


def show_sizes(arguments):
    """Print what a step of each model reads behind texts of several lengths: `sizes`."""
    print(f"{'MB a step, bfloat16':22} {'weights':>8} {f'{arguments.sparsity:.0%} of them':>11} "
          + f"{'cache,':>7}" + "".join(f"{used:>9,}" for used in arguments.behind))
    print(f"{'':22} {'':8} {'skipped':>11} {'a token':>7}"
          + f"{'tokens':>9}" * len(arguments.behind))
    for name in arguments.model:
        preset = name.removeprefix("random:")
        config = read_config(name) if preset == name else preset_config(preset)
        layers = 2e-6 * config.num_hidden_layers                         # MB a number, in all
        blocks = layers * sum(map(math.prod, block_linears(config).values()))
        head = 2e-6 * config.vocab_size * config.hidden_size
        token = layers * 2 * config.num_key_value_heads * config.head_dim
        print(f"{Path(preset).name:22} {blocks + head:8,.0f} "
              f"{blocks * (1 - arguments.sparsity) + head:11,.0f} {token:7.3f}"
              + "".join(f"{used * token:9,.0f}" for used in arguments.behind))


@torch.no_grad()
def time_behind(model, used, plan):
    """Return {name in WAYS: milliseconds of a step behind `used` tokens}; all ways take turns.

    The cache holds random numbers, of which neighbours have nothing in common.
    """
    cache = model.make_cache(1, used + 1)
    cache.keys.normal_()
    cache.values.normal_()
    token = torch.ones(1, 1, dtype=torch.int64, device=model.device)
    reading = read_less(model, plan)
    steps = {}
    times = {name: [] for name in WAYS}
    for _ in range(ROUNDS):
        for name, (mode, less) in WAYS.items():
            with sparse_mode(model, mode), reading.switched(less):
                cache.used = used
                if name not in steps:
                    steps[name] = record.make_step(model, cache)
                seconds = seconds_of(lambda: steps[name](token), model.device)
                times[name].append(1e3 * seconds)
    return {name: statistics.median(times[name][WARM_UP:]) for name in WAYS}


def measure_speed(arguments, model, tokenizer, tokens, page):
    """Measure the command `speed`."""
    longest = model.config.max_position_embeddings
    require(max(arguments.behind) < longest or arguments.model.startswith("random:"),
            f"--behind {max(arguments.behind)} does not fit the model's context of {longest}")
    plans = {used: plan_of(arguments, model.config, max(1, used // arguments.part), "tidal")
             for used in arguments.behind}
    page.say(circumstances(arguments.model, model))
    page.say(f"weights: {arguments.sparsity:.0%} skipped; cache: 1/{arguments.part} of the "
             f"positions, layers that read all: {listed(plans[arguments.behind[0]].layers)}")
    page.say(f"{'ms a step':>10}" + "".join(f"{name:>9}" for name in WAYS)
             + f"{'both/weights':>14}")
    for used, plan in progress(list(plans.items()), "timing steps behind several texts"):
        timed = time_behind(model, used, plan)
        page.say(f"{used:10}" + "".join(f"{one:9.2f}" for one in timed.values())
                 + f"{timed['weights'] / timed['both']:13.2f}x")
        for name, milliseconds in timed.items():
            page.add("skipped in part", name, used, milliseconds)
    page.write("tokens before the step", "ms a step", lowest=0)


# --------------------------------------------------------------------------------------------------
# Which layers are to read all?

def choices(q, k, sees, plan, by):
    """Return what each of T queries q (1, H, T, D) would choose of k (1, G, S, D), (T, S) bool.

    sees (T, S): the positions that a query can see.
    """
    chosen = torch.zeros_like(sees)
    for t in range(len(sees)):
        chosen[t, attend.choose(q[:, :, t:t + 1], k, sees[t:t + 1], plan, by)[0]] = True
    return chosen & sees


@torch.no_grad()
def costs_of_taking_over(model, tokens, scored, plan, label=""):
    """Return what it costs that a layer reads what another chose, float64 (layers + 1, layers).

    [i, l]: the KL in nats from the whole cache's distributions, a mean over the last `scored` of
    tokens (N,), where layer l alone reads what layer i - 1 chose, i <= l. Row 0: the last positions
    and the first, which are read where no layer has chosen. label: what the progress is called.
    """
    used = len(tokens) - scored
    cache = behind(model, tokens[:used], scored)
    rest = tokens[None, used:].to(model.device)
    window = model.config.sliding_window or len(tokens)
    sees = torch.ones(scored, len(tokens), dtype=torch.bool, device=model.device)
    sees = sees.tril(used).triu(used + 1 - window)
    attentions = [block.self_attn for block in model.model.layers]
    own = [attention.attend for attention in attentions]
    chosen = []

    def log_p():
        cache.used = used
        return model(rest, cache)[0].log_softmax(-1)

    def note_choice(whole, q, k, v, mask):
        for by in ("tidal",) if chosen else ("window", "tidal"):
            chosen.append(choices(q, k, sees, plan, by))
        return whole(q, k, v, mask)

    for attention, whole in zip(attentions, own):
        attention.attend = functools.partial(note_choice, whole)
    expected = log_p()
    for attention, whole in zip(attentions, own):
        attention.attend = whole
    costs = torch.full((len(own) + 1, len(own)), float("inf"), dtype=torch.float64)
    pairs = [(i, layer) for layer in range(len(own)) for i in range(layer + 1)]
    for i, layer in progress(pairs, f"{label}what taking over costs, pairs of layers"):
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


def measure_layers(arguments, model, tokenizer, tokens, page):
    """Measure the command `layers`, on tokens (N,), and write the best layers."""
    context, layers, scored = arguments.context, len(model.model.layers), arguments.scored
    count = arguments.count or layers // 3
    require(count <= layers, f"--count {count}, expected at most {layers}, the model's layers")
    path = Path(arguments.model) / attend.LAYERS_FILE
    check_output(path, "--model")
    plan = plan_of(arguments, model.config, max(1, context // arguments.part), "tidal")
    windows = windows_of(tokens, context - 1)[:arguments.texts]
    costs = sum(costs_of_taking_over(model, window, scored, plan, f"text {i} of {len(windows)}, ")
                for i, window in enumerate(windows, start=1)) / len(windows)
    page.say(f"{len(windows)} texts of {context} tokens, of which the last {scored} count; "
             f"1/{arguments.part} of the positions")
    page.say(f"{'read all':>8} {'KL':>8} {'cache read':>11}  layers")
    for number in range(1, layers // 2 + 1):
        total, best = best_layers(costs, number)
        read = replace(plan, layers=best).share(model.config, context - 1, context)
        page.say(f"{number:8} {total:8.4f} {read:11.1%}  {listed(best)}")
    best = best_layers(costs, count)[1]
    write_json(path, {"layers": best})
    page.say(f"{path}: {listed(best)}")


# --------------------------------------------------------------------------------------------------
# The command line

COMMANDS = {             # {name: (its function of arguments, model, tokenizer, tokens, page; help)}
    "sizes": (show_sizes, "what a step reads, on paper"),
    "layers": (measure_layers, "which layers are to read all"),
    "perplexity": (measure_perplexity, "of the last tokens of long texts"),
    "needle": (measure_needle, "numbers hidden in long texts and asked for"),
    "speed": (measure_speed, "milliseconds a step"),
}
ONE = {"metavar": "N", "type": natural}
SEVERAL = ONE | {"nargs": "+"}
OPTIONS = [              # (commands that have it, option, default or what None means, help, more)
    ("sizes", "--model", ["random:llama-3-8b", "random:llama-2-7b"],
     "checkpoint folders, or random:PRESET", {"nargs": "+"}),
    ("layers perplexity needle", "--text", "the standard library's", "UTF-8 text", {}),
    ("layers perplexity needle", "--context", "the model's context", "tokens of a text", ONE),
    ("layers", "--scored", 128, "tokens at its end that count", ONE),
    ("perplexity", "--scored", 512, "tokens at its end that count", ONE),
    ("layers perplexity", "--texts", 2, "how many at most", ONE),
    ("needle", "--prompts", 40, "how many", ONE),
    ("perplexity needle", "--by", list(attend.SCORES), "how positions are chosen",
     {"nargs": "+", "choices": attend.SCORES}),
    ("perplexity needle", "--parts", [4, 8, 16], "a layer reads 1/N of the positions", SEVERAL),
    ("layers speed", "--part", 16, "a layer reads 1/N of the positions", ONE),
    ("sizes perplexity needle speed", "--sparsity", 0.5,
     "share of the blocks' weights to skip; 0: only dense", {"metavar": "S", "type": share}),
    ("sizes", "--behind", [1000, 4000, 8000, 32000], "tokens before a step", SEVERAL),
    ("speed", "--behind", [1000, 2000, 4000, 8000], "tokens before a step", SEVERAL),
    ("layers", "--count", "a third", "how many are to read all", ONE),
    ("perplexity needle speed", "--out", "the text is printed", "where text and figure go",
     {"metavar": "FOLDER", "type": Path}),
]


def make_parser():
    """Return the Parser of all commands, each of which has options of its own."""
    parser = Parser(description="Measures what reading less of the cache costs, and brings.")
    commands = parser.add_subparsers(dest="what", required=True, metavar="COMMAND")
    for name, (_, measures) in COMMANDS.items():
        command = commands.add_parser(name, help=measures, description=f"Measures {measures}.")
        if name != "sizes":
            command.add_model()
            add_quantize(command)
            attend.add_layers(command)
        for which, option, default, text, more in OPTIONS:
            if name in which.split():
                told = listed(default) if isinstance(default, list) else default
                command.add_argument(option, default=None if isinstance(default, str) else default,
                                     help=f"{text} (default: {told})", **more)
    return parser


def main():
    arguments = make_parser().parse_args()
    what = arguments.what
    if what == "sizes":
        show_sizes(arguments)
        return
    require(what == "speed" or not arguments.model.startswith("random:"),
            f"{arguments.model} has random weights: only its speed can be measured")
    page = Page(getattr(arguments, "out", None), what)
    model, tokenizer = load(arguments)
    plan_of(arguments, model.config, 1, "tidal").check(model.config)
    tokens = None
    if what != "speed":
        context = arguments.context or model.config.max_position_embeddings
        arguments.context = default_context(model, context)
        scored = getattr(arguments, "scored", 0)
        require(scored < context - 1,
                f"--scored {scored}, expected less than the {context} tokens of a text")
        part = "train" if what == "layers" else "held-out"
        tokens, _ = read_tokens(tokenizer, arguments.text, part)
    if what != "layers":
        thresholds = dict.fromkeys(linear_names(model.config))       # dense, by the same kernels
        if arguments.sparsity:
            thresholds = load_calibration(model, arguments.model).thresholds(arguments.sparsity)
        sparsify(model, thresholds | {"lm_head": None})
    COMMANDS[what][0](arguments, model, tokenizer, tokens, page)


if __name__ == "__main__":
    command_line(main)
