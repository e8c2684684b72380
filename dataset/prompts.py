"""The prompts of normal and anomalous objects (docs/method.md, "Text")."""

from utils.errors import UserError
from utils.reading import short_repr

# Values of `--class_names` other than a file: the catalog's names, or those of AA-CLIP's published code.
CATALOG_NAMES, PUBLISHED_NAMES = "catalog", "published"
NAMES = (CATALOG_NAMES, PUBLISHED_NAMES)
NORMAL_STATES = ("{}", "a {}", "the {}")
ABNORMAL_STATES = ("a damaged {}", "a broken {}", "a {} with flaw", "a {} with defect", "a {} with damage")
TEMPLATES = ("{}.", "a photo of {}.")
# Characters: longer names do not fit the 77 tokens of CLIP's prompts.
MAX_NAME_LENGTH = 200


def readable_name(class_name: str) -> str:
    """The name of a class folder as words: "metal_nut" becomes "metal nut"."""
    return " ".join(class_name.replace("_", " ").split())


def build_prompts(class_name: str) -> tuple[list[str], list[str]]:
    """The prompts of a class: each state in each template.

    Args:
        class_name: Such as "metal nut". Bytes of folder names that are not UTF-8 become question marks.

    Returns:
        The 6 normal and the 10 abnormal prompts.

    Raises:
        UserError: The name is empty or too long.
    """
    name = class_name.encode("utf-8", "replace").decode("utf-8")
    if not name.strip():
        raise UserError("a class needs a name for its prompts, such as 'metal screw': see --class_name, --class_names")
    if len(name) > MAX_NAME_LENGTH:
        raise UserError(f"the class name {short_repr(name)} has {len(name)} characters; the limit is {MAX_NAME_LENGTH}")
    return _fill(NORMAL_STATES, name), _fill(ABNORMAL_STATES, name)


def _fill(states: tuple[str, ...], name: str) -> list[str]:
    return [template.format(state.format(name)) for state in states for template in TEMPLATES]
