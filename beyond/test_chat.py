"""Tests of chat.py: tokens of every kind of tokenizer, and conversations."""
import base64
import builtins
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import generate
from beyond import chat
from calibrate import calibrate
from demo import corpus, train
from generate import StreamDecoder
from model import (Config, InputError, Llama, SentencePieceTokenizer, load_model, load_tokenizer,
                   read_tokens)
from sparsify import perplexity

DEMO = Path(__file__).parent.parent / "demo"
TEXTS = [
    "def walk(self, top):\n    return [i for i in range(10)]",
    " two  leading spaces",
    "Ωμέγα, naïve — 日本語 🙂🙂",
    "",
    "tabs\tand\r\nlines\n\n\n",
    "it's 12345 o'clock, <|eot_id|> <s> </s>",
    "\n",
    "x" * 300,
]
SPECIAL = ["<s>", "</s>", "<|user|>", "<|eot_id|>"]
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


@pytest.fixture(autouse=True)
def no_tiktoken_cache(monkeypatch):
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", "")


def tiktoken_folder(folder):
    """Write a Llama-3-like tokenizer.model: single bytes and a few merges; return its tokens.

    Its special tokens stand in tokenizer_config.json alone.
    """
    pytest.importorskip("tiktoken")
    pytest.importorskip("transformers")
    merges = ["he", " w", " wa", "lk", " walk", "12", "123", "Ω", "  ", "xx", "xxxx"]
    tokens = [bytes([i]) for i in range(256)] + [text.encode() for text in merges]
    lines = [base64.b64encode(token) + b" %d\n" % i for i, token in enumerate(tokens)]
    (folder / "tokenizer.model").write_bytes(b"".join(lines))
    special = {0: "<|begin_of_text|>", 1: "<|end_of_text|>", 9: "<|eot_id|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps({
        "tokenizer_class": "PreTrainedTokenizerFast", "add_bos_token": True,
        "bos_token": special[0], "eos_token": special[1],
        "added_tokens_decoder": {str(len(tokens) + i): {"content": text, "special": True}
                                 for i, text in special.items()},
    }))
    return tokens


def json_folder(folder):
    """Write a byte-level BPE in the hub's format, with special tokens and a chat template."""
    tokenizers = pytest.importorskip("tokenizers")
    pytest.importorskip("transformers")
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    bpe.train_from_iterator(TEXTS * 3, tokenizers.trainers.BpeTrainer(
        vocab_size=400, special_tokens=SPECIAL, show_progress=False,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet()))
    bpe.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)])
    bpe.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({
        "bos_token": "<s>", "eos_token": {"__type": "AddedToken", "content": "</s>"},
        "chat_template": TEMPLATE, "tokenizer_class": "PreTrainedTokenizerFast",
        "added_tokens_decoder": {str(i): {"content": text, "special": True}
                                 for i, text in enumerate(SPECIAL)},
    }))
    return bpe


@pytest.fixture(scope="module")
def chat_folder(tmp_path_factory):
    """A checkpoint of a tiny model with a tokenizer.json, a chat template and a calibration."""
    folder = tmp_path_factory.mktemp("chat")
    tokens = json_folder(folder).get_vocab_size()
    model = tiny_model(folder, tokens)
    calibrate(model, torch.randint(tokens, (300,))).save(folder / "calibration.safetensors")
    return folder


def talk(monkeypatch, capsys, typed, *options):
    """Return what `python -m beyond.chat` writes when lines are typed."""
    monkeypatch.setattr(sys, "argv", ["chat.py", *map(str, options)])
    monkeypatch.setattr(sys, "stdin", io.StringIO(typed))
    chat.main()
    return capsys.readouterr().out


# --------------------------------------------------------------------------------------------------
# Tokenizers

