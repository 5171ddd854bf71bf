from tests.catalog.fixtures import catalogs

__all__ = ["catalogs"]
