"""Level 4: closed forms near what they approximate at the predicted order and coefficient."""
