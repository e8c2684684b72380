"""Parsers made from frozen dataclasses whose fields are the arguments, and the groups that several scripts share."""

from __future__ import annotations

import argparse
import types
from collections.abc import Collection, Mapping
from dataclasses import MISSING, Field, dataclass, fields
from pathlib import Path
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

from dataset.options import HALF, names_or_file, share_or_nonzero
from model.config import ModelConfig
from utils.cli import Parser, not_empty, number, path
from utils.fields import changed, setting

# The groups of `--help`, in their order.
GROUPS = (
    "what to do", "model", "adapters", "cross-attention", "base", "feedback", "data", "training", "schedule", "machine",
    "output",
)  # fmt: skip
PRECISIONS = ("fp32", "bf16", "fp16")

Config = TypeVar("Config", bound="Arguments")


@dataclass(frozen=True)
class Arguments:
    """What a script was asked for: its fields are the arguments, by the same names."""

    @classmethod
    def of(cls: type[Config], **given: Any) -> Config:
        """The defaults, changed by the preset, then by the recipe, then by what is given."""
        values: dict[str, Any] = {}
        for choice in ("preset", "recipe"):
            values |= decided_by(cls, given.get(choice, getattr(cls, choice, None)))
        given = {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}
        return cls(**{**values, **given})

    @classmethod
    def of_before(cls) -> dict[str, Any]:
        """What arguments with another default now were, as plain values, in runs that began before there were any."""
        told = ((item.name, item.metadata.get("before", MISSING)) for item in fields(cls))
        return {name: plain(value) for name, value in told if value is not MISSING}

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as `args.json` holds them."""
        return {item.name: plain(getattr(self, item.name)) for item in fields(self)}


def decided_by(config: type[Arguments], name: str | None) -> dict[str, Any]:
    """The arguments that a preset or recipe decides, with its values."""
    found = ((item.name, item.metadata.get("under", {})) for item in fields(config))
    return {argument: values[name] for argument, values in found if name in values}


def make_parser(config: type[Arguments], description: str | None) -> Parser:
    """A script's parser. What is not given is left out of its namespace, so that presets can tell."""
    hints = get_type_hints(config)
    required = "".join(f" --{item.name} {item.name.upper()}" for item in fields(config) if item.default is MISSING)
    usage = f"%(prog)s{required} [--ARGUMENT VALUE ...]"
    parser = Parser(usage=usage, description=description, argument_default=argparse.SUPPRESS)
    named = [item.metadata["choices"] for item in fields(config) if item.name in ("preset", "recipe")]
    deciding = {name for choices in named for name in choices}
    for title in GROUPS:
        members = [item for item in fields(config) if item.metadata.get("group") == title]
        if members:
            group = parser.add_argument_group(title)
            for item in members:
                group.add_argument(f"--{item.name}", **_options(item, hints[item.name], deciding))
    return parser


def _options(item: Field, hint: Any, deciding: Collection[str]) -> dict[str, Any]:
    """What argparse is told of an argument; deciding: the presets and recipes of this script."""
    under = {name: value for name, value in item.metadata["under"].items() if name in deciding}
    told = {**item.metadata, "under": under}
    options: dict[str, Any] = {"help": _help(told, item.default)}
    kind = _bare(hint)
    if kind is bool:
        return {**options, "action": argparse.BooleanOptionalAction if told["under"] else "store_true"}
    if item.default is MISSING:
        options["required"] = True
    if told["several"]:
        options["nargs"] = "+"
    if told["alone"] is not None:
        options |= {"nargs": "?", "const": told["alone"]}
    if told["choices"]:
        return {**options, "choices": tuple(told["choices"])}
    readers = {int: number(int, told["between"]), float: number(float, told["between"]), Path: path, str: not_empty}
    metavar = {int: "N", float: "X", Path: "PATH"}.get(kind, "TEXT")
    return {**options, "type": told["kind"] or readers[kind], "metavar": metavar}


def _bare(hint: Any) -> type:
    """The type of one value: `int` for `int | None` and for `tuple[int, ...]`."""
    if get_origin(hint) in (Union, types.UnionType):
        hint = next(part for part in get_args(hint) if part is not type(None))
    return get_args(hint)[0] if get_origin(hint) is tuple else hint


def _help(told: Mapping[str, Any], default: Any) -> str:
    """The sentence of an argument, with its default and those under presets and recipes."""
    known = "" if default is MISSING else told["unset"] if default is None else _words(default)
    defaults = [*([known] if known else []), *(f"{name}: {_words(value)}" for name, value in told["under"].items())]
    shown = f"{told['help']} (default: {'; '.join(defaults)})" if defaults else told["help"]
    return shown.replace("%", "%%")


def _words(value: Any) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(plain(value))


def plain(value: Any) -> Any:
    """A value as JSON holds it; paths with slashes, which Windows takes too."""
    if isinstance(value, Path):
        return value.as_posix()
    return list(value) if isinstance(value, tuple) else value


@dataclass(frozen=True)
class ModelArguments(Arguments):
    """Which CLIP, and how its frozen features are taken."""

    model_name: str = changed(ModelConfig, "model_name", "ViT-L-14-336")
    clip_weights: str | None = setting(
        None, "weights file in any format open_clip reads, or one of its tags", "model", free=True,
        unset="OpenAI's from the hub",
    )  # fmt: skip
    img_size: int | None = changed(ModelConfig, "img_size", None, unset="518 for ViT-L-14-336, else the model's own")
    activation: str | None = changed(ModelConfig, "activation", None, unset="the one that the weights need")
    surgery: str = changed(ModelConfig, "surgery")
    surgery_until_layer: int | None = changed(ModelConfig, "surgery_until_layer", None, unset="5/6 of the depth")


@dataclass(frozen=True)
class DataArguments(Arguments):
    """Where images come from."""

    dataset: str = setting("VisA", "dataset: a catalog name, or a folder in MVTec's layout", "data")
    data_root: Path | None = setting(
        None, "folder of the datasets", "data", free=True, unset="$ANOMALY_DATA_ROOT, else data"
    )
    metadata: Path | None = setting(
        None, "list of images in JSON lines, in place of the one made from the folders", "data", free=True, unset="none"
    )
    class_names: str | None = setting(
        None,
        'names in prompts: catalog, published (those of AA-CLIP\'s code), or a JSON file {"class": "readable name"}',
        "data", kind=names_or_file, free=True, unset="the catalog's", under={"published": "published"},
    )  # fmt: skip
    mask_threshold: str | float = setting(
        HALF, "share of a mask's largest value from which on a pixel is anomalous, or nonzero: every one but 0", "data",
        kind=share_or_nonzero, under={"published": "nonzero"},
    )  # fmt: skip
    skip_bad_images: bool = setting(False, "leave out images that cannot be read, and say which", "data", free=True)


@dataclass(frozen=True)
class MachineArguments(Arguments):
    """How the machine is used; none of these changes what is computed, but for precision."""

    device: str = setting("auto", "auto, cpu, cuda, cuda:N or mps", "machine", free=True)
    precision: str = setting("fp32", "precision of the matrix products", "machine", choices=PRECISIONS)
    num_workers: int = setting(2, "processes that load images", "machine", between=(0, 512), free=True)