@pytest.mark.parametrize("kind", ["sentencepiece", "tiktoken", "json"])
def test_text_comes_back_at_once_and_streamed(tmp_path, kind):
    bos = 1
    if kind == "tiktoken":
        bos = len(tiktoken_folder(tmp_path))
    if kind == "json":
        json_folder(tmp_path)
        bos = 0
    tokenizer = load_tokenizer(DEMO if kind == "sentencepiece" else tmp_path)
    special = {i for i in range(tokenizer.vocab_size) if not tokenizer.decode([i])}
    assert bos in special
    for text in TEXTS:
        ids = tokenizer.encode(text)
        assert ids[0] == bos
        assert not set(ids[1:]) & special                  # written out, it is text
        assert tokenizer.encode(text, bos=False) == ids[1:]
        assert tokenizer.decode(ids) == text
        assert max(ids) < tokenizer.vocab_size
        for cut in {0, 1, len(ids) // 2}:
            decoder = StreamDecoder(tokenizer, ids[:cut])
            whole = "".join([decoder.add(i) for i in ids[cut:]] + [decoder.end()])
            assert "\ufffd" in whole or text.endswith(whole)
            if cut <= 1:
                assert whole == text


@pytest.mark.parametrize("size", [2, 3, 4])
def test_long_runs_of_bytes_are_streamed_as_they_are_decoded(tmp_path, size):
    """Characters without a token are spelt in bytes; a run cut inside one decodes to no text."""
    tokenizers = pytest.importorskip("tokenizers")
    vocabulary = {f"<0x{byte:02X}>": byte for byte in range(256)} | {"a": 256, " ": 257}
    whole = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, [], byte_fallback=True))
    whole.decoder = tokenizers.decoders.Sequence(
        [tokenizers.decoders.ByteFallback(), tokenizers.decoders.Fuse()])
    whole.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    tokenizer = load_tokenizer(tmp_path)
    first = {2: 0x7c0, 3: 0x1200, 4: 0x12000}[size]
    for length in range(1, 30):
        text = "a " + "".join(chr(first + i) for i in range(length)) + "a"
        ids = tokenizer.encode(text, bos=False)
        assert len(ids) == 3 + size * length
        for cut in (0, 2, 2 + size * (length // 2)):
            decoder = StreamDecoder(tokenizer, ids[:cut])
            parts = [decoder.add(i) for i in ids[cut:]] + [decoder.end()]
            assert "".join(parts) == text[len(tokenizer.decode(ids[:cut])):]
            assert max(map(len, parts)) == 1               # each as soon as it is whole


def test_tiktoken_is_read_as_the_reference_reads_it(tmp_path):
    tokens = tiktoken_folder(tmp_path)
    import tiktoken
    llama3_split = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
                    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
    reference = tiktoken.Encoding(
        "reference", pat_str=llama3_split, special_tokens={},
        mergeable_ranks={token: i for i, token in enumerate(tokens)})
    ours = load_tokenizer(tmp_path)
    for text in TEXTS:
        assert ours.encode(text, bos=False) == reference.encode_ordinary(text)
    size = len(tokens)
    assert ours.encode("a") == [size, ord("a")]
    assert ours.eos_ids == (size + 1,)
    assert ours.decode([ord("a"), size + 9, ord("b")]) == "ab"
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "eos_token_id": 8}))
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 9]}))
    assert load_tokenizer(tmp_path).eos_ids == (7, 9)
    (tmp_path / "chat_template.jinja").write_text("a<|eot_id|>{{ messages[0].content }}")
    template = chat.chat_template(tmp_path)
    assert template([{"role": "user", "content": "b"}]) == [ord("a"), size + 9, ord("b")]
    lines = (tmp_path / "tokenizer.model").read_bytes().splitlines()
    (tmp_path / "tokenizer.model").write_bytes(b"\n".join(lines[:50] + [b"!!! x"]))
    with pytest.raises(InputError, match="no tokenizer that can be read: .*!!! x"):
        load_tokenizer(tmp_path)


def sentencepiece_folder(folder, settings=None, added=None):
    """Write the demo's tokenizer.model with settings and added tokens, as Llama-2's kin have it."""
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.model").symlink_to(DEMO / "tokenizer.model")
    for name, value in [("tokenizer_config.json", settings), ("added_tokens.json", added)]:
        if value is not None:
            (folder / name).write_text(json.dumps(value))
    return folder


def added(text, special=True):
    return {"content": text, "special": special, "lstrip": False, "rstrip": False,
            "normalized": False, "single_word": False}


USUAL = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>",
         "unk_token": "<unk>", "add_bos_token": True, "add_prefix_space": False}


