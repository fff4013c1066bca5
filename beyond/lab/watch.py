"""One text, token by token: what sparsity skips, what it changes, and where greedy texts part.

Sparsity and perplexity are means over many tokens. Here are the tokens. Decoding is sparse behind a
dense prompt, and so is one pass over prompt and text in which the prompt's positions stay dense.
The picture has a column for each token behind the prompt:

    KL       how far the sparse model's distribution of the next token is from the dense model's,
             in nats; red where the likeliest one is another
    block    the share of each block's weights that was not read for this token
    dense    the tokens, which the dense model wrote after the prompt, greedily
    sparse   what the sparse model writes by itself, red from where it parts: behind the first red
             bar. From there on the sparse model is judged on a text that it would not have written

With --text the tokens are those of a file, behind its first 16.

    python -m beyond.lab.watch --figure FILE.png [--model FOLDER] [--prompt TEXT] [--sparsity 0.5]
    python -m beyond.lab.watch --figure FILE.png --text FILE
"""
import contextlib
import math
import warnings

import torch
import torch.nn.functional as F

from beyond.folders import load_model
from beyond.lab.figures import check_figure, pyplot, save_figure
from calibrate import load_calibration
from generate import PROMPT, check_prompt, first_difference, generate, plain_step, stream
from model import (Parser, block_linears, command_line, linear_names, natural, read_tokens, require,
                   share)
from sparsify import sparse_mode, sparsify

PROMPT_TOKENS = 16       # of a --text, which are read dense
MOST_LABELS = 72         # tokens whose text can be read side by side
LONGEST_LABEL = 12       # characters


@torch.no_grad()
def watch(model, prompt, ids):
    """Return what is seen while a sparse model reads N `ids` behind a prompt, which is dense.

    prompt, ids: lists of token ids. Returns skipped (N, layers) float64, the shares of a block's
    weights that are not read; kl (N,), of the next token's distribution from the dense model's, in
    nats; and same (N,) bool, whether the likeliest next token is the dense model's.
    """
    check_prompt(model, prompt, len(ids))
    tokens = torch.tensor([[*prompt, *ids]], device=model.device)
    behind = slice(len(prompt), None)
    skipped = torch.zeros(len(ids), len(model.model.layers), dtype=torch.float64)
    sizes = [math.prod(shape) for shape in block_linears(model.config).values()]
    log_p = {}                                                                  # (N, vocab) each
    with contextlib.ExitStack() as hooks:
        for i, name in enumerate(linear_names(model.config)):
            layer, of_block = divmod(i, len(sizes))

            def see(linear, inputs, of=skipped[:, layer], share=sizes[of_block] / sum(sizes)):
                if linear.state.is_sparse():
                    dropped = ~linear.keep(inputs[0])[0, behind]                # (N, in)
                    of += share * dropped.double().mean(-1).cpu()
            hooks.enter_context(model.get_submodule(name).register_forward_pre_hook(see))
        for mode in ("off", "all"):
            with sparse_mode(model, mode, dense_prefix=len(prompt)):
                log_p[mode] = model(tokens)[0, behind].log_softmax(-1).cpu()
    kl = F.kl_div(log_p["all"], log_p["off"], reduction="none", log_target=True).sum(-1)
    return skipped, kl, log_p["all"].argmax(-1) == log_p["off"].argmax(-1)


def labels(tokenizer, prompt, ids):
    """Return what to write for each of `ids` as it follows a prompt; white space becomes signs."""
    pieces = dict(enumerate(tokenizer.pieces()))           # other ids only pad the vocabulary
    texts = [text or pieces.get(token, f"<{token}>")
             for token, text in zip(ids, stream(ids, tokenizer.decode, list(prompt)))]
    signs = str.maketrans({" ": "·", "\n": "↵", "\t": "⇥"})
    return [(text.strip() or text.translate(signs))[:LONGEST_LABEL] for text in texts]


