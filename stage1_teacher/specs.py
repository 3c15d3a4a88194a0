"""Capture specs by name: sets of options that belong together, such as the paper's (`tidecache teacher capture --spec`).

A spec file is TOML; its fields are options of `capture`, and they take the place of the options' defaults. So a flag that is
given always wins, and `make cache SPEC=paper-cross` is nothing but a long command line.
"""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

from shared.errors import TidecacheError

SPECS = Path(__file__).resolve().parent / "specs"


def spec_names() -> list[str]:
    """The specs that ship with tidecache, in alphabetical order."""
    return sorted(path.stem for path in SPECS.glob("*.toml"))


def read_spec(name: str, options: dict[str, Any]) -> dict[str, Any]:
    """Options by name from a spec's TOML file; `options` are those of the command, with their defaults.

    Raises:
        TidecacheError: there is no such spec (the message lists those that there are), it is no TOML, or it has a field
            that is no option.
    """
    path = SPECS / f"{name}.toml" if name in spec_names() else Path(name).expanduser()
    if path.suffix != ".toml" or not path.is_file():
        raise TidecacheError(
            f"--spec {name}: expected {', '.join(spec_names())} or a TOML file of options; there is no such file"
        )
    try:
        fields = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise TidecacheError(f"spec {path}: not a TOML file ({error})") from error
    for field in fields:
        if field not in options:
            raise TidecacheError(f"spec {path}: unknown field {field!r}; the fields are options: {', '.join(options)}")
    return fields
