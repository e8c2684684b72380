"""Run the tests as other machines would compute: `python -m tests.other_machines`, with arguments for pytest if any.

Other CPUs add up in another order, and more threads do too: a test must not depend on how a sum is rounded. A machine
with wide instructions can compute as one with narrow ones; these settings ask torch, MKL and oneDNN to. Settings that
need instructions which this CPU lacks are named as not run. Each is a whole run of the tests in a process of its own;
`python -m tests.other_machines tests/test_reference.py` runs a part of them. Exit status 1 if any test failed in any
setting, else 0.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

import torch

from tests.helpers import THREADS
from tests.scripts import ROOT
from utils.text import format_table

# In ascending order: each CPU has all before its own.
CAPABILITIES = ("DEFAULT", "AVX2", "AVX512")


@dataclass(frozen=True)
class Setting:
    """How many threads, and the widest instructions that torch's own kernels, MKL and oneDNN may use."""

    threads: int
    aten: str
    mkl: str
    onednn: str

    def environment(self) -> dict[str, str]:
        return {
            **os.environ,
            THREADS: str(self.threads),
            "ATEN_CPU_CAPABILITY": self.aten.lower(),
            "MKL_ENABLE_INSTRUCTIONS": self.mkl,
            "ONEDNN_MAX_CPU_ISA": self.onednn,
            # More threads than cores: waiting ones must not take the cores from those that compute.
            "OMP_WAIT_POLICY": "PASSIVE",
        }

    @property
    def runs_here(self) -> bool:
        here = torch.backends.cpu.get_cpu_capability()
        return here in CAPABILITIES and CAPABILITIES.index(self.aten) <= CAPABILITIES.index(here)

    def row(self, *found: str) -> list[str]:
        return [f"{self.aten.lower()}, MKL {self.mkl}, oneDNN {self.onednn}", str(self.threads), *found]


SETTINGS = (
    Setting(1, "DEFAULT", "SSE4_2", "AVX2"),
    Setting(4, "DEFAULT", "SSE4_2", "AVX2"),
    Setting(1, "AVX2", "AVX2", "AVX2"),
    Setting(4, "AVX2", "AVX2", "AVX2"),
    Setting(1, "AVX512", "AVX512", "AVX512_CORE"),
    Setting(4, "AVX512", "AVX512", "AVX512_CORE"),
)


def run_tests(setting: Setting, arguments: list[str]) -> tuple[list[str], list[str]]:
    """The row of the table, and the names of the tests that failed."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", f"--junitxml={report}", *arguments]
        start = time.perf_counter()
        status = subprocess.call(command, cwd=ROOT, env=setting.environment())
        seconds = f"{time.perf_counter() - start:.0f}"
        if not report.is_file():
            return setting.row("", "", "", seconds, f"{status} FAILED"), [f"pytest ended with status {status}"]
        cases = list(ElementTree.parse(report).iter("testcase"))
    failed = [f"{case.get('classname')}::{case.get('name')}" for case in cases if case.find("failure") is not None]
    failed += [f"{case.get('classname')}::{case.get('name')}" for case in cases if case.find("error") is not None]
    skipped = sum(case.find("skipped") is not None for case in cases)
    counts = (len(cases) - len(failed) - skipped, len(failed), skipped)
    return setting.row(*map(str, counts), seconds, f"{status} FAILED" if status else "0"), failed


def main() -> int:
    rows, failures = [], []
    for setting in SETTINGS:
        if not setting.runs_here:
            rows.append(setting.row("", "", "", "", "not run: this CPU lacks it"))
            continue
        row, failed = run_tests(setting, sys.argv[1:])
        rows.append(row)
        failures += [f"{', '.join(row[:2])} threads: {name}" for name in failed]
    header = ["Instructions", "Threads", "Passed", "Failed", "Skipped", "Seconds", "Status"]
    sys.stdout.write("\n".join(["", format_table(header, rows), *failures, ""]))
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
