"""Diffusion mathematics: schedule, objective, samplers, guidance. Nothing here knows networks or data."""
