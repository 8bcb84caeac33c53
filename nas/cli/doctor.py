"""nas doctor."""

from __future__ import annotations

from nas.cli import options
from nas.cli.output import Output


def doctor(json: options.Json = False) -> None:
    """Say what is installed, which tables are here, whether a GPU and Triton work, and how to get what is missing."""
    from nas.doctor import examine

    output = Output("doctor", json)
    found = examine()
    for warning in found.pop("warnings"):
        output.warn(warning)
    for section, content in found.items():
        output.say(f"\n{section}" if section != "python" else section, style="bold")
        _section(output, content)
    output.finish(found)


def _section(output: Output, content: object) -> None:
    if isinstance(content, dict):
        output.pairs({f"  {name}": value for name, value in content.items()})
    elif isinstance(content, list) and content and isinstance(content[0], dict):
        output.table([f"  {k}" if i == 0 else k for i, k in enumerate(content[0])], [list(c.values()) for c in content])
    else:
        output.say(f"  {content}")
