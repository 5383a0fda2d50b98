"""Level 3: Algorithm 1 on random mini-batches converges to P*, at a stated rate of false alarms."""
