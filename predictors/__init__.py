"""Surrogates that rank candidates before they are evaluated."""
