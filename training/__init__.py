"""What a run needs. Imports models; loaders and evaluators reach it as arguments."""
