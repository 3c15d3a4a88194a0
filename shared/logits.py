"""What a causal LM does to its logits after the matrix product, read from its configuration.

Both stages run a head on a few positions only, outside the model, and must not lose this. Each proves its head against
the model's own logits as well, since a configuration may hold names that are not known here.
"""

from __future__ import annotations

from typing import Any, NamedTuple


class LogitTransform(NamedTuple):
    """logits = soft_cap · tanh(scale · product / soft_cap), or scale · product where there is no soft cap."""

    scale: float
    soft_cap: float | None


def logit_transform(config: Any) -> LogitTransform:
    """Of a transformers configuration; of its text part where it has several."""
    text = config.get_text_config()
    scale = float(getattr(text, "logit_scale", None) or 1.0)  # Cohere
    scale /= float(getattr(text, "logits_scaling", None) or 1.0)  # Granite
    cap = getattr(text, "final_logit_softcapping", None)  # Gemma
    return LogitTransform(scale, None if cap is None else float(cap))
