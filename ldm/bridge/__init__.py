"""The only way in and out for checkpoints of other programs: files are read as data (ADR 0012).

What is read becomes a model folder (`ldm.model_folder`), and a model folder is what is written.

    foreign     tensors and plain facts out of a `.ckpt` or `.safetensors`, with nothing in it executed
    unpickling  the opcodes of a pickle, read as data
    section     a mapping of a foreign config, read value by value
    compvis     configs and keys of CompVis/latent-diffusion
    diffusers   configs and keys of the library diffusers
    transfer    whole imports and exports, with a report of parity
"""
