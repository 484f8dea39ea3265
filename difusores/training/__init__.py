"""Training: data, losses, averaged weights, and a loop that can be killed and resumed bit for bit."""
