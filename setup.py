"""Builds the compiled modules with ninja, each by a file of building/. No torch is needed.

CONTRIBUTING.md lists the environment variables. A module that cannot be built is left out with a
note in its place, and `steppo-kernels info` says so.
"""

import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError, OptionError

# A build by PEP 517 does not look for modules beside this file.
sys.path.insert(0, str(Path(__file__).parent.resolve()))

from building import CannotBuild, cpu, cuda

ROOT = Path(__file__).parent.resolve()
PACKAGE = ROOT / "steppo_kernels"
BUILDERS = {"_C_cpu": cpu, "_C_cuda": cuda}


class BuildWithNinja(build_ext):
    """Builds each module from a build.ninja of its own: flags differ by object."""

    def finalize_options(self):
        """Keep the objects of editable installs: the next compiles only what has changed."""
        super().finalize_options()
        if self.editable_mode:
            folder = f"temp.{self.plat_name}-{sys.implementation.cache_tag}"
            self.build_temp = str(ROOT / "build" / folder)

    def build_extensions(self):
        """Build each module, or leave a note that says why it is not there."""
        plans = []
        # What is wrong with a setting is said before a compiler has run for a minute.
        for ext in self.extensions:
            module = self.file_of(ext)
            module.parent.mkdir(parents=True, exist_ok=True)
            module.unlink(missing_ok=True)
            note_of(module).unlink(missing_ok=True)
            try:
                plan = builder_of(ext).ninja_file(ROOT, self.include_dirs, module.name)
                plans.append((ext, plan))
            except CannotBuild as why:
                self.leave_out(ext, why)
            except ValueError as error:
                raise OptionError(str(error)) from error
        for ext, plan in plans:
            try:
                folder = Path(self.build_temp).resolve() / name_of(ext)
                built = plan.run(folder, is_quiet=not self.verbose)
            except CannotBuild as why:
                self.leave_out(ext, why)
            else:
                self.copy_file(str(built), str(self.file_of(ext)))

    def leave_out(self, ext, why):
        """Leave a note in the place of a module, or fail where that is not wanted."""
        if builder_of(ext).is_fatal(why):
            raise CompileError(f"{ext.name} is not built: {why}") from why
        note_of(self.file_of(ext)).write_text(f"not built: {why}\n")
        print(f"{ext.name} is not built: {why}", file=sys.stderr)

    def copy_extensions_to_source(self):
        """Put each module, or the note in its place, into the package (editable installs)."""
        for ext in self.extensions:
            module = self.file_of(ext)
            for made in (module, note_of(module)):
                place = PACKAGE / made.name
                if made.exists():
                    self.copy_file(str(made), str(place))
                else:
                    place.unlink(missing_ok=True)

    def file_of(self, ext):
        """Return where the file of a module is made, before it goes anywhere else."""
        return Path(self.build_lib, self.get_ext_filename(ext.name)).resolve()


def name_of(ext):
    """Return the name of a module in the package."""
    return ext.name.rpartition(".")[2]


def builder_of(ext):
    """Return the file of building/ that knows how a module is built."""
    return BUILDERS[name_of(ext)]


def note_of(module):
    """Return the note that is left in the place of a module."""
    return module.with_name(f"{module.name.partition('.')[0]}.missing")


setup(
    ext_modules=[
        Extension(f"steppo_kernels.{name}", sources=[builder.BINDINGS])
        for name, builder in BUILDERS.items()
    ],
    cmdclass={"build_ext": BuildWithNinja},
)