@pytest.mark.parametrize("settings, fits", [
    ({"bos_token": {"content": "<s>"}, "add_eos_token": None, "legacy": False}, True),
    ({"added_tokens_decoder": {"0": added("<unk>"), "1": added("<s>"), "2": added("</s>")}}, True),
    ({"add_bos_token": False}, False),
    ({"add_eos_token": True}, False),
    ({"add_prefix_space": False}, False),
    ({"bos_token": "<|im_start|>"}, False),
    ({"added_tokens_decoder": {"4096": added("<|im_start|>")}}, False),
    ({"added_tokens_decoder": {"7": added("<|im_start|>")}}, False),
    ({"added_tokens_decoder": {"x": 1}}, False),
])
def test_sentencepiece_reads_what_its_file_says_alone(tmp_path, settings, fits):
    folder = sentencepiece_folder(tmp_path, settings)
    assert SentencePieceTokenizer(folder).fits(folder) == fits


def test_a_tokenizer_json_that_disagrees_counts(tmp_path):
    """Fine-tuned models give rare tokens other names there, as transformers reads them."""
    folder = sentencepiece_folder(tmp_path, USUAL | {"add_prefix_space": None})
    tokenizer = SentencePieceTokenizer(folder)
    vocabulary = {piece: i for i, piece in enumerate(tokenizer.pieces())}
    renamed = vocabulary | {"<|im_end|>": vocabulary.pop(tokenizer.pieces()[4000])}
    begin = {"single": [{"SpecialToken": {"id": "<s>"}}, {"Sequence": {"id": "A"}}]}
    for pieces, fits in ((vocabulary | {tokenizer.pieces()[4000]: 4000}, True), (renamed, False)):
        (folder / "tokenizer.json").write_text(json.dumps(
            {"post_processor": begin, "model": {"vocab": pieces}}))
        assert tokenizer.fits(folder) == fits


@pytest.mark.parametrize("settings, bos, eos", [
    ({}, [1], []),
    ({"add_bos_token": False}, [], []),
    ({"add_bos_token": True, "add_eos_token": True}, [1], [2]),
])
def test_a_sentencepiece_text_begins_and_ends_as_its_settings_say(tmp_path, settings, bos, eos):
    pytest.importorskip("google.protobuf")
    transformers = pytest.importorskip("transformers")
    tokenizer = load_tokenizer(sentencepiece_folder(tmp_path, USUAL | settings))
    plain = load_tokenizer(DEMO)
    theirs = transformers.LlamaTokenizer.from_pretrained(tmp_path)
    for text in TEXTS:
        ids = tokenizer.encode(text)
        assert ids == bos + plain.encode(text, bos=False) + eos
        assert ids == theirs.encode(text, split_special_tokens=True)
        assert tokenizer.encode(text, bos=False) == plain.encode(text, bos=False)


@pytest.mark.parametrize("kind", ["llama", "mistral"])
@pytest.mark.parametrize("special", [None, True, False])
def test_tokens_that_a_folder_adds_are_tokens(tmp_path, kind, special):
    """In added_tokens.json (special: None) or tokenizer_config.json, without a tokenizer.json."""
    pytest.importorskip("google.protobuf")
    pytest.importorskip("transformers")
    marks = {"<|im_start|>": 4096, "<|im_end|>": 4097}
    settings = USUAL
    if special is not None:
        settings = settings | {"added_tokens_decoder": {
            str(i): added(text, special) for text, i in marks.items()}}
    sentencepiece_folder(tmp_path, settings, marks if special is None else None)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind}))
    (tmp_path / "chat_template.jinja").write_text(
        "{{ bos_token }}<|im_start|>{{ messages[0].content }}<|im_end|>")
    plain = load_tokenizer(DEMO)
    tokenizer = load_tokenizer(tmp_path)
    words = plain.encode("import os", bos=False)
    assert chat.chat_template(tmp_path)([{"content": "import os"}]) == [1, 4096, *words, 4097]
    text = tokenizer.decode([1, 4096, *words, 4097])
    assert text == ("import os" if special else "<|im_start|>import os<|im_end|>")
    marked = tokenizer.encode("<|im_start|>import os<|im_end|>")
    assert marked == ([1, *plain.encode("<|im_start|>import os<|im_end|>", bos=False)] if special
                      else [1, 4096, *words, 4097])
    assert tokenizer.pieces()[4096:] == list(marks)


