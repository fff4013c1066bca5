"""Tests of chat.py and of the tokenizers it meets: texts, templates, conversations."""
import base64
import io
import json
import os
import re
import subprocess
import sys

import pytest
import torch

import generate
from beyond import __main__ as beyond
from beyond import chat
from beyond.folders import load_tokenizer
from beyond.tests.conftest import ROOT, refused, tiny_model, write_bpe, write_byte_level
from calibrate import calibrate
from generate import StreamDecoder
from model import DEMO, Llama, read_tokens, write_json

tokenizers = pytest.importorskip("tokenizers")
transformers = pytest.importorskip("transformers")
pytest.importorskip("google.protobuf")
TEXTS = [
    "def walk(self, top):\n    return [i for i in range(10)]",
    " two  leading spaces",
    "Ωμέγα, naïve — 日本語 🙂🙂",
    "",
    "tabs\tand\r\nlines\n\n\n",
    "it's 12345 o'clock, <|eot_id|> <s> </s>",
    "x" * 300,
]
TEMPLATE = """{{ bos_token }}{% for message in messages %}
    {% if message.role == 'system' and not loop.first %}
        {{ raise_exception('the system speaks first') }}
    {% endif %}
<|user|>{{ message['role'] }}
{{ message['content'] | trim }}</s>
{% endfor %}
{% if add_generation_prompt %}
<|user|>assistant
{% endif %}"""


def byte_level(folder, rule=True, **settings):
    """Write a byte-level BPE with a chat template, see conftest.py."""
    return write_byte_level(folder, TEXTS * 3, ["<s>", "</s>", "<|user|>", "<|eot_id|>"], rule,
                            chat_template=TEMPLATE, **settings)


def tiktoken(folder):
    """Write a tokenizer.model of Llama-3's kind, single bytes and a few merges; return its tokens.

    Its special tokens stand in tokenizer_config.json alone.
    """
    pytest.importorskip("tiktoken")
    merges = ["he", " w", " wa", "lk", " walk", "12", "123", "Ω", "  ", "xx", "xxxx"]
    tokens = [bytes([i]) for i in range(256)] + [text.encode() for text in merges]
    lines = [base64.b64encode(token) + b" %d\n" % i for i, token in enumerate(tokens)]
    (folder / "tokenizer.model").write_bytes(b"".join(lines))
    marks = {len(tokens): "<|begin_of_text|>", len(tokens) + 1: "<|end_of_text|>",
             len(tokens) + 9: "<|eot_id|>"}
    write_json(folder / "tokenizer_config.json", {
        "tokenizer_class": "PreTrainedTokenizerFast", "add_bos_token": True,
        "bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>", "added_tokens_decoder": {
            str(i): {"content": text, "special": True} for i, text in marks.items()}})
    return tokens


def sentencepiece(folder, added=None, **settings):
    """Write the demo's tokenizer.model with settings and added tokens, as Llama-2's kin have it."""
    (folder / "tokenizer.model").symlink_to(DEMO.resolve() / "tokenizer.model")
    write_json(folder / "tokenizer_config.json", {
        "tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>",
        "unk_token": "<unk>", "add_bos_token": True, "add_prefix_space": False} | settings)
    if added:
        write_json(folder / "added_tokens.json", added)


def metaspace(folder):
    """Write a tokenizer.json of Mistral's kind: words begin with a blank, the first one too."""
    marks = ["<unk>", "<s>", "</s>", "[INST]", "[/INST]"]
    pieces = [*marks, "▁", "H", "i", "Hi", "▁Hi"]
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE(
        vocab={piece: i for i, piece in enumerate(pieces)},
        merges=[("H", "i"), ("▁", "Hi")], unk_token="<unk>"))
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace("▁", "first", split=False)
    bpe.decoder = tokenizers.decoders.Metaspace("▁", "first")
    bpe.add_special_tokens(marks)
    bpe.add_tokens([tokenizers.AddedToken("<|tool|>", special=False, normalized=False)])
    write_bpe(folder, bpe, "<s>", legacy=False, chat_template=(
        "<s>[INST] {{ messages[0].content }}[/INST]{{ messages[0].content }}"))


@pytest.fixture(scope="module")
def chat_folder(tmp_path_factory):
    """A checkpoint of a tiny model with a tokenizer.json, a chat template and a calibration."""
    folder = tmp_path_factory.mktemp("chat")
    tokens = byte_level(folder)
    model = tiny_model(vocab_size=tokens, max_position_embeddings=256)
    model.save_pretrained(folder)
    calibrate(model, torch.randint(tokens, (300,))).save(folder / "calibration.safetensors")
    return folder


