"""Trains the demo model: a Llama of 6.6 million parameters, on Python's standard library.

The same `Llama` of model.py that decodes is trained here: next-token cross-entropy, AdamW, a
warm-up, a constant learning rate, and a linear decay over the last 15 %. The decay is what makes an
end: a run can be stopped anywhere, and started again with the number of tokens it should end at.

    python demo/train.py                    trains, or resumes from demo/training/
    python demo/train.py --tokens 30e6      longer

Writes the tokenizer, config.json and model.safetensors (bfloat16) to --out, every ten minutes and
at the end. The state to resume from (float32 weights, AdamW's moments, the step) is a safetensors
file too.
"""
import ctypes
import io
import math
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
from demo import corpus                                                     # noqa: E402
from model import (Config, Llama, Parser, check_output, command_line, find_device,      # noqa: E402
                   load_tokenizer, progress, read_safetensors, replacing, require,
                   write_safetensors)

CONFIG = Config(hidden_size=256, intermediate_size=768, num_hidden_layers=7, num_attention_heads=8,
                num_key_value_heads=4, head_dim=32, vocab_size=4096, max_position_embeddings=512,
                tie_word_embeddings=True)
CONTEXT = 512            # tokens in a training window
BATCH = 8                # windows in a step
LEARNING_RATE = 2e-3
WARM_UP = 200            # steps
DECAY = 0.15             # of all steps


def train_tokenizer(path):
    """Train a SentencePiece BPE of 4,096 pieces, in which every source file decodes to itself.

    Byte fallback for what has no piece; no normalisation, no added or removed space; runs of spaces
    may be pieces, since indentation is half of Python; newline is a piece of its own.
    """
    import sentencepiece
    lines = (line for _, text in corpus.files("train") for line in text.split("\n")
             if 0 < len(line.encode()) < 4000)
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=lines, model_writer=model, model_type="bpe",
        vocab_size=CONFIG.vocab_size, byte_fallback=True, character_coverage=0.9999,
        normalization_rule_name="identity", add_dummy_prefix=False, remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True, user_defined_symbols=["\n"], unk_id=0, bos_id=1,
        eos_id=2, pad_id=-1, minloglevel=2)
    with replacing(path) as file:
        file.write(model.getvalue())


def token_stream(texts, tokenizer):
    """Return the texts as one row of tokens (N,) int32, each between its bos and eos, if any."""
    ids = []
    for text in texts:
        ids += tokenizer.encode(text) + list(tokenizer.eos_ids[:1])
    return torch.tensor(ids, dtype=torch.int32)


def training_tokens(tokenizer):
    """Return one pass over the training part: the library's own modules twice, its tests once.

    The order is drawn once. The tests are 60 % of the text and less varied; held-out text has none.
    """
    files = corpus.files("train")
    texts = [text for _, text in files]
    texts += [text for path, text in files if not corpus.TEST_FOLDERS & set(path.split("/"))]
    order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(0))
    return token_stream([texts[i] for i in order], tokenizer)


def batch(tokens, step):
    """Return the windows of a step, (BATCH, CONTEXT + 1) int64.

    They depend on the step alone, so that a resumed run sees what the unbroken one would have: each
    pass cuts the tokens at a new offset and draws without repeats.
    """
    per_pass = (len(tokens) - CONTEXT - 1) // CONTEXT // BATCH
    turn, place = divmod(step, per_pass)
    generator = torch.Generator().manual_seed(turn)
    offset = torch.randint(CONTEXT, (), generator=generator)
    order = torch.randperm(per_pass * BATCH, generator=generator)
    starts = order[place * BATCH:(place + 1) * BATCH] * CONTEXT + offset
    return tokens[starts[:, None] + torch.arange(CONTEXT + 1)].long()


def loss_of(model, windows, autocast):
    """Return the mean cross-entropy in nats a token of windows (B, CONTEXT + 1)."""
    with torch.autocast(windows.device.type, torch.bfloat16, enabled=autocast):
        logits = model(windows[:, :-1])
    return F.cross_entropy(logits.float().flatten(0, 1), windows[:, 1:].flatten())


def learning_rate(step, steps):
    """Return the rate of a step: a warm-up, constant, then linear to zero."""
    return LEARNING_RATE * min((step + 1) / WARM_UP, 1.0, (steps - step) / (DECAY * steps))


def initialise(model):
    """Draw normal weights of deviation 0.02.

    Those that write to the residual stream are smaller, since two a block add up.
    """
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2:
            writes = name.endswith(("o_proj.weight", "down_proj.weight"))
            smaller = math.sqrt(2 * CONFIG.num_hidden_layers) if writes else 1
            torch.nn.init.normal_(parameter, std=0.02 / smaller)


