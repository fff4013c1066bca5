"""Text to tokens and back.

A model reads numbers. Its tokenizer cuts text into pieces it has seen often while it was made (arXiv 1508.07909) and gives each
a number, the token id; what it has not seen falls into bytes, so that any text can be written:

    "def walk"  ─►  ▁def  ▁walk          "Ω"  ─►  <0xCE>  <0xA9>            ▁ stands for a space in SentencePiece

Three kinds are found in checkpoint folders, and which one a folder has is seen by looking:

    tokenizer.model    SentencePiece (Llama-2, Mistral), a binary file
    tokenizer.model    tiktoken (Llama-3): a line for each token, its bytes in base64 and its rank; needs the package tiktoken
    tokenizer.json     the hub's own format, any kind; needs the package tokenizers

Some ids are no text: begin and end of sequence, headers of a chat. They are special: a prompt never becomes one. In a chat the
whole text is the template's, so there a turn that spells one out does, as everywhere on the hub. Tokens that come one by one are turned to text by `StreamDecoder`, whole characters only.

A chat is one text in a form the model was trained on, with its own marks for who speaks. That form is the checkpoint's
chat template, a Jinja program in its folder, which is run in Jinja's sandbox.
"""
import base64
import functools
import json
import re
from pathlib import Path

from checkpoint import read_json
from cli import InputError

# How Llama-3 cuts text before it looks up pieces (its reference implementation, tokenizer.py).
LLAMA3_SPLIT = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
                r"|\s+(?!\S)|\s+")
LLAMA3_SPECIAL = {0: "<|begin_of_text|>", 1: "<|end_of_text|>", 6: "<|start_header_id|>", 7: "<|end_header_id|>", 9: "<|eot_id|>"}


class Tokenizer:
    """What all kinds share. A kind has vocab_size, _encode(text) -> ids of plain text, _decode(ids) -> text, pieces() -> list.

    special: {text of a special token: its id}; bos: the id that begins a sequence, or None; eos_ids: those that end one.
    """

    def encode(self, text, bos=True, special=False):
        """Token ids of `text`, the begin-of-sequence token first if `bos` and there is one.

        special: whether special tokens written out in the text are read as such, as in a rendered chat.
        """
        try:
            text.encode("utf-8")
        except UnicodeEncodeError:
            raise InputError("the text is not Unicode: it holds bytes that are no UTF-8") from None
        ids = [self.bos] * (bos and self.bos is not None)
        if not special or not self.special:
            return ids + self._encode(text)
        for part in re.split("(" + "|".join(map(re.escape, sorted(self.special, key=len, reverse=True))) + ")", text):
            if part in self.special:
                ids.append(self.special[part])
            elif part:
                ids += self._encode(part)
        return ids

    def decode(self, ids):
        """The text of token ids. Special tokens have none, nor have ids that pad a model's vocabulary."""
        hidden = self._special_ids
        return self._decode([int(i) for i in ids if i < self.vocab_size and i not in hidden])

    @functools.cached_property
    def _special_ids(self):
        return frozenset(self.special.values())


class SentencePieceTokenizer(Tokenizer):
    def __init__(self, path, settings):
        import sentencepiece                               # needed only where there is text
        self.processor = sentencepiece.SentencePieceProcessor()
        try:
            self.processor.load(str(path))
        except (RuntimeError, OSError) as error:
            raise InputError(f"{path}: not a SentencePiece model: {str(error).splitlines()[0]}") from None
        size = self.processor.vocab_size()
        self.special = {self.processor.id_to_piece(i): i for i in range(size) if self.processor.is_control(i)} | settings.special
        self.vocab_size = max([size, *(i + 1 for i in self.special.values())])
        self.bos = self.processor.bos_id() if self.processor.bos_id() >= 0 else None
        self.eos_ids = settings.eos_ids or ((self.processor.eos_id(),) if self.processor.eos_id() >= 0 else ())

    def _encode(self, text):
        return self.processor.encode(text)

    def _decode(self, ids):
        return self.processor.decode([i for i in ids if i < self.processor.vocab_size()])

    def pieces(self):
        """What each token stands for, a list by id: two tokenizers with the same pieces are the same."""
        return [self.processor.id_to_piece(i) for i in range(self.processor.vocab_size())]


