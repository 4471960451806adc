"""Scores of finished models: fidelity of samples, accuracy of conditions, quality of reconstructions."""
