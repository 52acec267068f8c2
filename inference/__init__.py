"""Generate text from weights: sampling, chat formats, llama.cpp and the HTTP server."""
