"""Recipes, the model zoo and benchmarks: what joins the other packages."""
