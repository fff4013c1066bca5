"""Tests of chat.py and of the tokenizers it meets: texts, templates, conversations."""
import base64
import os
import re
import shutil
import subprocess
import sys
import threading
import time

import pytest
import torch

import generate
from beyond import __main__ as beyond
from beyond import chat
from beyond.folders import load_tokenizer
from beyond.tests.conftest import ROOT, refused, tiny_model, write_byte_level
from beyond.tests.test_parallel import launch
from calibrate import calibrate
from generate import stream
from model import DEMO, Llama, read_json, write_json

tokenizers = pytest.importorskip("tokenizers")
transformers = pytest.importorskip("transformers")
pytest.importorskip("google.protobuf")
TEXTS = ["def walk(self, top):\n    return [i for i in range(10)]", " two  leading spaces", "",
         "Ωμέγα, naïve — 日本語 🙂🙂", "tabs\tand\r\nlines\n\n\n", "x" * 300,
         "it's 12345 o'clock, <|eot_id|> <s> </s>"]
TEMPLATE = """{{ bos_token }}{% for message in messages %}
{% if message.role == 'system' and not loop.first %}{{ raise_exception('too late') }}{% endif %}
<|user|>{{ message.role }}
{{ message.content | trim }}</s>
{% endfor %}
{% if add_generation_prompt %}<|user|>assistant
{% endif %}"""


def byte_level(folder, rule=True, **settings):
    """Write a byte-level BPE with a chat template, see conftest.py."""
    return write_byte_level(folder, TEXTS * 3, ["<s>", "</s>", "<|user|>", "<|eot_id|>"], rule,
                            chat_template=TEMPLATE, **settings)


def tiktoken(folder):
    """Write a tokenizer.model of Llama-3's kind, its special tokens beside it."""
    pytest.importorskip("tiktoken")
    merges = ["he", " w", " wa", "lk", " walk", "12", "123", "Ω", "  ", "xx", "xxxx"]
    tokens = [bytes([i]) for i in range(256)] + [text.encode() for text in merges]
    lines = [base64.b64encode(token) + b" %d\n" % i for i, token in enumerate(tokens)]
    (folder / "tokenizer.model").write_bytes(b"".join(lines))
    write_json(folder / "tokenizer_config.json", {
        "tokenizer_class": "PreTrainedTokenizerFast", "add_bos_token": True,
        "bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>",
        "added_tokens_decoder": decoder({"<|begin_of_text|>": 267, "<|end_of_text|>": 268})})


def decoder(marks, special=True):
    """Return added tokens {text: id} as tokenizer_config.json has them."""
    return {str(i): {"content": text, "special": special} for text, i in marks.items()}


def sentencepiece(folder, **settings):
    """Write the demo's tokenizer.model with settings, as Llama-2's kin have it."""
    (folder / "tokenizer.model").symlink_to(DEMO.resolve() / "tokenizer.model")
    write_json(folder / "tokenizer_config.json", {
        "tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>",
        "unk_token": "<unk>", "add_bos_token": True, "add_prefix_space": False} | settings)


def byte_fallback(folder):
    """Write a tokenizer.json of bytes: a run that ends inside a character decodes to no text."""
    vocabulary = {f"<0x{byte:02X}>": byte for byte in range(256)} | {"a": 256, " ": 257}
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, [], byte_fallback=True))
    bpe.decoder = tokenizers.decoders.Sequence(
        [tokenizers.decoders.ByteFallback(), tokenizers.decoders.Fuse()])
    bpe.save(str(folder / "tokenizer.json"))
    write_json(folder / "config.json", {"model_type": "llama"})


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
    (sentencepiece, [1]), (lambda folder: sentencepiece(folder, add_bos_token=False), []),
    (byte_fallback, []),
], ids=range(6))
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
        shown, seen = "", [*bos]
        for part in stream(plain, tokenizer.decode, seen):           # each character once whole
            shown += part
            whole = tokenizer.decode(seen[len(bos):]).rstrip("\ufffd")
            assert text.startswith(shown) and len(shown) >= len(whole)
        assert shown == text


@pytest.mark.parametrize("special", [None, True, False])
def test_tokens_that_a_folder_adds_are_tokens(tmp_path, special):
    """In added_tokens.json (special: None) or tokenizer_config.json, without a tokenizer.json."""
    marks = {"<|im_start|>": 4096, "<|im_end|>": 4097}
    if special is None:
        sentencepiece(tmp_path)
        write_json(tmp_path / "added_tokens.json", marks)
    else:
        sentencepiece(tmp_path, added_tokens_decoder=decoder(marks, special))
    write_json(tmp_path / "config.json", {"model_type": "mistral"})
    (tmp_path / "chat_template.jinja").write_text(
        "{{ bos_token }}<|im_start|>{{ messages[0].content }}<|im_end|>")
    plain, tokenizer = load_tokenizer(DEMO), load_tokenizer(tmp_path)
    marked = [1, 4096, *plain.encode("import os", bos=False), 4097]
    text = "<|im_start|>import os<|im_end|>"
    assert chat.chat_template(tmp_path)([{"content": "import os"}]) == marked
    assert tokenizer.decode(marked) == ("import os" if special else text)
    assert tokenizer.encode(text) == (plain.encode(text) if special else marked)
    assert tokenizer.pieces()[4096:] == list(marks)


