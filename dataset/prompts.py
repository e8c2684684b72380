"""The sentences that stand for "normal" and "abnormal" (docs/method.md, "Text")."""

from __future__ import annotations

from utils.errors import UserError
from utils.reading import short_repr

NORMAL_STATES = ("{}", "a {}", "the {}")
ABNORMAL_STATES = ("a damaged {}", "a broken {}", "a {} with flaw", "a {} with defect", "a {} with damage")
# Characters: more do not fit the 77 tokens of CLIP's prompts.
MAX_NAME_LENGTH = 200
TEMPLATES = ("{}.", "a photo of {}.")


def build_prompts(readable_name: str) -> tuple[list[str], list[str]]:
    """The 6 normal and the 10 abnormal prompts of a class, such as "metal nut": each state in each template.

    Bytes that are no UTF-8, which folder names may hold, become question marks. Raises UserError for an empty name,
    and for one that is too long.
    """
    name = readable_name.encode("utf-8", "replace").decode("utf-8")
    if not name.strip():
        raise UserError("a class needs a name for its prompts, such as 'metal screw': see --class_name, --class_names")
    if len(name) > MAX_NAME_LENGTH:
        raise UserError(f"the class name {short_repr(name)} has {len(name)} characters; the limit is {MAX_NAME_LENGTH}")
    return _fill(NORMAL_STATES, name), _fill(ABNORMAL_STATES, name)


def _fill(states: tuple[str, ...], readable_name: str) -> list[str]:
    return [template.format(state.format(readable_name)) for state in states for template in TEMPLATES]
