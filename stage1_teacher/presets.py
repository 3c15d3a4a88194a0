"""Teachers by name: what a checkpoint does not say about itself (DESIGN §7).

A preset names a checkpoint and its traits as a diffusion model: attention layout, block size, mask id, logit shift,
chat template; and, for a teacher that needs a GPU, in which type and with which batches it is run. It is a TOML file of
a few lines: those in `presets/` are found by name, any other by its path. A local folder or a hub id is a preset whose
traits are all left open, to be given by flags or found in the checkpoint.
"""

from __future__ import annotations

import dataclasses
import tomllib
from dataclasses import dataclass
from pathlib import Path

from shared.errors import TidecacheError
from shared.spec import LAYOUTS
from stage1_teacher.backends import BATCH_TOKENS

PRESETS = Path(__file__).resolve().parent / "presets"
PACKAGES = Path(__file__).resolve().parent.parent  # `package:stage1_teacher/tiny` is a folder shipped beside this code


@dataclass(frozen=True)
class Preset:
    """A teacher's traits; None where neither the preset nor a flag says. Lengths in tokens."""

    name: str  # names the cache's folder
    checkpoint: str  # a folder, a hub id, or `package:FOLDER` for data that ships with tidecache
    layout: str | None = None
    block_size: int | None = None
    mask_id: int | None = None
    logit_shift: bool | None = None
    template: Path | None = None  # a Jinja file that replaces the tokenizer's chat template
    length: int | None = None  # the default of --length
    dtype: str = "float32"  # the default of --dtype
    batch_tokens: int = BATCH_TOKENS  # the default of --batch-tokens
    students: tuple[str, ...] = ()  # the default of --students

    def with_flags(
        self,
        layout: str | None,
        block_size: int | None,
        mask_id: int | None,
        logit_shift: bool | None,
        template: Path | None = None,
    ) -> Preset:
        """The preset with every trait that is given replaced; a flag always wins."""
        return dataclasses.replace(
            self,
            layout=self.layout if layout is None else layout,
            block_size=self.block_size if block_size is None else block_size,
            mask_id=self.mask_id if mask_id is None else mask_id,
            logit_shift=self.logit_shift if logit_shift is None else logit_shift,
            template=self.template if template is None else template,
        )


def preset_names() -> list[str]:
    """The presets that ship with tidecache, in alphabetical order."""
    return sorted(path.stem for path in PRESETS.glob("*.toml"))


def find_preset(path_or_preset: str | Path) -> Preset:
    """A preset by name, by its TOML file, or for a folder or hub id.

    Raises:
        TidecacheError: nothing of that name, or the TOML file is malformed (the message names file and field).
    """
    text = str(path_or_preset)
    path = Path(text).expanduser()
    if text in preset_names():
        return read_preset(PRESETS / f"{text}.toml")
    if path.suffix == ".toml" and path.is_file():
        return read_preset(path)
    if path.is_dir():
        return Preset(name=path.resolve().name, checkpoint=str(path))
    if text.count("/") == 1 and not text.startswith((".", "/", "~")) and not path.exists():
        return Preset(name=text.split("/")[1], checkpoint=text)
    raise TidecacheError(
        f"teacher {text!r}: there is no such folder or TOML file, and no preset of that name; presets: "
        f"{', '.join(preset_names())}; give one of these, a model's folder, or a hub id such as organisation/model"
    )


def read_preset(path: Path) -> Preset:
    """Read one TOML file; its fields are those of `Preset`, the name being the file's.

    Raises:
        TidecacheError: the file is no TOML, a field is unknown or of another type, or `checkpoint` is missing.
    """
    try:
        fields = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise TidecacheError(f"preset {path}: not a TOML file ({error})") from error
    types: dict[str, type] = {
        "checkpoint": str, "layout": str, "block_size": int, "mask_id": int, "logit_shift": bool, "template": str,
        "length": int, "dtype": str, "batch_tokens": int, "students": list,
    }  # fmt: skip
    for name, value in fields.items():
        if name not in types:
            raise TidecacheError(f"preset {path}: unknown field {name!r}; the fields are {', '.join(types)}")
        if type(value) is not types[name]:
            raise TidecacheError(f"preset {path}: {name}: expected {types[name].__name__}, found {value!r}")
    if "checkpoint" not in fields:
        raise TidecacheError(f"preset {path}: the field `checkpoint` is missing: a model's folder or a hub id")
    if fields.get("layout", "full") not in LAYOUTS:
        raise TidecacheError(f"preset {path}: layout: expected one of {', '.join(LAYOUTS)}, found {fields['layout']!r}")
    students = tuple(fields.pop("students", ()))
    # Paths in a preset are meant from where it lies, so that a folder of presets can be moved.
    template = path.parent / fields.pop("template") if "template" in fields else None
    return Preset(name=path.stem, students=students, template=template, **fields)


def local_folder(checkpoint: str) -> Path:
    """The folder of a checkpoint, downloaded if it is a hub id and not here yet (weights as safetensors, no code).

    Raises:
        TidecacheError: it is neither here nor can be downloaded; the message says with which command to get it.
    """
    if checkpoint.startswith("package:"):
        return PACKAGES / checkpoint.removeprefix("package:")
    folder = Path(checkpoint).expanduser()
    if folder.is_dir():
        return folder
    from stage1_teacher.architectures.hub import checkpoint_folder

    return checkpoint_folder(checkpoint)
