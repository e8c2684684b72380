"""Advice that names the flags of the training scripts."""

from __future__ import annotations

from pathlib import Path

LESS_MEMORY = (
    "--checkpoint_blocks, a smaller --image_batch_size or --text_batch_size, --precision bf16, a smaller --img_size"
)


def remedies_for(side: str, feedback: bool) -> dict[str, tuple[str, ...]]:
    """What to try for each verdict on a stage, with the flags that its script has."""
    higher, lower = f"a higher {_rate(side)}", f"a lower {_rate(side)}"
    later = ("--cross_attn_start_loop 2",) if feedback else ()
    gentler = ("more --warmup_epochs", "a tighter --grad_clip") if feedback else ()
    return {
        'collapsed to "all normal"': (higher, *later, "a look at the masks of the training data"),
        "exploding": (*gentler, lower),
        "vanishing": (higher, *later),
        "not learning": (higher, *later, "more epochs"),
    }


def after_not_finite(state: Path, side: str, feedback: bool) -> str:
    """How to go on after a loss that is not finite; state: the file that the run can be taken up from."""
    begin = (
        f"--init_from {state}, and a lower {_rate(side)} or a tighter --grad_clip"
        if feedback
        else f"a lower {_rate(side)}"
    )
    return f"The last good state is {state}; start with another --save_path{', ' if feedback else ' and '}{begin}"


def _rate(side: str) -> str:
    """The flags of a stage's learning rate."""
    return "--text_lr and --image_lr" if side == "both" else f"--{side}_lr"
