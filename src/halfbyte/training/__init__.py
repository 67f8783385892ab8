"""What needs gradients: one loop that can be killed at any step, and the jobs that it runs."""
