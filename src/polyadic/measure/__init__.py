"""What is measured on the machine at hand: its rates, and the plans that are fastest there."""
