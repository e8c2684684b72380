"""The commands that the files in examples/ start under Slurm, whose programs are replaced here."""

import json
import os
import re
import shlex
import shutil
import stat
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from tests.documented import check_arguments

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
FILES = sorted(EXAMPLES.glob("*.sbatch"))
SLURM = {
    "SLURM_JOB_ID": "4711",
    "SLURM_JOB_NODELIST": "node[1-2]",
    "SLURM_NNODES": "2",
    "SLURM_GPUS_ON_NODE": "4",
    "SLURM_CPUS_PER_TASK": "32",
}
# Each starts its command on every node, with the number that Slurm would give.
SRUN = """#!/bin/bash
while [[ $1 == --* ]]; do shift; done
for node in $(seq 0 $((NODES - 1))); do SLURM_NODEID=$node "$@" || exit 1; done
"""
SCONTROL = """#!/bin/bash
[[ $* == "show hostnames node[1-2]" ]] && printf 'node1\\nnode2\\n'
"""
# Writes down its words, and gets no further.
WRITES_DOWN = """#!{python}
import json, sys
from pathlib import Path
with Path("started.jsonl").open("a") as file:
    file.write(json.dumps([Path(sys.argv[0]).name, *sys.argv[1:]]) + "\\n")
"""


def usage(file: Path) -> list[str]:
    """The arguments in a file's usage example."""
    line = re.search(r"^#   sbatch (.*)$", file.read_text(encoding="utf-8"), re.MULTILINE).group(1)
    words = shlex.split(line)
    return words[words.index(f"examples/{file.name}") + 1 :]


def started(file: Path, folder: Path, nodes: int) -> list[list[str]]:
    """The commands that a job starts, on each of its nodes."""
    programs = folder / "programs"
    programs.mkdir()
    (folder / ".venv" / "bin").mkdir(parents=True)
    (folder / ".venv" / "bin" / "activate").touch()
    writes_down = WRITES_DOWN.format(python=sys.executable)
    stand_ins = {"srun": SRUN, "scontrol": SCONTROL, "accelerate": writes_down, "python": writes_down}
    for name, text in stand_ins.items():
        (programs / name).write_text(text, encoding="utf-8")
        (programs / name).chmod(stat.S_IRWXU)
    environment = {**os.environ, **SLURM, "NODES": str(nodes), "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(
        ["bash", str(file), *usage(file)], cwd=folder, env=environment, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in (folder / "started.jsonl").read_text(encoding="utf-8").splitlines()]


@pytest.mark.skipif(sys.platform == "win32" or shutil.which("bash") is None, reason="needs bash")
@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_commands_of_job_files_are_accepted(file: Path, tmp_path: Path) -> None:
    nodes = int(re.search(r"--nodes=(\d+)", file.read_text(encoding="utf-8")).group(1))
    found = started(file, tmp_path, nodes)
    assert len(found) == nodes
    for words in found:
        check_arguments(words)
    if nodes > 1:
        values = [dict(pairwise(words)) for words in found]
        assert [value["--machine_rank"] for value in values] == ["0", "1"]
        same = {name: {value[name] for value in values} for name in ("--num_processes", "--main_process_ip")}
        assert same == {"--num_processes": {"8"}, "--main_process_ip": {"node1"}}


@pytest.mark.parametrize("library", ["anomalib", "open_clip"])
def test_maps_of_other_libraries_are_rescored(library: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a stand-in for anomalib, and open_clip itself with a tiny model."""
    from engine.config.evaluation import RescoreArguments
    from engine.evaluation.rescore import rescore
    from examples import write_maps
    from tests.scripts import write_clip, write_dataset

    class TorchInferencer:
        def __init__(self, path: str) -> None:
            assert path == "model.pt"

        def predict(self, image: Path) -> SimpleNamespace:
            pixels = np.asarray(Image.open(image).convert("L").resize((20, 20))) / 255
            return SimpleNamespace(anomaly_map=torch.from_numpy(pixels)[None], pred_score=torch.tensor([pixels.max()]))

    monkeypatch.setitem(sys.modules, "anomalib", ModuleType("anomalib"))
    monkeypatch.setitem(sys.modules, "anomalib.deploy", SimpleNamespace(TorchInferencer=TorchInferencer))
    write_dataset(tmp_path / "test", classes=("cork",), count=3)
    model = {"anomalib": ["model.pt"], "open_clip": [f"local-dir:{write_clip(tmp_path / 'clip')}", ""]}[library]
    write_maps.main([str(tmp_path / "test"), str(tmp_path / "maps"), library, *model])
    own, _ = rescore(RescoreArguments.of(maps=tmp_path / "maps", dataset=str(tmp_path / "test")))
    assert own.total.images == 6
    assert set(own.total.values) >= {"aupimo", "image_auroc"} and own.total.values["pixel_auroc"] is not None
    if library == "anomalib":
        # Defects are bright.
        assert own.total.values["image_auroc"] == 100 and own.total.values["pixel_auroc"] > 95
    scores = (tmp_path / "maps" / "scores.csv").read_text(encoding="utf-8").splitlines()
    assert [line.split(",")[0] for line in scores[:2]] == ["path", "cork/test/good/000.png"]
