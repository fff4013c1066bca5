"""A conversation: how a model that continues a text answers.

A chat model was trained on conversations that were written as one text, with marks of its own for
who speaks. Whoever talks to it has to write that text in the same form:

    you type            Why is the sky blue?
    the model is given  <s><|user|>Why is the sky blue?</s><|assistant|>
    it writes           Because air scatters blue light more than red.</s>
    then it is given    <s><|user|>Why is ... </s><|assistant|>Because ... red.</s><|user|>...

This form is the checkpoint's chat template, a program in the language Jinja. transformers runs it
in a sandbox and cuts its text into tokens: marks become special tokens, which the prompt of
generate.py never holds. A turn that spells out a mark becomes that mark, as everywhere on the hub.

A model remembers nothing: every turn is a new text that begins with all earlier turns. When a
conversation is longer than the model's context, its oldest turns are dropped.

The seam: `chat` is given a function that continues a prompt.

    python -m beyond.chat --model FOLDER [--system TEXT]      the same as python -m beyond --chat
"""
import sys
from pathlib import Path

import generate
from beyond.folders import load_tokenizer
from model import HubTokenizer, note, refusing, require


def chat_template(folder):
    """Return the chat template of a checkpoint folder, as a function of messages.

    template([{"role": "user", "content": "Hi"}, ...]) -> the token ids of the conversation so far,
    up to where the model's next turn begins. Raises InputError, at once, where there is no template
    or a package is missing; and later, with the template's own words, where it fails.
    """
    require(not str(folder).startswith("random:"),
            f"a chat needs a checkpoint folder: {folder} has random weights and no tokenizer")
    require(Path(folder).is_dir(), f"{folder}: no such folder")
    tokenizer = load_tokenizer(folder)
    if not isinstance(tokenizer, HubTokenizer):            # SentencePiece alone has no templates
        with refusing(f"{folder}: a chat needs the package transformers: pip install transformers",
                      ImportError):
            from transformers import LlamaTokenizer
        tokenizer = HubTokenizer(folder, kind=LlamaTokenizer)
    tokenizer = tokenizer.tokenizer
    require(tokenizer.chat_template,
            f"{folder}: no chat template: neither chat_template.jinja nor one in "
            f"tokenizer_config.json; a chat needs a model made for it")

    def template(messages):
        # A program of others: anything may go wrong in it.
        with refusing(f"{folder}: the chat template", Exception):
            return tokenizer.apply_chat_template(messages, add_generation_prompt=True,
                                                 tokenize=True, return_dict=False)
    return template


def read_line():
    """Return a line of input, None at its end."""
    require(sys.stdin is not None, "standard input is closed: the turns of a chat come from there")
    with refusing("standard input: not UTF-8 text", UnicodeError):
        try:
            line = input("\n> " if sys.stdin.isatty() else "")
        except EOFError:
            return None
        line.encode("utf-8")             # some locales let other bytes through
    return line


def prompt_of(messages, template, longest):
    """Return the tokens of a conversation, shortened in place to `longest` tokens.

    The oldest turns go, with their answers; the system's message and the last turn stay.
    """
    prompt = template(messages)
    first = int(messages[0]["role"] == "system")
    forgotten = 0
    while len(prompt) > longest and len(messages) > first + 1:
        del messages[first:first + 2]
        forgotten += 1
        prompt = template(messages)
    if forgotten:
        note(f"[forgotten, to make room: the oldest {forgotten} turns of the conversation]")
    return prompt


def longest_prompt(model, max_new_tokens):
    """Return the length of a prompt that leaves room for an answer, at most a quarter for it."""
    context = model.config.max_position_embeddings
    return context - min(max_new_tokens, context // 4 + 1)


def chat(tokenizer, template, system, text_of, longest, from_first=lambda ask: ask()):
    """Hold a conversation on standard output: each line of input is a turn, until it ends.

    template: of `chat_template`. system: what the model is told first, or None. text_of(ids)
    returns an iterator of the token ids that follow a prompt. longest: the most tokens of a prompt.
    from_first(ask) returns ask() of the first of several processes: see parallel.py.
    """
    messages = [{"role": "system", "content": system}] if system else []
    while (line := from_first(read_line)) is not None:
        if not line.strip():
            continue
        messages.append({"role": "user", "content": line})
        prompt = from_first(lambda: prompt_of(messages, template, longest))    # may hold the time
        ids = list(prompt)
        try:
            for text in generate.stream(text_of(prompt), tokenizer.decode, ids):
                print(text, end="", flush=True)
        except KeyboardInterrupt:        # ends an answer, not the conversation
            print("\n[interrupted]", end="")
        print(flush=True)
        messages.append({"role": "assistant", "content": tokenizer.decode(ids[len(prompt):])})


def settle(arguments):
    """Check the arguments of generate.make_parser for a chat, and put values where none are."""
    for name in ("prompt", "compare"):
        require(not getattr(arguments, name), f"--{name} is for a text, not for a chat")
    arguments.sparsity = arguments.sparsity or 0.0
    return generate.settle(arguments)


if __name__ == "__main__":
    from beyond import __main__ as beyond, parallel
    sys.argv.insert(1, "--chat")
    parallel.command_line(beyond.main)
