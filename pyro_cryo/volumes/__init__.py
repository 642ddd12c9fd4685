"""Representations of the map V(k | z), one a file.

A volume is an nn.Module with

    forward(k, z) -> (*batch, P, 2)     its transform at points (*batch, P, 3) in cycles a box, real and imaginary
    map(z)        -> (*batch, D, D, D)  the same in real space, z-y-x

where z is (*batch, zdim), or None for a volume without latent coordinates.
"""
