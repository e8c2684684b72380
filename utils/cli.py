"""What the scripts share: arguments in named groups, and errors that end in one line."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import torch

from utils.errors import NotFiniteError, Stopped, UserError, original_message

USER_ERROR = 2
NOT_FINITE = 3
PRECISIONS = ("fp32", "bf16", "fp16")


class Parser(argparse.ArgumentParser):
    """An argument parser whose mistakes are one line with status 2, and whose help gives each default."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False, **kwargs)

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see {self.prog} --help)")


def run_script(main: Callable[[], int | None]) -> NoReturn:
    """Run a script's `main` and leave with its status; a user's mistake is one line on standard error and status 2."""
    try:
        status = main() or 0
    except UserError as error:
        status = _say(original_message(error), USER_ERROR)
    except NotFiniteError as error:
        status = _say(str(error), NOT_FINITE)
    except Stopped as error:
        status = _say(str(error), 128 + error.signal_number)
    except torch.OutOfMemoryError:
        status = _say(
            "out of GPU memory; these need less: a smaller --image_batch_size or --text_batch_size (training) or "
            "--batch_size (testing), --precision bf16, a smaller --img_size",
            USER_ERROR,
        )
    except BrokenPipeError:
        # The reader of our output has gone (`| head`); nothing is left to say, and Python would complain at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 1
    except KeyboardInterrupt:
        status = _say("stopped", 130)
    sys.exit(status)


def _say(message: str, status: int) -> int:
    line = " ".join(message.split())
    sys.stderr.write(f"error: {line}\n" if status in (USER_ERROR, NOT_FINITE) else f"{line}\n")
    return status


def positive_int(text: str) -> int:
    return _number(text, int, 1)


def count(text: str) -> int:
    return _number(text, int, 0)


def rate(text: str) -> float:
    return _number(text, float, 0.0)


def _number(text: str, kind: Callable[[str], Any], low: float) -> Any:
    try:
        value = kind(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"'{text}' is not a number") from None
    if not low <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not {low} or more")
    return value


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Which CLIP, and how its frozen features are taken; None follows the checkpoint, the weights or the depth."""
    group = parser.add_argument_group("model")
    group.add_argument("--model_name", help="open_clip model name, local-dir:FOLDER, or toy (the shipped toy CLIP)")
    group.add_argument(
        "--clip_weights", help="weights file in any format open_clip reads, or a tag; None takes OpenAI's from the hub"
    )
    group.add_argument("--img_size", type=positive_int, help="pixels; None is 518 for ViT-L-14-336, else the model's")
    group.add_argument(
        "--activation", choices=("gelu", "quick_gelu"), help="of CLIP's MLPs; None follows what the weights need"
    )
    group.add_argument(
        "--surgery",
        choices=("dual", "sequential"),
        help="V-V attention of the frozen image features: beside the blocks (CLIP-Surgery) or inside (AA-CLIP)",
    )
    group.add_argument(
        "--surgery_until_layer", type=positive_int, help="V-V attention in the last N - 1 blocks; None is 5/6 of depth"
    )


def add_adapter_arguments(parser: argparse.ArgumentParser) -> None:
    """What is trainable, and where it stands."""
    group = parser.add_argument_group("adapters")
    group.add_argument(
        "--adapter",
        choices=("bottleneck", "linear"),
        help="bottleneck (two linears over half the width) or linear (the published variant)",
    )
    group.add_argument("--relu", action="store_true", help="put a LeakyReLU behind the image projectors")
    group.add_argument("--levels", type=positive_int, nargs="+", help="vision blocks to read; None is each quarter")
    group.add_argument("--text_adapt_weight", type=rate, help="share of the adapter in the text blend")
    group.add_argument("--image_adapt_weight", type=rate, help="share of the adapter in the image blend")
    group.add_argument("--text_adapt_until", type=count, help="text blocks with an adapter; None is a quarter of them")
    group.add_argument("--image_adapt_until", type=count, help="image blocks with one; None is a quarter of them")


def add_data_arguments(parser: argparse.ArgumentParser, help_dataset: str) -> None:
    """Where images come from."""
    group = parser.add_argument_group("data")
    group.add_argument("--dataset", help=help_dataset)
    group.add_argument("--data_root", type=Path, help="folder of the datasets; None is $ANOMALY_DATA_ROOT, then data")
    group.add_argument("--metadata", type=Path, help="JSON lines made elsewhere, in place of those built from folders")
    group.add_argument("--class_names", type=Path, help='JSON file {"class": "readable name"} for the prompts')
    group.add_argument("--skip_bad_images", action="store_true", help="go on without images that cannot be read")


def add_run_arguments(parser: argparse.ArgumentParser) -> None:
    """How the machine is used; none of these changes what is computed, but for precision."""
    group = parser.add_argument_group("machine")
    group.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps")
    group.add_argument("--precision", choices=PRECISIONS, default="fp32", help="of the matrix products")
    group.add_argument("--num_workers", type=count, default=2, help="processes that load images")


def add_training_arguments(parser: argparse.ArgumentParser) -> None:
    """The two stages of training, in the base's column of docs/method.md, "Training"."""
    group = parser.add_argument_group("training")
    group.add_argument("--training_mode", choices=("few_shot", "full_shot"), help="some images per class, or all")
    group.add_argument("--shot", type=positive_int, help="images per class in few_shot, half of them anomalous")
    group.add_argument("--text_batch_size", type=positive_int, help="images per step of Stage 1")
    group.add_argument("--image_batch_size", type=positive_int, help="images per step of Stage 2")
    group.add_argument("--accumulate", type=positive_int, help="batches whose gradients make one optimizer step")
    group.add_argument("--text_norm_weight", type=rate, help="weight of the anchors' overlap in Stage 1")
    group.add_argument(
        "--stage1_levels",
        choices=("all", "last"),
        help="levels that count in Stage 1; last is what earlier code did by mistake",
    )
    group.add_argument("--seed", type=int, help="of weights, few-shot choice, order and augmentation")


