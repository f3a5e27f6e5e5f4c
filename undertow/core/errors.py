"""The error tree. A user error is answered with one message and exit code 2; anything else is a bug (exit 1).

    UndertowError
    └── UserError                 what was wrong, the value, and what to type next
        ├── SpecError             a configuration value that the spec refuses
        ├── SubjectError          a model that cannot be opened or is of an unknown architecture
        ├── SiteError             a hook site that the subject does not have
        ├── TextError             a text source that is missing, empty, too short or not readable
        ├── ArtifactError         an artifact directory that is missing, changed, or in the way
        ├── DictionaryError       an SAE that does not fit the subject or the site
        ├── NumericsError         NaN or infinite values where finite ones are needed
        ├── EditError             an edit that was refused, or that never fired
        ├── FetchError            a download that failed
        └── StorageError          the disk is full or not writable
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UndertowError(Exception):
    """Base of every error that this package raises on purpose."""


class UserError(UndertowError):
    """Something the user can mend.

    Args:
        what: what was wrong, with the offending value in it.
        hint: what to type or change next; empty where nothing helps.
    """

    def __init__(self, what: str, hint: str = "") -> None:
        super().__init__(f"{what}\n  {hint}" if hint else what)
        self.what = what
        self.hint = hint


class SpecError(UserError):
    """A configuration value that its spec refuses."""


class SubjectError(UserError):
    """A model that cannot be opened, or an architecture we cannot tap."""


class SiteError(UserError):
    """A hook site that this subject does not have."""


class TextError(UserError):
    """A text source that is missing, empty, too short or not readable."""


class ArtifactError(UserError):
    """An artifact directory that is missing, incomplete, changed, or in the way."""


class DictionaryError(UserError):
    """A sparse autoencoder that does not fit the subject, the site or the request."""


class NumericsError(UserError):
    """NaN or infinite values where finite ones are needed."""


class EditError(UserError):
    """An edit of the forward pass that was refused, or that never fired."""


class FetchError(UserError):
    """A download that failed or whose content is not the expected one."""


class StorageError(UserError):
    """The disk is full or cannot be written."""


def near_matches(word: str, known: Iterable[str], n: int = 3) -> str:
    """A "did you mean" clause for an unknown `word`, or an empty string if nothing is near."""
    matches = difflib.get_close_matches(word, list(known), n=n, cutoff=0.6)
    return f"did you mean {' or '.join(matches)}?" if matches else ""
