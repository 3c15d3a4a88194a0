"""The one exception that users see.

Anything a user can cause (a wrong path, another spec, a full disk) is raised as `TidecacheError` with a message that
says what was wrong, where, what was expected and found, and what to do. The command line prints it as one line and
exits with 1; a traceback means a defect of ours.
"""

from __future__ import annotations


class TidecacheError(Exception):
    """A mistake that the user can mend; its text is one line and complete."""