@pytest.fixture
def talk(run):
    """Return a function that returns what `python -m beyond --chat` writes when lines are typed."""
    return lambda typed, *options, **more: run(beyond, "--chat", *options, "--device", "cpu",
                                               typed=typed, **more)


# --------------------------------------------------------------------------------------------------
# Tokenizers

@pytest.mark.parametrize("write, bos", [
    (byte_level, [0]), (lambda folder: byte_level(folder, False), []), (tiktoken, [267]),
    (lambda folder: byte_level(folder, add_bos_token=True), [0]),        # the rule counts alone
    (lambda folder: byte_level(folder, False, add_bos_token=True), []),
    (sentencepiece, [1]), (lambda folder: sentencepiece(folder, add_bos_token=False), []),
    (lambda folder: sentencepiece(folder, {"<|im_start|>": 4096}), [1]),
], ids=range(8))
def test_text_comes_back_at_once_and_streamed(tmp_path, write, bos):
    write(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    marks = {i for i in range(tokenizer.vocab_size) if not tokenizer.decode([i])}
    assert {*bos} <= marks
    for text in TEXTS:
        ids = tokenizer.encode(text)
        plain = tokenizer.encode(text, bos=False)
        assert ids == bos + plain
        assert not {*plain} & marks                        # a mark that is written out is text
        assert tokenizer.decode(ids) == text
        for cut in (0, len(bos)):
            decoder = StreamDecoder(tokenizer, ids[:cut])
            assert "".join([decoder.add(i) for i in ids[cut:]] + [decoder.end()]) == text
    (tmp_path / "text.txt").write_text(TEXTS[0])           # of calibrations, too
    assert read_tokens(tokenizer, tmp_path / "text.txt", None)[0].tolist() == tokenizer.encode(
        TEXTS[0])


@pytest.mark.parametrize("size, first", [(2, 0x7c0), (3, 0x1200), (4, 0x12000)])
def test_long_runs_of_bytes_are_streamed_as_they_are_decoded(tmp_path, size, first):
    """Characters without a token are spelt in bytes; a run cut inside one decodes to no text."""
    vocabulary = {f"<0x{byte:02X}>": byte for byte in range(256)} | {"a": 256, " ": 257}
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, [], byte_fallback=True))
    bpe.decoder = tokenizers.decoders.Sequence(
        [tokenizers.decoders.ByteFallback(), tokenizers.decoders.Fuse()])
    bpe.save(str(tmp_path / "tokenizer.json"))
    write_json(tmp_path / "config.json", {"model_type": "llama"})
    tokenizer = load_tokenizer(tmp_path)
    for length in range(1, 30, 4):
        text = "a " + "".join(chr(first + i) for i in range(length)) + "a"
        ids = tokenizer.encode(text, bos=False)
        assert len(ids) == 3 + size * length
        for cut in (0, 2, 2 + size * (length // 2)):
            decoder = StreamDecoder(tokenizer, ids[:cut])
            parts = [decoder.add(i) for i in ids[cut:]] + [decoder.end()]
            assert "".join(parts) == text[len(tokenizer.decode(ids[:cut])):]
            assert max(map(len, parts)) == 1               # each as soon as it is whole


def test_tiktoken_is_read_as_the_reference_reads_it(tmp_path):
    tokens = tiktoken(tmp_path)
    split = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
             r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")      # Llama-3's
    import tiktoken as package
    reference = package.Encoding("reference", pat_str=split, special_tokens={},
                                 mergeable_ranks={token: i for i, token in enumerate(tokens)})
    ours = load_tokenizer(tmp_path)
    assert all(ours.encode(text, bos=False) == reference.encode_ordinary(text) for text in TEXTS)
    assert ours.eos_ids == (268,)
    (tmp_path / "chat_template.jinja").write_text("a<|eot_id|>{{ messages[0].content }}")
    assert chat.chat_template(tmp_path)([{"content": "b"}]) == [ord("a"), 276, ord("b")]
    (tmp_path / "tokenizer.model").write_bytes(b"!!! x")
    with refused(match="no tokenizer that can be read: .*!!! x"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("kind", ["llama", "mistral"])
@pytest.mark.parametrize("special", [None, True, False])
def test_tokens_that_a_folder_adds_are_tokens(tmp_path, kind, special):
    """In added_tokens.json (special: None) or tokenizer_config.json, without a tokenizer.json."""
    marks = {"<|im_start|>": 4096, "<|im_end|>": 4097}
    decoder = {str(i): {"content": text, "special": special} for text, i in marks.items()}
    sentencepiece(tmp_path, *[marks] * (special is None),
                  **{"added_tokens_decoder": decoder} if special is not None else {})
    write_json(tmp_path / "config.json", {"model_type": kind})
    (tmp_path / "chat_template.jinja").write_text(
        "{{ bos_token }}<|im_start|>{{ messages[0].content }}<|im_end|>")
    plain, tokenizer = load_tokenizer(DEMO), load_tokenizer(tmp_path)
    marked = [1, 4096, *plain.encode("import os", bos=False), 4097]
    text = "<|im_start|>import os<|im_end|>"
    assert chat.chat_template(tmp_path)([{"content": "import os"}]) == marked
    assert tokenizer.decode(marked) == ("import os" if special else text)
    assert tokenizer.encode(text) == (plain.encode(text) if special else marked)
    assert tokenizer.pieces()[4096:] == list(marks)


def test_a_text_of_a_tokenizer_with_more_tokens_than_the_model(tmp_path, talk):
    """Only its first word is given a blank, and no token is named that ends it."""
    metaspace(tmp_path)
    tiny_model(vocab_size=10).save_pretrained(tmp_path)    # the last token of 11, <|tool|>, is 10
    config = json.loads((tmp_path / "config.json").read_text())
    write_json(tmp_path / "config.json", config | {"eos_token_id": None})
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.eos_ids == ()
    assert tokenizer.encode("Hi<|tool|>Hi") == [1, 9, 10, 8]             # no special token
    assert tokenizer.decode([1, 9, 10, 8, 4]) == "Hi<|tool|>Hi"
    assert chat.chat_template(tmp_path)([{"content": "Hi"}]) == [1, 3, 9, 4, 8]
    options = ["--model", tmp_path, "--max-new-tokens", 3]
    assert talk("Hi\n", *options)
    error = talk("Hi<|tool|>\n", *options, expected=2)
    assert "token id 10 is outside the vocabulary of 10" in error


# --------------------------------------------------------------------------------------------------
# Templates

def test_a_chat_has_the_tokens_that_transformers_gives_it(tmp_path):
    byte_level(tmp_path)
    reference = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path)
    template = chat.chat_template(tmp_path)
    roles = ["system", "user", "assistant", "user"]
    for messages in ([{"role": "user", "content": " Hello Ω "}],
                     [{"role": role, "content": f"{role} <|eot_id|>"} for role in roles]):
        ids = template(messages)
        text = reference.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        assert ids == reference(text, add_special_tokens=False).input_ids
        assert ids.count(0) == 1                           # the template writes <s>, nobody else
    assert text.endswith("user <|eot_id|></s>\n<|user|>assistant\n")
    with refused(match="the chat template: the system speaks first"):
        template(messages[::-1])


@pytest.mark.parametrize("source", [
    "{{ 1 / 0 }}", "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "{% nonsense %}",
    "{{ range(99999999) | list }}", "{{ messages.__class__.__mro__ }}",  # the sandbox says no
    "\ud8ff",
])
def test_chat_templates_that_fail_say_so(chat_folder, tmp_path, source):
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / file).symlink_to(chat_folder / file)
    (tmp_path / "chat_template.jinja").write_bytes(source.encode(errors="surrogatepass"))
    with refused(match="no tokenizer that can|the chat template: .") as caught:
        chat.chat_template(tmp_path)([{"role": "user", "content": "x"}])
    assert len(str(caught.value).splitlines()) == 1


def test_a_chat_needs_no_tokenizer_json_but_transformers(tmp_path, monkeypatch):
    (tmp_path / "tokenizer.model").symlink_to(DEMO.resolve() / "tokenizer.model")
    (tmp_path / "chat_template.jinja").write_text("<s>{{ messages[0].content }}")
    for text in TEXTS[:5]:                                 # SentencePiece alone
        ids = chat.chat_template(tmp_path)([{"content": "x = " + text}])
        assert ids == load_tokenizer(DEMO).encode("x = " + text)
    monkeypatch.setitem(sys.modules, "transformers", None)
    with refused(match="pip install transformers"):
        chat.chat_template(tmp_path)


# --------------------------------------------------------------------------------------------------
# Conversations

def test_a_conversation_tells_all_that_was_said_before(monkeypatch, capsys):
    tokenizer = load_tokenizer(DEMO)
    prompts = []

    def template(messages):
        prompts.append(" ".join(f"{message['role']}: {message['content']}" for message in messages))
        return tokenizer.encode(prompts[-1])

    def text_of(ids):
        assert ids == tokenizer.encode(prompts[-1])
        return iter(tokenizer.encode(f" number {len(prompts)}", bos=False))
    monkeypatch.setattr(sys, "stdin", io.StringIO("one\n\n  \ntwo"))
    chat.chat(tokenizer, template, "Count.", text_of)
    assert prompts == ["system: Count. user: one",
                       "system: Count. user: one assistant:  number 1 user: two"]
    assert capsys.readouterr().out == " number 1\n number 2\n"


@pytest.mark.parametrize("longest, kept, turns", [
    (None, [0, 1, 2, 3, 4, 5], 0), (21, [0, 1, 2, 3, 4, 5], 0), (20, [0, 3, 4, 5], 1),
    (12, [0, 5], 2), (2, [0, 5], 2)])
def test_a_conversation_longer_than_the_context_forgets_its_oldest_turns(capsys, longest, kept,
                                                                         turns):
    def template(messages):
        return [token for message in messages for token in message["content"]]
    messages = [{"role": role, "content": [i] * (4 if i else 1)}
                for i, role in enumerate(["system", *["user", "assistant"] * 2, "user"])]
    assert chat.prompt_of(messages, template, longest) == template(messages)
    assert [message["content"][0] for message in messages] == kept
    said = f"[forgotten, to make room: the oldest {turns} turns of the conversation]\n"
    assert capsys.readouterr().err == (said if turns else "")


def test_python_m_beyond_chat(chat_folder, tmp_path, talk, capsys, run):
    options = ["--model", chat_folder, "--max-new-tokens", 6]
    prompt = chat.chat_template(chat_folder)([{"role": "system", "content": "a test"},
                                              {"role": "user", "content": "one"}])
    tokenizer = load_tokenizer(chat_folder)
    ids = list(generate.generate(Llama.from_pretrained(chat_folder), prompt, 6,
                                 eos_ids=tokenizer.eos_ids))
    dense = talk("one\n\ntwo\n", *options, "--system", "a test")
    assert dense.startswith(tokenizer.decode(ids) + "\n")
    drafted = talk("one\n\ntwo\n", *options, "--system", "a test", "--draft", "sparse")
    assert drafted == dense                                # lossless
    assert talk("one\n", *options, "--sparsity", 0.5)
    for path in chat_folder.iterdir():                     # a shorter context: it forgets
        (tmp_path / path.name).write_bytes(path.read_bytes())
    config = json.loads((chat_folder / "config.json").read_text())
    write_json(tmp_path / "config.json", config | {"max_position_embeddings": 96})
    options = ["--model", tmp_path, "--max-new-tokens", 4]
    assert talk("walk on\n" * 9, *options).count("\n") >= 9
    assert "[forgotten, to make room: the oldest 1 turns" in run.error
    error = talk("walk on " * 99 + "\n", *options, expected=2)
    assert "the model's context holds 96" in error


TYPED = b"one\n" * 60


@pytest.mark.parametrize("redirection, locale, typed, status, said", [
    ("<&-", "C", TYPED, 2, "standard input is closed: the turns of a chat come from there"),
    ("2>&-", "C", TYPED, 0, ""),
    (">/dev/full", "C", TYPED, 2, r"\[Errno 28\] No space left on device"),
    ("", "C", b"one\nt\xffwo\n", 2, "[^\n]*not UTF-8[^\n]*"),
    ("", "C.UTF-8", b"one\nt\xffwo\n", 2, "[^\n]*not UTF-8[^\n]*"),      # Python reads it otherwise
])
def test_closed_streams_and_bytes_that_are_not_utf8(chat_folder, redirection, locale, typed, status,
                                                    said):
    command = f"{sys.executable} -m beyond.chat --model {chat_folder} --max-new-tokens 3"
    ended = subprocess.run(f"{command} {redirection}", shell=True, input=typed, cwd=ROOT,
                           capture_output=True, env=os.environ | {"LC_ALL": locale})
    assert ended.returncode == status
    assert re.fullmatch(f"chat.py: error: {said}\n" if said else "", ended.stderr.decode())
    assert bool(ended.stdout) == (status == 0 or typed != TYPED)         # the first answer
