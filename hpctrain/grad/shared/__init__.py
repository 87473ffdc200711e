"""One encoder that ranks with different tasks train together: what the root makes of its copies."""
