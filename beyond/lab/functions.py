"""Whether what a model writes is Python: functions that a person began, completed and parsed.

Perplexity judges a model on what people wrote. Here it writes by itself: the demo model gets the
lines before a function of the held-out part and its def line, and completes the function greedily,
dense or sparse. Python's parser is the judge. A column of judge.py.
"""
import ast
import io
import itertools
import textwrap

import torch

from demo import corpus
from model import require


def function_beginnings(tokenizer, count, length=128, seed=0):
    """Return beginnings of functions of the held-out part, `count` of them, drawn with a seed.

    Returns [(ids of the last `length` tokens up to the end of the def line, text of the def line)].
    Those with less text before them are left out.
    """
    beginnings = []
    for _, text in corpus.files("held-out"):
        lines = io.StringIO(text).readlines()      # as Python counts them: a form feed ends none
        for node in ast.walk(ast.parse(text)):
            if not isinstance(node, ast.FunctionDef) or node.end_lineno - node.lineno < 3:
                continue
            first = [node.body[0], *getattr(node.body[0], "decorator_list", [])]
            body = min(each.lineno for each in first)
            head = "".join(lines[node.lineno - 1:body - 1])
            ids = tokenizer.encode("".join(lines[:body - 1]))[-length:]
            if head.strip() and len(ids) == length:
                beginnings.append((ids, head))
    require(beginnings, f"no function to complete in the held-out part of {corpus.NAME}; leave it "
                        f"out with --functions 0")
    order = torch.randperm(len(beginnings), generator=torch.Generator().manual_seed(seed))
    return [beginnings[i] for i in order[:count]]


def is_function(head, body):
    """Return whether a def line and the text after it, cut where the function ends, are Python."""
    indent = len(head) - len(head.lstrip())

    def is_inside(line):                 # and finished
        return line.endswith("\n") and (not line.strip() or len(line) - len(line.lstrip()) > indent)

    inside = itertools.takewhile(is_inside, body.splitlines(keepends=True))
    try:
        ast.parse(textwrap.dedent(head + "".join(inside)))
    except (SyntaxError, ValueError):
        return False
    return True


@torch.no_grad()
def share_of_functions(model, tokenizer, beginnings, setting, new_tokens=96):
    """Return the share of `beginnings` that the model completes to what Python can parse.

    It decodes greedily, all of them side by side, made sparse by a Setting.
    """
    tokens = torch.tensor([ids for ids, _ in beginnings], device=model.device)      # (B, length)
    cache = model.make_cache(len(tokens), tokens.shape[1] + new_tokens)
    written = []
    with setting.way(model, "decode", 0):
        for _ in range(new_tokens):
            tokens = model(tokens, cache, last_only=True)[:, -1].argmax(-1, keepdim=True)   # (B, 1)
            written.append(tokens)
    texts = [tokenizer.decode(ids) for ids in torch.cat(written, 1).tolist()]
    good = [is_function(head, text) for (_, head), text in zip(beginnings, texts)]
    return sum(good) / len(good)
