"""Find-by-file-name registry: a folder's listing is its catalogue.

``Registry("moe.adaptation", entry_point="moepipe.adaptation")`` finds ``moe/adaptation/tent.py`` under the name
``tent`` without importing it, so that listing and completion stay instant. Third-party packages add files through the
entry-point group.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import ModuleType

from moe.errors import SpecError, nearest

_PLUMBING = {"base", "guard", "stream"}  # files beside the entries of a folder that are not entries


@dataclass(frozen=True)
class Registry:
    """The modules of one package folder, by file name.

    Attributes:
        package: dotted name of the folder, e.g. ``workers.datasets``.
        noun: what one entry is called in messages, e.g. ``dataset``.
        entry_point: group under which other distributions register modules.
    """

    package: str
    noun: str
    entry_point: str

    @cached_property
    def _modules(self) -> dict[str, str]:
        spec = importlib.util.find_spec(self.package)
        found: dict[str, str] = {}
        for folder in (spec.submodule_search_locations or []) if spec else []:
            for file in sorted(Path(folder).glob("*.py")):
                if not file.stem.startswith("_") and file.stem not in _PLUMBING:
                    found[file.stem] = f"{self.package}.{file.stem}"
        for point in importlib.metadata.entry_points(group=self.entry_point):
            found.setdefault(point.name, point.module)
        return found

    def add(self, name: str, module: str) -> None:
        """Register a dotted ``module`` under ``name`` for this process (notebooks and tests)."""
        self._modules[name] = module

    def names(self) -> list[str]:
        """All names, sorted, without importing any module."""
        return sorted(self._modules)

    def module_name(self, name: str) -> str:
        """Dotted module that implements ``name``.

        Raises:
            SpecError: no such entry; the message suggests the nearest name.
        """
        try:
            return self._modules[name]
        except KeyError:
            raise SpecError(f"There is no {self.noun} named {name!r}.", nearest(name, self.names())) from None

    def load(self, name: str) -> ModuleType:
        """Import and return the module of ``name`` (SpecError when unknown)."""
        return importlib.import_module(self.module_name(name))
