"""Variational families for the sites of the plate."""
