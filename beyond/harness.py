"""The field's own tasks: minTEAL's model in EleutherAI's lm-evaluation-harness (lm_eval on PyPI).

The harness asks a model for three things: the log-likelihood of a continuation after a context,
that of a whole text, and a text to be written. `MinTEAL` answers with minTEAL's own model, dense or
sparse; all numbers of a dense model are those of the harness's `hf` model.

Four answers follow one question, and five examples stand before each of a hundred questions. So the
texts to be scored grow together as a tree, in which what several begin with stands once. Its tokens
run as one row, with one cache, and each sees only its own text:

    The cat sat down ─┐      The ─► cat ─┬► sat ─► down         row:  The cat ran sat down
    The cat ran      ─┘                  └► ran                 down sees The, cat, sat and itself

Sparsity is as in the paper: every token of a text is sparse except the first few. Or it is as in
decoding (--dense-prompt): contexts are dense, continuations sparse. The first token of each is then
the dense model's, since the last token of the context gives it. Where a text is written, the prompt
is dense and the answer sparse in any case.

The seam: `sparse_mode(model, "all", dense_prefix=...)`, and a KVCache that sees in its own way.

    pip install "lm_eval[hf]==0.4.13"
    python -m beyond.harness --model FOLDER --tasks piqa arc_easy --sparsity 0 0.4 0.5
    python -m beyond.harness run --model minteal --model_args pretrained=FOLDER,sparsity=0.5 \\
        --tasks piqa                                           the harness's own command line
"""
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path

import torch

from beyond.folders import load_model
from calibrate import SINKS, Calibration, load_calibration
from generate import generate
from model import (HubTokenizer, KVCache, Parser, check_output, command_line, default_context,
                   natural, note, progress, refusing, require, share, write_json)
from sparsify import counted, realised_sparsity, skipped_share, sparse_mode, sparsify

try:
    import lm_eval
    from lm_eval import utils
    from lm_eval.__main__ import cli_evaluate
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
    from lm_eval.models.utils import (handle_stop_sequences, has_bos_prefix, normalize_gen_kwargs,
                                      postprocess_generated_text)
    from lm_eval.tasks import TaskManager
except ImportError:                      # main says so
    TemplateLM = None

TOKENS = 512             # of a tree beside what its texts share, and of a call of the model


# --------------------------------------------------------------------------------------------------
# The tree of the texts that are scored

@dataclass
class Node:
    """A token of the tree. Nodes are numbered as a walk meets them, so those after it come next."""
    token: int
    dense: bool
    position: int
    number: int
    end: int = 0                         # the number after the last node that follows this one
    asked: list = field(default_factory=list)              # of (target, request)


def trees(texts):
    """Yield lists of nodes by number, a tree each.

    texts: of (tokens, targets, request). tokens: (token, whether it stays dense), all but the last;
    targets: what should come after each of the last of them; request: the number of the one asking.
    """
    nodes = []
    path = []                            # the nodes of the text before
    for tokens, targets, request in progress(sorted(texts), "log-likelihoods"):
        shared = len(os.path.commonprefix([[(each.token, each.dense) for each in path], tokens]))
        if nodes and len(nodes) + len(tokens) - 2 * shared > TOKENS:
            yield nodes
            nodes, path, shared = [], [], 0
        del path[shared:]
        for position, (token, dense) in enumerate(tokens[shared:], start=shared):
            path.append(Node(token, dense, position, len(nodes)))
            nodes.append(path[-1])
        for node in path:
            node.end = len(nodes)
        for node, target in zip(path[-len(targets):], targets):
            node.asked.append((target, request))
    yield nodes


class TreeCache(KVCache):
    """A cache in which each node of a tree sees those that it follows, and itself."""

    def __init__(self, cache, nodes):
        vars(self).update(vars(cache))
        numbers = [(node.number, node.end, node.position) for node in nodes]
        self.number, self.end, self.position = torch.tensor(numbers, device=cache.keys.device).t()

    def look(self, T, window):
        new = slice(self.used, self.used + T)
        seen = slice(0, self.used + T)
        number = self.number[new, None]                                         # (T, 1)
        mask = (self.number[seen] <= number) & (number < self.end[seen])        # (T, S)
        if window:
            mask &= self.position[new, None] - self.position[seen] < window
        return self.position[new], mask


