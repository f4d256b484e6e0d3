"""What changes or joins a model. Each function returns a model, and leaves the one that it is given as it was."""