@pytest.mark.parametrize("rule", [True, False])            # SmolLM2-Instruct has none
@pytest.mark.parametrize("settings", [{}, {"add_bos_token": False}, {"add_bos_token": True}])
def test_a_text_begins_with_the_token_that_a_rule_adds(tmp_path, settings, rule):
    """Not with the one that is named: of tokenizer.json its rule counts, in transformers too."""
    bpe = json_folder(tmp_path)
    if not rule:
        bpe.post_processor = None
        bpe.save(str(tmp_path / "tokenizer.json"))
    path = tmp_path / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))
    import transformers
    tokenizer = load_tokenizer(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in TEXTS[:5]:
        ids = tokenizer.encode(text)
        assert ids == theirs.encode(text)
        assert ids == [0] * rule + tokenizer.encode(text, bos=False)
    (tmp_path / "text.txt").write_text(TEXTS[0])
    tokens, _ = read_tokens(tokenizer, tmp_path / "text.txt", None)      # calibration, perplexity
    assert tokens.tolist() == tokenizer.encode(TEXTS[0])


def metaspace_folder(folder):
    """Write a tokenizer.json of Mistral's kind: words begin with a blank, the first one too."""
    tokenizers = pytest.importorskip("tokenizers")
    pytest.importorskip("transformers")
    marks = ["<unk>", "<s>", "</s>", "[INST]", "[/INST]"]
    pieces = [*marks, "▁", "H", "i", "Hi", "▁Hi", "<|tool|>"]
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE(
        vocab={piece: i for i, piece in enumerate(pieces[:-1])},
        merges=[("H", "i"), ("▁", "Hi")], unk_token="<unk>"))
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace("▁", "first", split=False)
    bpe.decoder = tokenizers.decoders.Metaspace("▁", "first")
    bpe.add_special_tokens(marks)
    bpe.add_tokens([tokenizers.AddedToken("<|tool|>", special=False, normalized=False)])
    bpe.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)])
    bpe.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>",
        "legacy": False,
        "chat_template": "<s>[INST] {{ messages[0].content }}[/INST]{{ messages[0].content }}"}))


def test_only_the_first_word_of_a_text_is_given_a_blank(tmp_path):
    metaspace_folder(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.encode("Hi") == [1, 9]
    assert chat.chat_template(tmp_path)([{"content": "Hi"}]) == [1, 3, 9, 4, 8]
    assert tokenizer.encode("Hi<|tool|>Hi") == [1, 9, 10, 8]             # no special token
    assert tokenizer.decode([1, 9, 10, 8, 4]) == "Hi<|tool|>Hi"


def tiny_model(folder, tokens, **changes):
    """Save a tiny model of so many tokens beside a tokenizer, and return it as it is loaded."""
    torch.manual_seed(0)
    shape = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
                 num_key_value_heads=2, head_dim=8, max_position_embeddings=256)
    model = Llama(Config(vocab_size=tokens, **shape | changes)).requires_grad_(False)
    model.save_pretrained(folder)
    return Llama.from_pretrained(folder)


def test_a_tokenizer_may_have_more_tokens_than_the_model(tmp_path, monkeypatch, capsys):
    metaspace_folder(tmp_path)
    tiny_model(tmp_path, 10)                               # the last token of 11, <|tool|>, is 10
    options = ["--model", tmp_path, "--sparsity", 0, "--max-new-tokens", 3]
    monkeypatch.setattr(sys, "argv", ["generate.py", *map(str, options), "--prompt", "HiHi"])
    generate.main()
    assert "3 tokens" in capsys.readouterr().out
    refusal = "token id 10 is outside the vocabulary of 10"
    monkeypatch.setattr(sys, "argv", ["generate.py", *map(str, options), "--prompt", "Hi<|tool|>"])
    with pytest.raises(InputError, match=refusal):
        generate.main()
    with pytest.raises(InputError, match=refusal):
        talk(monkeypatch, capsys, "Hi<|tool|>\n", *options)
    model, tokenizer = load_model(tmp_path)
    tokens = torch.tensor(tokenizer.encode("Hi<|tool|>" * 20))
    for use in (calibrate, perplexity):
        with pytest.raises(InputError, match=refusal):
            use(model, tokens, 20)