class TiktokenTokenizer(Tokenizer):
    def __init__(self, path, settings):
        try:
            import tiktoken
        except ImportError:
            raise InputError(f"{path}: a tokenizer in tiktoken's format needs the package tiktoken: pip install tiktoken") from None
        ranks, number = {}, 0
        for number, line in enumerate(Path(path).read_bytes().splitlines(), start=1):
            try:
                token, rank = line.split()
                ranks[base64.b64decode(token, validate=True)] = int(rank)
            except ValueError:
                raise InputError(f"{path}: line {number} is not a token in base64 and its rank") from None
        if sorted(ranks.values()) != list(range(number)) or not {bytes([i]) for i in range(256)} <= ranks.keys():
            raise InputError(f"{path}: ranks should be 0 to {len(ranks) - 1}, each once, with every single byte among the tokens")
        base = len(ranks)                                  # 256 special tokens follow, as in Llama-3
        names = [LLAMA3_SPECIAL.get(i, f"<|reserved_special_token_{i}|>") for i in range(256)]
        self.special = settings.special or {name: base + i for i, name in enumerate(names)}
        self.encoding = tiktoken.Encoding(str(path), pat_str=LLAMA3_SPLIT, mergeable_ranks=ranks, special_tokens={})
        self.ranks, self.vocab_size = ranks, base + 256
        self.bos = self.special.get(settings.bos or LLAMA3_SPECIAL[0], base)
        self.eos_ids = settings.eos_ids or tuple(self.special[name] for name in (LLAMA3_SPECIAL[1], LLAMA3_SPECIAL[9]) if name in self.special)

    def _encode(self, text):
        # tiktoken recurses over what is not yet split: very long runs are cut first, as the reference does.
        parts = [text[i:i + 400_000] for i in range(0, len(text), 400_000)]
        return [i for part in parts for i in self.encoding.encode_ordinary(part)]

    def _decode(self, ids):
        return self.encoding.decode([i for i in ids if i < len(self.ranks)], errors="replace")

    def pieces(self):
        return sorted(self.ranks, key=self.ranks.get)


class JsonTokenizer(Tokenizer):
    def __init__(self, path, settings):
        try:
            import tokenizers
        except ImportError:
            raise InputError(f"{path}: this kind of tokenizer needs the package tokenizers: pip install tokenizers") from None
        try:
            self.tokenizer = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:                         # the package raises nothing narrower
            raise InputError(f"{path}: not a tokenizer: {str(error).splitlines()[0]}") from None
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()
        self.special = {token.content: i for i, token in self.tokenizer.get_added_tokens_decoder().items() if token.special} | settings.special
        self.vocab_size = self.tokenizer.get_vocab_size(with_added_tokens=True)
        self.bos = self.tokenizer.token_to_id(settings.bos) if settings.bos else None
        eos = self.tokenizer.token_to_id(settings.eos) if settings.eos else None
        self.eos_ids = settings.eos_ids or (() if eos is None else (eos,))

    def _encode(self, text):
        self.tokenizer.encode_special_tokens = True        # as text: what a user writes is not special
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def _decode(self, ids):
        return self.tokenizer.decode(ids, skip_special_tokens=True)

    def pieces(self):
        vocabulary = self.tokenizer.get_vocab(with_added_tokens=True)
        return sorted(vocabulary, key=vocabulary.get)


def optional_json(path):
    """The object in a JSON file, an empty one where there is no file."""
    return read_json(path) if path.exists() else {}


def written_as(token):
    """The text of a special token as the hub writes it: that text, or an object that holds it."""
    return token["content"] if isinstance(token, dict) else token


class Settings:
    """What tokenizer_config.json, generation_config.json and config.json say: special {text: id}, bos and eos (texts or None), eos_ids."""

    def __init__(self, folder):
        path = Path(folder) / "tokenizer_config.json"
        raw = optional_json(path)
        added = raw.get("added_tokens_decoder") or {}
        try:
            self.special = {token["content"]: int(i) for i, token in added.items() if token.get("special")}
            self.bos, self.eos = map(written_as, (raw.get("bos_token"), raw.get("eos_token")))
        except (AttributeError, KeyError, TypeError, ValueError):
            raise InputError(f"{path}: added_tokens_decoder, bos_token or eos_token is not as the hub writes it") from None
        self.eos_ids = ()
        for name in ("generation_config.json", "config.json"):
            ids = optional_json(Path(folder) / name).get("eos_token_id")
            ids = ids if isinstance(ids, list) else [ids]
            self.eos_ids = self.eos_ids or tuple(i for i in ids if type(i) is int and i >= 0)


