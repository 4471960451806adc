"""Where training runs: in this process, or in ranks under a supervisor; the same loop, the same bits."""