def test_a_folder_may_name_no_end(tmp_path, monkeypatch, capsys):
    metaspace_folder(tmp_path)
    path = tmp_path / "tokenizer_config.json"
    path.write_text(json.dumps({key: value for key, value in json.loads(path.read_text()).items()
                                if key != "eos_token"}))
    tiny_model(tmp_path, 11)
    config = json.loads((tmp_path / "config.json").read_text()) | {"eos_token_id": None}
    (tmp_path / "config.json").write_text(json.dumps(config))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.eos_ids == ()
    monkeypatch.setattr(corpus, "files", lambda part: [("a.py", "Hi"), ("b.py", "HiHi")])
    tokens, _ = read_tokens(tokenizer, None, "train")
    assert sorted(tokens.tolist()) == sorted([1, 9, 1, 9, 8])            # joined without
    assert train.token_stream(["Hi", "HiHi"], tokenizer).tolist() == [1, 9, 1, 9, 8]
    talk(monkeypatch, capsys, "Hi\n", "--model", tmp_path, "--max-new-tokens", 4)


# --------------------------------------------------------------------------------------------------
# Templates

def test_a_chat_has_the_tokens_that_transformers_gives_it(tmp_path):
    json_folder(tmp_path)
    import transformers
    reference = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path)
    template = chat.chat_template(tmp_path)
    chats = [
        [{"role": "user", "content": " Hello Ω "}],
        [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "a"},
         {"role": "assistant", "content": "b"}, {"role": "user", "content": "c <|eot_id|>"}],
    ]
    for messages in chats:
        ids = template(messages)
        text = reference.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        assert ids == reference(text, add_special_tokens=False).input_ids
        assert ids.count(0) == 1                           # the template writes <s>, nobody else
        assert type(ids) is list
    assert reference.decode(template(chats[0])) == (
        "<s><|user|>user\nHello Ω</s>\n<|user|>assistant\n")
    with pytest.raises(InputError, match="the chat template: the system speaks first"):
        template([{"role": "user", "content": "a"}, {"role": "system", "content": "b"}])
    with pytest.raises(InputError, match="not Unicode"):
        template([{"role": "user", "content": "\udcff"}])
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(InputError, match="no tokenizer that can be read"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("source", [
    "{{ 1 / 0 }}",
    '{{ "a" + 1 }}',
    "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "{% nonsense %}",
    "{{ range(99999999) | list }}",
    "{{ messages.__class__.__mro__ }}",                    # the sandbox says no
    "{{ strftime_now() }}",
    b"\xff",
])
def test_chat_templates_that_fail_say_so(chat_folder, tmp_path, source):
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / file).symlink_to(chat_folder / file)
    source = source if isinstance(source, bytes) else source.encode()
    (tmp_path / "chat_template.jinja").write_bytes(source)
    message = "chat_template.jinja: not UTF-8 text|the chat template: ."
    with pytest.raises(InputError, match=message) as caught:
        chat.chat_template(tmp_path)([{"role": "user", "content": "x"}])
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("template, expected", [
    ("{% for m in messages %}{% if loop.index > 1 %}{% break %}{% endif %}"
     "{% generation %}{{ m | tojson }}{% endgeneration %}{% endfor %}", '{"content": "é<"}'),
    ("a {% generation %} b {% endgeneration %} c", "a  b  c"),           # without blanks of its own
    ("{% generation %}\n  b\n{% endgeneration %}\nc", "  b\nc"),
    ("{{ tools is none }} {{ documents is none }}{% if tools %} tools{% endif %}", "True True"),
    ("{{ messages[0] | tojson(indent=1) }}", '{\n "content": "é<"\n}'),
    ('{{ {"b": 1, "a": 2} | tojson(sort_keys=True, separators=(",", ":")) }}', '{"a":2,"b":1}'),
    ("{{ 'é' | tojson(ensure_ascii=True) }}", '"\\u00e9"'),
    ("{{ strftime_now('%%') }}{{ bos_token }}{{ eos_token }}", "%<s></s>"),
])
def test_chat_templates_may_use_what_transformers_gives_them(tmp_path, template, expected):
    bpe = json_folder(tmp_path)
    path = tmp_path / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    names = {key: settings.pop(key) for key in ("bos_token", "eos_token")}
    del settings["added_tokens_decoder"]                   # older folders have none
    path.write_text(json.dumps(settings))
    (tmp_path / "special_tokens_map.json").write_text(json.dumps(names))       # but this
    (tmp_path / "chat_template.jinja").write_text(template)
    ids = chat.chat_template(tmp_path)([{"content": "é<"}, {"content": "b"}])
    assert bpe.decode(ids, skip_special_tokens=False) == expected


