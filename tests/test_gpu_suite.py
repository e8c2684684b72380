"""The GPU benchmark at a tiny size on the CPU."""

import json
import time
from pathlib import Path
from typing import Any

import pytest

from benchmarks import gpu_suite


def test_the_suite_runs_at_a_tiny_size(tmp_path: Path) -> None:
    gpu_suite.main(["--tiny", "--device", "cpu", "--output_dir", str(tmp_path)])
    content = json.loads((tmp_path / "gpu_suite.json").read_text(encoding="utf-8"))
    skipped = {name for name, note in content["notes"].items() if note.startswith("skipped: ")}
    assert skipped >= {"Largest batch", "Demo"} and skipped <= {"Largest batch", "Demo", "ONNX"}
    assert {name for name, note in content["notes"].items() if note} == skipped
    assert all(content["parts"][name] for name in gpu_suite.PARTS.keys() - skipped)
    steps = {(row["stage"], row["mode"]): row for row in content["parts"]["Steps"]}
    assert steps.keys() >= {("text", "plain"), ("image", "checkpointed"), ("evaluation", "bf16")}
    assert steps["image", "plain"]["times plain"] == 1 and steps["image", "fp32"]["TFLOP/s"] > 0
    (epoch,) = content["parts"]["One epoch"]
    assert epoch["text, images/s"] > 0 and epoch["image, images/s"] > 0
    page = (tmp_path / "gpu_suite.md").read_text(encoding="utf-8")
    assert "| image | checkpointed | 2 |" in page and "skipped: needs a GPU" in page


@pytest.mark.parametrize(
    ("error", "note"),
    [
        (None, "ended after its 0 s"),
        (gpu_suite.Skipped("no reason"), "skipped: no reason"),
        (RuntimeError("first line\nsecond"), "failed: first line"),
        (KeyboardInterrupt(), "interrupted"),
    ],
)
def test_a_part_that_ends_early_keeps_its_rows(error: BaseException | None, note: str, tmp_path: Path) -> None:
    def part(suite: gpu_suite.Suite) -> gpu_suite.Rows:
        yield {"row": 1}
        if error:
            raise error
        time.sleep(0.01)
        yield {"row": 2}

    suite = gpu_suite.Suite("cpu", True, tmp_path)
    seconds: Any = 0.0 if error is None else 60.0
    if isinstance(error, KeyboardInterrupt):
        with pytest.raises(KeyboardInterrupt):
            suite.run("Part", part, seconds)
    else:
        suite.run("Part", part, seconds)
    content = json.loads((tmp_path / "gpu_suite.json").read_text(encoding="utf-8"))
    assert content["parts"]["Part"] == [{"row": 1}] and suite.notes["Part"] == note
