"""Migrations of the database of the accounts, run by alembic."""
