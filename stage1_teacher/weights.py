"""What a checkpoint is, by content: digests of its weights and of its configuration, for the spec (DESIGN §3, §10).

Two caches must never pass for each other, and the same teacher must be recognised wherever it lies. So the digest runs
over tensors (names, types, shapes, bytes), whatever files they are spread over and whatever these are called.
"""

from __future__ import annotations

import hashlib
import json
import struct
from pathlib import Path
from typing import Any

from shared.errors import TidecacheError

_BLOCK = 1 << 24  # bytes read at once
# Fields of config.json that record who wrote it and how it is used, not what the model computes.
_IDLE_FIELDS = frozenset(
    [
        "_name_or_path",
        "transformers_version",
        "torch_dtype",
        "dtype",
        "architectures",
        "use_cache",
        "auto_map",
        "bos_token_id",
        "eos_token_id",
        "pad_token_id",
        "output_attentions",
        "output_hidden_states",
        "return_dict",
    ]
)


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint, sorted.

    Raises:
        TidecacheError: there are none.
    """
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        names = sorted(set(read_json(index)["weight_map"].values()))
        missing = [name for name in names if not (folder / name).is_file()]
        if missing:
            raise TidecacheError(
                f"{folder}: {index.name} names {missing[0]}, which is not there ({len(missing)} of {len(names)} files "
                f"are missing): download the checkpoint again"
            )
        return [folder / name for name in names]
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise TidecacheError(
            f"{folder}: no weights in safetensors form (model.safetensors or model.safetensors.index.json); "
            f"other forms are not read, since they can run code"
        )
    return files


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file of the checkpoint.

    Raises:
        TidecacheError: the file is missing or no JSON object.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise TidecacheError(
            f"{path}: there is no such file; expected the folder of a Hugging Face checkpoint"
        ) from None
    except (ValueError, UnicodeDecodeError) as error:
        raise TidecacheError(f"{path}: not valid JSON ({error})") from error
    if not isinstance(data, dict):
        raise TidecacheError(f"{path}: expected a JSON object, found {type(data).__name__}")
    return data


def weights_digest(folder: Path) -> str:
    """BLAKE2b-16 hex over every tensor's name, type, shape and bytes, in the order of the names.

    Raises:
        TidecacheError: no safetensors, or a truncated or malformed file (named).
    """
    tensors: dict[str, tuple[Path, int, dict[str, Any]]] = {}
    for path in weight_files(folder):
        size = path.stat().st_size
        with path.open("rb") as file:
            try:
                (length,) = struct.unpack("<Q", file.read(8))
                header = json.loads(file.read(length)) if length <= size else None
            except (struct.error, ValueError):
                header = None
        if not isinstance(header, dict):
            raise TidecacheError(f"{path}: not a safetensors file, or cut short: download it again")
        header.pop("__metadata__", None)
        for name, entry in header.items():
            if 8 + length + entry["data_offsets"][1] > size:
                raise TidecacheError(
                    f"{path}: cut short: tensor {name} ends at byte {8 + length + entry['data_offsets'][1]}, the file at {size}; "
                    f"download it again"
                )
            tensors[name] = (path, 8 + length, entry)
    digest = hashlib.blake2b(digest_size=16)
    for name in sorted(tensors):
        path, base, entry = tensors[name]
        digest.update(json.dumps([name, entry["dtype"], entry["shape"]]).encode())
        start, stop = entry["data_offsets"]
        with path.open("rb") as file:
            file.seek(base + start)
            left = stop - start
            while left:
                block = file.read(min(_BLOCK, left))
                digest.update(block)
                left -= len(block)
    return digest.hexdigest()


def configuration_digest(folder: Path) -> str:
    """12 hexadecimal digits over the fields of config.json that decide what the model computes."""
    config = {name: value for name, value in read_json(folder / "config.json").items() if name not in _IDLE_FIELDS}
    text = json.dumps(config, sort_keys=True, separators=(",", ":"))
    return hashlib.blake2b(text.encode(), digest_size=6).hexdigest()