def test_what_a_chat_needs(chat_folder, tmp_path, monkeypatch):
    with pytest.raises(InputError, match="demo: no chat template"):
        chat.chat_template(DEMO)
    with pytest.raises(InputError, match="nowhere: no such folder"):
        chat.chat_template("nowhere")
    with pytest.raises(InputError, match="random weights and no tokenizer"):
        chat.chat_template("random:llama-3.2-1b")
    absent = {"google.protobuf"}
    original = builtins.__import__

    def importing(name, *arguments, **options):
        if name in absent:
            raise ImportError
        return original(name, *arguments, **options)
    monkeypatch.setattr(builtins, "__import__", importing)
    (tmp_path / "tokenizer.model").symlink_to(DEMO / "tokenizer.model")
    (tmp_path / "chat_template.jinja").write_text("x")
    with pytest.raises(InputError, match="pip install protobuf"):
        chat.chat_template(tmp_path)
    absent.add("transformers")
    with pytest.raises(InputError, match="pip install transformers"):
        chat.chat_template(chat_folder)


def test_a_sentencepiece_model_without_tokenizer_json(tmp_path):
    pytest.importorskip("google.protobuf")
    (tmp_path / "tokenizer.model").symlink_to(DEMO / "tokenizer.model")
    (tmp_path / "chat_template.jinja").write_text("<s>{{ messages[0].content }}")
    for text in TEXTS:
        ids = chat.chat_template(tmp_path)([{"role": "user", "content": "x = " + text}])
        if "<s>" not in text:                              # written out, it is the mark
            assert ids == load_tokenizer(tmp_path).encode("x = " + text)


# --------------------------------------------------------------------------------------------------
# Conversations

def test_a_conversation_tells_all_that_was_said_before(capsys):
    tokenizer = load_tokenizer(DEMO)
    prompts = []

    def template(messages):
        prompts.append(" ".join(f"{message['role']}: {message['content']}" for message in messages))
        return tokenizer.encode(prompts[-1])

    def text_of(ids):
        assert ids == tokenizer.encode(prompts[-1])
        return iter(tokenizer.encode(f" number {len(prompts)}", bos=False))
    lines = iter(["one", "", "  ", "two", None])
    chat.chat(tokenizer, template, "Count.", text_of, lambda: next(lines))
    assert prompts == [
        "system: Count. user: one",
        "system: Count. user: one assistant:  number 1 user: two",
    ]
    assert capsys.readouterr().out == " number 1\n number 2\n"


def test_a_conversation_longer_than_the_context_forgets_its_oldest_turns(capsys):
    def template(messages):
        return [token for message in messages for token in message["content"]]

    def conversation(*sizes):
        return [{"role": role, "content": [i] * size} for i, (role, size) in enumerate(
            zip(["system", *["user", "assistant"] * 9], sizes))]

    for longest, kept, turns in [(None, [0, 1, 2, 3, 4, 5], 0), (21, [0, 1, 2, 3, 4, 5], 0),
                                 (20, [0, 3, 4, 5], 1), (12, [0, 5], 2), (2, [0, 5], 2)]:
        messages = conversation(1, 4, 4, 4, 4, 4)
        prompt = chat.prompt_of(messages, template, longest)
        assert prompt == template(messages)
        assert [message["content"][0] for message in messages] == kept
        said = f"[forgotten, to make room: the oldest {turns} turns of the conversation]\n"
        assert capsys.readouterr().err == (said if turns else "")
    messages = conversation(1, 4, 4, 4, 4, 4)[1:]          # without a system
    assert chat.prompt_of(messages, template, 12) == template(messages) == [3] * 4 + [4] * 4 + [
        5] * 4


