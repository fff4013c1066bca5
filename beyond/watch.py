"""One text, token by token: what sparsity skips, what it changes, and where greedy texts part.

A share of weights skipped and a perplexity are means over many tokens. Here are the tokens. Decoding
is sparse behind a dense prompt, and so it is done here: the prompt is read dense, then the tokens of
a text one by one, twice, dense and sparse, each with a cache of its own. After each sparse step the
counts of the sparse linears say what it did. The picture has a column for each token:

    KL       how far the sparse model's distribution of the token that follows is from the dense
             model's, in nats; red where the likeliest one is another
    blocks   the share of each block's weights that was not read for this token
    texts    the tokens; in red what the sparse model writes by itself, from where it parts

The text is what the dense model writes after the prompt, greedily; the sparse model is judged on it,
whatever it would have written. Up to the first red bar that is the same; there its own greedy text
leaves, and goes on in a row of its own. With --text the tokens are those of a file, behind its first
16, and both greedy texts are what the models write behind these.

The seam: `sparse_mode` switches one model between the two, `SparseLinear.kept` and `.seen` are what
the kernels' callers counted, and `generate` writes the greedy texts.

    python -m beyond.watch --figure watch.png [--model FOLDER] [--prompt TEXT] [--sparsity 0.5]
    python -m beyond.watch --figure watch.png --text FILE --tokens 48
"""
from typing import NamedTuple

import torch
import torch.nn.functional as F

from beyond.allocate import check_figure, pyplot, refuse_beside, save_figure
from calibrate import load_calibration
from generate import PROMPT, StreamDecoder, check_prompt, first_difference, generate, plain_step
from model import (Parser, command_line, load_model, natural, progress, read_tokens, require, share)
from sparsify import SparseLinear, reset_counts, sparse_mode, sparsify

PROMPT_TOKENS = 16       # of a --text, which are read dense
MOST_LABELS = 80         # tokens whose text can be read side by side
LONGEST_LABEL = 12       # characters


class Watched(NamedTuple):
    """What was seen while N tokens were read."""
    skipped: torch.Tensor            # (N, layers) float64: shares of a block's weights not read
    kl: torch.Tensor                 # (N,) of the next token's distribution, from the dense, nats
    same: torch.Tensor               # (N,) bool: the likeliest next token is the dense model's


def skipped_by_block(model):
    """Return the shares (layers,) of the blocks' weights not read since `reset_counts`, float64.

    All linears of the blocks are sparse. The mean of the shares is `realised_sparsity`.
    """
    shares = []
    for block in model.model.layers:
        linears = [linear for linear in block.modules() if isinstance(linear, SparseLinear)]
        size = torch.tensor([linear.in_features * linear.out_features for linear in linears])
        counts = torch.stack([torch.stack((linear.kept, linear.seen)) for linear in linears]).cpu()
        shares.append(1 - (size * counts[:, 0].double() / counts[:, 1]).sum() / size.sum())
    return torch.stack(shares)


@torch.no_grad()
def watch(model, prompt, ids):
    """Return what is Watched while a sparse model reads `ids` one by one behind a prompt (of ids)."""
    prompt = check_prompt(model, prompt, len(ids))
    caches = {}
    for mode in ("off", "decode"):
        caches[mode] = model.make_cache(1, prompt.shape[1] + len(ids))
        with sparse_mode(model, mode):
            model(prompt, caches[mode], last_only=True)
    steps = []
    for token in progress(ids, "watching"):
        log_p = {}                                                              # (vocab,) each
        for mode, cache in caches.items():
            reset_counts(model)
            with sparse_mode(model, mode):
                logits = model(torch.tensor([[token]], device=model.device), cache)
            log_p[mode] = logits[0, 0].log_softmax(-1)
        kl = F.kl_div(log_p["decode"], log_p["off"], reduction="sum", log_target=True)
        same = log_p["decode"].argmax() == log_p["off"].argmax()
        steps.append((skipped_by_block(model), kl.cpu(), same.cpu()))
    return Watched(*map(torch.stack, zip(*steps)))


def greedy(model, prompt, count, eos_ids, mode):
    """Return the ids that the model writes after a prompt, dense or sparse as `mode` says."""
    with sparse_mode(model, mode):
        return list(generate(model, prompt, count, eos_ids=eos_ids, make_step=plain_step))


def labels(tokenizer, prompt, ids):
    """Return the text of each of `ids` as it follows what stands before it."""
    decoder = StreamDecoder(tokenizer, prompt)
    pieces = tokenizer.pieces()
    texts = [decoder.add(token) or pieces[token] for token in ids]
    return [text.replace("\n", "⏎").replace(" ", "·") for text in texts]


