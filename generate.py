"""The command line: writes text with a Llama, dense, sparse or speculatively, and says how fast.

decode.py holds the loop that writes one token after another, speculate.py the one that writes several a pass.

    python generate.py                                         the demo: a small model writes Python, dense and sparse
    python generate.py --model FOLDER --prompt TEXT --sparsity 0.5
    python generate.py --draft sparse --compare                the demo, speculating, beside plain decoding
    python generate.py --model FOLDER --chat                   a conversation
    torchrun --nproc-per-node=2 generate.py --model FOLDER     on two GPUs: see parallel.py
"""
import functools
import statistics
import sys
import time

import torch

import parallel
from calibrate import load_calibration
from checkpoint import linear_names
from cli import DEMO, InputError, Parser, command_line, natural, progress_line
from decode import check_prompt, check_sampling, choose, generate, random_source
from kernel import best_backend
from model import Llama, load_model
from sparsify import realised_sparsity, reset_counts, sparse_mode, sparsify
from speculate import ModelDraft, RecycleDraft, generate_speculative, verdict
from step import Steps
from tokenizer import StreamDecoder, chat_template

PROMPT = 'class Stack:\n    """A last-in, first-out stack of items."""\n\n    def __init__(self'


def stream(tokens, decoder, show):
    """Takes tokens from an iterator to its end, shows their text as it comes, and measures. Ctrl-C ends it early.

    Returns (ids, seconds to the first token, seconds for the rest, whether it was interrupted).
    """
    ids, began, first, interrupted = [], time.perf_counter(), None, False
    try:
        for token in tokens:
            first = first or time.perf_counter()
            ids.append(token)
            show(decoder.add(token) if decoder else f" {token}")
    except KeyboardInterrupt:
        interrupted = True
    ended = time.perf_counter()
    show((decoder.end() if decoder else "") + "\n[interrupted]" * interrupted)
    first = first or ended
    return ids, first - began, ended - first, interrupted


def rate(ids, seconds):
    """Tokens a second of decoding, without the first token, which is the prompt's; 0 where there was no other."""
    return (len(ids) - 1) / seconds if len(ids) > 1 else 0.0


def same_tokens(tokenizer, other, name):
    """Raises InputError if the tokenizer of the draft model `name` is not that of the model (both None: random models)."""
    if (tokenizer is None) != (other is None):
        raise InputError(f"--draft {name}: one of the two models has a tokenizer, the other has random weights and none")
    if tokenizer is not None:
        ours, theirs = tokenizer.pieces(), other.pieces()
        if ours != theirs:
            at = next((i for i, (a, b) in enumerate(zip(ours, theirs)) if a != b), min(len(ours), len(theirs)))
            raise InputError(f"--draft {name}: its tokenizer is not the model's, they differ from token {at} on")


def demo_tokens_a_pass(draft, sparsity, sizes, prompts=8, new_tokens=96):
    """{size: tokens a pass} of drafts on the demo model and held-out text, sampling at temperature 1, top-p 0.9."""
    from sparsify import read_tokens
    model, tokenizer = load_model(DEMO)
    sparsify(model, load_calibration(model, DEMO).thresholds(sparsity))
    texts = read_tokens(tokenizer, None, "held-out")[0][:prompts * 1000].view(prompts, 1000)[:, :64].tolist()
    found = {}
    for size in sizes:
        progress_line(f"tokens a pass on the demo model: {size} guesses")
        written = passes = 0
        for seed, prompt in enumerate(texts):
            run = generate_speculative(model, prompt, new_tokens, draft, draft_tokens=size, temperature=1.0, top_p=0.9, seed=seed)
            for _ in run:
                pass
            written, passes = written + run.statistics.tokens, passes + run.statistics.passes
        found[size] = written / passes
    return found


