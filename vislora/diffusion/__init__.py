"""What is particular to diffusion models: loading, caching, losses, sampling, prior preservation."""
