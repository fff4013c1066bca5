"""C from Python: source text, compiled for this processor when it is first needed, and loaded.

The functions are plain C and know nothing of torch: they take addresses of memory and sizes, and ctypes calls them. So a
build takes about a second and needs no headers but C's own.
"""
import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

# No -ffast-math: a library linked with it makes the whole process flush denormals. -march is for gcc and clang
# on x86, -mcpu for arm. Apple's compiler has no OpenMP of its own: there C runs on one thread.
FLAGS = ["-O3 -fopenmp -march=native -mprefer-vector-width=512", "-O3 -fopenmp -march=native",
         "-O3 -fopenmp -mcpu=native", "-O3 -mcpu=native", "-O3"]


@functools.cache
def compiled(source):
    """C source compiled for this processor and loaded (a ctypes.CDLL), or None where no C compiler builds it.

    Built on first use into MINTEAL_CACHE or ~/.cache/minteal under a name that carries a hash of source, flags, compiler
    and processor. Set MINTEAL_CACHE to "off" to do without.
    """
    compiler = os.environ.get("CC") or next(filter(shutil.which, ("cc", "gcc", "clang")), None)
    if os.environ.get("MINTEAL_CACHE") == "off" or compiler is None:
        return None
    try:
        folder = Path(os.environ.get("MINTEAL_CACHE") or Path.home() / ".cache" / "minteal")
        version = subprocess.run([*compiler.split(), "--version"], capture_output=True, text=True).stdout
        for flags in FLAGS:
            identity = "\n".join([source, flags, version, _processor()])
            library = folder / f"{hashlib.sha256(identity.encode()).hexdigest()[:16]}.so"
            loaded = _load(library) or _build(compiler, flags, source, library) and _load(library)
            if loaded:
                return loaded
    except (OSError, RuntimeError):                        # no compiler to run, no folder to write to, no home
        pass
    return None


def _build(compiler, flags, source, library):
    """Compiles C to the file `library`, whole or not at all, whoever else is building; whether it did."""
    library.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        made = Path(folder) / library.name
        built = subprocess.run([*compiler.split(), *flags.split(), "-shared", "-fPIC", "-x", "c", "-", "-o", str(made), "-lm"],
                               input=source, capture_output=True, text=True)
        if built.returncode == 0:
            os.replace(made, library)
    return built.returncode == 0


def _load(library):
    """The library at a path, or None if there is none that loads."""
    try:
        return ctypes.CDLL(str(library))
    except OSError:
        return None


def _processor():
    """What -march=native looks at, near enough: a cache folder may be shared between machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    return platform.machine() + platform.processor() + "".join(
        sorted({line for line in lines if line.startswith(("model name", "flags", "Features", "CPU part"))}))
