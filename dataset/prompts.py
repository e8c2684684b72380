"""The sentences that stand for "normal" and "abnormal" (docs/method.md, "Text")."""

from __future__ import annotations

NORMAL_STATES = ("{}", "a {}", "the {}")
ABNORMAL_STATES = ("a damaged {}", "a broken {}", "a {} with flaw", "a {} with defect", "a {} with damage")
TEMPLATES = ("{}.", "a photo of {}.")


def build_prompts(readable_name: str) -> tuple[list[str], list[str]]:
    """The 6 normal and the 10 abnormal prompts of a class, such as "metal nut": each state in each template."""
    return _fill(NORMAL_STATES, readable_name), _fill(ABNORMAL_STATES, readable_name)


def _fill(states: tuple[str, ...], readable_name: str) -> list[str]:
    return [template.format(state.format(readable_name)) for state in states for template in TEMPLATES]
