"""The only way in and out for checkpoints of other programs (ADR 0012): files are read as data.

foreign     tensors and plain facts out of a `.ckpt`, with nothing in it executed
section     a mapping of a foreign config, read value by value
compvis     configs and keys of CompVis/latent-diffusion
diffusers   configs and keys of the library diffusers
transfer    whole imports and exports, with a report of parity
"""