def draw(skipped, kl, same, rows, parting, title, path):
    """Draw what was watched as a PNG.

    rows: {name: labels of tokens}, first the text that was watched. parting: how many tokens the
    greedy texts, "dense" and "sparse", have in common.
    """
    count = len(kl)
    shown = rows if count <= MOST_LABELS else {}           # else only their numbers fit
    figure, axes = pyplot().subplots(
        2 + len(shown), sharex=True, figsize=(9, 4.2 + 0.8 * len(shown)), layout="constrained",
        height_ratios=[1.4, 2.8] + [0.8] * len(shown))
    for chosen, colour, label in ((same, "tab:blue", "the likeliest next token is the same"),
                                  (~same, "tab:red", "it is another")):
        axes[0].bar(range(count), kl.where(chosen, 0.0).tolist(), color=colour, label=label)
    axes[0].set(ylabel="KL (nats)", title=title)
    axes[0].legend(ncols=2, loc="upper right")
    axes[0].margins(y=0.3)               # room for the legend
    low, high = torch.quantile(100 * skipped, torch.tensor([0.01, 0.99]).double()).tolist()
    image = axes[1].imshow(100 * skipped.T.numpy(), vmin=low, vmax=high, aspect="auto",
                           origin="lower", interpolation="nearest")
    axes[1].set(ylabel="block", xlabel="tokens behind the prompt", xlim=(-0.5, count - 0.5))
    axes[1].grid(False)
    axes[1].yaxis.get_major_locator().set_params(integer=True)
    figure.colorbar(image, ax=axes[:2], label="weights skipped (%)", pad=0.01, extend="both")
    for axis, (name, texts) in zip(axes[2:], shown.items()):
        axis.axis("off")
        axis.text(-0.012, 0.9, name, transform=axis.transAxes, ha="right", va="top")
        for i, text in enumerate(texts[:count]):
            colour = "tab:red" if name == "sparse" and i >= parting else "black"
            axis.text(i, 1, text, rotation=90, ha="center", va="top", color=colour,
                      fontsize=min(8, 480 / count), parse_math=False)
    if parting < count and rows["dense"] != rows["sparse"]:
        for axis in axes if next(iter(rows)) == "dense" else axes[3:]:         # greedy texts alone
            axis.axvline(parting - 0.5, color="tab:red", lw=1, ls="--")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")         # a script that the font does not have
        save_figure(figure, path)


def main():
    parser = Parser(description="Draws what sparsity skips and changes, token by token.")
    parser.add_model()
    begin = parser.add_mutually_exclusive_group().add_argument
    begin("--prompt", default=PROMPT,
          help="text to continue (default: the beginning of a class)")
    begin("--text", metavar="FILE",
          help=f"watch UTF-8 text, its first {PROMPT_TOKENS} tokens the prompt (default: what the "
               f"dense model writes)")
    add = parser.add_argument
    add("--tokens", type=natural, default=48,
        help="how many after the prompt, at most (default: 48)")
    add("--sparsity", type=share, default=0.5, metavar="S",
        help="share of the blocks' weights to skip (default: 0.5)")
    parser.add_calibration()
    add("--allocation", help="how the sparsity is shared out (default: the best that the "
                             "calibration holds)")
    add("--figure", required=True, metavar="FILE",
        help="the PNG to write (no default: it is needed)")
    arguments = parser.parse_args()
    check_figure(arguments.figure)
    require(not arguments.model.startswith("random:"),
            f"{arguments.model} has random weights: there is no text to watch")
    model, tokenizer = load_model(arguments.model, arguments.device, arguments.dtype)
    calibration = load_calibration(model, arguments.model, arguments.calibration)
    thresholds = calibration.thresholds(arguments.sparsity, arguments.allocation)
    prompt = tokenizer.encode(arguments.prompt)
    texts = {}
    if arguments.text:
        ids = read_tokens(tokenizer, arguments.text, "held-out")[0].tolist()
        require(len(ids) > PROMPT_TOKENS, f"{arguments.text} has {len(ids)} tokens, expected more "
                                          f"than the {PROMPT_TOKENS} of the prompt")
        ids = ids[:min(PROMPT_TOKENS + arguments.tokens, model.config.max_position_embeddings)]
        prompt = ids[:PROMPT_TOKENS]
        texts["text"] = ids[PROMPT_TOKENS:]
        arguments.tokens = len(texts["text"])
    sparsify(model, thresholds)
    for name, mode in (("dense", "off"), ("sparse", "decode")):
        with sparse_mode(model, mode):
            texts[name] = list(generate(model, prompt, arguments.tokens, eos_ids=tokenizer.eos_ids,
                                        make_step=plain_step))
    parting = first_difference(texts["dense"], texts["sparse"])
    name, tokens = next(iter(texts.items()))
    require(tokens, "the dense model writes nothing behind the prompt: no token to watch")
    skipped, kl, same = watch(model, prompt, tokens)
    title = (f"{arguments.sparsity:.0%} {arguments.allocation or calibration.allocations[0]}: "
             f"{skipped.mean():.1%} of the blocks' weights skipped, mean KL {kl.mean():.3f}")
    rows = {name: labels(tokenizer, prompt, ids) for name, ids in texts.items()}
    draw(skipped, kl, same, rows, parting, title, arguments.figure)
    for each, ids in {"prompt": prompt, **texts}.items():
        print(f"{each:>6}: {tokenizer.decode(ids)!r}")
    print(title)
    print(f"watched: {name}, {len(tokens)} tokens; after {(~same).sum()} of them the "
          f"likeliest next token is another")
    if texts["dense"] == texts["sparse"]:
        print(f"the greedy texts are the same, all {parting} tokens")
    else:
        dense, sparse = [(rows[each] + ["the end"])[parting] for each in ("dense", "sparse")]
        print(f"the greedy texts part after {parting} tokens: dense {dense!r}, sparse {sparse!r}")


if __name__ == "__main__":
    command_line(main)
