"""Other people's implementations that tests compare with."""

from __future__ import annotations

import importlib.util
import sys
import types


def allow_timm_without_torchvision() -> None:
    """Make `timm.layers.<module>` importable where torchvision is missing or does not fit torch.

    `import timm` itself needs torchvision; its layers do not. So the two packages are registered as empty modules
    that only know their folder. Without timm nothing happens, and importing it raises ImportError as usual.
    """
    if "timm" in sys.modules:
        return
    found = importlib.util.find_spec("timm")
    if found is None or not found.submodule_search_locations:
        return
    folder = found.submodule_search_locations[0]
    for name, path in (("timm", folder), ("timm.layers", f"{folder}/layers")):
        package = types.ModuleType(name)
        package.__path__ = [path]
        sys.modules[name] = package