# --------------------------------------------------------------------------------------------------
# Conversations

def test_a_chat_has_the_tokens_that_transformers_gives_it(tmp_path):
    byte_level(tmp_path)
    reference = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path)
    template = chat.chat_template(tmp_path)
    messages = [{"role": role, "content": f" {role} Ω <|eot_id|> "}
                for role in ("system", "user", "assistant", "user")]
    text = reference.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text.endswith("user Ω <|eot_id|></s>\n<|user|>assistant\n")
    ids = template(messages)
    assert ids == reference(text, add_special_tokens=False).input_ids
    assert ids.count(0) == 1                               # the template writes <s>, nobody else
    with refused(match="the chat template: too late"):
        template(messages[::-1])
    for source in ("{{ 1 / 0 }}", "{% nonsense %}", "{{ messages.__class__.__mro__ }}"):
        (tmp_path / "chat_template.jinja").write_text(source)
        with refused(match="the chat template: .") as caught:
            chat.chat_template(tmp_path)(messages)
        assert "\n" not in str(caught.value)


def test_a_chat_needs_no_tokenizer_json_but_transformers(tmp_path, monkeypatch):
    sentencepiece(tmp_path)
    (tmp_path / "chat_template.jinja").write_text("<s>{{ messages[0].content }}")
    text = "\n".join(TEXTS[:-1])
    assert chat.chat_template(tmp_path)([{"content": text}]) == load_tokenizer(DEMO).encode(text)
    monkeypatch.setitem(sys.modules, "transformers", None)
    with refused(match="pip install transformers"):
        chat.chat_template(tmp_path)


def test_a_long_conversation_forgets_its_oldest_turns(capsys):
    roles = ["system", "user", "assistant", "user", "assistant", "user"]
    for longest, kept in ((6, "s12345"), (5, "s345"), (1, "s5")):
        messages = [{"role": role, "content": text} for role, text in zip(roles, "s12345")]
        assert kept == chat.prompt_of(
            messages, lambda messages: "".join(each["content"] for each in messages), longest)
    assert re.findall(r"the oldest \d turns", capsys.readouterr().err) == [
        "the oldest 1 turns", "the oldest 2 turns"]


def test_ctrl_c_ends_an_answer_not_the_conversation(capsys, monkeypatch):
    def text_of(prompt):
        yield from prompt
        raise KeyboardInterrupt

    told = []
    lines = iter(["one", "two", None])
    tokenizer = load_tokenizer(DEMO)
    monkeypatch.setattr(chat, "read_line", lambda: next(lines))
    chat.chat(tokenizer, lambda messages: told.append(list(messages)) or tokenizer.encode("x = 1"),
              None, text_of, longest=99)
    assert [turn["content"] for turn in told[1]] == ["one", "x = 1", "two"]
    assert capsys.readouterr().out.count("\n[interrupted]\n") == 2


def test_python_m_beyond_chat(chat_folder, tmp_path, talk, run):
    template, tokenizer = chat.chat_template(chat_folder), load_tokenizer(chat_folder)
    model = Llama.from_pretrained(chat_folder)
    messages = [{"role": "system", "content": "a test"}]
    expected = ""
    for line in ("one", "two"):                            # all that was said before is told
        messages.append({"role": "user", "content": line})
        answer = tokenizer.decode(list(generate.generate(model, template(messages), 6,
                                                         eos_ids=tokenizer.eos_ids)))
        messages.append({"role": "assistant", "content": answer})
        expected += answer + "\n"
    options = ["--model", chat_folder, "--max-new-tokens", 6, "--system", "a test"]
    assert talk("one\n\n  \ntwo", *options) == expected
    assert talk("one\n\ntwo\n", *options, "--draft", "sparse") == expected         # lossless
    assert talk("one\n", *options, "--sparsity", 0.5)
    shutil.copytree(chat_folder, tmp_path, dirs_exist_ok=True)
    write_json(tmp_path / "config.json",
               read_json(chat_folder / "config.json") | {"max_position_embeddings": 96})
    options = ["--model", tmp_path, "--max-new-tokens", 4]
    assert talk("walk on\n" * 9, *options).count("\n") >= 9
    assert "[forgotten, to make room: the oldest 1 turns" in run.error
    assert "the model's context holds 96" in talk("walk on " * 99, *options, expected=2)


def test_several_ranks_hold_a_conversation_and_wait_for_a_person(chat_folder, tmp_path, talk):
    """They wait for a line longer than they wait for one another."""
    def speak():
        with open(tmp_path / "in", "w") as person:
            for line in ("one\n", "two\n"):
                print(line, file=person, flush=True)
                time.sleep(5)

    options = ["--model", chat_folder, "--max-new-tokens", 6]
    os.mkfifo(tmp_path / "in")
    threading.Thread(target=speak, daemon=True).start()
    statuses, written, errors = launch(tmp_path, 2, """
import datetime
from beyond import __main__ as beyond, parallel
parallel.PATIENCE = datetime.timedelta(seconds=3)
parallel.command_line(beyond.main)
""", "--chat", *options, "--device", "cpu")
    assert statuses == [0, 0], errors
    assert written == talk("one\ntwo\n", *options)


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
