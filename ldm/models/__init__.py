"""Networks: first stages, UNet, conditioning encoders, perceptual metric. They know shapes, not data or training."""