# --------------------------------------------------------------------------------------------------
# The model, as the harness asks it

class MinTEAL(TemplateLM or object):
    """A model of the harness, where its name is minteal.

    pretrained: a checkpoint folder. sparsity, allocation, calibration: what its thresholds are read
    from. dense_prompt: whether all of a context stays dense where a text is scored, or SINKS
    tokens. max_length: tokens that the model sees at most (None: its context). dtype, device: as
    for load_model. The harness gives batch sizes, too, which mean nothing: TOKENS run at a time.
    """
    eot_token_id = prefix_token_id = tokenizer_name = None           # properties of TemplateLM

    def __init__(self, pretrained, sparsity=0.0, allocation=None, calibration=None,
                 dense_prompt=False, max_length=None, dtype=None, device=None,
                 batch_size=None, max_batch_size=None, **unknown):
        super().__init__()
        require(not unknown, f"minteal has no model_args {', '.join(unknown)}")
        self.folder = str(pretrained)
        self.model, tokenizer = load_model(
            self.folder, device or ("cuda" if torch.cuda.is_available() else "cpu"), dtype)
        require(tokenizer is not None, f"{self.folder} has no tokenizer")
        self.max_length = default_context(
            self.model, max_length or self.model.config.max_position_embeddings)
        self.dense_prompt = dense_prompt
        self.calibration = calibration             # a path, until one is needed
        self.tokenizer_name = self.folder.replace("/", "__")
        self.own_tokenizer = tokenizer
        if not isinstance(tokenizer, HubTokenizer) and Path(self.folder, "tokenizer.json").exists():
            tokenizer = HubTokenizer(self.folder)          # as the hf model has it
        self.tokenizer = getattr(tokenizer, "tokenizer", None)
        begin = getattr(self.tokenizer, "bos_token_id", None), *tokenizer.encode("")[:1]
        end = getattr(self.tokenizer, "eos_token_id", None), *tokenizer.eos_ids
        require(end != (None,), f"{self.folder}: no token ends a text")
        self.eot_token_id, self.prefix_token_id = (
            next(i for i in ids if i is not None) for ids in (end, begin + end))
        self._device = self.model.device
        self.set(sparsity, allocation)

    def set(self, sparsity, allocation=None):
        """Make the model sparse as the calibration has it for so much, or dense; count anew."""
        self.sparse = sparsity != 0
        self.skipped = []                # of (share of the blocks' weights, tokens that skipped it)
        if self.sparse:
            if not isinstance(self.calibration, Calibration):
                self.calibration = load_calibration(self.model, self.folder, self.calibration)
            sparsify(self.model, self.calibration.thresholds(sparsity, allocation))

    def realised(self):
        """Return the share of the blocks' weights that the sparse tokens did not read."""
        tokens = sum(number for _, number in self.skipped)
        return sum(part * number for part, number in self.skipped) / max(tokens, 1)

    # Tokens

    def tok_encode(self, string, add_special_tokens=None, **more):
        """Return the tokens of a text, with those that the tokenizer adds, unless it has them."""
        if self.tokenizer is None:
            return self.own_tokenizer.encode(string, bos=add_special_tokens is not False)
        if add_special_tokens is None:
            begin = self.tokenizer.decode(self.prefix_token_id)
            add_special_tokens = not has_bos_prefix(string, begin)
        return self.tokenizer.encode(string, add_special_tokens=add_special_tokens)

    def tok_decode(self, ids, **options):
        if self.tokenizer is None:
            return self.own_tokenizer.decode(ids)
        return self.tokenizer.decode(ids, **options)

    def apply_chat_template(self, chat_history, add_generation_prompt=True):
        require(self.tokenizer is not None, f"{self.folder} has no chat template")
        return self.tokenizer.apply_chat_template(
            chat_history, tokenize=False, add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt)

    # Scores

    @torch.no_grad()
    def _loglikelihood_tokens(self, requests, **more):
        """Return (log-likelihood, whether it is the greedy one) of each (key, context, target)."""
        texts = []
        for i, (key, context, targets) in enumerate(requests):
            require(0 < len(targets) <= self.max_length,
                    f"a continuation has {len(targets)} tokens, expected 1 to {self.max_length}, "
                    f"the context of the model: {(key or ('', ''))[1][:40]!r}...")
            context = context or [self.prefix_token_id]    # it was blanks, now of the continuation
            ids = (context + targets)[-self.max_length - 1:-1]
            dense = len(ids) + 1 - len(targets) if self.dense_prompt else SINKS
            texts.append(([(token, at < dense) for at, token in enumerate(ids)], targets, i))
        cut = sum(len(context + targets) > self.max_length + 1 for _, context, targets in requests)
        if cut:
            note(f"{cut} of {len(requests)} texts are cut to their last {self.max_length} tokens")
        sums = torch.zeros(len(requests), 2, dtype=torch.float64, device=self.device)
        for nodes in trees(texts):
            self.score(nodes, sums)
        require(bool(sums.isfinite().all()), "a log-likelihood is no finite number: the model's "
                                             "numbers are too large for its dtype")
        return [(value, not missed) for value, missed in sums.tolist()]

    def score(self, nodes, sums):
        """Run a tree, and add to sums (requests, 2): log-likelihoods, and misses of the greedy."""
        nodes.sort(key=lambda node: (not node.dense, node.position))       # each after its parent
        cache = TreeCache(self.model.make_cache(1, len(nodes)), nodes)
        for part in (nodes[i:i + TOKENS] for i in range(0, len(nodes), TOKENS)):
            tokens = torch.tensor([[node.token for node in part]], device=self.device)
            dense = sum(node.dense for node in part)
            asked = [(row, *each) for row, node in enumerate(part) for each in node.asked]
            asked = torch.tensor(asked, dtype=torch.int64, device=self.device).view(-1, 3)
            rows, targets, request = asked.t()
            # The head, a large part of a small model, runs where a score is asked.
            choose = self.model.lm_head.register_forward_pre_hook(lambda _, x: x[0][:, rows])
            with choose, counted(self.model), sparse_mode(
                    self.model, "all" if self.sparse else "off", dense_prefix=dense):
                log_p = self.model(tokens, cache)[0].log_softmax(-1)            # (asked, vocab)
            if self.sparse:
                self.skipped.append((realised_sparsity(self.model), len(part) - dense))
            found = log_p.gather(1, targets[:, None])
            missed = log_p.argmax(-1, keepdim=True) != targets[:, None]
            sums.index_add_(0, request, torch.cat((found.double(), missed.double()), 1))

    def loglikelihood_rolling(self, requests, disable_tqdm=True):
        windows = [(i, *utils.make_disjoint_window(pair)) for i, request in enumerate(requests)
                   for pair in utils.get_rolling_token_windows(
                       self.tok_encode(request.args[0]), self.prefix_token_id, self.max_length, 1)]
        scores = self._loglikelihood_tokens([(None, *pair) for _, *pair in windows])
        sums = [0.0] * len(requests)
        for (i, *_), (score, _) in zip(windows, scores):
            sums[i] += score
        return sums

    # Texts

    def generate_until(self, requests, disable_tqdm=True):
        texts = []
        for request in progress(requests, "texts"):
            context, options = request.args
            texts.append(self.write(context, **normalize_gen_kwargs(options)))
            self.cache_hook.add_partial("generate_until", request.args, texts[-1])
        return texts

    def write(self, context, until, max_gen_toks, do_sample, temperature=0.0, top_k=None,
              top_p=None, **unknown):
        """Return what the model writes after a context, up to a stop string of `until`."""
        require(not unknown, f"generation options that minTEAL does not follow: "
                             f"{', '.join(sorted(unknown))}")
        room = self.max_length - max_gen_toks
        require(room > 0, f"{max_gen_toks} tokens to be written leave no room for a prompt in the "
                          f"model's context of {self.max_length}")
        prompt = self.tok_encode(context)[-room:] or [self.prefix_token_id]
        until = handle_stop_sequences(until, self.tok_decode([self.eot_token_id]))
        # As the hf model looks for a stop string: in as many last tokens as it has, and two.
        stops = {stop: len(self.tok_encode(stop, add_special_tokens=False)) + 2
                 for stop in until if stop}
        seed = int(torch.randint(2**31, ())) if temperature > 0 else None       # by the harness's
        ids = []
        with sparse_mode(self.model, "decode" if self.sparse else "off"):
            for token in generate(self.model, prompt, max_gen_toks, temperature, top_k, top_p, seed,
                                  self.own_tokenizer.eos_ids):
                ids.append(token)
                if any(stop in self.tok_decode(ids[-last:]) for stop, last in stops.items()):
                    break
        if self.sparse and len(ids) > 1:
            skipped = skipped_share(self.model, prompt + ids, len(prompt))
            self.skipped.append((skipped, len(ids) - 1))
        return postprocess_generated_text(self.tok_decode(ids, skip_special_tokens=True),
                                          list(stops), None)


