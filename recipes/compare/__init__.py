"""`trimtab compare`: steering beside fine-tuning and the other rivals, on the same episodes and budget."""
