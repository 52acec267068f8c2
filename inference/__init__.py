"""From weights to text: generation, chat and llama.cpp."""
