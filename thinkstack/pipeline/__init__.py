"""Recipes: graphs of stages in TOML files. recipe.py reads them, graph.py plans the stages, run.py runs them."""
