"""A Dask cluster of real processes on this machine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.fixtures import ROOT

PATIENCE = 120  # seconds for a scheduler to start on a busy machine
THREADS = {"NUMBA_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}


@dataclass
class Cluster:
    """A scheduler and its workers, each started by Dask's own command, in another working directory than ours."""

    folder: Path
    processes: list[subprocess.Popen[bytes]] = field(default_factory=list)
    address: str = ""

    def start(self, command: str, *options: str) -> None:
        arguments = [sys.executable, "-m", f"distributed.cli.dask_{command}", "--no-dashboard", *options]
        env = os.environ | THREADS | {"PYTHONPATH": str(ROOT)}
        with open(self.folder / f"{command}.log", "a") as log:
            self.processes.append(subprocess.Popen(arguments, cwd=self.folder, env=env, stderr=log))

    def start_scheduler(self) -> None:
        self.start("scheduler", "--host", "127.0.0.1", "--port", "0", "--scheduler-file", "scheduler.json")
        file = self.folder / "scheduler.json"
        deadline = time.monotonic() + PATIENCE
        while not file.exists() or not file.read_text().endswith("}"):
            log = (self.folder / "scheduler.log").read_text()
            assert self.processes[-1].poll() is None and time.monotonic() < deadline, f"no scheduler came up:\n{log}"
            time.sleep(0.05)
        self.address = json.loads(file.read_text())["address"].removeprefix("tcp://")

    def start_worker(self) -> None:
        local = str(self.folder / f"worker{len(self.processes)}")
        self.start("worker", f"tcp://{self.address}", "--no-nanny", "--nthreads", "2", "--local-directory", local)

    def kill_worker(self) -> None:
        self.processes.pop().kill()

    def stop(self) -> None:
        for process in self.processes[::-1]:
            process.kill()
            process.wait()


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    made = Cluster(tmp_path_factory.mktemp("cluster"))
    try:
        made.start_scheduler()
        made.start_worker()
        made.start_worker()
        yield made
    finally:
        made.stop()