if TemplateLM is not None:
    register_model("minteal")(MinTEAL)


# --------------------------------------------------------------------------------------------------
# The commands

def main():
    require(TemplateLM is not None,
            'beyond.harness needs lm_eval: pip install "lm_eval[hf]==0.4.13"')
    if sys.argv[1:2] and sys.argv[1] in ("run", "ls", "validate"):
        with refusing("lm_eval", ValueError, KeyError):    # so it says what it cannot use
            return cli_evaluate()
    parser = Parser(description="Measures a model, dense and sparse, on tasks of "
                                "lm-evaluation-harness. With run, ls or validate as first word: "
                                "the harness's own command line, which knows the model minteal.")
    parser.add_model()
    parser.add_calibration()
    add = parser.add_argument
    add("--tasks", nargs="+", required=True, metavar="TASK",
        help="as the harness names them (python -m beyond.harness ls tasks)")
    add("--sparsity", nargs="+", type=share, default=[0.0, 0.4, 0.5], help="(default: 0 0.4 0.5)")
    add("--allocation", nargs="+", default=[None],
        help="of those in the calibration (default: its first)")
    add("--include-path", metavar="DIR", help="with task files (default: none)")
    add("--limit", type=natural, metavar="N", help="documents of each task (default: all)")
    add("--num-fewshot", metavar="N", type=int,
        help="examples before each (default: the task's own number)")
    add("--dense-prompt", action="store_true",
        help="contexts dense, continuations sparse, as in decoding (default: all sparse but the "
             f"first {SINKS} tokens)")
    add("--context", type=natural, metavar="N",
        help="tokens that the model sees at most (default: its context)")
    add("--out", metavar="FILE", help="JSON to write, too (default: none)")
    arguments = parser.parse_args()
    if arguments.out:
        check_output(arguments.out, "--out")
    tasks = TaskManager(include_path=arguments.include_path, include_defaults=False)
    if not all(tasks.match_tasks([name]) for name in arguments.tasks):
        tasks = TaskManager(include_path=arguments.include_path)     # it reads 13,000 files
    for name in arguments.tasks:
        require(tasks.match_tasks([name]), f"--tasks {name}: no such task; see python -m "
                                           f"beyond.harness ls tasks, and --include-path")
    model = MinTEAL(arguments.model, calibration=arguments.calibration,
                    dense_prompt=arguments.dense_prompt, max_length=arguments.context,
                    dtype=arguments.dtype, device=arguments.device)
    about = (f"{arguments.model}, lm_eval {lm_eval.__version__}; in texts that are scored "
             + ("contexts are dense, continuations sparse" if arguments.dense_prompt else
                f"all tokens but the first {SINKS} are sparse"))
    rows = []
    table = {"results": {}, "versions": {}, "n-shot": {}}  # as the harness prints them
    for sparsity in sorted(set(arguments.sparsity)):
        for allocation in arguments.allocation if sparsity else ["dense"]:
            model.set(sparsity, allocation)
            allocation = allocation or model.calibration.allocations[0]
            note(f"{allocation}, {sparsity:.0%}")
            found = lm_eval.simple_evaluate(
                model, tasks=tasks.match_tasks(arguments.tasks), num_fewshot=arguments.num_fewshot,
                limit=arguments.limit, log_samples=False, task_manager=tasks)
            realised = model.realised()
            rows.append({"allocation": allocation, "sparsity": sparsity, "realised": realised,
                         "results": found["results"], "n-shot": found["n-shot"]})
            if arguments.out:            # after each, so that a run that is stopped leaves some
                write_json(arguments.out, {"about": about, "rows": rows})
            for task, result in found["results"].items():
                name = f"{task}: {sparsity:3.0%} {allocation}, realised {realised:.1%}"
                table["results"][name] = {**result, "alias": name}
                table["n-shot"][name] = found["n-shot"].get(task, "")
    print(about)
    print(utils.make_table(table, sort_results=True))


if __name__ == "__main__":
    command_line(main)
