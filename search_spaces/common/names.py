"""Names on the command line: lower case with hyphens; the nearest valid one is suggested."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Iterable

from search_spaces.common.errors import UserError, one_of


def canonical(name: str) -> str:
    """Lower case, underscores as hyphens: `Regularized_Evolution` -> `regularized-evolution`."""
    return name.strip().lower().replace("_", "-")


def nearest(name: str, candidates: Iterable[str]) -> str | None:
    """The candidate most like `name`, or None if none is similar."""
    by_canonical = {canonical(c): c for c in candidates}
    found = difflib.get_close_matches(canonical(name), by_canonical, n=1, cutoff=0.5)
    return by_canonical[found[0]] if found else None


def match(name: str, candidates: Iterable[str], kind: str) -> str:
    """The candidate that `name` spells (hyphens and case do not matter); UserError otherwise.

    `kind` says what a candidate is, with its article: `a strategy`.
    """
    listed = list(candidates)
    for candidate in listed:
        if canonical(candidate) == canonical(name):
            return candidate
    raise UserError(name, f"{kind} ({one_of(listed)})", nearest(name, listed))


def load_object(path: str, kind: str) -> object:
    """The object that `package.module:object` names; UserError says which half is wrong."""
    module_name, _, attribute = path.partition(":")
    if not module_name or not attribute:
        raise UserError(path, f"{kind} as `package.module:object`")
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise UserError(path, f"{kind}; the module {module_name!r} cannot be imported ({error})") from None
    try:
        return getattr(module, attribute)
    except AttributeError:
        raise UserError(
            path, f"{kind}; {module_name!r} has no {attribute!r}", nearest(attribute, vars(module))
        ) from None
