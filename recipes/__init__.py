"""Hydra config root: ``config.yaml`` and its groups."""
