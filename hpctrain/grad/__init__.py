"""From backward to the averaged gradient."""
