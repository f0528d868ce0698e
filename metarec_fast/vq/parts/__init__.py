"""What FastVQ and the residual quantizers are made of."""
