"""The only way in and out for checkpoints of other programs: files are read as data (ADR 0012).

What is read becomes a model folder (`ldm.model_folder`), and a model folder is what is written.

    foreign             tensors and plain facts out of a `.ckpt` or `.safetensors`, nothing in it executed
    unpickling          the opcodes of a pickle, read as data
    section             a mapping of a foreign config, read value by value
    compvis             first stages of CompVis/latent-diffusion: configs and keys
    compvis_ldm         its latent diffusion models: keys
    compvis_ldm_config  their configs, read
    compvis_ldm_output  their configs, written
    diffusers           first stages of the library diffusers: configs and keys
    diffusers_unet      its UNets, written
    diffusers_ldm       its pipelines, written
    transfer            whole imports and exports
    parity              by how much a model that was written and read back differs
"""
