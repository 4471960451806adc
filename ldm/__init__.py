"""Latent diffusion: batches in; weights, latents, samples and scores out.

The package knows no orchestrator and no download. Its parts are imported by name, never from here:

    ldm.models      networks: the first stage, the U-Net, the perceptual distance
    ldm.evaluation  scores of finished models
    ldm.weights     pretrained weights that come inside installed packages
    ldm.errors      the error tree
"""
