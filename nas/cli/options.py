"""Options that several commands share, and how their values are read."""

from __future__ import annotations

import ast
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from search_spaces.common.errors import UserError


def _benchmarks(incomplete: str) -> list[str]:
    from benchmarks.registry import known_ids

    return [id for id in known_ids() if id.startswith(incomplete)]


def _strategies(incomplete: str) -> list[str]:
    from nas.strategies import STRATEGIES

    return [name for name in STRATEGIES if name.startswith(incomplete)]


def _presets(incomplete: str) -> list[str]:
    from nas.training.presets import PRESETS

    return [name for name in PRESETS if name.startswith(incomplete)]


Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on standard output.")]
Seed = Annotated[int, typer.Option("--seed", help="Everything random follows from it.")]
BenchmarkId = Annotated[
    str, typer.Argument(help="<space>/<data set>, see `nas bench list`.", autocompletion=_benchmarks)
]
Benchmark = Annotated[
    str | None, typer.Option("--benchmark", help="Short for --evaluator table:ID.", autocompletion=_benchmarks)
]
Strategy = Annotated[str, typer.Option("--strategy", help="See `nas strategies`.", autocompletion=_strategies)]
Objectives = Annotated[
    str | None, typer.Option("--objectives", help="val_acc,latency_ms,params<=1e6; the first is the primary.")
]
Label = Annotated[str, typer.Option("--label", help="val; `test` searches on test values, for tables without others.")]
Settings = Annotated[
    list[str] | None, typer.Option("--setting", help="NAME=VALUE of the strategy, see `nas strategies`; repeatable.")
]
RunFolder = Annotated[str, typer.Argument(metavar="RUN", help="A run's folder.")]
DataOption = typer.Option("--data", help="digits, cifar10, cifar100, a folder, or package.module:object.")
Data = Annotated[str, DataOption]
DataRoot = Annotated[Path | None, typer.Option("--data-root", help="Where the files of named data lie.")]
Size = Annotated[int | None, typer.Option("--size", help="Average images down to this size.")]
PresetOption = typer.Option("--preset", help="Training settings, see `nas presets`.", autocompletion=_presets)
Preset = Annotated[str, PresetOption]
Changes = Annotated[
    list[str] | None, typer.Option("--set", help="NAME=VALUE of the training, see `nas presets NAME`; repeatable.")
]
Scale = Annotated[
    list[str] | None, typer.Option("--scale", help="NAME=VALUE of the network, such as channels=8; repeatable.")
]
Norm = Annotated[str | None, typer.Option("--norm", help="Every normalisation, see `nas primitives list`; or a layer.")]
Act = Annotated[str | None, typer.Option("--act", help="Every activation, see `nas primitives list`.")]
Layer = Annotated[str | None, typer.Option("--layer", help="One layer for both: a name, a formula, RUN:best.")]
ValShare = Annotated[float | None, typer.Option("--val-share", help="Of the training images (default: the preset's).")]


def read_settings(given: Sequence[str] | None) -> dict[str, Any]:
    """`["population=20", "fidelities=12,200"]` -> {"population": 20, "fidelities": (12, 200)}. Errors: UserError."""
    settings: dict[str, Any] = {}
    for item in given or ():
        name, equals, text = item.partition("=")
        if not equals or not name or not text:
            raise UserError(item, "a setting as NAME=VALUE")
        try:
            value = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            value = text
        settings[name.strip().replace("-", "_")] = value
    return settings


def read_strategy_settings(given: Sequence[str] | None, strategies: Sequence[str]) -> dict[str, dict[str, Any]]:
    """`["regularized-evolution.population=4"]` -> {"regularized-evolution": {"population": 4}}. Errors: UserError."""
    from nas.strategies import strategy_class, strategy_settings
    from search_spaces.common.names import match

    names = [strategy_class(name).name for name in strategies]
    settings: dict[str, dict[str, Any]] = {}
    for item in given or ():
        strategy, dot, rest = item.partition(".")
        if not dot or "=" in strategy:
            raise UserError(item, "a setting as STRATEGY.NAME=VALUE", f"{names[0]}.{item}")
        strategy = match(strategy, names, "a strategy of this comparison")
        for name, value in read_settings([rest]).items():
            known = match(name, strategy_settings(strategy), f"a setting of {strategy}")
            settings.setdefault(strategy, {})[known] = value
    return settings


def read_seed_policy(text: str) -> int | str:
    """`mean`, `random` or a seed's number."""
    return int(text) if text.isdigit() else text
