"""What is measured, and shown in the documentation: ``python -m benchmarks``."""
