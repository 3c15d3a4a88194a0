"""Find a checkpoint's files: a folder, the local cache of the hub, or a download; and say what to do if there are none.

Only data is fetched (configuration, safetensors, tokenizer, template), never code. Every way in which a repository can
be out of reach has its own sentence, with the very command that mends it.
"""

from __future__ import annotations

from pathlib import Path

from shared.errors import TidecacheError

DATA_FILES = ("*.json", "*.safetensors", "*.jinja", "*.txt", "*.model")


def checkpoint_folder(repository: str) -> Path:
    """The folder of a hub repository's files, fetched if it is not here yet.

    Raises:
        TidecacheError: it is not here and cannot be fetched: no network, gated, missing, or a full disk.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
    )

    command = download_command(repository)
    try:
        return Path(snapshot_download(repository, allow_patterns=list(DATA_FILES)))
    except GatedRepoError as error:
        raise TidecacheError(
            f"teacher {repository}: the repository is gated: accept its terms at https://huggingface.co/{repository}, "
            f"log in with `hf auth login`, then run `{command}`"
        ) from error
    except RepositoryNotFoundError as error:
        raise TidecacheError(
            f"teacher {repository}: the hub has no such repository, or it is private and you are not logged in: check "
            f"the name at https://huggingface.co/{repository}, or log in with `hf auth login`"
        ) from error
    except HFValidationError as error:
        raise TidecacheError(
            f"teacher {repository}: not a folder, and no valid repository name: expected organisation/model"
        ) from error
    except (LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
        raise absent(repository, "its files are not on this machine and the hub cannot be reached") from error
    except OSError as error:
        text = " ".join(str(error).split()) or type(error).__name__
        raise absent(repository, f"its files could not be downloaded ({text[:200]})") from error


def download_command(repository: str) -> str:
    """The command that brings a repository's files into the local cache, where they are found again."""
    return f"hf download {repository}"


def absent(repository: str, what: str) -> TidecacheError:
    """The error for files that are not here."""
    return TidecacheError(
        f"teacher {repository}: {what}: run `{download_command(repository)}` where there is network (and copy the "
        f"folder here if that is another machine, then give its path), or choose another --teacher"
    )


def repository_of(folder: Path) -> str | None:
    """The repository whose snapshot in the local cache a folder is; None for any other folder."""
    for part in folder.parts:
        if part.startswith("models--"):
            return part.removeprefix("models--").replace("--", "/")
    return None
