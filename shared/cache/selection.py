"""Which draws of a cache are wanted: by timestep, by document key, by the documents' names.

One frozen value that the reader, the order of a training run and the streams share, so that they cannot disagree.
"""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase


@dataclass(frozen=True)
class Selection:
    """Draws with min_timestep ≤ t ≤ max_timestep, of documents whose key is among `documents` (None: any) and whose
    name matches the glob `names` (None: any; `*` matches everything, `/` included; case counts).
    """

    min_timestep: float = 0.0
    max_timestep: float = 1.0
    documents: frozenset[str] | None = None
    names: str | None = None

    @property
    def timesteps(self) -> tuple[float, float]:
        """(lowest, highest), both included."""
        return (self.min_timestep, self.max_timestep)

    @property
    def all_documents(self) -> bool:
        """Whether no document is left out, so that neither keys nor names need to be read."""
        return self.documents is None and self.names is None

    def takes(self, key: str, name: str) -> bool:
        """Whether a document is wanted."""
        return (self.documents is None or key in self.documents) and (
            self.names is None or fnmatchcase(name, self.names)
        )

    def __str__(self) -> str:
        """For messages."""
        parts = [f"a timestep from {self.min_timestep:g} to {self.max_timestep:g}"]
        if self.documents is not None:
            parts.append(f"one of {len(self.documents)} document keys")
        if self.names is not None:
            parts.append(f"a name like {self.names!r}")
        return " and ".join(parts)
