"""Architectures that a teacher may have, read from their official files without running code that came with them.

`families` says how each is read, `llada2` is the one network that the installed transformers lacks, `loading` checks a
checkpoint against its configuration and loads it, `memory` says beforehand whether it fits, and `hub` finds the files.
"""
