"""Programs of verl in processes of their own, on the platform of the tests.

Run by itself, it is the whole trainer on the toy game, in an existing folder:

    python verl_processes.py FOLDER [OVERRIDES...]
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

_HERE = Path(__file__).parent


def environment(**more: str) -> dict[str, str]:
    """What a process of verl needs to take the CPU for its device."""
    path = os.pathsep.join(filter(None, [str(_HERE), os.environ.get("PYTHONPATH", "")]))
    return {
        **os.environ,
        "PYTHONPATH": path,
        "VERL_PLATFORM": "cpu",
        # The engine is registered for cuda and npu.
        "VERL_ENGINE_DEVICE": "cuda",
        "VERL_USE_EXTERNAL_MODULES": "cpu_platform",
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        **more,
    }


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def run_ranks(program: str, world: int, *arguments: str, timeout: float = 300) -> None:
    """Run a program on several ranks at once, each in a process; any failure is an error."""
    port = free_port()
    started = []
    for rank in range(world):
        of_rank = {
            "RANK": rank,
            "LOCAL_RANK": rank,
            "WORLD_SIZE": world,
            "LOCAL_WORLD_SIZE": world,
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
        }
        started.append(
            subprocess.Popen(
                [sys.executable, str(_HERE / program), *arguments],
                env=environment(**{name: str(value) for name, value in of_rank.items()}),
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )
    try:
        said = [process.communicate(timeout=timeout)[0] for process in started]
    finally:
        for process in started:
            process.kill()
    failed = [text for process, text in zip(started, said, strict=True) if process.returncode]
    assert not failed, failed[0][-4000:]


def train(folder: Path, *overrides: str, timeout: float = 400) -> str:
    """Run the whole trainer in `folder`, and return what it printed."""
    done = subprocess.run(
        [sys.executable, str(_HERE / "verl_train.py"), str(folder), *overrides],
        env=environment(
            VERL_USE_EXTERNAL_MODULES="cpu_platform,cpu_trainer",
            STEPPO_DUMP=str(folder / "rows.pt"),
            RAY_USAGE_STATS_ENABLED="0",
            RAY_DEDUP_LOGS="0",
        ),
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=timeout,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-6000:]
    return done.stdout


if __name__ == "__main__":
    print(train(Path(sys.argv[1]).resolve(), *sys.argv[2:], timeout=3600))
