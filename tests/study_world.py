"""A study that takes a second: a training and a test script that use only the standard library."""

import json
from pathlib import Path
from typing import Any

# Trains a number; resumes after a kill, and can start from the file of another run, be slow, or fail.
TRAIN = """
import argparse, json, pathlib, random, sys, time
parser = argparse.ArgumentParser()
for name, kind, default in (("save_path", str, None), ("dataset", str, ""), ("seed", int, 0), ("gain", float, 0.0),
                            ("epochs", int, 2), ("delay", float, 0.0), ("start", str, ""), ("fail", int, 0)):
    parser.add_argument(f"--{name}", type=kind, default=default)
asked = parser.parse_args()
folder = pathlib.Path(asked.save_path)
folder.mkdir(parents=True, exist_ok=True)
(folder / "args.json").write_text(json.dumps(vars(asked)))
print("training with", asked)
if asked.fail:
    sys.exit("error: the disk is full")
history = folder / "history.jsonl"
rows = history.read_text().splitlines() if history.is_file() else []
value = json.loads(pathlib.Path(asked.start).read_text())["value"] if asked.start else 0.0
for epoch in range(1, asked.epochs + 1):
    value += random.Random(f"{asked.seed} {epoch} {asked.dataset}").random() + asked.gain
    if epoch > len(rows):
        time.sleep(asked.delay)
        rows.append(json.dumps({"stage": "only", "epoch": epoch, "loss": 1 / epoch, "steps": 3, "seconds": 1}))
        temporary = folder / ".history"
        temporary.write_text("\\n".join(rows) + "\\n")
        temporary.replace(history)
(folder / "model.json").write_text(json.dumps({"value": value}))
"""
TEST = """
import argparse, csv, json, pathlib, sys, random
parser = argparse.ArgumentParser()
for name in ("checkpoint", "dataset", "output_dir", "bonus", "silent"):
    parser.add_argument(f"--{name}", default="0")
asked = parser.parse_args()
value = 0.0 if asked.checkpoint == "none" else json.loads(pathlib.Path(asked.checkpoint).read_text())["value"]
if asked.silent != "0":
    sys.exit(0)
folder = pathlib.Path(asked.output_dir)
folder.mkdir(parents=True, exist_ok=True)
with (folder / "evaluation.csv").open("w", newline="") as file:
    writer = csv.writer(file)
    writer.writerow(["model", "dataset", "class", "images", "anomalous", "pixel_ap", "image_auroc"])
    for index, name in enumerate(("bolt", "felt")):
        noise = random.Random(f"{value} {name}").random() / 10
        writer.writerow(["m", asked.dataset, name, 6, 3, 50 + value + index + noise + float(asked.bonus),
                         "n/a" if name == "felt" else 60 + value])
    writer.writerow(["m", asked.dataset, "average", 12, 6, 0, 0])
"""


def write_world(folder: Path, **changes: Any) -> Path:
    """Write the two scripts and a study of four arms; `changes` replace entries of its tables ("table.key")."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "train.py").write_text(TRAIN, encoding="utf-8")
    (folder / "test.py").write_text(TEST, encoding="utf-8")
    script = (folder / "train.py").as_posix()
    study: dict[str, Any] = {
        "study": {
            "name": "world",
            "seeds": [0, 1],
            "pairs": [{"train": "a", "test": ["b"]}],
            "compare_with": "plain",
            "test_script": (folder / "test.py").as_posix(),
            "arguments": {"epochs": 2},
        },
        "arms": {
            "untrained": {"checkpoint": "none"},
            "plain": {"script": script, "checkpoint": "model.json"},
            "better": {
                "script": script,
                "arguments": {"gain": 1.0},
                "start": {"arm": "plain", "arguments": {"start": "model.json"}},
                "checkpoint": "model.json",
            },
            "tested": {"start": {"arm": "better"}, "checkpoint": "model.json", "test_arguments": {"bonus": 1}},
        },
    }
    for place, value in changes.items():
        *tables, last = place.split(".")
        table = study
        for name in tables:
            table = table[name]
        if value is None:
            del table[last]
        else:
            table[last] = value
    file = folder / "world.toml"
    file.write_text(to_toml(study), encoding="utf-8")
    return file


def to_toml(study: dict[str, Any]) -> str:
    """A study as TOML."""
    lines = []
    for table, content in (("study", study["study"]), *((f'arms."{k}"', v) for k, v in study["arms"].items())):
        lines.append(f"[{table}]")
        lines += [f"{json.dumps(name)} = {_value(value)}" for name, value in content.items()]
    return "\n".join(lines) + "\n"


def _value(value: Any) -> str:
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{json.dumps(name)} = {_value(item)}" for name, item in value.items()) + " }"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(_value, value)) + "]"
    return json.dumps(value)
