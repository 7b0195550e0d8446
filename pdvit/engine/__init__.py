"""One loop for every task. The engine imports no model, loss or data."""
