"""Training: one loop, and tasks as phases. Start at `loop.train`; recipes are in `recipes`."""
