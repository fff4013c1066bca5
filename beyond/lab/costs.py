"""What guesses cost: drafts and verify passes on a model of a real size.

Speculation pays if what its guesses bring is worth the time that they take. Random weights accept
at random, so the two are measured apart: times on a model of a real size with random weights,
tokens a pass on the demo model and held-out text. The last column combines them: the speed over
that of plain decoding.

    python -m beyond.lab.costs                        --draft sparse, at 75 %
    python -m beyond.lab.costs --draft recycle --model random:llama-3.2-1b --quantize int8
"""
import statistics

from beyond import drafts, record
from beyond.lab.timing import load_sparse, rate
from beyond.quantize import add_quantize
from calibrate import load_calibration
from generate import generate
from model import DEMO, Parser, command_line, load_model, progress, read_tokens, require, share
from sparsify import sparse_mode, sparsify

SIZES = range(1, drafts.MOST + 1)        # guesses a pass
PROMPT = 64                              # tokens
TOKENS = 96                              # that are written after it


def demo_tokens_a_pass(draft, sparsity, texts=8):
    """Return {guesses: tokens a pass} of a draft on the demo model, at temperature 1, top-p 0.9.

    draft: "sparse", at a sparsity, or "recycle".
    """
    model, tokenizer = load_model(DEMO)
    sparsify(model, load_calibration(model, DEMO).thresholds(sparsity) | {"lm_head": None})
    tokens, _ = read_tokens(tokenizer, None, "held-out")
    prompts = tokens[:texts * 1000].view(texts, 1000)[:, :PROMPT].tolist()
    rates = {}
    for size in progress(SIZES, "tokens a pass on the demo model, guesses"):
        written = passes = 0
        for seed, prompt in enumerate(prompts):
            run = drafts.speculate(model, prompt, TOKENS, draft, draft_tokens=size,
                                   temperature=1.0, top_p=0.9, seed=seed,
                                   make_step=record.make_step)
            list(run)
            written += run.statistics.tokens
            passes += run.statistics.passes
        rates[size] = written / passes
    return rates


def draft_costs(model, draft, sparsity):
    """Print what drafts cost on a random model, and what they bring with the demo's acceptance.

    draft: "sparse" or "recycle". model: one made sparse, with the draft's thresholds; verify passes
    are dense.
    """
    tokens_a_pass = demo_tokens_a_pass(draft, sparsity)
    # Random logits are flat; at 0.2 they are as sharp as those of a text.
    how = dict(temperature=0.2, top_p=0.9, seed=0, make_step=record.make_step)
    prompt = list(range(1, PROMPT + 1))
    with sparse_mode(model, "off"):
        plain = rate(generate(model, prompt, TOKENS, **how))
    print(f"a plain step {1e3 / plain:.1f} ms, {plain:.1f} tokens/s")
    print(f"{'guesses':>8} {'draft ms':>9} {'verify ms':>10} {'tokens a pass':>14} "
          f"{'tokens/s':>9} {'ratio':>7}")
    for size in SIZES:
        times = []                       # of each pass: seconds to draft, and to verify

        def note(guesses, accepted, *seconds):
            if guesses == size:          # the last has fewer
                times.append(seconds)

        run = drafts.speculate(model, prompt, TOKENS, draft, draft_tokens=size, **how)
        run.statistics.record = note
        list(run)
        drafting, verifying = map(statistics.median, zip(*times[1:]))    # the first sets up
        speed = tokens_a_pass[size] / (drafting + verifying)
        print(f"{size:8} {1e3 * drafting:9.1f} {1e3 * verifying:10.1f} {tokens_a_pass[size]:14.2f} "
              f"{speed:9.1f} {speed / plain:6.2f}x", flush=True)
    print("times: this model's, with random weights, sampled at temperature 0.2; tokens a pass: "
          "the demo model's, at 1; both top-p 0.9")


def main():
    parser = Parser(description="Prints what guesses cost at a real size, and what they bring.")
    parser.add_model()
    parser.set_defaults(model="random:llama-3.2-1b")
    add_quantize(parser)
    parser.add_argument("--draft", choices=["sparse", "recycle"], default="sparse",
                        help="the model itself, sparser, or Token Recycling (default: sparse)")
    parser.add_argument("--draft-sparsity", type=share, metavar="S", default=0.75,
                        help="of --draft sparse (default: 0.75)")
    arguments = parser.parse_args()
    require(arguments.model.startswith("random:"),
            f"--model {arguments.model} is a checkpoint: python -m beyond --draft "
            f"{arguments.draft} --compare says what guesses cost and bring there")
    model = load_sparse(arguments, arguments.draft_sparsity)
    draft_costs(model, arguments.draft, arguments.draft_sparsity)


if __name__ == "__main__":
    command_line(main)
