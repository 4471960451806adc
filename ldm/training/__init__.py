"""Training: one loop, exact continuation, and the two models it trains. Knows no orchestrator, no MLflow."""