def draft_costs(model, draft, sparsity):
    """Prints what drafts cost on a random model, and what they would bring with the acceptance of the demo model.

    The model is sparse, with the draft's thresholds. Random weights accept at random, so each is measured where it can be.
    """
    sampling, generator = (0.2, None, 0.9), random_source(model, 0)    # random logits are flat; at 0.2 as sharp as those of a text
    kind = ModelDraft if draft == "sparse" else RecycleDraft
    sizes = [size for size in kind.SIZES if size]
    brought = demo_tokens_a_pass(draft, sparsity, sizes)
    prompt, cache = torch.arange(1, 65, device=model.device)[None], model.make_cache(1, 256)

    def milliseconds(call, repeats=9):
        """The median; each call begins behind the prompt."""
        times = []
        for _ in range(repeats + 2):                       # the first two set things up
            cache.used = prompt.shape[1]
            began = time.perf_counter()
            call()
            times.append(1e3 * (time.perf_counter() - began))
        return statistics.median(times[2:])

    with torch.no_grad(), sparse_mode(model, "off"):
        model(prompt, cache, last_only=True)
        verify, step, recycle = Steps(model, cache), Steps(model, cache), RecycleDraft(model)
        plain = milliseconds(lambda: choose(verify(prompt[:, :1])[:, -1], sampling, generator)[0].item())
        print(f"a plain step {plain:.1f} ms, {1e3 / plain:.1f} tokens/s")
        if draft == "sparse":
            with sparse_mode(model, "all"):
                one = milliseconds(lambda: choose(step(prompt[:, :1])[:, -1], sampling, generator)[0].item())
            print(f"a draft step at {sparsity:.0%} {one:.1f} ms")
        print(f"{'guesses':>8} {'draft ms':>9} {'verify ms':>10} {'tokens a pass':>14} {'tokens/s':>9} {'ratio':>7}")
        for size in sizes:
            tree, tokens = kind.shape(size, model.device), prompt[:, :1].expand(1, size + 1)
            guess = size * one if draft == "sparse" else milliseconds(lambda: recycle.guess([1], size, sampling, generator))

            def verified():
                logits = verify(tokens, tree.depths, tree.sees)[0]
                verdict(logits, tree, tokens[0].tolist(), None, sampling, generator)
                if draft == "recycle":
                    recycle.learn(tokens[0], logits)
            pass_ = milliseconds(verified)
            print(f"{size:8} {guess:9.1f} {pass_:10.1f} {brought[size]:14.2f} {1e3 * brought[size] / (guess + pass_):9.1f} "
                  f"{brought[size] * plain / (guess + pass_):6.2f}x", flush=True)
    print("times: this model's, with random weights, sampled at temperature 0.2; tokens a pass: the demo model's, at 1; both top-p 0.9")


