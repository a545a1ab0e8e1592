"""Which plan a layer follows, what each plan costs, and why one was chosen."""
