"""What training says between processes: counted, and by formula."""
