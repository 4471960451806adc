"""Networks: first stages, UNet, conditioning, perceptual metric; they know no data and no training."""
