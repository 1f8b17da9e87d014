"""searchlab: gradient-free search over what can change in a trained model after training."""

__version__ = "0.1.0"
