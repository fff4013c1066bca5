"""The fast one: generate.py's command line, with every chapter at work.

    python -m beyond                                          the demo: dense, then sparse
    python -m beyond --model FOLDER --prompt TEXT --sparsity 0.5 --quantize int8
    python -m beyond --draft recycle --compare                guesses without a model
    python -m beyond --model FOLDER --prompt "$(cat LONG)" --attend 512   reads 512 positions
    python -m beyond --model FOLDER --chat                    a conversation
    torchrun --nproc-per-node=2 -m beyond --model FOLDER      on two GPUs: see parallel.py

What is added: whatever folders minTEAL reads (folders.py); steps are recorded (record.py), and
fused on a GPU (fused.py); --quantize, and folders with quantized weights (quantize.py); a sparse
head (--head-sparsity); --draft recycle, sparse verifiers, and as many guesses a pass as are fastest
here unless --draft-tokens says how many (drafts.py); --attend, by which a step reads less of the
cache (attend.py); --chat (chat.py); several processes (parallel.py).
"""
import contextlib

import generate
from beyond import attend, chat, drafts, folders, fused, parallel, quantize, record
from calibrate import load_calibration
from kernel import best_backend, threshold_dropping
from model import Llama, Parser, natural, require, share
from sparsify import skipped_share, sparse_mode, sparsify

import torch


class Writer(generate.Writer):
    """generate.Writer with the chapters' parts."""
    reading = None                   # attend.Reading, with --attend

    def prepare(self):
        super().prepare()
        if self.arguments.head_sparsity:
            sparsify(self.model, {"lm_head": self.head_threshold(self.arguments.head_sparsity)})
        if best_backend(self.model.model.norm.weight) == "triton":
            fused.fuse(self.model)
        if self.arguments.attend:
            plan = attend.plan_of(self.arguments, self.model.config)
            self.reading = attend.read_less(self.model, plan)

    @torch.no_grad()
    def head_threshold(self, sparsity):
        """Return the magnitude that a share of what the head reads, of the prompt, stays below."""
        text = self.arguments.prompt or generate.PROMPT
        ids = self.tokenizer.encode(text) if self.tokenizer else range(1, 17)
        seen = []
        with (self.model.lm_head.register_forward_pre_hook(lambda _, inputs: seen.extend(inputs)),
              sparse_mode(self.model, "off")):
            self.model(torch.tensor([list(ids)], device=self.model.device))
        return threshold_dropping(seen[0], sparsity)

    def say_skipped(self, prompt, ids):
        super().say_skipped(prompt, ids)
        if self.arguments.head_sparsity:
            print(f"of the head about {self.arguments.head_sparsity:.0%} are skipped besides")

    def speculate(self, *given, **named):
        arguments, thresholds = self.arguments, None       # None: the model's, of a dense verifier
        if self.draft == "sparse" and arguments.sparsity:
            calibration = load_calibration(self.model, arguments.model, arguments.calibration)
            thresholds = calibration.thresholds(arguments.draft_sparsity, arguments.allocation)
        return drafts.Speculation(*given, draft_thresholds=thresholds,
                                  sparse_verifier=arguments.sparsity > 0, **named)

    @contextlib.contextmanager
    def baseline(self):
        with contextlib.ExitStack() as stack:
            if not (self.draft and self.arguments.sparsity):         # else the verifier is sparse
                stack.enter_context(super().baseline())
            if self.reading:
                stack.enter_context(self.reading.switched(False))
            yield

    @staticmethod
    def skipped_share(*arguments):
        """Return the share of the weights that a text skipped, of all ranks together."""
        return parallel.mean(skipped_share(*arguments))

    def show(self, title, prompt, tokens):
        if not (self.reading and self.reading.active):
            return super().show(title, prompt, tokens)
        ids, rate = super().show(f"{title}, {self.arguments.attend} positions", prompt, tokens)
        end = len(prompt) + len(ids) - 1
        share = self.reading.plan.share(self.model.config, len(prompt), end)
        print(f"{share:.1%} of the cache read")
        return ids, rate


def make_parser():
    """Return generate.py's Parser with the options of the chapters."""
    core = generate.make_parser()                          # two of its options do more here
    parser = Parser(description=core.description, parents=[core], conflict_handler="resolve")
    parser.add_argument("--draft", metavar="KIND",
                        help="speculate, and lose nothing: sparse (guesses by the model itself, "
                             "sparser), recycle (Token Recycling, no model), demo, or the folder "
                             "of a smaller model (default: no speculation)")
    parser.add_argument("--draft-tokens", type=natural, metavar="N",
                        help="guesses a pass (default: what is fastest, found while it decodes; "
                             "then a seed does not repeat a sampled text)")
    parser.add_argument("--head-sparsity", type=share, default=0.0, metavar="S",
                        help="share of the head's inputs to drop, too, by a threshold that the "
                             "prompt gives (default: 0, as in the paper)")
    quantize.add_quantize(parser)
    attend.add_options(parser)
    parser.add_argument("--chat", action="store_true",
                        help="talk: each line of input is a turn, in the checkpoint's own chat "
                             "format (default: no)")
    parser.add_argument("--system", metavar="TEXT",
                        help="with --chat: what the model is told first (default: nothing)")
    return parser


def settle(arguments):
    """Check the arguments, and put values where none were given."""
    require(arguments.chat or arguments.system is None,
            "--system is for --chat, which is not given")
    require(parallel.ranks() == 1 or not arguments.draft or arguments.draft_tokens,
            "--draft with several processes needs --draft-tokens: each would find another number "
            "the fastest")
    attend.check_options(arguments)
    require(not (arguments.attend and arguments.draft),
            "--attend with --draft: no draft has steps that read less")
    return chat.settle(arguments) if arguments.chat else generate.settle(arguments)


def load_draft(arguments, tokenizer):
    """Return what --draft names, as generate.load_draft does, or "recycle"."""
    if arguments.draft == "recycle":
        return "recycle"
    draft = generate.load_draft(arguments, tokenizer, folders.load_model)
    if isinstance(draft, Llama):
        parallel.follow_first(draft)
    return draft


def write(arguments):
    """Do what the command line asks for, as one of `parallel.ranks()` processes."""
    ranks = parallel.ranks()
    template = chat.chat_template(arguments.model) if arguments.chat else None
    maker = parallel if ranks > 1 else Llama
    model, tokenizer = folders.load_model(arguments.model, arguments.device, arguments.dtype, maker)
    quantize.follow(arguments, model, arguments.model)
    if ranks > 1:
        source = generate.random_source(model, arguments.seed)
        arguments.seed = parallel.from_first(source.initial_seed)
    # The ranks talk to each other between the operations, which no tape can note.
    make_step = record.make_step if ranks == 1 else generate.fast_step
    writer = Writer(arguments, model, tokenizer, load_draft(arguments, tokenizer), make_step)
    if not arguments.chat:
        writer.write()
        return
    writer.prepare()
    chat.chat(tokenizer, template, arguments.system, writer.text, from_first=parallel.from_first,
              longest=chat.longest_prompt(model, arguments.max_new_tokens))


def main():
    arguments = settle(make_parser().parse_args())
    with parallel.group(arguments.device) as arguments.device:
        write(arguments)


if __name__ == "__main__":
    parallel.command_line(main)
