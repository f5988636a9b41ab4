"""Recipes, one per artefact; they import deltalab, never the reverse."""
