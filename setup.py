"""Builds steppo_kernels._C_cpu with ninja: every kernel once per instruction set, no torch.

Environment: CXX the compiler; STEPPO_SANITIZE e.g. "address,undefined" or "thread"; MAX_JOBS.
Where there is no compiler the package installs without the module, and `steppo-kernels info` says
so.
"""

import os
import platform
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
PACKAGE = ROOT / "steppo_kernels"
X86 = platform.machine().lower() in ("x86_64", "amd64")

# Chosen at run time (csrc/cpu/dispatch.cpp); never -march=native.
ISAS = {"baseline": []}
if X86:
    ISAS["avx2"] = ["-mavx2", "-mfma", "-mbmi2", "-mf16c"]
    ISAS["avx512"] = [
        *ISAS["avx2"], "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl",
        "-mprefer-vector-width=512",
    ]  # fmt: skip

KERNELS = sorted(
    path for path in (ROOT / "csrc/cpu").glob("*.cpp")
    if path.stem not in ("dispatch", "pages", "parallel")
)  # fmt: skip
ONCE = [ROOT / f"csrc/cpu/{stem}.cpp" for stem in ("dispatch", "pages", "parallel")]
BINDINGS = ROOT / "python/bindings_cpu.cpp"


def compilers():
    """Return the C++ compilers to look for: that of CXX, or those that machines have."""
    named = os.environ.get("CXX", "").strip()
    return [named] if named else ["c++", "g++", "clang++"]


def find_compiler():
    """Return the C++ compiler as a list of words, or None."""
    for words in map(shlex.split, compilers()):
        if shutil.which(words[0]):
            return words
    return None


class BuildWithNinja(build_ext):
    """Builds the one extension from a build.ninja of our own: flags differ by object."""

    def build_extension(self, ext):
        """Build the module, or leave a note that says why it is not there."""
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        missing = target.parent / "_C_cpu.missing"
        missing.unlink(missing_ok=True)
        compiler = find_compiler()
        if compiler is None:
            note = f"not built: no C++ compiler ({', '.join(compilers())}) when it was installed"
            missing.parent.mkdir(parents=True, exist_ok=True)
            missing.write_text(note + "\n")
            print(f"steppo_kernels: the C++ backend is {note}", file=sys.stderr)
            return
        build = Path(self.build_temp).resolve()
        build.mkdir(parents=True, exist_ok=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        (build / "build.ninja").write_text(self.ninja_file(compiler, target))
        jobs = ["-j", os.environ["MAX_JOBS"]] if "MAX_JOBS" in os.environ else []
        subprocess.check_call([find_ninja(), "-C", str(build), *jobs])

    def copy_extensions_to_source(self):
        """Put the module, or the note in its place, into the package (editable installs)."""
        note = PACKAGE / "_C_cpu.missing"
        built = Path(self.build_lib) / "steppo_kernels" / note.name
        if built.exists():
            note.write_text(built.read_text())
        else:
            note.unlink(missing_ok=True)
            super().copy_extensions_to_source()

    def ninja_file(self, compiler, target):
        """Return the text of build.ninja."""
        import pybind11

        version = subprocess.check_output([*compiler, "--version"], text=True).splitlines()[0]
        common = [
            "-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-fno-math-errno",
            "-fno-trapping-math", "-fopenmp-simd", "-pthread", "-Wall", "-Wextra", "-Wno-psabi",
            f"-I{ROOT / 'csrc/include'}", f"-I{ROOT / 'csrc/cpu'}",
            *(["-DSTEPPO_X86"] if X86 else []),
        ]  # fmt: skip
        glue = [
            *(f"-I{path}" for path in (*self.include_dirs, pybind11.get_include())),
            f'-DSTEPPO_COMPILER="{version}"',
        ]
        link = ["-shared", "-pthread"]
        if sys.platform == "darwin":
            link += ["-undefined", "dynamic_lookup"]
        if sanitizers := os.environ.get("STEPPO_SANITIZE"):
            checks = [f"-fsanitize={sanitizers}", "-fno-omit-frame-pointer", "-g", "-O1"]
            common += [*checks, "-fno-sanitize-recover=undefined"]
            link += checks
        objects = [(path, isa, flags) for path in KERNELS for isa, flags in ISAS.items()]
        lines = [
            f"cxx = {escape(shlex.join(compiler))}",
            "rule compile",
            "  command = $cxx -MMD -MF $out.d $flags -c $in -o $out",
            "  depfile = $out.d",
            "  deps = gcc",
            "rule link",
            "  command = $cxx $in $flags -o $out",
        ]
        outputs = []

        def compile_one(path, name, flags):
            outputs.append(name)
            lines.append(f"build {name}: compile {escape_path(path)}")
            lines.append(f"  flags = {escape(shlex.join(flags))}")

        for path, isa, flags in objects:
            compile_one(path, f"{path.stem}.{isa}.o", [*common, *flags, f"-DSTEPPO_ISA={isa}"])
        for path in ONCE:
            compile_one(path, f"{path.stem}.o", common)
        compile_one(BINDINGS, "bindings_cpu.o", [*common, *glue])
        lines.append(f"build {escape_path(target)}: link {' '.join(outputs)}")
        lines.append(f"  flags = {escape(shlex.join(link))}")
        return "\n".join(lines) + "\n"


def escape_path(path):
    """Return a path escaped for a build line, where blanks separate."""
    return escape(str(path)).replace(" ", "$ ")


def escape(text):
    """Return `text` with the characters that ninja reads escaped."""
    return text.replace("$", "$$").replace(":", "$:").replace("\n", "$\n")


def find_ninja():
    """Return the ninja of the build environment."""
    try:
        import ninja
    except ImportError:
        return "ninja"
    return str(Path(ninja.BIN_DIR) / "ninja")


setup(
    ext_modules=[Extension("steppo_kernels._C_cpu", sources=[str(BINDINGS.relative_to(ROOT))])],
    cmdclass={"build_ext": BuildWithNinja},
)
