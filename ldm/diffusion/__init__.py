"""Diffusion mathematics: schedule, objective, samplers, guidance. No function here knows a network or a data set."""
