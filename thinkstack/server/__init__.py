"""The API server: accounts, keys, limits, prices and the ledger."""