def draw(watched, rows, parting, title, path):
    """Draw what was watched as a PNG.

    rows: {name: (texts of tokens, whether they are a text of the sparse model)}, the first that
    which was watched. parting: where the greedy texts part.
    """
    plt = pyplot()
    count, layers = watched.skipped.shape
    texts = rows if count <= MOST_LABELS else {}
    figure, axes = plt.subplots(
        2 + len(texts), sharex=True, figsize=(9, 3.9 + 0.75 * len(texts)), layout="constrained",
        height_ratios=[1.3, 2.6] + [0.75] * len(texts))
    colours = ["tab:blue" if same else "tab:red" for same in watched.same]
    axes[0].bar(range(count), watched.kl, color=colours, width=0.8)
    axes[0].set(ylabel="KL (nats)", title=title)
    image = axes[1].imshow(100 * watched.skipped.T, aspect="auto", origin="lower", cmap="viridis")
    axes[1].set(ylabel="block", xlim=(-0.5, count - 0.5))
    axes[1].grid(False)
    figure.colorbar(image, ax=axes[:2], label="weights skipped (%)")
    for axis, (name, (tokens, own)) in zip(axes[2:], texts.items()):
        axis.axis("off")
        axis.text(-0.012, 0.5, name, transform=axis.transAxes, ha="right", va="center")
        for i, text in enumerate(tokens):
            axis.text(i, 1, text[:LONGEST_LABEL], rotation=90, ha="center", va="top", fontsize=6.5,
                      color="tab:red" if own and i >= parting else "black", parse_math=False)
    for axis in axes:
        axis.axvline(parting - 0.5, color="tab:red", lw=1, ls="--")
    save_figure(figure, path)


def main():
    parser = Parser(description="Draws, for each token of a text and each block, what sparsity "
                                "skips, and how far it moves the next token.")
    parser.add_model()
    parser.add_argument("--prompt", help="text that the models continue (default: the beginning of "
                                         "a class)")
    parser.add_argument("--text", metavar="FILE",
                        help=f"watch UTF-8 text instead, its first {PROMPT_TOKENS} tokens the "
                             f"prompt (default: no)")
    parser.add_argument("--tokens", type=natural, default=64,
                        help="how many after the prompt, at most (default: 64)")
    parser.add_argument("--sparsity", type=share, default=0.5, metavar="S",
                        help="share of the blocks' weights to skip (default: 0.5)")
    parser.add_argument("--calibration", metavar="FILE",
                        help="(default: calibration.safetensors in the checkpoint folder)")
    parser.add_argument("--allocation", help="how the sparsity is shared out (default: the best "
                                             "that the calibration holds)")
    parser.add_argument("--figure", required=True, metavar="FILE",
                        help="the PNG to write (no default: it is needed)")
    arguments = parser.parse_args()
    refuse_beside(arguments, {"text": ("prompt",)})
    check_figure(arguments.figure)
    require(not arguments.model.startswith("random:"),
            f"{arguments.model} has random weights: there is no text to watch")
    model, tokenizer = load_model(arguments.model, arguments.device, arguments.dtype)
    calibration = load_calibration(model, arguments.model, arguments.calibration)
    thresholds = calibration.thresholds(arguments.sparsity, arguments.allocation)
    if arguments.text:
        ids = read_tokens(tokenizer, arguments.text, "held-out")[0].tolist()
        require(len(ids) > PROMPT_TOKENS, f"{arguments.text} has {len(ids)} tokens, expected more "
                                          f"than the {PROMPT_TOKENS} of the prompt")
        prompt = ids[:PROMPT_TOKENS]
    else:
        prompt = tokenizer.encode(PROMPT if arguments.prompt is None else arguments.prompt)
    check_prompt(model, prompt, arguments.tokens)
    sparsify(model, thresholds)
    dense = greedy(model, prompt, arguments.tokens, tokenizer.eos_ids, "off")
    sparse = greedy(model, prompt, arguments.tokens, tokenizer.eos_ids, "decode")
    if arguments.text:
        longest = model.config.max_position_embeddings
        text = ids[PROMPT_TOKENS:min(PROMPT_TOKENS + arguments.tokens, longest)]
        texts = {"text": text, "dense": dense, "sparse": sparse}
    else:
        require(dense, "the dense model ends the text with the prompt: there is no token to watch")
        text = dense
        texts = {"dense": dense, "sparse": sparse}
    watched = watch(model, prompt, text)
    parting = first_difference(dense, sparse)
    allocation = arguments.allocation or calibration.allocations[0]
    title = (f"{arguments.sparsity:.0%} {allocation}: {watched.skipped.mean():.1%} of the blocks' "
             f"weights skipped, mean KL {watched.kl.mean():.3f}")
    rows = {name: (labels(tokenizer, prompt, ids), name == "sparse") for name, ids in texts.items()}
    draw(watched, rows, parting, title, arguments.figure)
    print(title)


if __name__ == "__main__":
    command_line(main)
