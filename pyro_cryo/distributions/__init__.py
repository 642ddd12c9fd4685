"""Distributions that Pyro lacks."""

from pyro_cryo.distributions.volume import ShellNormal

__all__ = ["ShellNormal"]
