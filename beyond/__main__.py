"""The fast one: generate.py's command line, with every chapter at work.

    python -m beyond                                          the demo: dense, then sparse
    python -m beyond --model FOLDER --prompt TEXT --sparsity 0.5 --quantize int8
    python -m beyond --draft recycle --compare                guesses without a model
    python -m beyond --model FOLDER --prompt "$(cat LONG)" --attend 512   reads 512 positions
    python -m beyond --model FOLDER --chat                    a conversation
    python -m beyond --model random:llama-3.2-1b --draft sparse   a table of what guesses cost
    torchrun --nproc-per-node=2 -m beyond --model FOLDER      on two GPUs: see parallel.py

What is added: steps are recorded (record.py), and fused on a GPU (fused.py); --quantize, and
folders with quantized weights (quantize.py); --draft recycle, and as many guesses a pass as are
fastest here unless --draft-tokens says how many (drafts.py); --attend, by which a step, or a step
of --draft sparse, reads less of the cache (attend.py); --chat (chat.py); several processes
(parallel.py).
"""
import contextlib
import functools

import generate
from beyond import (allocate, attend, chat, drafts, fused, parallel, quantize, record, timing)
from kernel import best_backend
from model import Llama, load_model, require
from sparsify import realised_sparsity, sparse_mode, sparsify


class Writer(generate.Writer):
    OWN_DRAFTS = ("sparse", "recycle")
    reading = None                   # attend.Reading, with --attend

    def thresholds(self, sparsity):
        """Return the thresholds of a sparsity, for the part of the model that is here."""
        return parallel.part_of_thresholds(super().thresholds(sparsity))

    def load_draft(self, name):
        draft = super().load_draft(name)
        parallel.follow_first(draft)
        return draft

    def prepare(self):
        super().prepare()
        if best_backend(self.model.model.norm.weight) == "triton":
            fused.fuse(self.model)
        if self.arguments.attend:
            plan = attend.plan_of(self.arguments, self.model.config)
            self.reading = attend.read_less(self.model, plan)
            self.reading.active = not self.draft           # a draft switches it on for its guesses
            self.make_step = functools.partial(attend.make_step, make_step=self.make_step)
            self.speculate = functools.partial(self.speculate, kind=attend.Speculation)

    @property
    def title(self):
        return super().title + (f", {self.arguments.attend} positions" if self.reading else "")

    @contextlib.contextmanager
    def baseline(self):
        with super().baseline(), contextlib.ExitStack() as stack:
            if self.reading:
                stack.enter_context(self.reading.switched(False))
            yield

    def unread(self):
        text = super().unread()
        if self.reading:
            text += f", {self.reading.share:.1%} of the cache read"
        return text

    def show(self, *arguments):
        if self.reading:
            self.reading.reset()
        return super().show(*arguments)

    def write_speculatively(self, prompt):
        super().write_speculatively(prompt)
        if self.reading:
            print(f"the draft read {self.reading.share:.1%} of the cache")


def realised(model):
    """Return the realised sparsity of all ranks together."""
    parallel.count_together(model)
    return realised_sparsity(model)


def make_parser():
    """Return generate.py's Parser with the options of the chapters."""
    parser = generate.make_parser(
        "speculate, and lose nothing: sparse (guesses by the model itself, sparser), recycle "
        "(Token Recycling, no model), demo, or the folder of a smaller model (default: no "
        "speculation); with a random: model, a table of what guesses cost",
        "what is fastest, found while it decodes; then a seed does not repeat a sampled text")
    allocate.add_quantize(parser)
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
    random = arguments.model.startswith("random:")
    require(not random or not arguments.draft or not (arguments.compare or arguments.draft_tokens),
            "--compare and --draft-tokens are for --draft with a checkpoint folder")
    ranks = parallel.ranks()
    attend.check_options(arguments)
    require(not arguments.attend or arguments.draft in (None, "sparse"),
            f"--attend with --draft {arguments.draft}: --draft sparse alone has steps that read "
            f"less")
    require(not arguments.attend or not (arguments.draft and random),
            "--attend is not for the table of what guesses cost, --draft with a random: model")
    require(ranks == 1 or not (arguments.draft and random),
            "--draft with a random: model, a table of what guesses cost, is for one process")
    require(ranks == 1 or not arguments.draft or arguments.draft_tokens,
            "--draft with several processes needs --draft-tokens: each would find another number "
            "the fastest")
    return chat.settle(arguments) if arguments.chat else generate.settle(arguments)


def write(arguments):
    """Do what the command line asks for, as one of `parallel.ranks()` processes."""
    ranks = parallel.ranks()
    template = chat.chat_template(arguments.model) if arguments.chat else None
    maker = parallel if ranks > 1 else Llama
    model, tokenizer = load_model(arguments.model, arguments.device, arguments.dtype, maker)
    if arguments.attend:
        attend.plan_of(arguments, model.config).check(model.config)
    quantize.follow(arguments, model, arguments.model)
    if tokenizer is None and arguments.draft in Writer.OWN_DRAFTS:
        # What a random model would write says nothing.
        writer = Writer(arguments, model, None)
        sparsify(model, writer.thresholds(arguments.draft_sparsity))
        timing.draft_costs(model, arguments.draft, arguments.draft_sparsity)
        return
    if ranks > 1:
        source = generate.random_source(model, arguments.seed)
        arguments.seed = parallel.from_first(source.initial_seed)
    # The ranks talk to each other between the operations, which no tape can note.
    make_step = record.make_step if ranks == 1 else generate.fast_step
    writer = Writer(arguments, model, tokenizer, make_step, drafts.speculate, realised)
    if not arguments.chat:
        prompt = generate.prompt_of(arguments, model, tokenizer)
        writer.write(prompt)
        return
    writer.prepare()
    with sparse_mode(model, writer.mode):
        chat.chat(tokenizer, template, arguments.system,
                  lambda prompt: writer.text(prompt, speculative=bool(arguments.draft)),
                  from_first=parallel.from_first,
                  longest=chat.longest_prompt(model, arguments.max_new_tokens))


def main():
    arguments = settle(make_parser().parse_args())
    with parallel.group(arguments.device) as arguments.device:
        write(arguments)


if __name__ == "__main__":
    parallel.command_line(main)