def read_arguments():
    """The command line, checked as far as it can be without a model."""
    parser = Parser(description="Writes text with a Llama. Without arguments: the demo model, dense and then sparse.")
    parser.add_argument("--model", default=str(DEMO), help="checkpoint folder, or random:PRESET (default: the demo model)")
    parser.add_argument("--prompt", help="text to continue (default: the beginning of a Python class)")
    parser.add_argument("--sparsity", type=float, metavar="S",
                        help="share of the blocks' weights to skip, 0 to below 1 (default: 0.5 after a dense run to compare; 0 with --draft)")
    parser.add_argument("--draft", metavar="KIND", help="speculate, and lose nothing: sparse (guesses by the model itself, sparser), "
                        "recycle (Token Recycling, no model), demo or the folder of a smaller model (default: no speculation); "
                        "with a random: model, a table of what guesses cost")
    parser.add_argument("--draft-sparsity", type=float, metavar="S", help="of --draft sparse (default: 0.75)")
    parser.add_argument("--draft-tokens", type=natural, metavar="N", help="guesses a pass (default: what is fastest, found while it "
                        "decodes; then a seed does not repeat a sampled text)")
    parser.add_argument("--compare", action="store_true", help="with --draft: decode plainly too (default: no)")
    parser.add_argument("--chat", action="store_true", help="talk: each line of input is a turn, in the checkpoint's own chat format "
                        "(default: no)")
    parser.add_argument("--system", metavar="TEXT", help="with --chat: what the model is told first (default: nothing)")
    parser.add_argument("--max-new-tokens", type=natural, default=128, metavar="N", help="(default: 128)")
    parser.add_argument("--temperature", type=float, help="0 is greedy (default: 0; 1 in the demo, where so small a model "
                        "would soon repeat itself)")
    parser.add_argument("--top-k", type=int, help="sample from the k likeliest tokens (default: all)")
    parser.add_argument("--top-p", type=float, help="sample from the likeliest tokens that hold this share (default: all; 0.9 in the demo)")
    parser.add_argument("--seed", type=int, help="makes sampling repeatable (default: 0 when runs are compared, else none)")
    parser.add_device()
    parser.add_precision()
    parser.add_argument("--calibration", metavar="FILE", help="(default: calibration.safetensors in the checkpoint folder)")
    parser.add_argument("--allocation", help="how the sparsity is shared out (default: the best that the calibration holds)")
    arguments = parser.parse_args()
    demo = arguments.model == str(DEMO) and arguments.prompt is None and not arguments.draft
    for name in ("prompt", "compare") if arguments.chat else ("system",):
        if getattr(arguments, name):
            raise InputError(f"--{name} is for {'a text, not for --chat' if arguments.chat else '--chat, which is not given'}")
    if arguments.temperature is None:
        arguments.temperature = 1.0 if demo else 0.0
        arguments.top_p = arguments.top_p or (0.9 if demo else None)
    beside_dense = arguments.sparsity is None and not arguments.chat        # the default without a draft
    if arguments.sparsity is None:
        arguments.sparsity = 0.0 if arguments.draft or arguments.chat else 0.5
    if arguments.draft != "sparse" and arguments.draft_sparsity is not None:
        raise InputError("--draft-sparsity is for --draft sparse")
    arguments.draft_sparsity = 0.75 if arguments.draft_sparsity is None else arguments.draft_sparsity
    for name in ("sparsity", "draft_sparsity"):
        if not 0 <= getattr(arguments, name) < 1:
            raise InputError(f"--{name.replace('_', '-')} is {getattr(arguments, name)}, expected at least 0 and below 1")
    for name in ("compare", "draft_tokens"):
        if getattr(arguments, name) and (not arguments.draft or arguments.model.startswith("random:")):
            raise InputError(f"--{name.replace('_', '-')} is for --draft with a checkpoint folder")
    check_sampling(arguments.temperature, arguments.top_k, arguments.top_p, arguments.seed)
    if not arguments.draft:
        arguments.compare = beside_dense
    if arguments.compare and arguments.seed is None:
        arguments.seed = 0
    return arguments


def main():
    arguments = read_arguments()
    with parallel.group(arguments.device) as arguments.device:         # one process, unless torchrun has started more
        show(arguments)


