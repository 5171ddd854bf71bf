"""Packs migrations/ into the wheel as registry/migrations, and leaves it where it is in an editable install.

`registry.catalog.schema.migrations_path` finds it in both places.
"""

from __future__ import annotations

from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class MigrationsHook(BuildHookInterface[Any]):
    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        if version == "standard":
            build_data["force_include"]["migrations"] = "registry/migrations"
