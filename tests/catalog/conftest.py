from tests.catalog.fixtures import catalogs, database, kind, registry, registry_url

__all__ = ["catalogs", "database", "kind", "registry", "registry_url"]
