"""The demo's text: the source of the Python standard library, which everyone who can run this has.

`files("train")` and `files("held-out")` give the two parts. One file in twenty of those outside the
library's own test folders is held out, chosen by a hash of its path inside the library, so that the
same file is held out on every machine and in every Python version. Nothing is ever trained,
calibrated or tuned on the held-out part; quality is judged on it alone. Test folders are trained on
but never held out, since many installations lack them.

    python demo/corpus.py        prints what either part holds
"""
import hashlib
import platform
import sysconfig
from pathlib import Path

LIBRARY = Path(sysconfig.get_path("stdlib"))
NAME = f"the standard library of Python {platform.python_version()}"
TEST_FOLDERS = {"test", "tests", "idle_test"}
# site-packages and dist-packages are other people's; each machine's build makes its _sysconfigdata.
LEFT_OUT_FOLDERS = {"site-packages", "dist-packages", "__pycache__"}
LEFT_OUT_PREFIX = "_sysconfigdata"


def is_held_out(path):
    """Return whether the file at `path`, inside the library, is never trained on."""
    if TEST_FOLDERS & set(path.split("/")[:-1]):
        return False
    return int.from_bytes(hashlib.sha256(path.encode()).digest()[:8], "big") % 20 == 0


def files(part):
    """Return the (path, text) of every file of a part, "train" or "held-out", sorted by path.

    Files that are empty or not UTF-8 are left out.
    """
    if part not in ("train", "held-out"):
        raise ValueError(f'part is "train" or "held-out", not {part!r}')
    found = []
    for file in sorted(LIBRARY.rglob("*.py")):
        path = file.relative_to(LIBRARY).as_posix()
        if LEFT_OUT_FOLDERS & set(path.split("/")) or file.name.startswith(LEFT_OUT_PREFIX):
            continue
        if is_held_out(path) != (part == "held-out"):
            continue
        try:
            text = file.read_bytes().decode("utf-8")       # bytes, so that \r\n stays as it is
        except UnicodeDecodeError:
            continue
        if text:
            found.append((path, text))
    return found


if __name__ == "__main__":
    print(f"{NAME}, {LIBRARY}")
    for part in ("train", "held-out"):
        texts = files(part)
        size = sum(len(text.encode()) for _, text in texts) / 1e6
        print(f"{part:>9}: {len(texts):5} files, {size:6.2f} MB")
