"""nas doctor."""

from __future__ import annotations

from typing import Any

from nas.cli import options
from nas.cli.output import Output


def doctor(json: options.Json = False) -> None:
    """Say what is installed, which tables are here, whether a GPU and Triton work, and how to get what is missing."""
    from nas.doctor import examine

    output = Output("doctor", json)
    found = examine()
    warnings = found.pop("warnings")
    _print(output, found)
    for warning in warnings:
        output.warn(warning)
    output.finish(found)


def _print(output: Output, found: dict[str, Any]) -> None:
    python, device, triton = found["python"], found["device"], found["triton"]
    output.pairs(
        {
            "python": f"{python['version']} ({python['executable']})",
            "platform": python["platform"],
            "processor cores": device["cores"],
            "gpu": ", ".join(_gpu(d) for d in device["devices"]) or device["error"] or "none",
            "triton": f"{triton['version']}, kernel: {triton['kernel'] or triton['error']}",
            "home": f"{found['home']['folder']} ({found['home']['bytes'] / 1e6:,.1f} MB)",
        }
    )
    _section(output, "packages", ["package", "installed", "needed"], found["packages"], ("version", "requires"))
    extras = {
        name: {**e, "missing": ", ".join(e["missing"]), "get": "" if e["installed"] else e["get"]}
        for name, e in found["extras"].items()
    }
    _section(
        output, "extras", ["extra", "installed", "missing", "how to get it"], extras, ("installed", "missing", "get")
    )
    names = {n: {**e, "distributions": ", ".join(e["distributions"])} for n, e in found["names"].items()}
    _section(output, "package names", ["name", "owner", "ours", "file"], names, ("distributions", "ours", "file"))
    output.say("\ntables", style="bold")
    rows = [[t["id"], t["state"], t["rows"], t["get"] or ""] for t in found["tables"]]
    output.table(["benchmark", "state", "rows", "how to get it"], rows)


def _gpu(device: Any) -> str:
    return ", ".join(f"{k} {v}" for k, v in device.items()) if isinstance(device, dict) else str(device)


def _section(output: Output, title: str, columns: list[str], entries: dict[str, Any], fields: tuple[str, ...]) -> None:
    output.say(f"\n{title}", style="bold")
    output.table(columns, [[name, *(entry[f] for f in fields)] for name, entry in entries.items()])