def show(arguments):
    """What the command line asks for."""
    if parallel.ranks() > 1 and arguments.draft and arguments.model.startswith("random:"):
        raise InputError("--draft with a random: model, a table of what guesses cost, is for one process")
    if parallel.ranks() > 1 and arguments.draft and not arguments.draft_tokens:
        raise InputError("--draft with several processes needs --draft-tokens: each would find another number the fastest")
    template = chat_template(arguments.model) if arguments.chat else None
    model, tokenizer = load_model(arguments.model, arguments.device, arguments.dtype, arguments.quantize,
                                  parallel if parallel.ranks() > 1 else Llama)
    if tokenizer is None:
        if arguments.prompt is not None:
            raise InputError(f"--prompt: {arguments.model} has random weights and no tokenizer")
        prompt, eos_ids = torch.arange(1, 17).tolist(), ()
        print(f"{arguments.model}: random weights, for speed alone; what it writes are token numbers")
    else:
        prompt, eos_ids = tokenizer.encode(PROMPT if arguments.prompt is None else arguments.prompt), tokenizer.eos_ids
    check_prompt(model, prompt, arguments.max_new_tokens)
    dtype = str(model.model.embed_tokens.weight.dtype).removeprefix("torch.")
    workers = f", {torch.get_num_threads()} threads" if model.device.type == "cpu" else ""
    workers += f", {parallel.ranks()} processes" if parallel.ranks() > 1 else ""
    print(f"{arguments.model}, {dtype}, {model.device.type}{workers}, torch {torch.__version__}")

    ours = best_backend(model.model.embed_tokens.weight)

    @functools.cache
    def calibration():
        return load_calibration(model, arguments.model, arguments.calibration)

    def thresholds_for(sparsity):
        thresholds = calibration().thresholds(sparsity, arguments.allocation) if sparsity else dict.fromkeys(linear_names(model.config), 0.0)
        if ours == "c":                                    # the head stays dense, but is read faster by our kernel
            thresholds["lm_head"] = 0.0
        return parallel.part_of_thresholds(thresholds)

    sampling = dict(temperature=arguments.temperature, top_k=arguments.top_k, top_p=arguments.top_p, seed=arguments.seed,
                    eos_ids=eos_ids)

    def run(title, tokens):
        """Shows what an iterator of tokens writes; (ids, tokens a second)."""
        print(f"--- {title}")
        if tokenizer is not None:
            print(tokenizer.decode(prompt), end="", flush=True)
        reset_counts(model)
        ids, first, rest, interrupted = stream(tokens, tokenizer and StreamDecoder(tokenizer, prompt),
                                               lambda text: print(text, end="", flush=True))
        if not interrupted:                                # the others may have been elsewhere
            parallel.count_together(model)
        skipped = f", {realised_sparsity(model):.1%} of the blocks' weights skipped" if not arguments.draft else ""
        print(f"\n--- {title}: {len(ids)} tokens, {rate(ids, rest):.1f} tokens/s, prompt of {len(prompt)} in {first * 1e3:.0f} ms{skipped}",
              flush=True)
        if interrupted:
            raise KeyboardInterrupt
        return ids, rate(ids, rest)

    def text_of(prompt):
        """The tokens that follow a prompt, as the command line wants them written."""
        if not arguments.draft:
            return generate(model, prompt, arguments.max_new_tokens, **sampling)
        return generate_speculative(model, prompt, arguments.max_new_tokens, draft, draft_thresholds, arguments.draft_tokens,
                                    **sampling, sparse_verifier=arguments.sparsity > 0)

    if arguments.draft:
        draft, draft_thresholds = prepare_draft(model, tokenizer, arguments, thresholds_for)
        if tokenizer is None and isinstance(draft, str):   # a random model: what it would write says nothing
            draft_costs(model, draft, arguments.draft_sparsity)
            return
        if not arguments.chat:
            write_speculatively(model, prompt, arguments, lambda: generate(model, prompt, arguments.max_new_tokens, **sampling), text_of, run)
            return
    elif not arguments.compare:
        sparsify(model, thresholds_for(arguments.sparsity))
    if arguments.chat:
        with sparse_mode(model, "decode" if arguments.sparsity else "off"):
            chat(tokenizer, template, arguments.system, text_of)
        return
    if not arguments.compare:
        with sparse_mode(model, "decode" if arguments.sparsity else "off"):
            run(f"{arguments.sparsity:.0%} sparse" if arguments.sparsity else "dense",
                text_of(prompt))
        return
    # Dense is to be as fast as it can be: with our kernel, except where only the fallback runs.
    thresholds = thresholds_for(arguments.sparsity)
    if ours != "torch":
        sparsify(model, thresholds)
    with sparse_mode(model, "off"):
        dense_ids, dense_rate = run("dense", text_of(prompt))
    print()
    sparsify(model, thresholds)
    sparse_ids, sparse_rate = run(f"{arguments.sparsity:.0%} sparse", text_of(prompt))
    if not dense_rate:                                     # a text of a token or none has no rate
        return
    print(f"\nsparse over dense: {sparse_rate / dense_rate:.2f}x; the first {first_difference(dense_ids, sparse_ids)} of "
          f"{len(dense_ids)} tokens are the same")


def first_difference(ids, others):
    """How many tokens two lists have in common at the start."""
    return next((i for i, (a, b) in enumerate(zip(ids, others)) if a != b), min(len(ids), len(others)))