def test_a_chat_goes_on_beyond_the_context(chat_folder, tmp_path, monkeypatch, capsys):
    for path in chat_folder.iterdir():
        (tmp_path / path.name).symlink_to(path)
    config = json.loads((chat_folder / "config.json").read_text())
    (tmp_path / "config.json").unlink()
    (tmp_path / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 96}))
    options = ["--model", tmp_path, "--max-new-tokens", 4]
    talk(monkeypatch, capsys, "walk on\n", *options)       # the templates of one turn fit
    monkeypatch.setattr(sys, "argv", ["chat.py", *map(str, options)])
    monkeypatch.setattr(sys, "stdin", io.StringIO("walk on\n" * 9))
    chat.main()
    written, said = capsys.readouterr()
    assert written.count("\n") >= 9                        # an answer to each
    assert "[forgotten, to make room: the oldest 1 turns" in said
    with pytest.raises(InputError, match="the model's context holds 96"):
        talk(monkeypatch, capsys, "walk on " * 99 + "\n", *options)


@pytest.mark.parametrize("redirection, status, said", [
    ("<&-", 2, "chat.py: error: standard input is closed: the turns of a chat come from there\n"),
    (">&-", 2, "chat.py: error: standard output is closed\n"),
    ("2>&-", 0, ""),
    ("2>/dev/full", 0, ""),
    (">/dev/full", 2, "chat.py: error: [Errno 28] No space left on device\n"),
])
def test_closed_streams(chat_folder, redirection, status, said):
    command = f"{sys.executable} -m beyond.chat --model {chat_folder} --max-new-tokens 3"
    ended = subprocess.run(f"{command} {redirection}", shell=True, input="one\n" * 60, text=True,
                           capture_output=True, cwd=DEMO.parent)
    assert (ended.returncode, ended.stderr) == (status, said)
    assert bool(ended.stdout) == (status == 0)


@pytest.mark.parametrize("locale", ["C", "C.UTF-8"])       # Python reads them in two ways
def test_a_byte_that_is_not_utf8_ends_a_chat_with_one_line(chat_folder, locale):
    command = [sys.executable, "-m", "beyond.chat", "--model", chat_folder, "--max-new-tokens", "3"]
    ended = subprocess.run(command, input=b"one\nt\xffwo\n", capture_output=True, cwd=DEMO.parent,
                           env=os.environ | {"LC_ALL": locale})
    assert ended.returncode == 2
    assert ended.stdout.count(b"\n") >= 1                  # the first answer
    assert re.fullmatch(rb"chat.py: error: [^\n]*(not UTF-8|no UTF-8)[^\n]*\n", ended.stderr)


def test_python_m_beyond_chat(chat_folder, monkeypatch, capsys):
    options = ["--model", chat_folder, "--max-new-tokens", 6]
    tokenizer = load_tokenizer(chat_folder)
    template = chat.chat_template(chat_folder)
    model = Llama.from_pretrained(chat_folder)
    system = {"role": "system", "content": "a test"}
    prompt = template([system, {"role": "user", "content": "one"}])
    ids = list(generate.generate(model, prompt, 6, eos_ids=tokenizer.eos_ids))
    dense = talk(monkeypatch, capsys, "one\n\ntwo\n", *options, "--system", "a test")
    assert dense.startswith(tokenizer.decode(ids) + "\n")
    drafted = talk(monkeypatch, capsys, "one\n\ntwo\n", *options, "--system", "a test",
                   "--draft", "sparse")
    assert drafted == dense                                # lossless
    assert talk(monkeypatch, capsys, "one\n", *options, "--sparsity", 0.5)
    assert talk(monkeypatch, capsys, "one\n", *options) != dense


@pytest.mark.parametrize("options, message", [
    (["--prompt", "x"], "--prompt is for a text, not for a chat"),
    (["--draft", "sparse", "--compare"], "--compare is for a text, not for a chat"),
    (["--draft-tokens", "3"], "--draft-tokens are for --draft"),
    (["--model", "nowhere"], "nowhere: no such folder"),
    (["--top-p", "2"], "top_p is 2.0"),
    ([], "no chat template"),
])
def test_bad_input_on_the_command_line(monkeypatch, capsys, options, message):
    with pytest.raises(InputError, match=message):
        talk(monkeypatch, capsys, "", *options)
