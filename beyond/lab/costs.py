"""What guesses cost: drafts and verify passes on a model of a real size.

Speculation pays if what its guesses bring is worth the time that they take. Random weights accept
at random, so the two are measured apart: times on a model of a real size with random weights,
tokens a pass on the demo model and held-out text. The last column combines them: the speed over
that of plain decoding.

    python -m beyond.lab.costs                        --draft sparse, at 75 %
    python -m beyond.lab.costs --draft recycle --model random:llama-3.2-1b --quantize int8
"""
import torch

from beyond import drafts, record
from beyond.lab.timing import load_sparse
from beyond.quantize import add_quantize
from calibrate import load_calibration
from generate import Sampling, random_source, verdict
from kernel import median_time
from model import DEMO, Parser, command_line, load_model, progress, read_tokens, require, share
from sparsify import sparse_mode, sparsify

SIZES = range(1, drafts.MOST + 1)        # guesses a pass
PROMPT = 64                              # tokens


def demo_tokens_a_pass(draft, sparsity, texts=8, new_tokens=96):
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
            run = drafts.speculate(model, prompt, new_tokens, draft, draft_tokens=size,
                                   temperature=1.0, top_p=0.9, seed=seed,
                                   make_step=record.make_step)
            list(run)
            written += run.statistics.tokens
            passes += run.statistics.passes
        rates[size] = written / passes
    return rates


@torch.no_grad()
def draft_costs(model, draft, sparsity):
    """Print what drafts cost on a random model, and what they bring with the demo's acceptance.

    draft: "sparse" or "recycle". model: one made sparse, with the draft's thresholds. The tokens
    after a prompt are timed; verify passes are dense.
    """
    tokens_a_pass = demo_tokens_a_pass(draft, sparsity)
    # Random logits are flat; at 0.2 they are as sharp as those of a text.
    sampling = Sampling(temperature=0.2, top_p=0.9)
    generator = random_source(model, 0)
    prompt = torch.arange(1, PROMPT + 1, device=model.device)[None]
    token = prompt[:, :1]
    cache = model.make_cache(1, PROMPT + drafts.MOST + 1)
    recycled = drafts.RecycleDraft()

    def milliseconds(call):
        """Return the median time of a call that begins after the prompt."""
        def again(_):
            cache.used = PROMPT
            call()
        return 1e3 * median_time(again, model.device)

    def one_token(mode):
        """Return the milliseconds of a step with one token, and of choosing the next."""
        with sparse_mode(model, mode):
            step = record.make_step(model, cache)
            return milliseconds(lambda: sampling.choose(step(token)[:, -1], generator)[0].item())

    with sparse_mode(model, "off"):
        model(prompt, cache, last_only=True)
        plain = one_token("off")
        print(f"a plain step {plain:.1f} ms, {1e3 / plain:.1f} tokens/s")
        if draft == "sparse":
            guess = one_token("all")
            print(f"a draft step at {sparsity:.0%} {guess:.1f} ms")
        print(f"{'guesses':>8} {'draft ms':>9} {'verify ms':>10} {'tokens a pass':>14} "
              f"{'tokens/s':>9} {'ratio':>7}")
        verify = record.make_step(model, cache)
        for size in SIZES:
            guesses = [1] * size

            def verified():
                logits = verify(token.expand(1, size + 1))[0]                   # (size + 1, vocab)
                verdict(logits, guesses, None, sampling, generator)
                if draft == "recycle":
                    recycled.learn(token[0].expand(size + 1), logits)

            drafting = size * guess if draft == "sparse" else milliseconds(
                lambda: recycled.guess([1], size))
            verifying = milliseconds(verified)
            rate = tokens_a_pass[size] / (drafting + verifying)                 # a millisecond
            print(f"{size:8} {drafting:9.1f} {verifying:10.1f} {tokens_a_pass[size]:14.2f} "
                  f"{1e3 * rate:9.1f} {rate * plain:6.2f}x", flush=True)
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
