"""What both stages need: tokenization, alignment, corpora, noise and the cache. Imports neither stage, nor torch."""

__version__ = "0.1.0"
