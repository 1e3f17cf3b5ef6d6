"""What nvcc makes of the kernels."""

from __future__ import annotations

import cuda_machine_code


def table() -> list[str]:
    """Return the lines of the table: the kernels, and what each has for each architecture."""
    found = {arch: cuda_machine_code.kernels(arch) for arch in cuda_machine_code.ARCHITECTURES}
    lines = [
        f"nvcc {cuda_machine_code.nvcc_version()}; in this order: "
        + ", ".join(f"sm_{arch}" for arch in found),
        "",
        "| kernel | registers | local memory | shared memory | loads of 16 bytes | stores of 16 |",
        "|---|---|---|---|---|---|",
    ]
    for of_all in zip(*(sorted(kernels) for kernels in found.values()), strict=True):
        (name,) = {kernel.name for kernel in of_all}
        columns = (
            [kernel.registers for kernel in of_all],
            [kernel.stack for kernel in of_all],
            [kernel.shared for kernel in of_all],
            [kernel.wide_loads for kernel in of_all],
            [kernel.wide_stores for kernel in of_all],
        )
        shown = (" / ".join(map(str, column)) for column in columns)
        lines.append(f"| `{name.replace('steppo::', '')}` | {' | '.join(shown)} |")
    # A kernel that two sources use is in both.
    return list(dict.fromkeys(lines))
