"""What may vary in a trained model: one module or package per space."""
