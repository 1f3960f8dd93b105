"""What `make infer` says to the radiologist who reads its table, in Russian or English by locale."""

import os

from scripts.infer.sentences import SENTENCES

REPLACED = "the models were replaced during the run; run it again"
TEMPORARY = "no_memory", "crashed", "slow", "network", "unreadable", "internal"  # may pass by themselves


def is_russian() -> bool:
    """Whether the locale is Russian: the first of LC_ALL, LC_MESSAGES and LANG that is set decides."""
    values = (os.environ.get(name) for name in ("LC_ALL", "LC_MESSAGES", "LANG"))
    return next(filter(None, values), "").lower().startswith("ru")


def translate(key: str, **values: object) -> str:
    """The sentence `key` of SENTENCES in the reader's language, with `values` filled in."""
    return SENTENCES[key][is_russian()].format(**values)


class StudyError(Exception):
    """Why a study has no result: one of FAILURES."""

    def __init__(self, key: str, **values: object) -> None:
        super().__init__(translate(key, **values))
        self.key = key
