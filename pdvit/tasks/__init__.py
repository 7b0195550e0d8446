"""What can be trained: a task builds its model, and has batches, a forward pass, an objective and metrics."""
