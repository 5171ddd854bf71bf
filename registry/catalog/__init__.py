"""The catalog: SQLAlchemy Core tables, named queries and transactions, on SQLite and PostgreSQL.
It knows rows, never bytes of weights; neither torch nor alembic is imported to read it."""
