"""fedproxy as a Flower app."""
