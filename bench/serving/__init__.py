"""How many feeds a second a server answers and how late: ours beside a plain one with the same models and features."""
