"""Read text, JSON and TOML files that users or other programs wrote; every problem is a one-line `UserError`."""

import csv
import io
import json
import re
import reprlib
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from utils.errors import UserError
from utils.paths import is_file, is_no_file
from utils.schema import check

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

MIB = 2**20
# A list of a million images takes about 200 MiB.
MAX_BYTES = 256 * MIB

_short = reprlib.Repr()
_short.maxstring = 100


def read_text(path: Path, name: str = "", max_bytes: int = MAX_BYTES) -> str:
    """Return the UTF-8 text of a file without its byte order mark.

    Args:
        path: The file.
        name: What the file is, such as the option that names it; error messages begin with it.
        max_bytes: The largest size that is read.

    Returns:
        The text, with the line ends of the file.

    Raises:
        UserError: The path is not a regular file, cannot be read, is too large, or is not UTF-8.
    """
    source = _source(path, name)
    if is_no_file(path):
        raise UserError(f"{source} cannot be read: it is not a regular file")
    try:
        with path.open("rb") as file:
            content = file.read(max_bytes + 1)
        if len(content) > max_bytes:
            raise UserError(f"{source} cannot be read: it is larger than {max_bytes // MIB} MiB")
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{source} cannot be read: it is not UTF-8 text ({error.reason})") from error
    except (OSError, ValueError) as error:
        raise UserError(f"{source} cannot be read: {getattr(error, 'strerror', None) or error}") from error


def parse_json(text: str, source: object, schema: Any = Any) -> Any:
    """Return the value of a JSON text, checked against `schema` (`utils.schema.check`); errors begin with `source`."""
    try:
        value = json.loads(text)
    except ValueError as error:
        raise UserError(f"{source}: not valid JSON ({' '.join(str(error).split())})") from error
    except RecursionError as error:
        raise UserError(f"{source}: not valid JSON (nested too deeply)") from error
    check(value, schema, source)
    return value


def read_json(path: Path, schema: Any = Any, name: str = "", max_bytes: int = MAX_BYTES) -> Any:
    """Return the value in a JSON file, checked against `schema`; see `read_text` for the other arguments."""
    return parse_json(read_text(path, name, max_bytes), _source(path, name), schema)


def read_json_lines(path: Path, schema: Any = Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the values in a file of JSON lines, each with its "file:line" for error messages; blank lines are skipped.

    Only line feeds end a line: JSON allows other separators inside a text.
    """
    for number, line in enumerate(read_text(path, name).split("\n"), start=1):
        if line.strip():
            source = f"{path}:{number}"
            yield source, parse_json(line, source, schema)


def read_table(path: Path, name: str = "", columns: Sequence[str] = ()) -> Iterator[tuple[str, dict[str, str]]]:
    """Yield the rows of a file with columns separated by commas, semicolons, tabs or bars, each with its "file:line".

    The first line names the columns, which must include `columns`; missing values are empty.
    """
    text = read_text(path, name)
    rows = csv.DictReader(io.StringIO(text), delimiter=max(",;\t|", key=text.partition("\n")[0].count), restval="")
    try:
        if absent := [column for column in columns if column not in (rows.fieldnames or ())]:
            raise UserError(f"{path} lacks the column {', '.join(absent)}")
        yield from ((f"{path}:{rows.line_num}", row) for row in rows)
    except csv.Error as error:
        raise UserError(f"{path} cannot be read: {error}") from error


def read_toml(path: Path) -> dict[str, Any]:
    """Return the tables of a TOML file."""
    text = read_text(path)
    try:
        return tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise UserError(f"{path}: not valid TOML ({error})") from error


def wrong_content(path: Path, error: Exception) -> str | None:
    """What a file that a library could not read holds instead, as the end of a sentence; None if that is unknown."""
    start = b""
    if is_file(path):
        with path.open("rb") as file:
            start = file.read(100).lstrip()
    if start.startswith(b"version https://git-lfs"):
        return "is a Git LFS pointer, not the file itself: fetch that with git lfs pull"
    if start.startswith(b"<"):
        return "is a web page, not the file itself: download it from the link of the file, not of its page"
    # torch names the class that it does not load; it does not read what recent versions of pickle write.
    if "GLOBAL" in str(error) or re.match(rb"\x80[\x03-\x05]", start):
        return "holds Python objects, which may run code when they are loaded: save only a state dict of tensors"
    return None


def short_repr(value: object) -> str:
    """`repr` of a value for an error message, shortened if it is long or deeply nested."""
    return _short.repr(value)


def _source(path: Path, name: str) -> str:
    return f"{name} {path}" if name else str(path)
