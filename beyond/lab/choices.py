"""Tasks for lm-evaluation-harness, made from a text that is here, so that no network is needed.

    choices     the true continuation of a passage among four. The others continue other passages
                of the same article, so that the subject alone does not tell. Chance gives 25 %
    pages       the perplexity of a word of the articles, as in the harness's own task wikitext

The text is cut into articles at lines as " = Robert Boulter = ", as WikiText has them. Without
--text it is the held-out part of the standard library, a file an article.

    python -m beyond.lab.choices --text wikitext-2/test.txt --out tasks
    python -m beyond.harness --model FOLDER --tasks choices pages --include-path tasks
"""
import json
import random
import re
from pathlib import Path

from model import Parser, command_line, natural, refusing, replacing, require, write_json


def items_of(articles, number, before, after):
    """Return {"context", "choices", "answer"} for passages drawn from articles, the same each time.

    articles: texts. before, after: words of a context and of each of its four choices. No two
    passages of an article overlap, and the wrong choices are those of its other passages.
    """
    draw = random.Random(0)
    passages = []                        # of (context, end, the ends of its article)
    for words in (article.split(" ") for article in articles):
        own = [(" ".join(words[i:i + before]), " ".join(words[i + before:i + before + after]))
               for i in range(0, len(words) - before - after, before + after)]
        ends = {end for _, end in own}
        passages += [(context, end, ends) for context, end in own if len(ends) >= 4]
    require(len(passages) >= number, f"the text has {len(passages)} passages for {number} items: "
                                     f"give more text, or fewer --items")
    items = []
    for context, true, ends in draw.sample(passages, number):
        choices = draw.sample([true, *draw.sample(sorted(ends - {true}), 3)], 4)
        items.append({"context": context, "choices": choices, "answer": choices.index(true)})
    return items


def write_task(folder, name, documents, **settings):
    """Write a task of the harness: NAME.yaml, which may be JSON, and NAME.jsonl, its documents."""
    path = (folder / f"{name}.jsonl").absolute()
    with replacing(path) as file:
        file.writelines(f"{json.dumps(each)}\n".encode() for each in documents)
    files = {"data_files": {"test": str(path)}}
    write_json(folder / f"{name}.yaml",
               {"task": name, "dataset_path": "json", "dataset_kwargs": files, **settings})
    print(f"{folder / name}.yaml: {len(documents)} documents")


def main():
    with refusing('tasks need lm_eval: pip install "lm_eval[hf]==0.4.13"', ImportError):
        import lm_eval
        from lm_eval.tasks.wikitext.preprocess_wikitext import wikitext_detokenizer
    parser = Parser(description="Makes tasks for lm-evaluation-harness from a text.")
    add = parser.add_argument
    add("--text", metavar="FILE",
        help="UTF-8 text (default: the standard library's held-out part)")
    add("--out", required=True, metavar="DIR", type=Path, help="folder for the tasks")
    add("--items", type=natural, default=500, help="passages to continue (default: 500)")
    add("--before", type=natural, default=40,
        help="words of a passage's beginning (default: 40)")
    add("--after", type=natural, default=8, help="words of each continuation (default: 8)")
    arguments = parser.parse_args()
    if arguments.text is None:
        from demo import corpus
        articles = clean = [text for _, text in corpus.files("held-out")]
    else:
        parts = re.split(r"(?m)^(?= = [^=].* = $)", Path(arguments.text).read_text("utf-8"))
        articles = [part for part in parts if part.strip()]
        clean = [wikitext_detokenizer({"page": article}) for article in articles]
    items = items_of(clean, arguments.items, arguments.before, arguments.after)
    arguments.out.mkdir(parents=True, exist_ok=True)
    metrics = [{"metric": metric, "aggregation": "mean", "higher_is_better": True}
               for metric in ("acc", "acc_norm")]
    write_task(arguments.out, "choices", items, output_type="multiple_choice", test_split="test",
               doc_to_text="{{context}}", doc_to_choice="{{choices}}", doc_to_target="{{answer}}",
               metric_list=metrics, metadata={"version": 1.0})
    wikitext = Path(lm_eval.__file__).parent / "tasks" / "wikitext" / "wikitext.yaml"
    write_task(arguments.out, "pages", [{"page": article} for article in articles],
               include=str(wikitext), dataset_name=None, training_split=None, validation_split=None)


if __name__ == "__main__":
    command_line(main)
