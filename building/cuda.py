"""The module _C_cuda: nvcc compiles the kernels, and the C++ compiler the bindings.

Environment: STEPPO_BUILD_CUDA, STEPPO_NVCC, CUDA_HOME, CUDA_PATH, STEPPO_CUDA_ARCHS, CXX.
"""

import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import NamedTuple

from . import CannotBuild, CompilerFailed
from .compiler import binding_flags, find_compiler
from .ninja_file import NinjaFile, first_error

BINDINGS = "python/bindings_cuda.cpp"
MODES = ("0", "1", "auto")

# What is compiled for unless STEPPO_CUDA_ARCHS says otherwise. A GPU of the same generation runs
# code of an older one: 86 and 89 that of 80, and 103 that of 100.
ARCHITECTURES = ("80", "90", "100")
KERNEL_FLAGS = (
    "-O3",
    "--expt-relaxed-constexpr",
    "-Xcompiler=-fPIC,-fvisibility=hidden",
    "-Xfatbin=-compress-all",
)
BINDING_FLAGS = ("-O2", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra")
# Where toolkits of the system lie.
USUAL = "/usr/local/cuda/bin"
RUNTIME = "libcudart_static.a"


class Toolkit(NamedTuple):
    """A CUDA toolkit.

    Attributes:
        nvcc: the words that every call of nvcc begins with.
        version: of nvcc.
        knows: the architectures that it compiles for.
        runtime: the library that a module carries.
    """

    nvcc: list[str]
    version: str
    knows: list[str]
    runtime: Path


def mode() -> str:
    """Return STEPPO_BUILD_CUDA: without the module, with it, or with it where that is possible.

    Raises:
        ValueError: it is something else.
    """
    found = os.environ.get("STEPPO_BUILD_CUDA", "").strip() or "auto"
    if found not in MODES:
        raise ValueError(f"STEPPO_BUILD_CUDA: got {found!r}, expected {', '.join(MODES)}")
    return found


def is_fatal(_: CannotBuild) -> bool:
    """Whether the package is not to be installed without the module."""
    return mode() == "1"


def ninja_file(root: Path, includes: list[str], module: str) -> NinjaFile:
    """Return how the module is built of the sources in `root`.

    Raises:
        CannotBuild: the module is not wanted, a compiler is not there or cannot build it.
    """
    if mode() == "0":
        raise CannotBuild("STEPPO_BUILD_CUDA=0 when it was installed")
    if sys.platform != "linux":
        raise CannotBuild(f"CUDA kernels are built on Linux, and this is {sys.platform}")
    compiler = find_compiler()
    toolkit = find_toolkit()
    machine_code = architectures(toolkit)
    newest = machine_code[-1]
    code = [
        *(f"-gencode=arch=compute_{number},code=sm_{number}" for number in machine_code),
        f"-gencode=arch=compute_{newest},code=compute_{newest}",
    ]
    common = ["-std=c++17", f"-I{root / 'csrc/include'}"]
    kernels = [*common, *KERNEL_FLAGS, *code]
    told = " ".join([*machine_code[:-1], f"{newest}+PTX"])
    names = binding_flags(includes, f"nvcc {toolkit.version}")
    glue = [*common, *BINDING_FLAGS, *names, f'-DSTEPPO_ARCHITECTURES="{told}"']

    file = NinjaFile(module)
    file.rule("compile", compiler, "-MMD -MF $out.d $flags -c $in -o $out")
    file.rule("compile_cuda", toolkit.nvcc, "-MD -MF $out.d $flags -c $in -o $out")
    file.rule("link", compiler, "$in $flags -o $out", has_depfile=False)
    for path in sorted((root / "csrc/cuda").glob("*.cu")):
        file.compile("compile_cuda", path, f"{path.stem}.o", kernels)
    bindings = root / BINDINGS
    file.compile("compile", bindings, f"{bindings.stem}.o", glue)
    # torch puts a CUDA runtime of its own where every module looks for names. Those of the runtime
    # in this module are hidden, and so they are its own.
    hidden = "-Wl,--exclude-libs,ALL"
    file.link("link", ["-shared", str(toolkit.runtime), hidden, "-pthread", "-ldl", "-lrt"])
    return file


def find_nvcc() -> str:
    """Return the path of nvcc.

    Raises:
        CannotBuild: it is not there.
    """
    if named := os.environ.get("STEPPO_NVCC", "").strip():
        found = shutil.which(named)
        if found is None:
            raise CannotBuild(
                f"no nvcc when it was installed: STEPPO_NVCC is {named!r}, which is no program"
            )
        return os.path.abspath(found)
    homes = [os.environ.get(name, "").strip() for name in ("CUDA_HOME", "CUDA_PATH")]
    folders = [
        *(os.path.join(home, "bin") for home in homes if home),
        *filter(None, os.environ.get("PATH", "").split(os.pathsep)),
        USUAL,
        *wheels(),
    ]
    found = shutil.which("nvcc", path=os.pathsep.join(folders))
    if found is None:
        raise CannotBuild(
            f"no nvcc when it was installed (STEPPO_NVCC, CUDA_HOME, CUDA_PATH, PATH, {USUAL}, "
            "package nvidia-cuda-nvcc)"
        )
    return os.path.abspath(found)


def wheels() -> list[str]:
    """Return the folders where the package nvidia-cuda-nvcc has nvcc, the newest CUDA first.

    pip builds in an environment of its own, which does not see the packages beside the interpreter.
    """
    spec = importlib.util.find_spec("nvidia")
    seen = list(spec.submodule_search_locations or []) if spec else []
    beside = os.path.join(sysconfig.get_path("platlib"), "nvidia")
    found = [nvcc for folder in (*seen, beside) for nvcc in Path(folder).glob("cu*/bin/nvcc")]
    newest_first = sorted(found, key=lambda nvcc: nvcc.parts[-3], reverse=True)
    return [str(nvcc.parent) for nvcc in dict.fromkeys(newest_first)]


def find_toolkit() -> Toolkit:
    """Return the toolkit of nvcc, which is asked for what it is.

    Raises:
        CannotBuild: nvcc is not there, or does not answer.
    """
    nvcc = [find_nvcc()]
    # The compiler that is named is the only one. nvcc takes one word for it.
    named = shlex.split(os.environ.get("CXX", ""))
    if len(named) == 1:
        nvcc.append(f"-ccbin={named[0]}")
    release = re.search(r"V(\d+[\d.]*)", _ask(nvcc, "--version"))
    version = release[1] if release else "of an unknown version"
    knows = re.findall(r"^sm_(\d+)$", _ask(nvcc, "--list-gpu-code"), re.MULTILINE)
    # nvcc may be a link or a script that stands far from the toolkit, and packages have their
    # libraries in different folders: nvcc lists those that it links with.
    plan = _ask(nvcc, "--dryrun", "-x", "cu", "-c", os.devnull)
    facts = dict(re.findall(r"^#\$ (TOP|LIBRARIES)=(.*)$", plan, re.MULTILINE))
    listed = [word[2:] for word in shlex.split(facts.get("LIBRARIES", "")) if word[:2] == "-L"]
    # The wheels have `lib`, and nvcc lists `lib64`.
    top = facts.get("TOP", "").strip() or os.path.join(os.path.dirname(nvcc[0]), "..")
    folders = [*listed, os.path.join(top, "lib64"), os.path.join(top, "lib")]
    for folder in map(os.path.normpath, folders):
        if os.path.isfile(os.path.join(folder, RUNTIME)):
            return Toolkit(nvcc, version, knows, Path(folder, RUNTIME))
    looked = ", ".join(dict.fromkeys(map(os.path.normpath, folders)))
    raise CannotBuild(f"no {RUNTIME} of nvcc {version} when it was installed ({looked})")


def architectures(toolkit: Toolkit) -> list[str]:
    """Return the architectures to compile for, in ascending order.

    Raises:
        ValueError: STEPPO_CUDA_ARCHS is no list of numbers.
        CannotBuild: nvcc does not know one that is named there.
    """
    named = os.environ.get("STEPPO_CUDA_ARCHS", "").strip()
    numbers = re.split(r"[\s,;]+", named) if named else list(ARCHITECTURES)
    if not all(re.fullmatch(r"[1-9]\d+", number) for number in numbers):
        raise ValueError(
            f"STEPPO_CUDA_ARCHS: got {named!r}, expected numbers such as {','.join(ARCHITECTURES)}"
        )
    unknown = [number for number in numbers if number not in toolkit.knows]
    known = sorted(set(numbers) - set(unknown), key=int)
    if known and not (named and unknown):
        return known
    raise CannotBuild(
        f"nvcc {toolkit.version} did not know {', '.join(unknown)} when it was installed, but "
        f"{', '.join(sorted(toolkit.knows, key=int))}"
    )


def _ask(nvcc: list[str], *words: str) -> str:
    """Return what nvcc prints.

    Raises:
        CompilerFailed: it fails; the text is what it complains of first.
    """
    try:
        done = subprocess.run(
            [*nvcc, *words],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            check=False,
        )
    except OSError as error:
        raise CompilerFailed(f"nvcc failed when it was installed: {error}") from error
    if done.returncode:
        why = first_error(done.stdout.splitlines())
        raise CompilerFailed(f"nvcc failed when it was installed: {why}")
    return done.stdout
