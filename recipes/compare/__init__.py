"""`trimtab compare`: steering beside fine-tuning and other methods, on the same episodes and budget."""