def read_line():
    """A line of input, None at its end."""
    try:
        return input("\n> " if sys.stdin.isatty() else "")
    except EOFError:
        return None


def chat(tokenizer, template, system, text_of):
    """Turns of a conversation, one for each line of input, until it ends. text_of(prompt ids): an iterator of token ids."""
    messages = [{"role": "system", "content": system}] if system else []
    while True:
        line = parallel.from_first(read_line)
        if line is None:
            return
        if not line.strip():
            continue
        messages.append({"role": "user", "content": line})
        prompt = parallel.from_first(lambda: tokenizer.encode(template(messages), bos=False, special=True))    # it may hold the time
        ids, *_ = stream(text_of(prompt), StreamDecoder(tokenizer, prompt), lambda text: print(text, end="", flush=True))
        print(flush=True)
        messages.append({"role": "assistant", "content": tokenizer.decode(ids)})


def prepare_draft(model, tokenizer, arguments, thresholds_for):
    """(draft, draft_thresholds) for generate_speculative; the model, and a draft model, made as fast as they can be."""
    draft, sparsity, draft_thresholds = arguments.draft, arguments.sparsity, None
    if draft == "sparse":
        draft_thresholds = thresholds_for(arguments.draft_sparsity)
    elif draft != "recycle":
        folder = str(DEMO) if draft == "demo" else draft
        draft, other = load_model(folder, arguments.device, arguments.dtype)
        same_tokens(tokenizer, other, folder)
        parallel.follow_first(draft)
    if tokenizer is None and isinstance(draft, str):       # for draft_costs
        sparsify(model, draft_thresholds or thresholds_for(0))
        return draft, draft_thresholds
    for each in (model, draft) if isinstance(draft, Llama) else (model,):
        if best_backend(each.model.embed_tokens.weight) != "torch" or each is model and (sparsity or draft == "sparse"):
            names = [*linear_names(each.config), *["lm_head"] * (each.device.type == "cpu")]
            sparsify(each, dict.fromkeys(names, 0.0) if each is not model else thresholds_for(sparsity))
    return draft, draft_thresholds


def write_speculatively(model, prompt, arguments, plain_text, text_of, run):
    """Writes the text speculatively, says what it took, and with --compare sets plain decoding beside it."""
    sparsity = arguments.sparsity
    with sparse_mode(model, "decode" if sparsity else "off"):
        speculation = text_of(prompt)
        if arguments.compare:
            plain, plain_rate = run("plain", plain_text())
            print()
        ids, speed = run(f"speculative, {arguments.draft}", speculation)
        did = speculation.statistics
        print(f"\nlossless against {speculation.against}" + (f" at {sparsity:.0%}" if sparsity else "")
              + f": {did.tokens_a_pass:.2f} tokens a pass in {did.passes} passes, drafts {did.draft_seconds:.2f} s, "
              f"verify passes {did.verify_seconds:.2f} s")
        if did.passes:
            print("guesses accepted, by place: " + " ".join(f"{share:.0%}" for share in did.acceptance))
            print("rounds by guesses a pass: " + ", ".join(f"{size}: {len(did.times[size])}" for size in sorted(did.times)))
        if not arguments.compare:
            return
        print(f"speculative over plain: {speed / plain_rate:.2f}x" if plain_rate else "too few tokens to compare the speed")
        same = first_difference(plain, ids)
        if same == len(plain) == len(ids):
            print(f"the same text, all {same} tokens")
        elif arguments.temperature:
            print("sampled: another text of the same distribution")
        else:
            with torch.no_grad():
                logits = model(torch.tensor([prompt + plain[:same]], device=model.device), last_only=True)[0, -1]
            first, second = logits.topk(2).values.tolist()
            rounding = torch.finfo(model.model.embed_tokens.weight.dtype).eps * logits.abs().max()
            print(f"the texts part at token {same}, where the two best logits are {first - second:.2g} apart; logits there are "
                  f"rounded by up to {rounding:.2g}")


if __name__ == "__main__":
    command_line(main)
