"""`trimtab bench`: sample efficiency and engine speed, side by side with stable-baselines3's SAC."""
