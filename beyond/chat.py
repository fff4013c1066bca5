"""A conversation: how a model that continues a text answers.

A chat model was trained on conversations that were written as one text, with marks of its own for
who speaks. Whoever talks to it has to write that text in the same form:

    you type            Why is the sky blue?
    the model is given  <s><|user|>Why is the sky blue?</s><|assistant|>
    it writes           Because air scatters blue light more than red.</s>
    then it is given    <s><|user|>Why is ... </s><|assistant|>Because ... red.</s><|user|>...

That form is the checkpoint's chat template, a program in the language Jinja, in its folder. It is
run by transformers, in a sandbox, and transformers cuts the text into tokens: the marks are special
tokens, which a prompt of generate.py never becomes, and the template itself writes the token that
begins a text. A turn that spells out a mark becomes that mark, as everywhere on the hub.

A model remembers nothing. Every turn is a new text, which begins with all that was said before. Of
a conversation that is longer than the model's context, the oldest turns are left out.

The seam: `chat` is given a function that continues a prompt; `load_tokenizer` gives the text of
what it writes. The template's tokens need the package transformers.

    python -m beyond.chat --model FOLDER [--system TEXT] [options of generate.py]
"""
import sys
from pathlib import Path

import generate
from beyond import record
from generate import StreamDecoder, Writer, stream
from model import (HubTokenizer, InputError, check_text, command_line, load_model, note, read_json,
                   require)
from sparsify import sparse_mode


def chat_template(folder):
    """Return the chat template of a checkpoint folder, as a function of messages.

    template([{"role": "user", "content": "Hi"}, ...]) -> the token ids of the conversation so far,
    up to where the model's next turn begins. Raises InputError, at once, where there is no template
    or a package is missing; and later, with what the template said, where it fails.
    """
    require(not str(folder).startswith("random:"),
            f"a chat needs a checkpoint folder: {folder} has random weights and no tokenizer")
    folder = Path(folder)
    require(folder.is_dir(), f"{folder}: no such folder")
    settings = folder / "tokenizer_config.json"
    path = folder / "chat_template.jinja"
    if path.exists():
        try:
            path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            what = f"{error.reason} at byte {error.start}"
            raise InputError(f"{path}: not UTF-8 text: {what}") from None
    else:
        require(settings.exists() and read_json(settings).get("chat_template"),
                f"{folder}: no chat template: neither {path.name} nor one in {settings.name}; a "
                f"chat needs a model made for it")
    tokenizer = HubTokenizer(folder).tokenizer

    def template(messages):
        for message in messages:
            check_text(message["content"])
        try:
            return tokenizer.apply_chat_template(messages, add_generation_prompt=True,
                                                 tokenize=True, return_dict=False)
        except Exception as error:       # a program of others: anything may go wrong in it
            said = (str(error) or type(error).__name__).splitlines()[0]
            raise InputError(f"{folder}: the chat template: {said}") from None
    return template


def read_line():
    """Return a line of input, None at its end."""
    require(sys.stdin is not None, "standard input is closed: the turns of a chat come from there")
    try:
        return input("\n> " if sys.stdin.isatty() else "")
    except EOFError:
        return None
    except UnicodeDecodeError as error:
        raise InputError(f"standard input: not UTF-8 text: {error.reason}") from None


def prompt_of(messages, template, longest=None):
    """Return the tokens of a conversation, and make it one of at most `longest` tokens, if given.

    From `messages` the oldest turns are taken, with their answers; not what the system says, nor
    the last turn.
    """
    prompt = template(messages)
    first = int(messages[0]["role"] == "system")
    forgotten = 0
    while longest and len(prompt) > longest and len(messages) > first + 1:
        del messages[first:first + 2]
        forgotten += 1
        prompt = template(messages)
    if forgotten:
        note(f"[forgotten, to make room: the oldest {forgotten} turns of the conversation]")
    return prompt


def longest_prompt(model, max_new_tokens):
    """Return how many tokens of a conversation leave room for an answer, or a quarter for it."""
    context = model.config.max_position_embeddings
    return context - min(max_new_tokens, context // 4 + 1)


def chat(tokenizer, template, system, text_of, read_line=read_line, from_first=lambda ask: ask(),
         longest=None):
    """Hold a conversation on standard output: each line of input is a turn, until it ends.

    tokenizer: gives the text of tokens. template: of `chat_template`. system: what the model is
    told first, or None. text_of(ids) returns an iterator of the token ids that follow a prompt.
    from_first(ask) returns what ask() is in the first of several processes: see parallel.py.
    longest: how many tokens a prompt may have; beyond, the oldest turns are forgotten.
    """
    messages = [{"role": "system", "content": system}] if system else []
    while True:
        line = from_first(read_line)
        if line is None:
            return
        if not line.strip():
            continue
        messages.append({"role": "user", "content": line})
        prompt = from_first(lambda: prompt_of(messages, template, longest))    # may hold the time
        ids, *_ = stream(text_of(prompt), StreamDecoder(tokenizer, prompt),
                         lambda text: print(text, end="", flush=True))
        print(flush=True)
        messages.append({"role": "assistant", "content": tokenizer.decode(ids)})


def settle(arguments):
    """Check the arguments of generate.make_parser for a chat, and put values where none are."""
    for name in ("prompt", "compare"):
        require(not getattr(arguments, name), f"--{name} is for a text, not for a chat")
    if arguments.sparsity is None:
        arguments.sparsity = 0.0
    return generate.settle(arguments)


def main():
    parser = generate.make_parser()
    parser.description = ("Talks with a model: each line of input is a turn, in the checkpoint's "
                          "own chat format.")
    parser.add_argument("--system", metavar="TEXT",
                        help="what the model is told first (default: nothing)")
    arguments = settle(parser.parse_args())
    template = chat_template(arguments.model)
    model, tokenizer = load_model(arguments.model, arguments.device, arguments.dtype)
    writer = Writer(arguments, model, tokenizer, record.make_step)
    writer.prepare()
    with sparse_mode(model, writer.mode):
        chat(tokenizer, template, arguments.system,
             lambda prompt: writer.text(prompt, speculative=bool(arguments.draft)),
             longest=longest_prompt(model, arguments.max_new_tokens))


if __name__ == "__main__":
    command_line(main)
