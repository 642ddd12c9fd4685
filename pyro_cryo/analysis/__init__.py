"""What a fit means: resolution, maps to look at, the latent space, pictures."""
