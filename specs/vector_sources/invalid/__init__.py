"""The invalid vectors, a module for each thing that breaks a rule."""
