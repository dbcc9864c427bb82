"""What is wrong with a rule file, and where."""

from __future__ import annotations

import enum
from dataclasses import dataclass

from gatekeeper.policy.model import Place


class Severity(enum.StrEnum):
    """An error refuses the file; a warning does not."""

    ERROR = "error"
    WARNING = "warning"


@dataclass(frozen=True, slots=True, order=True)
class Problem:
    """One message at one place. ``code`` is stable and names the field or the check; ``length`` is the caret's width."""

    place: Place
    severity: Severity
    code: str
    message: str
    length: int = 1