def main():
    parser = Parser(description="Trains the demo model on the Python standard library.")
    parser.add_argument("--tokens", type=float, default=20e6,
                        help="tokens to train on, all in all (default: 20e6)")
    parser.add_argument("--out", type=Path, default=HERE,
                        help="checkpoint folder to write (default: demo)")
    parser.add_argument("--state", type=Path, default=HERE / "training",
                        help="folder for the state to resume from and the log (default: "
                             "demo/training)")
    parser.add_device()
    arguments = parser.parse_args()
    device = find_device(arguments.device)
    require(BATCH * CONTEXT <= arguments.tokens < 1e12,
            f"--tokens is {arguments.tokens:g}, expected at least the {BATCH * CONTEXT} of a step "
            f"and below 1e12")
    steps = int(arguments.tokens) // (BATCH * CONTEXT)

    if sys.platform == "linux":
        # Each step frees what the next one needs; to give pages back and ask anew costs 15 %.
        M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
        mallopt = getattr(ctypes.CDLL(None), "mallopt", lambda *_: None)
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
    # bfloat16 products pay off only where the processor has them.
    supported = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    autocast = device.type == "cuda" or supported()

    arguments.out.mkdir(parents=True, exist_ok=True)
    arguments.state.mkdir(parents=True, exist_ok=True)
    check_output(arguments.out / "model.safetensors", "--out")
    check_output(arguments.state / "state.safetensors", "--state")
    if not (arguments.out / "tokenizer.model").exists():
        train_tokenizer(arguments.out / "tokenizer.model")
    tokenizer = load_tokenizer(arguments.out)
    tokens = training_tokens(tokenizer)
    held_out = token_stream([text for _, text in corpus.files("held-out")], tokenizer)
    # For the log: 40 windows spread over the held-out text.
    starts = torch.linspace(0, len(held_out) - CONTEXT - 1, 40).long()
    held_out = held_out[starts[:, None] + torch.arange(CONTEXT + 1)].long()

    model = Llama(CONFIG)
    initialise(model)
    model.to(device)
    optimizer = torch.optim.AdamW([
        {"params": [p for p in model.parameters() if p.ndim == 2], "weight_decay": 0.1},
        {"params": [p for p in model.parameters() if p.ndim == 1], "weight_decay": 0.0},
    ], betas=(0.9, 0.95), fused=True)
    names = {parameter: name for name, parameter in model.named_parameters()}
    first = 0
    state_path = arguments.state / "state.safetensors"
    if state_path.exists():
        metadata = {}
        state = read_safetensors(state_path, metadata)
        first = int(metadata.get("step", -1))
        require(first >= 0,
                f"{state_path}: not the state of a training run: its header names no step")
        with torch.no_grad():
            for parameter, name in names.items():
                parameter.copy_(state[name])
                optimizer.state[parameter] = {
                    "step": torch.tensor(float(first), device=device),
                    "exp_avg": state[f"{name}.exp_avg"].to(device, copy=True),
                    "exp_avg_sq": state[f"{name}.exp_avg_sq"].to(device, copy=True)}
        del state

    def save(step):
        state = {}
        for parameter, name in names.items():
            state[name] = parameter
            state[f"{name}.exp_avg"] = optimizer.state[parameter]["exp_avg"]
            state[f"{name}.exp_avg_sq"] = optimizer.state[parameter]["exp_avg_sq"]
        write_safetensors(state_path, state, {"step": str(step)})
        CONFIG.write(arguments.out, torch.bfloat16)
        weights = {name: parameter.detach().bfloat16() for parameter, name in names.items()}
        write_safetensors(arguments.out / "model.safetensors", weights,
                          {"format": "pt", "trained_on": corpus.NAME,
                           "tokens": str(step * BATCH * CONTEXT)})

    log = open(arguments.state / "train.log", "a", buffering=1)

    def report(line):
        print(line, flush=True)
        log.write(line + "\n")

    report(f"{sum(p.numel() for p in model.parameters()):,} parameters; {corpus.NAME}: "
           f"{len(tokens):,} tokens a pass; steps {first} to {steps} of {BATCH * CONTEXT} tokens; "
           f"{device.type}, torch {torch.__version__}, {torch.get_num_threads()} threads, "
           f"{'bfloat16' if autocast else 'float32'} products")
    average = None
    saved = time.monotonic()
    done = first
    try:
        for step in progress(range(first, steps), "steps"):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, steps)
            loss = loss_of(model, batch(tokens, step).to(device), autocast)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            value = loss.item()
            done = step + 1
            average = value if average is None else 0.98 * average + 0.02 * value
            if done % 200 == 0 or done == steps:
                with torch.no_grad():
                    parts = [loss_of(model, part.to(device), autocast).item()
                             for part in held_out.split(BATCH)]
                mean = sum(parts) / len(parts)
                report(f"{done * BATCH * CONTEXT / 1e6:7.2f} M tokens  loss {average:.3f}  "
                       f"held-out {mean:.3f} (perplexity {math.exp(mean):.2f})")
            if time.monotonic() - saved > 600:
                save(done)
                saved = time.monotonic()
    finally:
        if done > first:                                   # Ctrl-C loses nothing
            save(done)


if __name__ == "__main__":
    command_line(main)
