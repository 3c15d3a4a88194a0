"""What the engine must know about a teacher besides its weights, carried inside the model's configuration.

vLLM hands the model's configuration to every worker process by itself, so this is how the client's choices reach the
plug-in: no environment variable, no global state.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

FIELD = "tidecache"  # of config.json
LAYOUTS = ("full", "block-causal", "bd3lm")


@dataclass(frozen=True)
class ScorerTraits:
    """Sizes in tokens; temperatures without unit."""

    family: str  # model type of the official checkpoint, for the names of its tensors
    layout: str
    block_size: int  # of the diffusion blocks
    page: int  # of vLLM's key/value cache
    vocabulary: int  # rows of the head over which the log-softmax runs
    temperatures: tuple[float, ...]

    @classmethod
    def of(cls, config: Any) -> ScorerTraits:
        """The traits that the client put into a configuration.

        Raises:
            ValueError: there are none: the model was not started by tidecache.
        """
        fields = getattr(config, FIELD, None)
        if not isinstance(fields, dict):
            raise ValueError(
                f"the model's configuration has no field {FIELD!r}: tidecache's architectures are started by "
                f"stage1_teacher.backends.load(..., backend='vllm'), not by themselves"
            )
        return cls(**{**fields, "temperatures": tuple(fields["temperatures"])})

    def to_json(self) -> dict[str, Any]:
        """The form that goes into config.json."""
        return {**dataclasses.asdict(self), "temperatures": list(self.temperatures)}
