"""Classes of ours copied into a written file, with the functions, constants and imports of their modules they use."""

from __future__ import annotations

import ast
import builtins
import importlib
import inspect
import re
import sys
from dataclasses import dataclass, field

OURS = ("search_spaces", "nas", "zero_cost", "benchmarks", "predictors", "kernels")
Import = tuple[str, str, str]  # (module, name or "" for the module itself, name in the file)


@dataclass
class Copies:
    """Copied definitions. texts: by their name in the file, in an order that runs; imports: what they use."""

    reserved: set[str] = field(default_factory=set)
    texts: dict[str, str] = field(default_factory=dict)
    imports: set[Import] = field(default_factory=set)
    _names: dict[tuple[str, str], str] = field(default_factory=dict)

    def add(self, kind: type) -> str:
        """Copy the class `kind` of a module of ours and all it uses; returns its name in the file."""
        return self._add(kind.__module__, kind.__name__)

    def _add(self, module: str, name: str) -> str:
        if (module, name) in self._names:
            return self._names[module, name]
        definitions = _definitions(module)
        node = definitions[name]
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in OURS:
            alias = next(a for a in node.names if (a.asname or a.name) == name)
            self._names[module, name] = self._add(node.module or "", alias.name)
            return self._names[module, name]
        if isinstance(node, ast.Import | ast.ImportFrom):
            alias = next(a for a in node.names if (a.asname or a.name.split(".")[0]) == name)
            if isinstance(node, ast.Import):
                self.imports.add((alias.name, "", name))
            else:
                self.imports.add((node.module or "", alias.name, name))
            self._names[module, name] = name
            return name
        new, number = name, 1
        while new in self.texts or new in self.reserved:  # something else's
            number += 1
            new = f"{name}_{number}"
        self._names[module, name] = new
        text = _source(module, node)
        renamed = {name: new}
        for used in _used(node, definitions):
            if used != name:
                renamed[used] = "ValueError" if used == "UserError" else self._add(module, used)
        for before, after in renamed.items():
            if before != after:
                text = re.sub(rf"(?<![\w.]){before}(?!\w)", after, text)
        self.texts[new] = text
        return new


def _source(module: str, node: ast.stmt) -> str:
    """The text of a definition with its decorators."""
    lines = inspect.getsource(sys.modules[module]).splitlines()
    decorators = getattr(node, "decorator_list", [])
    first = min([node.lineno, *(decorator.lineno for decorator in decorators)])
    return "\n".join(lines[first - 1 : node.end_lineno])


def _definitions(module: str) -> dict[str, ast.stmt]:
    """The statement that defines each name at the top of a module; imports for type checkers count."""
    importlib.import_module(module)
    found: dict[str, ast.stmt] = {}
    statements = list(ast.parse(inspect.getsource(sys.modules[module])).body)
    for statement in statements:
        if isinstance(statement, ast.If):
            statements.extend(statement.body)
        elif isinstance(statement, ast.ClassDef | ast.FunctionDef):
            found[statement.name] = statement
        elif isinstance(statement, ast.Assign | ast.AnnAssign):
            targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
            for target in targets:
                for part in ast.walk(target):
                    if isinstance(part, ast.Name):
                        found[part.id] = statement
        elif isinstance(statement, ast.Import | ast.ImportFrom):
            for alias in statement.names:
                found[alias.asname or alias.name.split(".")[0]] = statement
    return found


def _used(node: ast.stmt, definitions: dict[str, ast.stmt]) -> list[str]:
    """Names of the module's top that a definition reads, in order."""
    found: dict[str, None] = {}
    for part in ast.walk(node):
        names = [part.id] if isinstance(part, ast.Name) else []
        if isinstance(part, ast.Constant) and isinstance(part.value, str) and part.value.isidentifier():
            names = [part.value]  # an annotation in quotes
        for name in names:
            if name in definitions and not hasattr(builtins, name):
                found.setdefault(name)
    return list(found)
