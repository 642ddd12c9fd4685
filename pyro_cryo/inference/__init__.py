"""Fitting: closed-form reconstruction, the ELBO loop, saved runs."""