def open_tokenizer(folder):
    """The tokenizer of a checkpoint folder, whichever kind it is; InputError if there is none that can be read here."""
    folder = Path(folder)
    model, other = folder / "tokenizer.model", folder / "tokenizer.json"
    if not model.exists() and not other.exists():
        raise InputError(f"{folder}: no tokenizer: neither tokenizer.model nor tokenizer.json is there")
    settings = Settings(folder)
    if not model.exists():
        return JsonTokenizer(other, settings)
    with open(model, "rb") as file:
        first = file.readline(1000)
    if not re.fullmatch(rb"[A-Za-z0-9+/]+=* \d+\r?\n?", first):
        return SentencePieceTokenizer(model, settings)
    try:
        return TiktokenTokenizer(model, settings)
    except InputError as error:
        if "needs the package" not in str(error) or not other.exists():
            raise
        return JsonTokenizer(other, settings)


class StreamDecoder:
    """Turns tokens into text as they come, whole characters only.

    A character may be spread over several tokens, and what a token spells may depend on those before it. So the
    text of the last few tokens is decoded anew with each token, and given out as far as it is new and sure. Between calls
    the first `given` characters of decode(pending) have been given out.
    """
    CONTEXT = 8              # tokens kept before the new ones
    PATIENCE = 32            # tokens to wait for a character to become whole

    def __init__(self, tokenizer, prompt_ids=()):
        self.tokenizer = tokenizer
        self.pending = list(prompt_ids)[-self.CONTEXT:]
        self.given = len(tokenizer.decode(self.pending))

    def add(self, token):
        """The text that `token` completes; "" while a character is unfinished."""
        self.pending.append(token)
        text = self.tokenizer.decode(self.pending)
        if text.endswith("\ufffd") and len(self.pending) < self.PATIENCE:   # bytes that are no character yet
            return ""
        new, self.given = text[self.given:], len(text)
        if len(self.pending) >= 2 * self.CONTEXT:
            self.pending = self.pending[-self.CONTEXT:]
            self.given = len(self.tokenizer.decode(self.pending))
        return new

    def end(self):
        """What is left when no token follows: bytes that never became a character show as U+FFFD."""
        new, self.given = self.tokenizer.decode(self.pending)[self.given:], 0
        self.pending = []
        return new


def chat_template(folder):
    """The chat template of a checkpoint folder as a function: messages ([{"role", "content"}]) -> the text of the chat so far,
    up to where the model's next turn begins. InputError where there is none, or it does not take the messages."""
    folder = Path(folder)
    raw = optional_json(folder / "tokenizer_config.json")
    source = raw.get("chat_template")
    if isinstance(source, list):                           # several, by name
        source = next((each.get("template") for each in source if isinstance(each, dict) and each.get("name") == "default"), None)
    path = folder / "chat_template.jinja"
    if path.exists():
        try:
            source = path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise InputError(f"{path}: not UTF-8 text: {error.reason} at byte {error.start}") from None
    if not isinstance(source, str):
        raise InputError(f"{folder}: no chat template: neither chat_template.jinja nor one in tokenizer_config.json; --chat needs a model made for it")
    try:
        import jinja2.sandbox
    except ImportError:
        raise InputError("--chat needs the package jinja2: pip install jinja2") from None

    def refuse(message):
        raise jinja2.TemplateError(message)

    # As transformers sets it up, with the marks of what a model was trained to say left out.
    source = re.sub(r"\{%-?\s*(end)?generation\s*-?%\}", "", source)
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
    environment.filters["tojson"] = lambda value, indent=None: json.dumps(value, ensure_ascii=False, indent=indent)
    environment.globals |= {"raise_exception": refuse, "strftime_now": lambda form: __import__("datetime").datetime.now().strftime(form)}
    names = {name: written_as(token) for name, token in raw.items()
             if name.endswith("_token") and isinstance(token, (str, dict))}

    def render(messages):
        try:
            return environment.from_string(source).render(messages=messages, add_generation_prompt=True, **names)
        except Exception as error:                         # a program of others: anything may go wrong in it
            said = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise InputError(f"{folder}: the chat template: {said}") from None
    return render
