"""Networks in plain PyTorch: the model, its layers, attention, loss head and Hugging Face files."""
