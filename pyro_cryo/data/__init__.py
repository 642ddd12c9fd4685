"""Particle stacks and their tables: one file format a module; conversions of units and signs happen here only."""