def add_epoch_arguments(parser: argparse.ArgumentParser) -> None:
    """How long and how fast each stage is trained, where each is trained once."""
    group = parser.add_argument_group("schedule")
    group.add_argument("--text_epoch", type=count, help="epochs of Stage 1; 0 keeps CLIP's own text embeddings")
    group.add_argument("--image_epoch", type=count, help="epochs of Stage 2")
    add_rate_arguments(group)


def add_rate_arguments(group: argparse._ArgumentGroup, when: str = "") -> None:
    """The learning rates of both stages."""
    group.add_argument("--text_lr", type=rate, help=f"learning rate of Stage 1{when}")
    group.add_argument("--image_lr", type=rate, help=f"learning rate of Stage 2{when}")


def add_shared_arguments(parser: argparse.ArgumentParser) -> None:
    """The groups that all training scripts have: model, adapters, data, training, machine and output."""
    add_model_arguments(parser)
    add_adapter_arguments(parser)
    add_data_arguments(parser, "dataset to train on: a catalog name, or a folder in MVTec's layout")
    add_training_arguments(parser)
    add_run_arguments(parser)
    add_output_arguments(parser)


def add_output_arguments(parser: argparse.ArgumentParser) -> None:
    """Where a run is written, and how a second start treats it."""
    group = parser.add_argument_group("output")
    group.add_argument("--save_path", type=Path, help="folder of this run")
    group.add_argument(
        "--resume",
        choices=("auto", "never"),
        help="auto goes on with the run that is there; never starts over, in a new folder only",
    )
    group.add_argument("--tracker", choices=("tensorboard", "wandb", "none"), help="where curves go")


def add_base_arguments(parser: argparse.ArgumentParser) -> None:
    """The trained base that a run with cross-attention starts from."""
    group = parser.add_argument_group("base")
    group.add_argument("--load_base_text_adapter", type=Path, help="text_adapter.pth of a trained base")
    group.add_argument("--load_base_image_adapter", type=Path, help="image_adapter.pth of a trained base")
    group.add_argument("--reset_base_optimizer", action="store_true", help="leave the base's optimizer moments behind")
    group.add_argument("--allow_partial_base", action="store_true", help="start from one trained side only")
    group.add_argument("--freeze_base", action="store_true", help="train the cross-attentions only")


def add_cross_attention_arguments(parser: argparse.ArgumentParser) -> None:
    """The two cross-attentions (docs/method.md)."""
    group = parser.add_argument_group("cross-attention")
    group.add_argument("--text_cross_attn_weight", type=rate, help="weight of the text side's residual; 0 is off")
    group.add_argument("--image_cross_attn_weight", type=rate, help="weight of the image side's residual; 0 is off")
    group.add_argument("--cross_attn_heads", type=positive_int, help="attention heads")
    group.add_argument("--cross_attn_dropout", type=rate, help="of the attention weights, while training")
    group.add_argument(
        "--context_norm", choices=("unit", "none"), help="context tokens at length 1, or raw (the old behaviour)"
    )
    group.add_argument(
        "--cross_attn_init", choices=("xavier", "zero"), help="zero starts the output projection at zero"
    )
    group.add_argument(
        "--cross_attn_scale", choices=("fixed", "learned"), help="the weights above as they are, or as a start"
    )
    group.add_argument(
        "--text_conditioning",
        choices=("image", "batch_mean", "none"),
        help="anchors see each image, in Stage 1 the mean of the batch, or no image",
    )
