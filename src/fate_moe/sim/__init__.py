"""Which policy would have been better? Routing traces, replayed without a model. No torch."""
